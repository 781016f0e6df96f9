"""What stands between SwiGLU's matmuls, done by TPU kernels on their operands and results, in registers.

XLA fuses it into matmuls as well, but where two results leave one matmul, or two enter it, it writes one of them and
makes the other anew in every tile of the matmuls that read it. Here each is made once. A grid step works on a block of
tokens and a block of a weight; the weight's is fetched once, then all tokens pass it.

Shape letters: the package's; T tokens, U the width of SwiGLU, L the 128 lanes.
"""

import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from .columns import LANES, dot, lanes
from .plan import tiling_here
from .program import on_platform

TOKENS = 2 * LANES  # of a block, where they divide
COLUMNS = 8 * LANES  # that are worked on at once
MOST_WORK = 2**29  # multiplications of a grid step: its program grows with them


def sigmoid(x: Array) -> Array:
    """By a tanh, one operation of the TPU; a division is many."""
    return 0.5 * jnp.tanh(0.5 * x) + 0.5


def hidden(x_TE: Array, inverse_T1: Array, w_gate_EU: Array, w_up_EU: Array) -> list[Array]:
    """Of the normalised `n = x * inverse`: gate = n w_gate, up = n w_up and h = silu(gate) * up, [T, U] in x's dtype.

    T, E and U are multiples of 128.
    """
    return _call(_hidden, 1, [x_TE, inverse_T1], [], [w_gate_EU, w_up_EU], [x_TE.dtype] * 3)


