"""The paper's runs on C4: d8 to d28 at N = 512, batch 256, 524,288 steps (68.7 billion tokens).

    python -m trainer --config=configs/c4.py:d12 --workdir=/runs/c4-d12 --config.data.path=/data/c4

`:d12,standard` is the baseline without selection, `:d12,memory` adds the memory loss, `:d12,n2048` is the context-size
family (512, 1,024 or 2,048 tokens at batch 128). What to expect: by the paper, a lower validation perplexity than the
baseline's at every size; nobody has published these runs' curves.
"""

from ml_collections import ConfigDict

from configs import base

WIDTHS = (8, 12, 16, 20, 24, 28)  # the paper's ladder
CONTEXT_LENGTHS = (512, 1024, 2048)


def get_config(variant: str = "d12") -> ConfigDict:
    """`variant`: a width, then any of standard, memory, n512, n1024, n2048, separated by commas."""
    c = base.get_config()
    width, *options = variant.split(",")
    known_widths = {f"d{d}": d for d in WIDTHS}
    if width not in known_widths:
        raise ValueError(f"configs/c4.py: {width!r} is not a size; choose one of {', '.join(known_widths)}")
    c.model.width = known_widths[width]
    for option in options:
        if option == "standard":
            c.model.selective = False
        elif option == "memory":
            c.memory_loss.epsilon = 0.1
        elif option in {f"n{n}" for n in CONTEXT_LENGTHS}:
            c.context_length = int(option[1:])
            c.batch_size = 128
        else:
            choices = ["standard", "memory", *(f"n{n}" for n in CONTEXT_LENGTHS)]
            raise ValueError(f"configs/c4.py: {option!r} is not an option; choose from {', '.join(choices)}")
    return c
