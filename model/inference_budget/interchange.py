"""budgets.json: budgets, the policy they were found for, and the model that they belong to.

    {"format": "inference_budget.Budgets/1", "checkpoint": {"path": "...", "fingerprint": "..."},
     "context_length": 256, "policy": "selective", "budgets": [64, 32]}

A file may say more, such as how they were found.
"""

import dataclasses
import hashlib
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import TypedDict, cast

import jax
import numpy as np
from flax import nnx

from selective_attention import Transformer

from .budgets import Budgets, BudgetsError, check_budgets
from .policies import POLICIES, EvictionPolicy, check_policy

FORMAT = "inference_budget.Budgets/1"
EXECUTION = ("remat", "scan_layers", "attention")  # fields of a config that say how to compute, not what


class Source(TypedDict):
    """A model or a dataset, and where it was."""

    path: str
    fingerprint: str


class BudgetsFile(TypedDict):
    """What every such file says."""

    checkpoint: Source
    context_length: int
    policy: str
    budgets: list[int]


def save_budgets(
    path: str | Path, model: Transformer, budgets: Budgets, policy: EvictionPolicy, *, checkpoint: str | Path
) -> None:
    """Writes budgets.json for `load_budgets`.

    Args:
      path: the file; one that is there is overwritten.
      model: what the budgets were found for.
      budgets, policy: how many tokens each layer may hold, and who leaves a full one.
      checkpoint: the folder of the model, for people and programs that read the file.

    Raises:
      BudgetsError: budgets for another number of layers, or a policy that is not defined on the model.
    """
    check_budgets(budgets, model.config)
    check_policy(policy, model.config)
    content: BudgetsFile = {
        "checkpoint": {"path": str(checkpoint), "fingerprint": model_fingerprint(model)},
        "context_length": budgets.context_length,
        "policy": policy.name,
        "budgets": list(budgets.tokens),
    }
    write_budgets_file(path, content)


def load_budgets(path: str | Path, model: Transformer) -> tuple[Budgets, EvictionPolicy]:
    """What `save_budgets`, or a search, wrote about this very model.

    Raises:
      BudgetsError: no such file, another model's budgets, or a file that was changed to what cannot be used.
    """
    budgets, policy = budgets_of(read_budgets_file(path), model_fingerprint(model))
    check_budgets(budgets, model.config)
    check_policy(policy, model.config)
    return budgets, policy


def model_fingerprint(model: Transformer) -> str:
    """The SHA-256 of every parameter and of what the config says of the function that they make.

    Fields at their defaults are left out, so that a field that a later version adds changes nothing.
    """
    config = {
        field.name: str(getattr(model.config, field.name))
        for field in dataclasses.fields(model.config)
        if field.name not in EXECUTION and getattr(model.config, field.name) != field.default
    }
    digest = hashlib.sha256(json.dumps(config, sort_keys=True).encode())
    for name, parameter in sorted(nnx.to_flat_state(nnx.state(model, nnx.Param))):
        digest.update(repr(name).encode() + np.asarray(jax.device_get(parameter[...])).tobytes())
    return digest.hexdigest()


def write_budgets_file(path: str | Path, content: Mapping[str, object]) -> None:
    """Writes a BudgetsFile and whatever else `content` has, at once: an interruption leaves no half of it."""
    path = Path(path)
    partial = path.with_name(f".{path.name}.{os.getpid()}")
    partial.write_text(json.dumps({"format": FORMAT, **content}, indent=1) + "\n")
    partial.replace(path)


def read_budgets_file(path: str | Path) -> BudgetsFile:
    """Raises BudgetsError for what is not such a file; `budgets_of` checks what it says."""
    try:
        content = json.loads(Path(path).read_text())
    except (OSError, ValueError) as error:
        raise BudgetsError(f"{path} cannot be read: {error}") from error
    if not isinstance(content, dict) or content.get("format") != FORMAT:
        raise BudgetsError(f"{path} does not say that its format is {FORMAT!r}; make it with `search`")
    return cast(BudgetsFile, content)


def budgets_of(content: BudgetsFile, fingerprint: str) -> tuple[Budgets, EvictionPolicy]:
    """Raises BudgetsError if the file is another model's, or has been changed to what cannot be used."""
    try:
        checkpoint, length = content["checkpoint"], content["context_length"]
        tokens, policy = tuple(content["budgets"]), POLICIES[content["policy"]]
        found_for, path = checkpoint["fingerprint"], checkpoint["path"]
    except (KeyError, TypeError, ValueError) as error:
        raise BudgetsError(f"the budgets file lacks, or does not know, {error}; make it with `search`") from error
    if found_for != fingerprint:
        raise BudgetsError(
            f"these budgets were found for another model, {path} ({found_for[:12]}, not {fingerprint[:12]}); search "
            "again for this one"
        )
    return Budgets(tokens, length), policy
