"""The command that finds budgets: a greedy search on training windows, measured on held-out ones."""

import argparse
import dataclasses
import math
from pathlib import Path

from tqdm import tqdm

from data import open_dataset
from inference_budget import (
    Budgets,
    Evaluator,
    EvictionPolicy,
    Found,
    Losses,
    Point,
    Windows,
    baselines,
    best_point,
    exchange,
    find_policy,
    model_fingerprint,
    policy_name,
    search,
    uniform,
)
from inference_budget.interchange import write_budgets_file
from inference_budget.policies import policy_source
from inference_budget.search import check_steps
from launch.commands import InputError
from selective_attention import Transformer

from .inputs import check_output, check_vocabulary, load_model, located, read_windows
from .result import (
    Difference,
    HeldOut,
    Identity,
    Journal,
    Perplexities,
    PointJson,
    SearchFile,
    cache_size,
    point_json,
    points_json,
)


def run_search(options: argparse.Namespace) -> None:
    output = Path(options.output)
    check_output(output)
    policy = find_policy(options.policy)
    model, dataset = load_model(options.checkpoint), open_dataset(options.data)
    check_vocabulary(model, dataset.manifest.vocab_size, dataset.path)
    length = options.context or model.config.max_length
    if length > model.config.max_length:
        most = model.config.max_length
        raise InputError(f"--context={length}: the model was made for contexts of {most} tokens; give at most that")
    step = options.step or max(length // 32, 1)
    check_steps(length, step, options.first_step or step)
    training = read_windows(dataset, "train", length, options.windows)
    validation = read_windows(dataset, "validation", length, options.validation_windows)
    identity: Identity = {
        "checkpoint": {"path": located(options.checkpoint), "fingerprint": model_fingerprint(model)},
        "data": {"path": located(dataset.path), "fingerprint": dataset.manifest.fingerprint},
        "context_length": length,
        "policy": policy_name(policy),
        "windows": {"train": len(training), "validation": len(validation)},
    }
    if source := policy_source(policy):
        identity["policy_source"] = source
    evaluator = Evaluator(model, training, policy)
    target = None if options.target_checkpoint is None else load_model(options.target_checkpoint)
    target_nll = math.log(options.target_perplexity) if target is None else _plain(target, training).mean
    journal = Journal(output.with_name(f"{output.name}.journal"), identity)
    tried = _try_all(evaluator, target_nll, step, journal, options)
    best, others = tried.best, tried.baselines
    held_out = _held_out(model, validation, policy, tried, None if target is None else _plain(target, validation))
    content: SearchFile = {
        **identity,
        "budgets": list(best.budgets.tokens),
        "memory_factor": best.budgets.memory_factor,
        "search": {
            "step": step, "first_step": options.first_step or step, "lazy": options.lazy,
            "full_sweeps": tried.greedy.full_sweeps, "lazy_missed": tried.greedy.missed,
            "target_perplexity": math.exp(target_nll), "target_checkpoint": options.target_checkpoint,
        },
        "chosen": tried.chosen,
        "evaluations": tried.evaluations,
        "found": point_json(best),
        "validation": held_out,
        "curve": points_json(tried.greedy.curve),
        "exchange": points_json(tried.exchanged),
        "baselines": {name: points_json(points) for name, points in others.items()},
    }  # fmt: skip
    write_budgets_file(output, content)
    journal.remove()
    _print(content)
    print(cache_size(model, best.budgets, policy))


@dataclasses.dataclass(frozen=True)
class _Tried:
    """Everything that was measured for a target."""

    greedy: Found
    baselines: dict[str, list[Point]]
    uniform: tuple[Point, ...]  # from where greedy ended
    exchanged: tuple[Point, ...]  # none, if that was not asked for
    best: Point
    chosen: str
    evaluations: dict[str, int]

    @property
    def points(self) -> list[Point]:
        """All that budgets may be taken from."""
        return [*self.greedy.curve, *self.uniform, *self.exchanged]


def _try_all(
    evaluator: Evaluator, target_nll: float, step: int, journal: Journal, options: argparse.Namespace
) -> _Tried:
    evaluations: dict[str, int] = {}

    def count(name: str) -> None:
        evaluations[name] = len(journal.asked) - sum(evaluations.values())

    with tqdm(desc="search", unit="cut", disable=None) as bar:

        def progress(point: Point) -> None:
            bar.update()
            bar.set_postfix_str(f"{point.budgets.memory_factor:.2f}x, perplexity {point.perplexity:.3f}")

        found = search(
            evaluator,
            target_nll=target_nll,
            step=step,
            first_step=options.first_step,
            lazy=options.lazy,
            known=journal,
            progress=progress,
        )
        count("greedy")
        best, chosen = _best(found, target_nll), "greedy"
        even = uniform(evaluator, best.budgets.total, target_nll=target_nll, step=step, known=journal)
        count("uniform")
        if (better := best_point([best, *even], target_nll)) not in (best, None):
            best, chosen = better, "uniform"
        exchanged: tuple[Point, ...] = ()
        if options.exchange:
            exchanged = exchange(evaluator, best, target_nll=target_nll, step=step, known=journal, progress=progress)
            count("exchange")
        if (better := best_point([best, *exchanged], target_nll)) not in (best, None):
            best, chosen = better, "exchange"
    others = baselines(evaluator, _spread_totals(found), journal)
    count("baselines")
    return _Tried(found, others, even, exchanged, best, chosen, evaluations)


def _best(found: Found, target_nll: float) -> Point:
    best = found.best(target_nll)
    if best is None:
        least = min(found.curve, key=lambda point: point.nll)
        raise InputError(
            f"the target perplexity of {math.exp(target_nll):.3f} is out of reach: the best is {least.perplexity:.3f}, "
            f"at a memory factor of {least.budgets.memory_factor:.2f}; give one of at least that"
        )
    return best


def _plain(model: Transformer, windows: Windows) -> Losses:
    """The losses without evictions."""
    return Evaluator(model, windows, None).losses([Budgets.full(model.config.num_layers, windows.length)])[0]


def _spread_totals(found: Found, count: int = 12) -> list[int]:
    totals = sorted({point.budgets.total for point in found.curve})
    return totals[:: max(len(totals) // count, 1)]


def _held_out(
    model: Transformer, windows: Windows, policy: EvictionPolicy, tried: _Tried, target: Losses | None
) -> HeldOut:
    """What was found, on windows that the search has not seen; and the largest factor whose loss is at most the
    target's there, among all that was tried.
    """
    evaluator = Evaluator(model, windows, policy)
    full = Budgets.full(model.config.num_layers, windows.length)
    unpruned, pruned = evaluator.losses([full, tried.best.budgets])
    result: HeldOut = {
        "full": _perplexities(unpruned),
        "pruned": _perplexities(pruned),
        "pruned_minus_full": _difference(pruned, unpruned),
    }
    if target is None:
        return result
    result["target"] = _perplexities(target)
    result["pruned_minus_target"] = _difference(pruned, target)
    result["largest_at_target"] = None
    for point in sorted(tried.points, key=lambda point: -point.budgets.memory_factor):
        if (losses := evaluator.losses([point.budgets])[0]).mean <= target.mean:
            result["largest_at_target"] = {
                "memory_factor": point.budgets.memory_factor,
                "budgets": list(point.budgets.tokens),
                **_perplexities(losses),
            }
            break
    return result


def _perplexities(losses: Losses) -> Perplexities:
    return {"perplexity": losses.perplexity, "last_quarter_perplexity": losses.last_quarter_perplexity}


def _difference(one: Losses, other: Losses) -> Difference:
    nats, error = one.minus(other)
    return {"nats": nats, "standard_error": error}


def _at_equal_totals(content: SearchFile) -> list[tuple[PointJson, PointJson]]:
    greedy = {sum(point["budgets"]): point for point in content["curve"]}
    return [(point, greedy[sum(point["budgets"])]) for point in content["baselines"]["uniform"]]


def _print(content: SearchFile) -> None:
    options, held_out = content["search"], content["validation"]
    print(f"{content['policy']}: {content['memory_factor']:.2f}x fewer tokens, budgets {content['budgets']}")
    perplexity, target = content["found"]["perplexity"], options["target_perplexity"]
    print(f"training windows: perplexity {perplexity:.3f}, target {target:.3f}")
    counts = ", ".join(f"{name} {count:,}" for name, count in content["evaluations"].items())
    print(f"found by: {content['chosen']}; budgets evaluated: {counts}")
    if better := [one for one, other in _at_equal_totals(content) if one["nll"] < other["nll"]]:
        factor = min(point["memory_factor"] for point in better)
        print(f"uniform budgets cost less than greedy's at {len(better)} of the totals compared, from {factor:.2f}x on")
    print("validation windows:")
    measured = {"full": held_out["full"], "pruned": held_out["pruned"], "target": held_out.get("target")}
    for name, values in measured.items():
        if values is not None:
            last = values["last_quarter_perplexity"]
            print(f"  {name:<7} perplexity {values['perplexity']:.3f}, last quarter of positions {last:.3f}")
    differences = {"full": held_out["pruned_minus_full"], "target": held_out.get("pruned_minus_target")}
    for name, difference in differences.items():
        if difference is not None:
            nats, error = difference["nats"], difference["standard_error"]
            print(f"  pruned minus {name}: {nats:+.4f} nats, standard error {error:.4f}")
    if "largest_at_target" in held_out:
        point = held_out["largest_at_target"]
        print(f"  largest factor that meets the target here: {'none' if point is None else point['memory_factor']}")
    if sweeps := options["full_sweeps"]:
        print(f"lazy evaluation would have chosen otherwise in {options['lazy_missed']} of {sweeps} full sweeps")
