"""budgets.json: what a search found, for which model and on which data."""

import json
import os
from collections.abc import Iterable, Iterator, MutableMapping
from pathlib import Path
from typing import Any

from inference_budget.budgets import Budgets
from inference_budget.policies import POLICIES, EvictionPolicy
from inference_budget.search import Point

from .inputs import InputError

FORMAT = "inference_budget.Budgets/1"


def write_json(path: str | Path, content: dict[str, Any]) -> None:
    """At once, so that an interrupted command leaves no half of it."""
    path = Path(path)
    partial = path.with_name(f".{path.name}.{os.getpid()}")
    partial.write_text(json.dumps({"format": FORMAT} | content, indent=1) + "\n")
    partial.replace(path)


def read_json(path: str | Path) -> dict[str, Any]:
    """Raises InputError for what is not such a file."""
    try:
        content = json.loads(Path(path).read_text())
    except (OSError, ValueError) as error:
        raise InputError(f"{path} cannot be read: {error}") from error
    if not isinstance(content, dict) or content.get("format") != FORMAT:
        raise InputError(f"{path} does not say that its format is {FORMAT!r}; make it with `search`")
    return content


def budgets_of(content: dict[str, Any], fingerprint: str) -> tuple[Budgets, EvictionPolicy]:
    """Raises InputError if the file is another model's, or has been changed to what cannot be used."""
    try:
        checkpoint, tokens, length = content["checkpoint"], content["budgets"], content["context_length"]
        policy = POLICIES[content["policy"]]
        found_for, path = checkpoint["fingerprint"], checkpoint["path"]
    except (KeyError, TypeError) as error:
        raise InputError(f"the budgets file lacks, or does not know, {error}; make it with `search`") from error
    if found_for != fingerprint:
        raise InputError(
            f"these budgets were found for another model, {path} ({found_for[:12]}, not {fingerprint[:12]}); search "
            "again for this one"
        )
    return Budgets(tuple(tokens), length), policy


def point_json(point: Point) -> dict[str, Any]:
    return {
        "budgets": list(point.budgets.tokens),
        "memory_factor": point.budgets.memory_factor,
        "nll": point.nll,
        "perplexity": point.perplexity,
        "last_quarter_nll": point.last_quarter_nll,
    }


def points_json(points: Iterable[Point]) -> list[dict[str, Any]]:
    return [point_json(point) for point in points]


class Journal(MutableMapping[tuple[int, ...], tuple[float, float]]):
    """Losses that were measured, in a file that an interrupted search is resumed from.

    Raises:
      InputError: the file is of a search for something else.
    """

    def __init__(self, path: Path, identity: dict[str, Any]) -> None:
        self._losses: dict[tuple[int, ...], tuple[float, float]] = {}
        header = json.dumps(identity, sort_keys=True)
        lines = path.read_text().splitlines() if path.exists() else []
        if lines and lines[0] != header:
            raise InputError(f"{path} is of another search; remove it, or give another --output")
        for line in lines[1:]:
            try:
                budgets, mean, last_quarter = json.loads(line)
            except ValueError:  # the line that was being written when the search was killed
                continue
            self._losses[tuple(budgets)] = mean, last_quarter
        self._stream = path.open("a")
        if not lines:
            self._stream.write(header + "\n")
        elif not path.read_text().endswith("\n"):
            self._stream.write("\n")

    def __getitem__(self, budgets: tuple[int, ...]) -> tuple[float, float]:
        return self._losses[budgets]

    def __setitem__(self, budgets: tuple[int, ...], losses: tuple[float, float]) -> None:
        self._losses[budgets] = losses
        self._stream.write(json.dumps([budgets, *losses]) + "\n")
        self._stream.flush()

    def __delitem__(self, budgets: tuple[int, ...]) -> None:
        raise NotImplementedError("what was measured stays")

    def __iter__(self) -> Iterator[tuple[int, ...]]:
        return iter(self._losses)

    def __len__(self) -> int:
        return len(self._losses)
