"""Greedy search for per-layer budgets (section 2 of the paper), and what it is compared with.

From full budgets, each iteration lowers the budget of the one layer whose cut costs least perplexity, by a constant
step, ties to the lowest layer. Greedy promises no optimum: uniform budgets may do better, and `exchange` mends what it
regrets. Perplexity need not rise along the way, so the whole curve is kept, and what meets a target is the point of the
largest memory factor that does.
"""

import dataclasses
import math
from collections.abc import Callable, Iterable, Iterator, MutableMapping, Sequence

from .budgets import MIN_BUDGET, Budgets, BudgetsError
from .perplexity import Evaluator

# Mean nats per token, and over the last quarter of positions, by budgets: what a journal holds.
Known = MutableMapping[tuple[int, ...], tuple[float, float]]


@dataclasses.dataclass(frozen=True)
class Point:
    """Budgets and what they cost on the search's windows."""

    budgets: Budgets
    nll: float  # nats per token
    last_quarter_nll: float

    @property
    def perplexity(self) -> float:
        return math.exp(self.nll)


@dataclasses.dataclass(frozen=True)
class Found:
    """What a search went through. `curve` starts at full budgets."""

    curve: tuple[Point, ...]
    full_sweeps: int = 0  # of a lazy search, after its first
    missed: int = 0  # of those, the ones in which the lazy order would have taken another layer

    def best(self, target_nll: float) -> Point | None:
        """As `best_point` of the curve; None if not even full budgets meet the target."""
        return best_point(self.curve, target_nll)


def best_point(points: Iterable[Point], target_nll: float) -> Point | None:
    """Of the points at or below the target that of the largest memory factor, and among equals of the least loss."""
    meets = [point for point in points if point.nll <= target_nll]
    return max(meets, key=lambda point: (point.budgets.memory_factor, -point.nll), default=None)


class _Measure:
    """Measures budgets, by evaluating what is not known yet."""

    def __init__(self, evaluator: Evaluator, known: Known) -> None:
        self._evaluator, self._known = evaluator, known
        self._base: Budgets | None = None
        self._kept: Budgets | None = None

    def base(self, budgets: Budgets) -> None:
        """What the next candidates differ from in one layer."""
        self._base = budgets

    def __call__(self, candidates: Sequence[Budgets]) -> list[Point]:
        missing = [budgets for budgets in candidates if budgets.tokens not in self._known]
        if missing:
            if self._base is not None and self._kept != self._base:  # only now: a resumed search replays its past
                self._evaluator.keep(self._base)
                self._kept = self._base
            for budgets, losses in zip(missing, self._evaluator.losses(missing), strict=True):
                self._known[budgets.tokens] = losses.mean, float(losses.last_quarter.mean())
        return [Point(budgets, *self._known[budgets.tokens]) for budgets in candidates]


