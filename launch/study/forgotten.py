"""The part about what is forgotten: by layer and distance, and by kind of token."""

import numpy as np

from launch.study import figures
from launch.study.kinds import KINDS
from launch.study.measure import FORGOTTEN, LATER
from launch.study.page import Block, Command, Figure, Heading, Table, Text
from launch.study.record import STANDARD, Families, Record


def forgotten_blocks(record: Record) -> list[Block]:
    """Shares on held-out text, means over seeds."""
    blocks: list[Block] = [
        Heading("3. What is forgotten"),
        Text(
            f"On held-out text, the share of earlier tokens whose F exceeds {FORGOTTEN:g} nat, so that at most "
            "about a "
            "third of their weight is left: by how far back they are, and by kind of word, "
            f"{LATER} tokens later. Kinds go by simple rules "
            "(`launch/study/kinds.py`); repeated is a word that the window has had before. Means over seeds; ± is "
            "their sd."
        ),
    ]
    lines, rows = [], []
    for family, variants in Families.of(record).runs.items():
        for name, by_seed in variants.items():
            found = [run["measured"]["forgetting"] for run in by_seed.values() if run["measured"]]
            ours = [one for one in found if one is not None]
            if name == STANDARD or not ours:
                continue
            masked_SLD = np.array([one["by_distance"] for one in ours])
            for layer, masked_D in enumerate(masked_SLD.mean(axis=0)):
                title = f"{name}, N = {next(iter(by_seed.values()))['context_length']:,}, layer {layer}"
                lines.append((title, ours[0]["distances"], masked_D))
                cells = [title]
                for kind in KINDS:
                    shares = [one["by_kind"][kind][layer] for one in ours if kind in one["by_kind"]]
                    cells.append(_share(shares))
                rows.append(cells)
        del family
    if not lines:
        return [*blocks, Text("No selective run has been measured.")]
    says = ("tokens between query and key, lower edges", "share forgotten")
    chosen = lines[:18]
    svg = figures.lines(chosen, says, "Share of tokens forgotten by distance", log_x=True, zero=True, dots=True)
    return [
        *blocks,
        Figure("forgotten-distance", "Share of earlier tokens that are forgotten, by layer and distance", svg),
        Table(["forgotten share", *KINDS], rows),
        Command("python -m launch.study.measure RUN"),
    ]


def _share(shares: list[float]) -> str:
    if not shares:
        return ""
    spread = f" ± {100 * np.std(shares, ddof=1):.1f}" if len(shares) > 1 else ""
    return f"{100 * np.mean(shares):.1f}%{spread}"
