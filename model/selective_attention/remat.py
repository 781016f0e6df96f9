"""What the backward pass of a layer finds kept, and what it computes again.

XLA would write every intermediate of a layer that a gradient needs to memory, for every layer. Elementwise parts are
cheaper to compute again, fused with what reads them; so a layer keeps its matmuls, attention and a few statistics,
which are marked where they are made.
"""

from collections.abc import Callable

import jax
from jax import Array
from jax.ad_checkpoint import checkpoint_name

_KEPT = "kept"


def keep(x: Array) -> Array:
    """`x`, marked to be kept for the backward pass of a `rematerialised` layer."""
    return checkpoint_name(x, _KEPT)


def rematerialised(layer: Callable, remat: str, scanned: bool) -> Callable:
    """`layer`, whose backward pass recomputes what `TransformerConfig.remat` says.

    XLA would merge what is computed twice, and keep it; a scan keeps it from that by itself. What "none" computes again
    is cheap either way, and left to XLA.
    """
    policies = {
        "none": jax.checkpoint_policies.save_only_these_names(_KEPT),
        "dots": jax.checkpoint_policies.dots_with_no_batch_dims_saveable,
        "block": None,
    }
    return jax.checkpoint(layer, policy=policies[remat], prevent_cse=remat != "none" and not scanned)
