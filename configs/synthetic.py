"""The paper's two synthetic tasks, variable assignment and parity, small enough for a laptop's CPU.

    export JAX_PLATFORMS=cpu
    python -m trainer --config=configs/synthetic.py:assignment --workdir=runs/assignment
    python -m trainer --config=configs/synthetic.py:assignment,standard --workdir=runs/assignment-standard
    python -m launch.synthetic runs/assignment runs/assignment-standard

Slice: none, this machine. Compare the accuracy of both at contexts longer than those of training, and what the
selective one masks: F should tell stale assignments from live ones, and in parity all but the last two tokens should be
masked. `:parity` is the other task. Sizes, rates and the tasks' exact format are our choice.
"""

from ml_collections import ConfigDict

from configs import base

TASKS = ("assignment", "parity")
OPTIONS = ("standard",)


def get_config(variant: str = "assignment") -> ConfigDict:
    """`variant`: one of TASKS, then perhaps ",standard"."""
    task, *options = variant.split(",")
    if task not in TASKS:
        raise ValueError(f"--config: {task!r} is not a task; choose one of {', '.join(TASKS)}")
    for option in options:
        if option not in OPTIONS:
            raise ValueError(f"--config: {option!r} is not an option; choose from {', '.join(OPTIONS)}")
    c = base.get_config()
    c.data.task = task
    c.context_length = 64
    c.batch_size = 64
    c.steps = 500
    c.model.width = 1
    c.model.num_layers = 2
    c.model.num_heads = 2
    c.model.head_dim = 32
    c.model.vocab_size = 32
    c.model.selective = "standard" not in options
    c.model.dtype = "float32"  # CPUs compute bfloat16 slowly
    c.optimizer.peak_lr = 0.003
    c.optimizer.warmup_steps = 100
    c.checkpoint.every_steps = 250
    c.checkpoint.keep_every_steps = 0
    c.eval.every_steps = 100
    c.eval.batches = 4
    c.eval.pictures = False
    return c
