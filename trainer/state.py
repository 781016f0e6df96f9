"""The training state: parameters, optimizer state and step; created sharded, so that no host ever holds all of it."""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax
from flax import nnx
from jax import Array
from jax.sharding import Mesh

from selective_attention import EncoderDecoder, Transformer, TransformerConfig
from trainer.settings import Settings

Model = Transformer | EncoderDecoder
ARCHITECTURES: dict[str, type[Model]] = {"decoder": Transformer, "encoder_decoder": EncoderDecoder}


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


def learning_rate(settings: Settings) -> optax.Schedule:
    """Linear warm-up from 0, then cosine decay until the last step (paper, section 5)."""
    o = settings.optimizer
    return optax.warmup_cosine_decay_schedule(
        init_value=0.0,
        peak_value=o.peak_lr,
        warmup_steps=o.warmup_steps,
        decay_steps=max(settings.steps, o.warmup_steps + 1),
        end_value=o.peak_lr * o.final_lr_fraction,
    )


def make_optimizer(settings: Settings) -> optax.GradientTransformation:
    """AdamW with global-norm clipping; weight decay leaves norm scales alone."""
    o = settings.optimizer

    def decayed(params: nnx.State) -> nnx.State:
        return jax.tree.map(lambda p: p.axes != (None,) * len(p.axes), params, is_leaf=_is_param)

    clip = optax.clip_by_global_norm(o.clip_norm) if o.clip_norm else optax.identity()
    return optax.chain(
        clip,
        optax.adamw(learning_rate(settings), b1=o.b1, b2=o.b2, eps=o.eps, weight_decay=o.weight_decay, mask=decayed),
    )


def last_update(settings: Settings, state: TrainState) -> nnx.State:
    """What the newest good update has added to the parameters, weight decay apart: Adam's moments still say so."""
    o = settings.optimizer
    (adam,) = (s for s in jax.tree.leaves(state.opt_state, is_leaf=_is_adam) if _is_adam(s))
    mean, square = (
        optax.tree.bias_correction(moment, decay, adam.count) for moment, decay in ((adam.mu, o.b1), (adam.nu, o.b2))
    )
    rate = learning_rate(settings)(adam.count - 1)
    return jax.tree.map(lambda m, s: -rate * m / (jnp.sqrt(s) + o.eps), mean, square)


def _is_adam(node: object) -> bool:
    return isinstance(node, optax.ScaleByAdamState)


def _is_param(leaf: object) -> bool:
    return isinstance(leaf, nnx.Variable)


def init_state(settings: Settings) -> TrainState:
    """The state of step 0; traced under a mesh, every array is made with its sharding."""
    model = ARCHITECTURES[settings.model.architecture](settings.transformer, rngs=nnx.Rngs(params=settings.seed))
    params = nnx.state(model, nnx.Param)
    health = Health(jnp.zeros((), jnp.int32), jnp.full((), jnp.inf, jnp.float32))
    return TrainState(jnp.zeros((), jnp.int32), params, make_optimizer(settings).init(params), health)


def abstract_state(settings: Settings, mesh: Mesh) -> TrainState:
    """The state's shapes: ShapeDtypeStructs with their shardings on the mesh."""

    def concrete(x: jax.ShapeDtypeStruct) -> jax.ShapeDtypeStruct:
        spec = jax.P() if x.sharding is None else x.sharding.spec
        return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=jax.NamedSharding(mesh, spec))

    with jax.set_mesh(mesh):
        return jax.tree.map(concrete, jax.eval_shape(lambda: init_state(settings)))


@functools.cache
def model_graph(config: TransformerConfig, architecture: str = "decoder") -> nnx.GraphDef:
    """The model's structure, which `nnx.merge` joins with parameters."""
    return nnx.split(nnx.eval_shape(lambda: ARCHITECTURES[architecture](config, rngs=nnx.Rngs(params=0))))[0]
