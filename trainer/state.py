"""The training state: parameters, optimizer state and step; created sharded, so that no host ever holds all of it."""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax
from flax import nnx
from jax import Array
from ml_collections import ConfigDict

from selective_attention import Selection, Transformer, TransformerConfig
from trainer.errors import ConfigError


class Health(NamedTuple):
    """Of the numbers so far."""

    bad_steps: Array  # int32 scalar, how many of the newest updates in a row were bad, and skipped
    mean_loss: Array  # float32 scalar, running mean over good updates; infinite before the first


class TrainState(NamedTuple):
    """A pytree: what a checkpoint holds."""

    step: Array  # int32 scalar, updates done, skipped ones included
    params: nnx.State  # float32
    opt_state: optax.OptState
    health: Health


def model_config(config: ConfigDict) -> TransformerConfig:
    """The model's sizes from a run's config.

    Raises:
      ConfigError: a value that the model refuses.
    """
    m = config.model
    overrides = {name: m[name] for name in ("num_layers", "num_heads") if m[name]}
    try:
        return TransformerConfig.from_width(
            m.width,
            vocab_size=m.vocab_size,
            max_length=config.context_length,
            num_kv_heads=m.num_kv_heads,
            selection=m.selection if m.selective else Selection.OFF,
            positions=m.positions,
            qk_norm=m.qk_norm,
            tied_embeddings=m.tied_embeddings,
            dtype=m.dtype,
            remat=m.remat,
            scan_layers=m.scan_layers,
            attention=None if m.attention == "auto" else m.attention,
            **overrides,
        )
    except ValueError as error:
        raise ConfigError(f"config.model: {error}") from error


def learning_rate(config: ConfigDict) -> optax.Schedule:
    """Linear warm-up from 0, then cosine decay until the last step (paper, section 5)."""
    o = config.optimizer
    return optax.warmup_cosine_decay_schedule(
        init_value=0.0,
        peak_value=o.peak_lr,
        warmup_steps=o.warmup_steps,
        decay_steps=max(config.steps, o.warmup_steps + 1),
        end_value=o.peak_lr * o.final_lr_fraction,
    )


def make_optimizer(config: ConfigDict) -> optax.GradientTransformation:
    """AdamW with global-norm clipping; weight decay leaves norm scales alone."""
    o = config.optimizer

    def decayed(params: nnx.State) -> nnx.State:
        return jax.tree.map(lambda p: p.axes != (None,) * len(p.axes), params, is_leaf=_is_param)

    clip = optax.clip_by_global_norm(o.clip_norm) if o.clip_norm else optax.identity()
    return optax.chain(
        clip,
        optax.adamw(learning_rate(config), b1=o.b1, b2=o.b2, eps=o.eps, weight_decay=o.weight_decay, mask=decayed),
    )


def _is_param(leaf: object) -> bool:
    return isinstance(leaf, nnx.Variable)


def init_state(config: ConfigDict, optimizer: optax.GradientTransformation) -> TrainState:
    """The state of step 0; traced under a mesh, every array is made with its sharding."""
    model = Transformer(model_config(config), rngs=nnx.Rngs(params=config.seed))
    params = nnx.state(model, nnx.Param)
    health = Health(jnp.zeros((), jnp.int32), jnp.full((), jnp.inf, jnp.float32))
    return TrainState(jnp.zeros((), jnp.int32), params, optimizer.init(params), health)


@functools.cache
def model_graph(config: TransformerConfig) -> nnx.GraphDef:
    """The model's structure, which `nnx.merge` joins with parameters."""
    return nnx.split(nnx.eval_shape(lambda: Transformer(config, rngs=nnx.Rngs(params=0))))[0]
