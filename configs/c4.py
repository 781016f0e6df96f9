"""The paper's runs on C4: d8 to d28 at N = 512, batch 256, 524,288 steps (68.7 billion tokens).

    python -m trainer --config=configs/c4.py:d12 --workdir=/runs/c4-d12 --config.data.path=/data/c4

`:d12,standard` is the baseline without selection, `:d12,standard,heads2x` the one with twice the heads, `:d12,memory`
adds the memory loss, `:d12,n2048` is the context-size family (512, 1,024 or 2,048 tokens at batch 128), `:d12,vocab32k`
has the larger vocabulary. Each names a slice and a mesh, where `python -m launch.plan` says it fits. To expect, by the
paper, a lower validation perplexity than the baseline's at every size; nobody has published these runs' curves.
"""

from ml_collections import ConfigDict

from configs import base

WIDTHS = (8, 12, 16, 20, 24, 28)  # the paper's ladder
CONTEXT_LENGTHS = (512, 1024, 2048)
# Of each width: a slice, and how many chips share parameters and optimizer state, which shortens the update too.
MESHES = {8: ("v4-16", 4), 12: ("v4-32", 4), 16: ("v4-32", 4), 20: ("v4-64", 4), 24: ("v4-64", 8), 28: ("v4-128", 8)}
OPTIONS = ("standard", "memory", "heads2x", "vocab32k", *(f"n{n}" for n in CONTEXT_LENGTHS))


def get_config(variant: str = "d12") -> ConfigDict:
    """`variant`: a width, then any of OPTIONS, separated by commas."""
    c = base.get_config()
    width, *options = variant.split(",")
    known_widths = {f"d{d}": d for d in WIDTHS}
    if width not in known_widths:
        raise ValueError(f"configs/c4.py: {width!r} is not a size; choose one of {', '.join(known_widths)}")
    c.model.width = known_widths[width]
    c.mesh.topology, c.mesh.fsdp = MESHES[c.model.width]
    for option in options:
        if option == "standard":
            c.model.selective = False
        elif option == "memory":
            c.memory_loss.epsilon = 0.1
        elif option == "heads2x":
            c.model.num_heads = 2 * c.model.width
        elif option == "vocab32k":
            c.model.vocab_size = 32_768
        elif option in OPTIONS:
            c.context_length = int(option[1:])
            c.batch_size = 128
        else:
            raise ValueError(f"configs/c4.py: {option!r} is not an option; choose from {', '.join(OPTIONS)}")
    return c
