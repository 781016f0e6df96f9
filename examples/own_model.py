"""Selective attention in a JAX model of your own: a two-layer language model over bytes, with the paper's memory loss.

python examples/own_model.py
"""

import jax
import jax.numpy as jnp

from selective_attention import memory_loss, selective_attention

VOCAB, LAYERS, HEADS, WIDTH = 256, 2, 4, 16
MODEL = HEADS * WIDTH
EPSILON, TAU = 0.1, 1.0  # the memory loss's weight, and the F above which a token counts as forgotten
TEXT = b"what was said once need not be kept: what is stale is masked, and what is masked can be forgotten. "


def init(key):
    shapes = {"qkv": (LAYERS, 3, MODEL, HEADS, WIDTH), "out": (LAYERS, HEADS, WIDTH, MODEL), "embed": (VOCAB, MODEL)}
    keys = jax.random.split(key, len(shapes))
    return {name: 0.1 * jax.random.normal(k, shape) for k, (name, shape) in zip(keys, shapes.items(), strict=True)}


def forward(params, tokens_BN):
    """Logits [B, N, V], and of each layer what its queries have forgotten, [L, B, N]."""
    x, forgotten = params["embed"][tokens_BN], []
    for layer in range(LAYERS):
        q, k, v = jnp.einsum("bne,cehd->cbnhd", x, params["qkv"][layer])
        attended, layer_forgotten = selective_attention(q, k, v, memory_tau=TAU)
        x = x + jnp.einsum("bnhd,hde->bne", attended, params["out"][layer])
        forgotten.append(layer_forgotten)
    return x @ params["embed"].T, jnp.stack(forgotten)


def loss(params, tokens_BN):
    logits_BNV, forgotten_LBN = forward(params, tokens_BN[:, :-1])
    log_p_BNV = jax.nn.log_softmax(logits_BNV)
    nll = -jnp.mean(jnp.take_along_axis(log_p_BNV, tokens_BN[:, 1:, None], axis=-1))
    memory = jnp.mean(memory_loss(forgotten_LBN, jnp.ones(forgotten_LBN.shape[1:])))
    return nll + EPSILON * memory, {"nll": nll, "memory": memory}


@jax.jit
def train_step(params, tokens_BN):
    grads, metrics = jax.grad(loss, has_aux=True)(params, tokens_BN)
    return jax.tree.map(lambda p, g: p - 0.5 * g, params, grads), metrics


tokens = jnp.array([list(TEXT)], jnp.int32)
params = init(jax.random.key(0))
for step in range(101):
    params, metrics = train_step(params, tokens)
    if step % 50 == 0:
        print(f"step {step:3d}: {metrics['nll']:.3f} nats a byte, memory loss {metrics['memory']:.3f}")
