"""One update, and one evaluation batch: pure functions of state and batch.

Shape letters: B batch, N positions, A accumulation parts.
"""

import dataclasses
import functools
import logging
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import nnx
from jax import Array
from jax.sharding import Mesh

from selective_attention import EncoderDecoder, TransformerConfig, lm_loss, memory_loss, reshard, selection_statistics
from trainer.batches import Batch, batch_sharding, rows_sharding
from trainer.compiler_options import OPTIONS
from trainer.hosts.requests import Request, request_sharding
from trainer.metrics.norms import norms_by_layer
from trainer.settings import Settings
from trainer.state import Health, Model, TrainState, learning_rate, make_optimizer, model_graph

logger = logging.getLogger("trainer")


TEXT_TOKENS = 32  # of a text whose masks are shown, BOS included
_MEMORY = 0.99  # how much of the running mean of the loss a step keeps
Metrics = dict[str, Any]  # of arrays, and of dicts of them
TrainStep = Callable[[TrainState, Batch, Array], tuple[TrainState, Metrics]]
EvalStep = Callable[[nnx.State, Batch, Array], Metrics]


def make_train_step(settings: Settings, pad_id: int) -> TrainStep:
    """`train_step(state, batch, requests) -> (state, metrics)`.

    `requests` is int32 [devices, len(Request)], one row on every device, 1 where its host asks for something; their
    maximum comes back with the metrics, so that all hosts learn of them after the same step.

    Where the loss or the gradient is not finite, or the loss a spike (`faults.spike_factor`), parameters and optimizer
    state stay as they were; `state.health` counts. Metrics are float32 scalars: loss (cross-entropy, nats per token),
    memory_loss, grad_norm (before clipping), learning_rate, tokens, bytes (of text), bad_steps (in a row); beside them
    `norms`, of the gradient before clipping as `norms_by_layer`; and requests.
    """
    optimizer, schedule = make_optimizer(settings), learning_rate(settings)
    graph = model_graph(settings.transformer, settings.model.architecture)
    epsilon, tau = settings.memory_loss.epsilon, settings.memory_loss.tau

    def loss_fn(params: nnx.State, part: Batch, num_tokens: Array) -> tuple[Array, Metrics]:
        model = nnx.merge(graph, params)
        weights_BN = _weights(part, pad_id)
        hidden_BNE, forgotten_LBN = model.hidden(**_seen(model, part, pad_id), memory_tau=tau if epsilon else None)
        with jax.named_scope("loss"):
            nll, _ = lm_loss(model.logits(hidden_BNE), part["targets"], weights_BN)
        loss = nll / num_tokens
        if not epsilon:
            return loss, {"loss": loss, "memory_loss": jnp.zeros_like(loss)}
        memory = jnp.sum(memory_loss(forgotten_LBN, _present(part, pad_id))) / settings.batch_size
        return loss + epsilon * memory, {"loss": loss, "memory_loss": memory}

    def train_step(state: TrainState, batch: Batch, requests: Array) -> tuple[TrainState, Metrics]:
        num_tokens = jnp.maximum(jnp.sum(_weights(batch, pad_id)), 1)
        gradient = functools.partial(jax.grad(loss_fn, has_aux=True), num_tokens=num_tokens)
        grads, metrics = _in_parts(gradient, state.params, batch, settings.accumulation)
        grad_norm = optax.tree.norm(grads)
        good = jnp.isfinite(grad_norm) & jnp.isfinite(metrics["loss"])
        if settings.faults.spike_factor:
            good &= metrics["loss"] <= settings.faults.spike_factor * state.health.mean_loss
        with jax.named_scope("optimizer"):
            updates, opt_state = optimizer.update(grads, state.opt_state, state.params)
            updated = optax.apply_updates(state.params, updates), opt_state
            params, opt_state = jax.tree.map(
                lambda new, old: jax.lax.select_n(good, old, new), updated, (state.params, state.opt_state)
            )
        health = _next_health(state.health, metrics["loss"], good)
        metrics |= {
            "grad_norm": grad_norm,
            "learning_rate": jnp.asarray(schedule(state.step), jnp.float32),
            "tokens": num_tokens,
            "bytes": jnp.sum(batch["bytes"]).astype(jnp.float32),
            "bad_steps": health.bad_steps.astype(jnp.float32),
            "requests": jnp.max(requests, axis=0),
        }
        metrics["norms"] = {"gradient": norms_by_layer(grads)}
        return TrainState(state.step + 1, params, opt_state, health), metrics

    return train_step


def _in_parts(gradient: Callable[..., Any], params: nnx.State, batch: Batch, parts: int) -> Any:
    """The sum of `gradient(params, part)` over so many parts of the batch, one after the other."""
    if parts == 1:
        return gradient(params, batch)

    def add_part(total, part):
        return jax.tree.map(jnp.add, total, gradient(params, part)), None

    # Row r goes to part r mod A: every device splits its own rows, none move.
    tokens = {name: x for name, x in batch.items() if name != "bytes"}
    zeros = jax.tree.map(jnp.zeros_like, params), {"loss": jnp.zeros(()), "memory_loss": jnp.zeros(())}
    return jax.lax.scan(add_part, zeros, jax.tree.map(lambda x: _split_rows(x, parts), tokens))[0]


