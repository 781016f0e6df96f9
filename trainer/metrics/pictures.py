"""Pictures of what is forgotten: by layer and step, and over a fixed text of the validation split.

matplotlib is imported where something is drawn, since that takes a second.
"""

import io
import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from trainer.metrics.json_lines import Series

_STATISTICS = {"mean_f": "mean F, nats", "forgotten_fraction": "share of the context that is masked"}
_DENSE = 8  # evaluations that all have pictures; then every eighth
_MOST = 4.0  # nats of F that have the darkest colour: exp(-4) is 2%


def is_due(evaluation: int) -> bool:
    """Whether evaluation number 1, 2, ... of a run has pictures."""
    return evaluation <= _DENSE or evaluation % _DENSE == 0


def layers_over_steps(scalars: Mapping[str, Series]) -> bytes:
    """A PNG: how much each layer masks, layers from the bottom up, evaluations from left to right.

    Args:
      scalars: as `read_metrics`, with `selection_mean_f/layer_00` and so on.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 4.2), layout="constrained")
    for axes, (statistic, title) in zip(figure.subplots(1, len(_STATISTICS)), _STATISTICS.items(), strict=True):
        layers = [
            series for name, series in sorted(scalars.items()) if name.startswith(f"selection_{statistic}/layer_")
        ]
        steps = layers[0].steps if layers else []
        values_LS = np.array([series.values for series in layers if series.steps == steps])
        if values_LS.size:
            shown = axes.imshow(values_LS, aspect="auto", origin="lower", cmap="magma_r", vmin=0, interpolation="none")
            figure.colorbar(shown, ax=axes)
            ticks = np.unique(np.linspace(0, len(steps) - 1, min(6, len(steps))).astype(int))
            axes.set_xticks(ticks, [f"{steps[i]:,}" for i in ticks])
            axes.set_yticks(range(len(values_LS)))
        axes.set(title=title, xlabel="step", ylabel="layer")
    return _png(figure)


def text_masks(f_LNN: np.ndarray, tokens: Sequence[str]) -> bytes:
    """A PNG: F over a text, one square a layer; the darker, the more the token (column) is masked for the query (row).

    Args:
      f_LNN: [L, N, N], nats.
      tokens: N, as they are shown.
    """
    columns = min(4, len(f_LNN))
    rows = math.ceil(len(f_LNN) / columns)
    from matplotlib.figure import Figure

    figure = Figure(figsize=(3.2 * columns + 0.8, 3.4 * rows + 0.6))
    figure.subplots_adjust(left=0.6 / columns * 0.25 + 0.02, right=0.99, top=0.96, bottom=0.14 / rows, wspace=0.05)
    later_NN = np.triu(np.ones(f_LNN.shape[1:], bool), 1)
    for layer, f_NN in enumerate(f_LNN):
        axes = figure.add_subplot(rows, columns, layer + 1)
        axes.imshow(np.ma.masked_where(later_NN, f_NN), cmap="Purples", vmin=0, vmax=_MOST, interpolation="none")
        axes.set_title(f"layer {layer}, mean F {f_NN[~later_NN].mean():.2f}", size=9)
        # Names at the edges only: drawing text takes most of the time.
        below, left = layer + columns >= len(f_LNN), layer % columns == 0
        axes.set_xticks(range(len(tokens)), tokens if below else [], rotation=90, size=6)
        axes.set_yticks(range(len(tokens)), tokens if left else [], size=6)
    return _png(figure)


def _png(figure: Any) -> bytes:
    stream = io.BytesIO()
    figure.savefig(stream, format="png", dpi=110)
    return stream.getvalue()
