"""The paper's encoder-decoder, T5-style: blanks in C4 are filled by a decoder whose self-attention is selective.

    python -m trainer --config=configs/t5.py:d12 --workdir=/runs/t5-d12 --config.data.path=/data/c4
    python -m launch.spans /runs/t5-d12

Slice: as the decoders of configs/c4.py. Compare the validation loss, nats per token of the blanks and their sentinels,
with that of `standard`: lower by the paper. `memory` adds the memory loss of the decoder. Sizes are d8 to d28, with d
layers in the encoder and d in the decoder; blanks are T5's, 15% of a window in spans of 3 tokens on average. Windows of
512 tokens, batch and steps are those of the decoders: the paper's for this experiment are not known here.

    python -m trainer --config=configs/t5.py:toy --workdir=runs/t5 --config.data.path=runs/demo/data

is two layers on the text of `make train`, on this machine.
"""

from ml_collections import ConfigDict

from configs import c4, demo

SIZES = (*(f"d{width}" for width in c4.WIDTHS), "toy")
OPTIONS: dict[str, dict[str, object]] = {name: c4.OPTIONS[name] for name in ("standard", "memory")}
SENTINELS = 128  # ids beside the dataset's; a window of 2,048 tokens needs 103


def get_config(variant: str = "d12") -> ConfigDict:
    """`variant`: one of SIZES, then any of OPTIONS, separated by commas."""
    size, *options = variant.split(",")
    if size not in SIZES:
        raise ValueError(f"--config: {size!r} is not a size; choose one of {', '.join(SIZES)}")
    c = demo.get_config() if size == "toy" else c4.get_config(size)
    for option in options:
        if option not in OPTIONS:
            raise ValueError(f"--config: {option!r} is not an option; choose from {', '.join(OPTIONS)}")
        c.update_from_flattened_dict(OPTIONS[option])
    c.model.architecture = "encoder_decoder"
    c.model.vocab_size += SENTINELS
    if size == "toy":
        c.mesh.data, c.mesh.fsdp = -1, 1  # of the devices that there are
    return c
