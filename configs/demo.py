"""The run of `make train`: two layers on the embedded corpus, on an emulated pod of eight devices.

    python -m trainer --config=configs/demo.py --workdir=runs/mine --config.data.path=runs/demo/data

`:standard` is the baseline without selection, the same in everything else.
"""

from ml_collections import ConfigDict

from configs import base


def get_config(variant: str = "selective") -> ConfigDict:
    """`variant`: "selective" or "standard"."""
    if variant not in ("selective", "standard"):
        raise ValueError(f"configs/demo.py: {variant!r} is not a variant; choose selective or standard")
    c = base.get_config()
    c.context_length = 256
    c.batch_size = 16
    c.steps = 300
    c.model.width = 2
    c.model.vocab_size = 2048
    c.model.selective = variant == "selective"
    c.model.dtype = "float32"  # CPUs compute bfloat16 slowly
    c.optimizer.warmup_steps = 30
    c.mesh.data = 4
    c.mesh.fsdp = 2
    c.checkpoint.every_steps = 50
    c.checkpoint.keep_every_steps = 0
    c.eval.every_steps = 100
    c.eval.batches = 8
    c.log_every_steps = 10
    return c
