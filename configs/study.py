"""The runs of `make study`: the paper's comparisons at sizes that a laptop's CPU trains.

    python -m trainer --config=configs/study.py:small,standard --workdir=runs/mine --config.seed=1 \\
        --config.data.path=runs/study/small/data

Slice: none, this machine. First `small` or `full`, then options, separated by commas: `standard`, `memory`, `heads2x`
and the ablations as in configs/c4.py; `n1024`, a context twice as long; `wide`, another size. `toy` is for trying the
commands. By seed, all variants begin with the same values, as far as their parameters are the same, and see the same
batches. To expect: docs/study.md has what came out. Everything here is our choice.
"""

from ml_collections import ConfigDict

from configs import base, c4

PRESETS: dict[str, dict[str, object]] = {
    "toy": {"context_length": 64, "batch_size": 4, "steps": 6, "model.width": 1, "model.vocab_size": 512},
    "small": {"context_length": 512, "batch_size": 4, "steps": 600, "model.width": 2, "model.vocab_size": 1024},
    "full": {"context_length": 512, "batch_size": 16, "steps": 2_000, "model.width": 3, "model.vocab_size": 2048},
}
OPTIONS: dict[str, dict[str, object]] = {
    **{name: c4.OPTIONS[name] for name in ("standard", "memory", "heads2x", *c4.ABLATIONS)},
    "n1024": {},  # the preset's context and batch, twice and half
    "wide": {},  # one more layer and head
}


def get_config(variant: str = "small") -> ConfigDict:
    """`variant`: one of PRESETS, then any of OPTIONS, separated by commas."""
    preset, *options = variant.split(",")
    if preset not in PRESETS:
        raise ValueError(f"--config: {preset!r} is not a preset; choose one of {', '.join(PRESETS)}")
    c = base.get_config()
    c.update_from_flattened_dict(PRESETS[preset])
    for option in options:
        if option not in OPTIONS:
            raise ValueError(f"--config: {option!r} is not an option; choose from {', '.join(OPTIONS)}")
        c.update_from_flattened_dict(OPTIONS[option])
    if "n1024" in options:
        c.context_length, c.batch_size = 2 * c.context_length, c.batch_size // 2
    if "wide" in options:
        c.model.width += 1
    c.model.num_layers, c.model.d_model, c.model.head_dim = c.model.width, 64 * c.model.width, 32
    c.model.num_heads = (4 if "heads2x" in options else 2) * c.model.width
    c.model.dtype = "float32"  # CPUs compute bfloat16 slowly
    c.optimizer.warmup_steps = c.steps // 10
    c.mesh.data = 1
    c.checkpoint.every_steps = max(c.steps // 4, 1)
    c.checkpoint.keep_last = 1
    c.checkpoint.keep_every_steps = 0
    c.checkpoint.keep_best = 0
    c.eval.every_steps = max(c.steps // 8, 1)
    c.eval.batches = 8
    c.eval.pictures = False
    c.log_every_steps = 50
    return c
