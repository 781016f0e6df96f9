"""The paper's runs on C4: d8 to d28 at N = 512, batch 256, 524,288 steps (68.7 billion tokens).

    python -m trainer --config=configs/c4.py:d12 --workdir=/runs/c4-d12 --config.data.path=/data/c4

Slice: v4-16 for d8 to v4-128 for d28 (MESHES), where `python -m launch.plan` says that it fits. Options follow the
size, separated by commas; `python -m configs.list` has the runs of each experiment and what to compare in it.

- `standard` is the baseline without selection, `standard,heads2x` the one with twice the heads.
- `memory` adds the memory loss.
- `n512`, `n1024` and `n2048` are the context-size family, at batch 128.
- `vocab32k` has the larger vocabulary, of a dataset prepared with it.
- `lr0.0025` and `lr0.01` are other peak learning rates; that it is these two is our choice.
- `unprotected_bos`, `unprotected_self`, `leaky` and `own_head` each change one thing in the selection.

To expect, by the paper, a lower validation perplexity than the baseline's at every size; nobody has published these
runs' curves.
"""

from ml_collections import ConfigDict

from configs import base

WIDTHS = (8, 12, 16, 20, 24, 28)  # the paper's ladder
CONTEXT_LENGTHS = (512, 1024, 2048)
LEARNING_RATES = (0.0025, 0.01)  # half the paper's and twice
ABLATIONS = ("unprotected_bos", "unprotected_self", "leaky", "own_head")
# Of each width: a slice, and how many chips share parameters and optimizer state, which shortens the update too.
MESHES = {8: ("v4-16", 4), 12: ("v4-32", 16), 16: ("v4-32", 4), 20: ("v4-64", 4), 24: ("v4-64", 8), 28: ("v4-128", 8)}
OPTIONS: dict[str, dict[str, object]] = {
    "standard": {"model.selective": False},
    "memory": {"memory_loss.epsilon": 0.1},
    "heads2x": {},  # depends on the width
    "vocab32k": {"model.vocab_size": 32_768},
    **{f"n{length}": {"context_length": length, "batch_size": 128} for length in CONTEXT_LENGTHS},
    **{f"lr{rate}": {"optimizer.peak_lr": rate} for rate in LEARNING_RATES},
    **{name: {"model.selection": name} for name in ABLATIONS},
}


def get_config(variant: str = "d12") -> ConfigDict:
    """`variant`: a width, then any of OPTIONS, separated by commas."""
    c = base.get_config()
    width, *options = variant.split(",")
    known_widths = {f"d{d}": d for d in WIDTHS}
    if width not in known_widths:
        raise ValueError(f"--config: {width!r} is not a size; choose one of {', '.join(known_widths)}")
    c.model.width = known_widths[width]
    c.mesh.topology, c.mesh.fsdp = MESHES[c.model.width]
    for option in options:
        if option not in OPTIONS:
            raise ValueError(f"--config: {option!r} is not an option; choose from {', '.join(OPTIONS)}")
        c.update_from_flattened_dict(OPTIONS[option])
    if "heads2x" in options:
        c.model.num_heads = 2 * c.model.width
    return c
