"""budgets.json: budgets, the policy they were found for, and the model that they belong to.

    {"format": "inference_budget.Budgets/1", "checkpoint": {"path": "...", "fingerprint": "..."},
     "context_length": 256, "policy": "selective", "budgets": [64, 32]}

A file may say more, such as how they were found.
"""

import dataclasses
import hashlib
import json
import os
import reprlib
import types
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NotRequired, TypedDict, TypeVar, Union, cast, get_args, get_origin, get_type_hints, is_typeddict

import jax
import numpy as np
from flax import nnx

from selective_attention import Transformer

from .budgets import Budgets, BudgetsError, check_budgets
from .policies import EvictionPolicy, check_policy, find_policy, policy_name, policy_source

FORMAT = "inference_budget.Budgets/1"


class Source(TypedDict):
    """A model or a dataset, and where it was."""

    path: str
    fingerprint: str


class BudgetsFile(TypedDict):
    """What every such file says."""

    checkpoint: Source
    context_length: int
    policy: str
    policy_source: NotRequired[str]  # SHA-256 of the module of a policy of one's own
    budgets: list[int]


File = TypeVar("File", bound=BudgetsFile)


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
      BudgetsError: budgets for another number of layers, or a policy that is not defined on the model, or that no name
        stands for (see `policy_name`).
    """
    check_budgets(budgets, model.config)
    check_policy(policy, model.config)
    content: BudgetsFile = {
        "checkpoint": {"path": str(checkpoint), "fingerprint": model_fingerprint(model)},
        "context_length": budgets.context_length,
        "policy": policy_name(policy),
        "budgets": list(budgets.tokens),
    }
    if source := policy_source(policy):
        content["policy_source"] = source
    write_budgets_file(path, content)


def load_budgets(path: str | Path, model: Transformer) -> tuple[Budgets, EvictionPolicy]:
    """What `save_budgets`, or a search, wrote about this very model.

    Raises:
      BudgetsError: no such file, another model's budgets, those of a policy whose module was changed since, or a file
        that was changed to what cannot be used.
    """
    budgets, policy = budgets_of(read_budgets_file(path, BudgetsFile), model_fingerprint(model))
    check_budgets(budgets, model.config)
    check_policy(policy, model.config)
    return budgets, policy


def model_fingerprint(model: Transformer) -> str:
    """The SHA-256 of every parameter and of what the config says of the function that they make.

    Fields at their defaults are left out, so that a field that a later version adds changes nothing.
    """
    execution = model.config.machine_fields()
    config = {
        field.name: str(getattr(model.config, field.name))
        for field in dataclasses.fields(model.config)
        if field.name not in execution and getattr(model.config, field.name) != field.default
    }
    digest = hashlib.sha256(json.dumps(config, sort_keys=True).encode())
    for name, parameter in sorted(nnx.to_flat_state(nnx.state(model, nnx.Param))):
        digest.update(repr(name).encode() + np.asarray(jax.device_get(parameter[...])).tobytes())
    return digest.hexdigest()


def write_budgets_file(path: str | Path, content: Mapping[str, object]) -> None:
    """Writes a BudgetsFile and whatever else `content` has, at once: an interruption leaves no half of it.

    Raises:
      OSError: it cannot be written; a file that is there stays.
    """
    path = Path(path)
    partial = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        partial.write_text(json.dumps({"format": FORMAT, **content}, indent=1) + "\n")
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)


def read_budgets_file(path: str | Path, kind: type[File]) -> File:
    """What a file says, which is all that `kind` does: BudgetsFile or a TypedDict of more.

    Raises:
      BudgetsError: it is not such a file; `budgets_of` checks whether what it says can be used.
    """
    try:
        content = json.loads(Path(path).read_text())
    except OSError as error:
        raise BudgetsError(f"{path} cannot be read: {error.strerror}; give a file of `search`") from error
    except ValueError as error:
        raise BudgetsError(f"{path} cannot be read: {error}; make it with `search`") from error
    if not isinstance(content, dict) or content.get("format") != FORMAT:
        raise BudgetsError(f"{path} does not say that its format is {FORMAT!r}; make it with `search`")
    for mistake in _mistakes(content, kind, ""):
        raise BudgetsError(f"{path}: {mistake}; make it with `search`")
    return cast(File, content)


_WORDS = {
    int: "a whole number",
    float: "a number",
    bool: "true or false",
    str: "text",
    list: "a list",
    dict: "an object",
}


def _mistakes(value: Any, hint: Any, name: str) -> Iterator[str]:
    """Where what was read from JSON is not of a type: a TypedDict, `T | None`, or of lists, dicts, numbers and text."""
    kind: Any = get_origin(hint) or (dict if is_typeddict(hint) else hint)
    if kind in (Union, types.UnionType):
        (hint,) = set(get_args(hint)) - {types.NoneType}
        yield from () if value is None else _mistakes(value, hint, name)
        return
    fits = isinstance(value, (int, float) if kind is float else kind)
    if not fits or (isinstance(value, bool) and kind is not bool):  # which Python takes for a number
        yield f"{name} is {reprlib.repr(value)}, not {_WORDS[kind]}"
    elif is_typeddict(hint):
        hints = get_type_hints(hint)
        yield from (f"{name or 'the file'} lacks {key!r}" for key in sorted(hint.__required_keys__ - value.keys()))
        for key in filter(value.__contains__, hints):
            yield from _mistakes(value[key], hints[key], f"{name}.{key}".lstrip("."))
    elif kind in (list, dict):
        for key, item in value.items() if kind is dict else enumerate(value):
            yield from _mistakes(item, get_args(hint)[-1], f"{name}[{key!r}]")


def budgets_of(content: BudgetsFile, fingerprint: str) -> tuple[Budgets, EvictionPolicy]:
    """Raises BudgetsError if the file is another model's or another policy's, or says what cannot be used."""
    checkpoint, found_for = content["checkpoint"], content["checkpoint"]["fingerprint"]
    if found_for != fingerprint:
        raise BudgetsError(
            f"these budgets were found for another model, {checkpoint['path']} ({found_for[:12]}, not "
            f"{fingerprint[:12]}); search again for this one"
        )
    policy = find_policy(content["policy"])
    source = policy_source(policy)
    if content.get("policy_source", source) != source:
        raise BudgetsError(
            f"the module of {content['policy']} was changed since these budgets were found with it; bring it back, "
            "search again, or delete policy_source from their file to use them all the same"
        )
    return Budgets(tuple(content["budgets"]), content["context_length"]), policy