def _hidden(x, inverse, w_gate, w_up, gate, up, h) -> None:
    n = (x[...].astype(jnp.float32) * inverse[...]).astype(x.dtype)
    for at in _chunks(gate.shape[1], COLUMNS // 2):
        gate[:, at] = dot(n, w_gate[:, at], (1, 0)).astype(gate.dtype)
        up[:, at] = dot(n, w_up[:, at], (1, 0)).astype(up.dtype)
        wide = gate[:, at].astype(jnp.float32)
        h[:, at] = (wide * sigmoid(wide) * up[:, at].astype(jnp.float32)).astype(h.dtype)


def hidden_gradient(d_y_TE: Array, gate_TU: Array, up_TU: Array, w_down_UE: Array, turn: bool = False) -> list[Array]:
    """From d_h = d_y w_down^T: the gradients of gate and up, and a float32 [T, ...] whose sum over the last axis is
    `sum_u(d_gate gate + d_up up)`. `turn` spares a copy of a `w_down` that has U along lanes.
    """
    kernel = functools.update_wrapper(functools.partial(_hidden_gradient, turn), _hidden_gradient)
    weight = w_down_UE.T if turn else w_down_UE
    return _call(kernel, int(turn), [d_y_TE], [gate_TU, up_TU], [weight], [gate_TU.dtype, up_TU.dtype], sums=1)


def _hidden_gradient(turned: bool, d_y, gate, up, w_down, d_gate, d_up, along) -> None:
    sums = jnp.zeros(along.shape, jnp.float32)
    for at in _chunks(gate.shape[1], COLUMNS):
        d_h = dot(d_y[...], w_down[:, at], (1, 0)) if turned else dot(d_y[...], w_down[at], (1, 1))
        parts = swiglu_gradient(d_h, gate[:, at].astype(jnp.float32), up[:, at].astype(jnp.float32))
        d_gate[:, at], d_up[:, at] = (part.astype(d_gate.dtype) for part in parts[:2])
        for n in range(parts[2].shape[1] // LANES):
            sums += parts[2][:, lanes(n)]
    along[...] = sums


def swiglu_gradient(d_h: Array, gate: Array, up: Array) -> tuple[Array, Array, Array]:
    """The gradients of gate and of up where `h = silu(gate) up`, and `d_gate gate + d_up up`."""
    of_gate = sigmoid(gate)
    silu = gate * of_gate
    slope = 1 + (gate - silu)  # silu's derivative is this times the sigmoid
    scaled = d_h * up * of_gate
    return scaled * slope, d_h * silu, scaled * gate * (slope + 1)


def input_gradient(
    d_gate_TU: Array, d_up_TU: Array, mean_T1: Array, inverse_T1: Array, x_TE: Array, d_y_TE: Array, *weights: Array
) -> list[Array]:
    """d_x of `x + SwiGLU`, one array in a list: d_y and what comes through the norm. `mean` is that over E of the
    gradient of n times n; `weights` are those of gate and up, [E, U].
    """
    whole, parts = [d_gate_TU, d_up_TU, mean_T1, inverse_T1], [x_TE, d_y_TE]
    return _call(_input_gradient, 0, whole, parts, weights, [x_TE.dtype], spilled=7)


def _input_gradient(d_gate, d_up, mean, inverse, x, d_y, w_gate, w_up, d_x) -> None:
    factor, along = inverse[...], mean[...]
    for at in _chunks(x.shape[1], COLUMNS):
        d_normed = dot(d_gate[...], w_gate[at], (1, 1)) + dot(d_up[...], w_up[at], (1, 1))
        normed = x[:, at].astype(jnp.float32) * factor
        d_x[:, at] = (d_y[:, at].astype(jnp.float32) + factor * (d_normed - normed * along)).astype(d_x.dtype)


def _chunks(width: int, size: int) -> list[slice]:
    return [slice(start, min(start + size, width)) for start in range(0, width, size)]


def _call(
    kernel: Callable[..., None],
    axis: int,
    whole: Sequence[Array],
    parts: Sequence[Array],
    weights: Sequence[Array],
    results: Sequence[jnp.dtype],
    sums: int = 0,
    spilled: int = 0,
) -> list[Array]:
    """`kernel` on blocks of tokens, and of the weights along `axis`, whose width the `parts` and the `results` have
    too. Each of `sums` is float32 [T, 128] for each block of the weights, side by side. `spilled` says how many float32
    arrays of the size of a part's window the compiler keeps in VMEM, by its own account.
    """
    tokens, width = whole[0].shape[0], weights[0].shape[axis]
    depth = weights[0].size // width
    itemsize = weights[0].dtype.itemsize
    of_token = sum(max(x.shape[1], LANES) * x.dtype.itemsize for x in whole) + sums * LANES * 4
    of_both = (len(parts) + len(results)) * itemsize
    side, block = _blocks(tokens, width, depth * len(weights), of_token, of_both, itemsize, 4 * spilled)
    shapes = [jax.ShapeDtypeStruct((tokens, width), dtype) for dtype in results]
    shapes += [jax.ShapeDtypeStruct((tokens, LANES * (width // block)), jnp.float32)] * sums
    part = pl.BlockSpec((side, block), lambda w, t: (t, w))
    of_weight = pl.BlockSpec((block, depth), lambda w, t: (w, 0)), pl.BlockSpec((depth, block), lambda w, t: (0, w))
    flops = 2 * tokens * width * depth * len(weights)
    arrays: list[Any] = [*whole, *parts, *weights, *shapes]
    moved = sum(x.size * x.dtype.itemsize for x in arrays)

    def run(operands, _, interpret):
        return pl.pallas_call(
            kernel,
            grid=(width // block, tokens // side),
            in_specs=[
                *(pl.BlockSpec((side, x.shape[1]), lambda w, t: (t, 0)) for x in whole),
                *(part for _ in parts),
                *(of_weight[axis] for _ in weights),
            ],
            out_specs=[*(part for _ in results), *[pl.BlockSpec((side, LANES), lambda w, t: (t, w))] * sums],
            out_shape=shapes,
            compiler_params=pltpu.CompilerParams(
                dimension_semantics=("arbitrary", "parallel"), vmem_limit_bytes=tiling_here().vmem
            ),
            cost_estimate=pl.CostEstimate(flops=flops, bytes_accessed=moved, transcendentals=0),
            interpret=interpret,
            name=f"swiglu{kernel.__name__}",
        )(*operands)

    return on_platform(run, [*whole, *parts, *weights], ())


def _blocks(
    tokens: int, width: int, depth: int, of_token: int, of_both: int, itemsize: int, spilled: int
) -> tuple[int, int]:
    """How many tokens and how much of the width a grid step works on: the largest product that fits into VMEM.

    In bytes, `of_token` is what a token takes of it, `of_both` what a token takes for each of the width; `depth` is how
    many values of the weights belong to each of the width. Windows are there twice, `spilled`, as `of_both`, once.
    """
    fitting = [(LANES, LANES)]
    for side in (TOKENS, LANES):
        for block in range(width, 0, -LANES):
            windows = side * (of_token + of_both * block) + depth * block * itemsize
            fits = 2 * windows + spilled * side * block <= tiling_here().vmem and side * depth * block <= MOST_WORK
            if fits and tokens % side == 0 and width % block == 0:
                fitting.append((side, block))
    return max(fitting, key=lambda sides: (sides[0] * sides[1], sides[0]))
