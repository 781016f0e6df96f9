"""One update, and one evaluation batch: pure functions of state and batch, jitted once by the loop.

Shape letters: B batch, N positions, A accumulation parts.
"""

from collections.abc import Callable
from typing import TypedDict

import jax
import jax.numpy as jnp
import optax
from flax import nnx
from jax import Array
from ml_collections import ConfigDict

from selective_attention import lm_loss, memory_loss, reshard, selection_statistics
from trainer.state import TrainState, learning_rate, model_config, model_graph


class Batch(TypedDict):
    """Global arrays, rows sharded over `data` and `fsdp`, positions over `context`."""

    inputs: Array  # int32 [B, N]
    targets: Array  # int32 [B, N]; the tokenizer's pad id does not count


Metrics = dict[str, Array]
TrainStep = Callable[[TrainState, Batch, Array], tuple[TrainState, Metrics]]
EvalStep = Callable[[nnx.State, Batch, Array], Metrics]


def make_train_step(config: ConfigDict, optimizer: optax.GradientTransformation, pad_id: int) -> TrainStep:
    """`train_step(state, batch, stop) -> (state, metrics)`.

    `stop` is int32 [devices], one element on every device, 1 where the host was told to stop; its maximum comes back
    with the metrics, so that all hosts learn of it after the same step. Metrics are float32 scalars: loss (cross-
    entropy, nats per token), memory_loss, grad_norm (before clipping), learning_rate, tokens; and stop.
    """
    schedule = learning_rate(config)
    graph = model_graph(model_config(config))
    epsilon, tau = config.memory_loss.epsilon, config.memory_loss.tau

    def loss_fn(params: nnx.State, part: Batch, num_tokens: Array) -> tuple[Array, Metrics]:
        model = nnx.merge(graph, params)
        weights_BN = _weights(part, pad_id)
        hidden_BNE, forgotten_LBN = model.hidden(part["inputs"], memory_tau=tau if epsilon else None)
        nll, _ = lm_loss(model.logits(hidden_BNE), part["targets"], weights_BN)
        loss = nll / num_tokens
        if not epsilon:
            return loss, {"loss": loss, "memory_loss": jnp.zeros_like(loss)}
        memory = jnp.sum(memory_loss(forgotten_LBN, weights_BN)) / config.batch_size
        return loss + epsilon * memory, {"loss": loss, "memory_loss": memory}

    def train_step(state: TrainState, batch: Batch, stop: Array) -> tuple[TrainState, Metrics]:
        num_tokens = jnp.maximum(jnp.sum(_weights(batch, pad_id)), 1)
        gradient = jax.grad(loss_fn, has_aux=True)
        if config.accumulation == 1:
            grads, metrics = gradient(state.params, batch, num_tokens)
        else:
            # Row r goes to part r mod A: every device splits its own rows, none move.
            parts = jax.tree.map(lambda x: _split_rows(x, config.accumulation), batch)

            def add_part(total, part):
                return jax.tree.map(jnp.add, total, gradient(state.params, part, num_tokens)), None

            zeros = jax.tree.map(jnp.zeros_like, state.params), {"loss": jnp.zeros(()), "memory_loss": jnp.zeros(())}
            (grads, metrics), _ = jax.lax.scan(add_part, zeros, parts)
        updates, opt_state = optimizer.update(grads, state.opt_state, state.params)
        metrics |= {
            "grad_norm": optax.tree.norm(grads),
            "learning_rate": jnp.asarray(schedule(state.step), jnp.float32),
            "tokens": num_tokens,
            "stop": jnp.max(stop),
        }
        return TrainState(state.step + 1, optax.apply_updates(state.params, updates), opt_state), metrics

    return train_step


def make_eval_step(config: ConfigDict, pad_id: int) -> EvalStep:
    """`eval_step(params, batch, stop) -> {"nll": summed nats, "tokens": their number, "stop": as in train_step}`."""
    graph = model_graph(model_config(config))

    def eval_step(params: nnx.State, batch: Batch, stop: Array) -> Metrics:
        logits_BNV = nnx.merge(graph, params)(batch["inputs"])
        nll, tokens = lm_loss(logits_BNV, batch["targets"], _weights(batch, pad_id))
        return {"nll": nll, "tokens": tokens, "stop": jnp.max(stop)}

    return eval_step


def make_selection_step(config: ConfigDict, pad_id: int) -> Callable[[nnx.State, Batch], Metrics]:
    """`selection_step(params, batch)` -> `selective_attention.selection_statistics` of every layer, each [L]."""
    graph = model_graph(model_config(config))

    def selection_step(params: nnx.State, batch: Batch) -> Metrics:
        def statistics(f_BNM: Array) -> Metrics:
            return selection_statistics(f_BNM, reshard(_weights(batch, pad_id), "batch", None), config.memory_loss.tau)

        return nnx.merge(graph, params).selection_masks(batch["inputs"], statistics)

    return selection_step


def _weights(batch: Batch, pad_id: int) -> Array:
    return (batch["targets"] != pad_id).astype(jnp.float32)


def _split_rows(x_BN: Array, parts: int) -> Array:
    rows = x_BN.shape[0] // parts
    return reshard(jnp.swapaxes(x_BN.reshape(rows, parts, -1), 0, 1), None, "batch", "sequence")
