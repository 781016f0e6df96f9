"""A model that was trained before, trained on with selection switched on, so that it learns to forget.

    python -m trainer.import_hf FOLDER -o CHECKPOINT
    python -m trainer --config=configs/uptrain.py:CHECKPOINT --init_from=CHECKPOINT --workdir=runs/uptrained \\
        --config.data.path=DATASET

The model's shape, context and dtype are CHECKPOINT's, an exported folder of `trainer.import_hf` or `trainer.export`.
With selection `own_head`, the default here, the run begins as exactly that model. `--config.model.selection=paper`
needs no new parameters, but head 0 masks at once. Beside the model everything is our choice;
docs/results.md has what a small one makes of it.
"""

import dataclasses
import json
from pathlib import Path

from ml_collections import ConfigDict

from configs import base

LONGEST_CONTEXT = 2_048  # tokens of a dataset's record, by default


def get_config(checkpoint: str = "") -> ConfigDict:
    """`checkpoint`: the folder of an exported model."""
    model = _read(checkpoint)
    c = base.get_config()
    for field in dataclasses.fields(base.Model):
        value = model.get(field.name)
        if isinstance(value, dict):
            c.model[field.name].update(value)
        elif value is not None:
            c.model[field.name] = value
    c.model.width = c.model.num_layers  # which decides nothing: every size is given
    if model["selection"] == "off":
        c.model.selection = "own_head"
    c.context_length = min(model["max_length"], LONGEST_CONTEXT)
    c.batch_size = 64
    c.steps = 1_000
    c.optimizer.peak_lr = 1e-4
    c.optimizer.warmup_steps = 100
    c.checkpoint.every_steps = 250
    c.checkpoint.keep_every_steps = 0
    c.eval.every_steps = 250
    return c


def _read(checkpoint: str) -> dict:
    if not checkpoint:
        raise ValueError("configs/uptrain.py: give a model's folder, --config=configs/uptrain.py:CHECKPOINT")
    path = Path(checkpoint, "config.json")
    try:
        model = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise ValueError(f"configs/uptrain.py: {path} cannot be read: {error}") from error
    if not isinstance(model, dict) or not str(model.get("format")).startswith("selective_attention.Transformer/"):
        raise ValueError(f"configs/uptrain.py: {path} is no model's of this repository; trainer.import_hf makes one")
    return model
