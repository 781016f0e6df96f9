"""Plans of decoding as text for a terminal of 80 columns: a row for each figure, a column for each cache."""

from collections.abc import Callable, Sequence

from launch.plan.decode.parts import PARTS
from launch.plan.decode.result import CacheDoesNotFit, DecodePlan, Slice

GIB = 2**30
LABEL, COLUMN, COLUMNS = 29, 10, 5  # characters of a row's name and of a column; columns side by side
LEFT_OUT = "Estimates, no TPU was used. Left out: prefill, host, network latency, jitter."
Result = DecodePlan | CacheDoesNotFit


def plan_table(plans: Sequence[Result], place: Slice, title: str, notes: Sequence[str]) -> str:
    """All caches on the slice, COLUMNS of them side by side; `title` says of which model, `notes` stand at the end."""
    chips = f"{place.chips} chips" if place.chips > 1 else "1 chip"
    shared = "a whole model on each chip" if place.tensor == 1 else f"heads over {place.tensor} chips"
    lines = [
        f"{place.topology}: {chips}, mesh data={place.data},tensor={place.tensor}: {shared}",
        title,
        "A batch is the slice's" + (f", 1/{place.data} of it on each chip." if place.data > 1 else "."),
    ]
    for first in range(0, len(plans), COLUMNS):
        lines += ["", *_side_by_side(plans[first : first + COLUMNS])]
    for plan in plans:
        if isinstance(plan, CacheDoesNotFit):
            lines += ["", f"{plan.name} does NOT fit, batch {plan.batch_size:,}:", f"  {plan.error}"]
    return "\n".join([*lines, "", *notes, LEFT_OUT])


def _side_by_side(plans: Sequence[Result]) -> list[str]:
    def row(label: str, value: Callable[[DecodePlan], str], otherwise: str = "-") -> str:
        shown = (value(plan) if isinstance(plan, DecodePlan) else otherwise for plan in plans)
        return f"{label:<{LABEL}}" + "".join(f"{text:>{COLUMN}}" for text in shown)

    def part(label: str, value: Callable[[DecodePlan], float], scale: float = 1.0) -> str:
        return row(f"  {label}", lambda plan: f"{value(plan) / scale:.2f}")

    fitting = [plan for plan in plans if isinstance(plan, DecodePlan)]
    held = list(dict.fromkeys(name for plan in fitting for name in plan.step.hbm_bytes))
    spent = [name for name in PARTS if any(plan.step.step_ms_by_part.get(name, 0.0) for plan in fitting)]
    lines = [
        " " * LABEL + "".join(f"{plan.name[: COLUMN - 1]:>{COLUMN}}" for plan in plans),
        f"{'who leaves a full layer':<{LABEL}}" + "".join(f"{_policy(p)[: COLUMN - 1]:>{COLUMN}}" for p in plans),
        f"{'slots of a layer, mean':<{LABEL}}" + "".join(f"{_mean(p):>{COLUMN}}" for p in plans),
        f"{'memory factor':<{LABEL}}" + "".join(f"{p.memory_factor:>{COLUMN}.1f}" for p in plans),
        f"{_batch_label(fitting):<{LABEL}}" + "".join(f"{p.batch_size:>{COLUMN},}" for p in plans),
        "HBM of each chip, GiB",
    ]
    for name in held:
        lines.append(part(name, lambda plan, name=name: plan.step.hbm_bytes.get(name, 0), GIB))  # type: ignore[misc]
        if name == "cache":
            lines.append(part("  without its padding", lambda plan: plan.step.cache_bytes, GIB))
    lines += [
        part("total", lambda plan: plan.hbm_total_bytes, GIB),
        row("  left", lambda plan: f"{1 - plan.hbm_total_bytes / plan.hbm_limit_bytes:.0%}", "none"),
        "A step, estimated, ms",
    ]
    for name in spent:
        lines.append(part(name, lambda plan, name=name: plan.step.step_ms_by_part.get(name, 0.0)))  # type: ignore[misc]
    lines += [
        part("total", lambda plan: plan.step_ms),
        part("what HBM's bandwidth allows", lambda plan: plan.hbm_limit_ms),
        row("tokens/s", lambda plan: f"{plan.tokens_per_second:,.0f}"),
        row("tokens/s of a chip", lambda plan: f"{plan.tokens_per_second_per_chip:,.0f}"),
        row("million tokens a dollar", lambda plan: _millions(plan.tokens_per_dollar)),
    ]
    return lines


def _batch_label(plans: Sequence[DecodePlan]) -> str:
    return "batch, the largest that fits" if plans and all(plan.largest for plan in plans) else "batch"


def _policy(plan: Result) -> str:
    return "-" if plan.memory_factor == 1 else plan.policy


def _mean(plan: Result) -> str:
    mean = sum(plan.budgets) / len(plan.budgets)
    return f"{mean:,.0f}" if mean == int(mean) else f"{mean:,.1f}"


def _millions(tokens: float | None) -> str:
    return "-" if tokens is None else f"{tokens / 1e6:,.1f}"
