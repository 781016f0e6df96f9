"""What the backward pass of a layer finds kept, and what it computes again.

XLA would write every intermediate of a layer that a gradient needs to memory, for every layer. Elementwise parts are
cheaper to compute again, fused with what reads them; so a layer keeps its matmuls, attention and a few statistics,
which are marked where they are made.
"""

from collections.abc import Callable

import jax
from jax import Array
from jax.ad_checkpoint import checkpoint_name

_KEPT, _MATMUL = "kept", "matmul"


def keep(x: Array, matmul: bool = False) -> Array:
    """`x`, marked to be kept for the backward pass of a `rematerialised` layer; `matmul`: as a kernel's matmul."""
    return checkpoint_name(x, _MATMUL if matmul else _KEPT)


def rematerialised(layer: Callable, remat: str, scanned: bool) -> Callable:
    """`layer`, whose backward pass recomputes what `TransformerConfig.remat` says.

    XLA would merge what is computed twice, and keep it; a scan keeps it from that by itself. What "none" computes again
    is cheap either way, and left to XLA.
    """
    known = jax.checkpoint_policies
    kernels = known.save_only_these_names(_MATMUL)
    policies = {
        "none": known.save_only_these_names(_KEPT, _MATMUL),
        "dots": known.save_from_both_policies(known.dots_with_no_batch_dims_saveable, kernels),
        "block": None,
    }
    return jax.checkpoint(layer, policy=policies[remat], prevent_cse=remat != "none" and not scanned)
