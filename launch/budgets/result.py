"""What a search writes: budgets.json with all that it went through, and the journal that it is resumed from."""

import json
from collections.abc import Iterable, Iterator, Mapping, MutableMapping
from pathlib import Path
from typing import NotRequired, TypedDict

from inference_budget import Budgets, EvictionPolicy, Point, cache_bytes, init_pruned_cache, memory_factor
from inference_budget.interchange import BudgetsFile, Source
from launch.commands import InputError
from selective_attention import Transformer


class PointJson(TypedDict):
    """Budgets and what they cost on the search's training windows."""

    budgets: list[int]
    memory_factor: float
    nll: float  # nats per token
    perplexity: float
    last_quarter_nll: float


class Perplexities(TypedDict):
    """Over all positions, and over the last quarter of them."""

    perplexity: float
    last_quarter_perplexity: float


class Difference(TypedDict):
    """Of two losses on the same windows, and the standard error from the pairs."""

    nats: float
    standard_error: float


class Holding(Perplexities):
    """A point of the curve on the held-out windows."""

    memory_factor: float
    budgets: list[int]


class HeldOut(TypedDict):
    """What was found, on windows that the search has not seen; the last three where the target is a model."""

    full: Perplexities
    pruned: Perplexities
    pruned_minus_full: Difference
    target: NotRequired[Perplexities]
    pruned_minus_target: NotRequired[Difference]
    largest_at_target: NotRequired[Holding | None]


class Options(TypedDict):
    """How a search went about it."""

    step: int
    first_step: int
    lazy: bool
    full_sweeps: int
    lazy_missed: int
    target_perplexity: float
    target_checkpoint: str | None


class Identity(TypedDict):
    """What a journal's losses depend on."""

    checkpoint: Source
    data: Source
    context_length: int
    policy: str
    policy_source: NotRequired[str]
    windows: dict[str, int]  # by split


class SearchFile(BudgetsFile):
    """A budgets.json of `search`."""

    data: Source
    windows: dict[str, int]
    memory_factor: float
    search: Options
    chosen: NotRequired[str]  # of what was tried, "greedy", "uniform" or "exchange", the one that found it
    evaluations: NotRequired[dict[str, int]]  # by what needed them, budgets that nothing before had measured
    found: PointJson
    validation: HeldOut
    curve: list[PointJson]
    exchange: NotRequired[list[PointJson]]  # what the exchange pass went through
    baselines: dict[str, list[PointJson]]


class UsableFile(BudgetsFile):
    """What `evaluate` and `generate` need; a file of `save_budgets` says no more than the budgets."""

    data: NotRequired[Source]
    windows: NotRequired[dict[str, int]]


def point_json(point: Point) -> PointJson:
    return {
        "budgets": list(point.budgets.tokens),
        "memory_factor": point.budgets.memory_factor,
        "nll": point.nll,
        "perplexity": point.perplexity,
        "last_quarter_nll": point.last_quarter_nll,
    }


def points_json(points: Iterable[Point]) -> list[PointJson]:
    return [point_json(point) for point in points]


def cache_size(model: Transformer, budgets: Budgets, policy: EvictionPolicy, dtype: str | None = None) -> str:
    """A line about the cache of one sequence: the bytes of its arrays, beside a full one's of the same dtype."""
    cache = init_pruned_cache(model.config, 1, budgets, policy, dtype)
    factor = memory_factor(cache, budgets.context_length)
    of_dtype = f" in {dtype}" if dtype else ""
    return f"cache of one sequence: {cache_bytes(cache):,} bytes, {factor:.2f}x less than a full cache{of_dtype}"


class Journal(MutableMapping[tuple[int, ...], tuple[float, float]]):
    """Losses that were measured, in a file that an interrupted search is resumed from.

    Attributes:
      asked: the budgets that this search wanted to know of, whether it measured them or an interrupted one had.

    Raises:
      InputError: the file is of a search for something else, or cannot be written.
    """

    def __init__(self, path: Path, identity: Mapping[str, object]) -> None:
        self.asked: set[tuple[int, ...]] = set()
        self._path, self._losses = path, dict[tuple[int, ...], tuple[float, float]]()
        header = json.dumps(identity, sort_keys=True)
        try:
            text = path.read_text() if path.exists() else ""
            first, *lines = text.splitlines() or [""]
            ours = header.startswith(first.partition(":")[0])  # or empty, or cut off on a full disk
            if first != header and (lines or not ours):  # with a first line alone nothing is lost
                raise InputError(
                    f"{path} is of another search, or of this policy before a change; remove it, or give "
                    "another --output"
                )
            self._stream = path.open("ab" if first == header else "wb", buffering=0)
        except (OSError, UnicodeDecodeError) as error:
            raise InputError(f"the journal {path} cannot be used ({error}); give another --output") from error
        for line in lines:
            try:
                budgets, mean, last_quarter = json.loads(line)
                self._losses[tuple(budgets)] = mean, last_quarter
            except (ValueError, TypeError):  # the line that was being written when the search was killed
                continue
        if first != header:
            self._append(header + "\n")
        elif not text.endswith("\n"):
            self._append("\n")

    def _append(self, text: str) -> None:
        content = text.encode()
        try:
            whole = self._stream.write(content) == len(content)
        except OSError as error:
            raise InputError(f"{self._path}: {error.strerror}; see to it, the same command then goes on") from error
        if not whole:
            raise InputError(f"{self._path}: no space left for it; make some, the same command then goes on")

    def __getitem__(self, budgets: tuple[int, ...]) -> tuple[float, float]:
        self.asked.add(budgets)
        return self._losses[budgets]

    def __setitem__(self, budgets: tuple[int, ...], losses: tuple[float, float]) -> None:
        self._losses[budgets] = losses
        self._append(json.dumps([budgets, *losses]) + "\n")

    def remove(self) -> None:
        """The search is done, and what it found is written."""
        self._stream.close()
        self._path.unlink(missing_ok=True)

    def __delitem__(self, budgets: tuple[int, ...]) -> None:
        raise NotImplementedError("what was measured stays")

    def __iter__(self) -> Iterator[tuple[int, ...]]:
        return iter(self._losses)

    def __len__(self) -> int:
        return len(self._losses)