def compile_train_step(settings: Settings, pad_id: int, state_shape: TrainState, mesh: Mesh) -> jax.stages.Compiled:
    """The train step compiled for exactly these shapes and shardings, its state donated."""
    rows, sharding = settings.batch_size, batch_sharding(mesh)
    batch = {
        name: jax.ShapeDtypeStruct((rows, length), jnp.int32, sharding=sharding)
        for name, length in settings.lengths.items()
    }
    batch["bytes"] = jax.ShapeDtypeStruct((rows,), jnp.int32, sharding=rows_sharding(sharding))
    requests = jax.ShapeDtypeStruct((mesh.size, len(Request)), jnp.int32, sharding=request_sharding(mesh))
    start = time.monotonic()
    with jax.set_mesh(mesh):  # of this thread
        step = jax.jit(make_train_step(settings, pad_id), donate_argnums=0)
        lowered = step.lower(state_shape, batch, requests)
        compiled = lowered.compile(compiler_options=OPTIONS.get(mesh.devices.flat[0].device_kind))
    if jax.process_index() == 0:
        logger.info("compiled the train step in %.1f s", time.monotonic() - start)
    return compiled


def make_eval_step(
    config: TransformerConfig, pad_id: int, has_answers: bool = False, architecture: str = "decoder"
) -> EvalStep:
    """`eval_step(params, batch, requests) -> {"nll": summed nats, "tokens", "bytes", "requests"}`, as above; with
    answers also "correct": how many tokens were more likely than all others.
    """
    graph = model_graph(_scanned(config), architecture)

    def eval_step(params: nnx.State, batch: Batch, requests: Array) -> Metrics:
        model = nnx.merge(graph, params)
        logits_BNV = model(**_seen(model, batch, pad_id))
        weights_BN = _weights(batch, pad_id)
        nll, tokens = lm_loss(logits_BNV, batch["targets"], weights_BN)
        sums = {"nll": nll, "tokens": tokens, "bytes": jnp.sum(batch["bytes"])}
        if has_answers:
            sums["correct"] = jnp.sum(is_correct(logits_BNV, batch["targets"]) * weights_BN)
        return sums | {"requests": jnp.max(requests, axis=0)}

    return eval_step


def make_selection_step(
    config: TransformerConfig, tau: float, pad_id: int, architecture: str = "decoder"
) -> Callable[[nnx.State, Batch], Metrics]:
    """`selection_step(params, batch)` -> `selective_attention.selection_statistics` of every layer, each [L], and
    `text_f`, F of every layer over the first row's first tokens, [L, TEXT_TOKENS, TEXT_TOKENS]; `tau` in nats.
    """
    graph = model_graph(_scanned(config), architecture)

    def selection_step(params: nnx.State, batch: Batch) -> Metrics:
        def statistics(f_BNM: Array) -> Metrics:
            is_first_B = reshard(jnp.arange(f_BNM.shape[0]) == 0, "batch").astype(f_BNM.dtype)
            text_f = jnp.sum(f_BNM[:, :TEXT_TOKENS, :TEXT_TOKENS] * is_first_B[:, None, None], axis=0)
            return selection_statistics(f_BNM, reshard(_present(batch, pad_id), "batch", None), tau) | {
                "text_f": text_f
            }

        model = nnx.merge(graph, params)
        return model.selection_masks(**_seen(model, batch, pad_id), reduce=statistics)

    return selection_step


def _scanned(config: TransformerConfig) -> TransformerConfig:
    """Sooner compiled, and without a gradient a scan stacks nothing."""
    return dataclasses.replace(config, scan_layers=True)


def _seen(model: Model, batch: Batch, pad_id: int) -> dict[str, Any]:
    """What a model is told of a batch, by the names of its arguments."""
    if not isinstance(model, EncoderDecoder):
        return {"tokens_BN": batch["inputs"]}
    inputs_BM = batch["encoder_inputs"]
    return {"inputs_BM": inputs_BM, "outputs_BN": batch["inputs"], "visible_BM": inputs_BM != pad_id}


def _next_health(health: Health, loss: Array, good: Array) -> Health:
    mean = jnp.where(jnp.isfinite(health.mean_loss), _MEMORY * health.mean_loss + (1 - _MEMORY) * loss, loss)
    return Health(jnp.where(good, 0, health.bad_steps + 1), jnp.where(good, mean, health.mean_loss))


def is_correct(logits_BNV: Array, targets_BN: Array) -> Array:
    """Whether a target is more likely than all others, bool [B, N]; by sums and maxima, which V may be sharded for."""
    is_target_BNV = jnp.arange(logits_BNV.shape[-1], dtype=targets_BN.dtype) == targets_BN[..., None]
    target_BN = jnp.sum(jnp.where(is_target_BNV, logits_BNV, 0), axis=-1)
    return target_BN > jnp.max(jnp.where(is_target_BNV, -jnp.inf, logits_BNV), axis=-1)


def _weights(batch: Batch, pad_id: int) -> Array:
    """1 for tokens to be predicted."""
    return ((batch["targets"] != pad_id) & (batch["targets"] >= 0)).astype(jnp.float32)


def _present(batch: Batch, pad_id: int) -> Array:
    """1 for tokens that are there, whether they are to be predicted or not."""
    return (batch["targets"] != pad_id).astype(jnp.float32)


def _split_rows(x_BN: Array, parts: int) -> Array:
    rows = x_BN.shape[0] // parts
    return reshard(jnp.swapaxes(x_BN.reshape(rows, parts, -1), 0, 1), None, "batch", "sequence")