def search(
    evaluator: Evaluator,
    *,
    target_nll: float,
    step: int,
    first_step: int | None = None,
    patience: int = 3,
    lazy: bool = False,
    slack: float = 0.0,
    full_sweep_every: int = 8,
    known: Known | None = None,
    progress: Callable[[Point], object] = lambda point: None,
) -> Found:
    """Lowers budgets greedily until the target is missed.

    Args:
      evaluator: of the model, the search's windows and the policy.
      target_nll: nats per token that the result may cost on the same windows.
      step: tokens by which a budget is lowered at a time.
      first_step: a coarser step to begin with; once it misses the target, the search goes back to the last point that
        met it and halves the step, down to `step`. By default `step`: the paper's search.
      patience: cuts beyond the first miss at the last step, since perplexity may fall again.
      lazy: measure only layers whose increment at their last measurement could still be the least. That is the greedy
        choice if no increment falls by more than `slack` (nats) as other budgets shrink, which nothing guarantees;
        every `full_sweep_every` iterations all layers are measured, and `Found` counts how often that chose another.
      known: losses that need not be measured again, extended on the way; a search with what an interrupted one left
        here goes on from there, because nothing else decides what it does.
      progress: called with each new point of the curve.

    Raises:
      BudgetsError: a step out of range.
    """
    length, num_layers = evaluator.windows.length, evaluator.config.num_layers
    step_now = first_step or step
    check_steps(length, step, step_now)
    measure = _Measure(evaluator, {} if known is None else known)
    choose = _Choice(measure, num_layers, slack=slack if lazy else None, full_sweep_every=full_sweep_every)
    point = measure([Budgets.full(num_layers, length)])[0]
    curve, misses = [point], 0
    progress(point)
    while misses <= patience and (cuts := _cuts(point.budgets, step_now)):
        cut = choose(cuts, point, iteration=len(curve))
        if cut.nll > target_nll and step_now > step:
            step_now = max(step_now // 2, step)
            choose.forget()
            continue
        misses = misses + 1 if cut.nll > target_nll else 0
        point = cut
        curve.append(point)
        progress(point)
    return Found(tuple(curve), choose.full_sweeps, choose.missed)


def check_steps(length: int, step: int, first_step: int) -> None:
    """Raises BudgetsError unless budgets of `length` tokens can be lowered by so many at a time."""
    if not 1 <= step <= first_step < length:
        raise BudgetsError(
            f"steps must be from 1 to {length - 1}, the first at least the last; got {first_step} and {step}"
        )


def uniform(
    evaluator: Evaluator,
    total: int,
    *,
    target_nll: float,
    step: int,
    patience: int = 3,
    known: Known | None = None,
) -> tuple[Point, ...]:
    """Uniform budgets of `total` tokens over all layers, and of `step` fewer each time until the target is missed.

    Args:
      evaluator, target_nll, patience, known: as of `search`.
      total: tokens of what a search found, which these may beat.
      step: tokens by which the total is lowered at a time.
    """
    length, num_layers = evaluator.windows.length, evaluator.config.num_layers
    measure = _Measure(evaluator, {} if known is None else known)
    points, misses = list[Point](), 0
    while misses <= patience and total >= MIN_BUDGET * num_layers:
        points += measure([Budgets.uniform(num_layers, length, total)])
        misses = misses + 1 if points[-1].nll > target_nll else 0
        total -= step
    return tuple(points)


def exchange(
    evaluator: Evaluator,
    start: Point,
    *,
    target_nll: float,
    step: int,
    known: Known | None = None,
    progress: Callable[[Point], object] = lambda point: None,
) -> tuple[Point, ...]:
    """Mends what a search regrets: moves budget from one layer to another for as long as the loss falls.

    Each move is the one of all pairs of layers that lowers the loss most, ties to the lowest layers. Where none helps
    and the target is met, the cheapest cut follows, and moves again; it ends where they do not bring the loss back to
    the target. With L layers a move costs at most L (L - 1) evaluations. As exact and as resumable as `search`.

    Args:
      evaluator, target_nll, known, progress: as of `search`.
      start: where to begin, such as `Found.best`.
      step: tokens that are moved or cut at a time.

    Returns:
      The points that it went through, `start` first.
    """
    measure, path = _Measure(evaluator, {} if known is None else known), [start]
    while True:
        point = path[-1]
        measure.base(point.budgets)
        moved = [moved for moves in _moves(point.budgets, step) for moved in measure(moves)]
        following = min(moved, key=lambda moved: moved.nll, default=point)
        if following.nll >= point.nll:
            cuts = list(_cuts(point.budgets, step).values())
            if point.nll > target_nll or not cuts:
                return tuple(path)
            following = min(measure(cuts), key=lambda cut: cut.nll)
        path.append(following)
        progress(following)


def _moves(budgets: Budgets, step: int) -> Iterator[list[Budgets]]:
    """By the layer that gives, what it can give to each of the others: not so many at once that memory runs out."""
    for giver, least in enumerate(budgets.tokens):
        moves = []
        for taker, most in enumerate(budgets.tokens):
            tokens = min(step, least - MIN_BUDGET, budgets.context_length - most)
            if taker != giver and tokens > 0:
                moves.append(budgets.replaced(giver, least - tokens).replaced(taker, most + tokens))
        yield moves


def _cuts(budgets: Budgets, step: int) -> dict[int, Budgets]:
    """By layer, the budgets with that layer's lowered."""
    return {
        layer: budgets.replaced(layer, max(budget - step, MIN_BUDGET))
        for layer, budget in enumerate(budgets.tokens)
        if budget > MIN_BUDGET
    }


class _Choice:
    """Chooses the cut that costs least: by measuring all, or with a `slack` those that may."""

    def __init__(self, measure: _Measure, num_layers: int, *, slack: float | None, full_sweep_every: int) -> None:
        self.full_sweeps = self.missed = 0
        self._measure, self._slack, self._full_sweep_every = measure, slack, full_sweep_every
        self._increments = [-math.inf] * num_layers  # of each layer's cut when it was last measured

    def __call__(self, cuts: dict[int, Budgets], point: Point, iteration: int) -> Point:
        self._measure.base(point.budgets)
        lazy = {} if self._slack is None else self._lazily(cuts, point, self._slack)
        measured = lazy
        if full := self._slack is None or iteration % self._full_sweep_every == 0:
            measured = dict(zip(cuts, self._measure(list(cuts.values())), strict=True))
        for layer, cut in measured.items():
            self._increments[layer] = cut.nll - point.nll
        chosen = _cheapest(measured)
        if lazy and full:
            self.full_sweeps += 1
            self.missed += _cheapest(lazy) != chosen
        return measured[chosen]

    def forget(self) -> None:
        """Another step has other increments."""
        self._increments = [-math.inf] * len(self._increments)

    def _lazily(self, cuts: dict[int, Budgets], point: Point, slack: float) -> dict[int, Point]:
        measured: dict[int, Point] = {}
        for layer in sorted(cuts, key=lambda layer: (self._increments[layer], layer)):
            least = min((cut.nll for cut in measured.values()), default=math.inf)
            if self._increments[layer] > least - point.nll + slack:
                break
            measured[layer] = self._measure([cuts[layer]])[0]
        return measured


def _cheapest(cuts: dict[int, Point]) -> int:
    return min(cuts, key=lambda layer: (cuts[layer].nll, layer))


def baselines(evaluator: Evaluator, totals: Iterable[int], known: Known | None = None) -> dict[str, list[Point]]:
    """Uniform budgets and PyramidKV's line at the same totals, under the evaluator's policy."""
    length, num_layers = evaluator.windows.length, evaluator.config.num_layers
    measure, totals = _Measure(evaluator, {} if known is None else known), list(totals)
    return {
        "uniform": measure([Budgets.uniform(num_layers, length, total) for total in totals]),
        "pyramid": measure([Budgets.pyramid(num_layers, length, total) for total in totals]),
    }
