"""Plans as text for a terminal of 80 columns."""

from collections.abc import Sequence

from launch.plan.result import DoesNotFit, Impossible, Place, Plan, Remedy, Run, ScalingRow
from trainer.mesh import AXES

GIB = 2**30
LEFT_OUT = "Estimates: input, host and network jitter left out."


def plan_table(
    plan: Plan | DoesNotFit, price: float = 0.0, remedies: Sequence[Remedy] | None = None, listed: str = ""
) -> str:
    """One plan, whether it fits or not.

    Args:
      price: dollars for a chip-hour; without them nothing is said of the cost.
      remedies: what was tried to make it fit.
      listed: of when `price` is, if it is the list price.
    """
    mesh = ",".join(f"{axis}={plan.mesh[axis]}" for axis in AXES)
    batch = f"batch {plan.place.batch_size} x {plan.place.context_length}"
    lines = [f"{_place(plan.place)}, mesh {mesh}, {batch}", *_memory(plan)]
    if isinstance(plan, DoesNotFit):
        return "\n".join([*lines, *_remedies(remedies)])
    lines += ["", f"{'Step time, estimated':<34}{'ms':>10}"]
    parts = sorted(plan.step.step_ms_by_part.items(), key=lambda part: -part[1])
    lines += [f"  {part:<32}{ms:10.2f}" for part, ms in parts]
    speed = f"MFU {plan.mfu:.1%}, {plan.tokens_per_second:,.0f} tokens/s"
    lines += [f"  {'total':<32}{plan.step_ms:10.2f}   {speed}"]
    if plan.step.collectives:
        lines += ["", f"{'Collectives in a step':<36}{'chips':>6}{'by':>5}{'count':>8}{'MB':>12}{'ms':>10}"]
        for row in plan.step.collectives:
            what = f"{row['kind']} over {row['axes']}"
            sizes = f"{row['count']:8,.0f}{row['bytes'] / 1e6:12,.1f}{row['milliseconds']:10.2f}"
            lines.append(f"  {what:<34}{row['size']:6}{row['network']:>5}{sizes}")
        lines.append(f"  {'of these beside other work':<34}{plan.step.hidden_collectives_ms:41.2f}")
    return "\n".join([*lines, "", *_run(plan.run, price, listed), *_remedies(remedies), "", LEFT_OUT])


def sweep_table(plans: Sequence[Plan | DoesNotFit | Impossible]) -> str:
    """Meshes, the fastest first."""
    lines = [
        f"{'data':>6}{'fsdp':>6}{'context':>9}{'tensor':>8}{'step ms':>10}{'MFU':>8}{'collectives':>13}{'HBM left':>10}"
    ]
    for plan in plans:
        mesh = plan.mesh
        line = f"{mesh['data']:6}{mesh['fsdp']:6}{mesh['context']:9}{mesh['tensor']:8}"
        if not isinstance(plan, Plan):
            lines.append(f"{line}  {plan.error[:50]}")
        elif not plan.fits:
            lines.append(f"{line}  does not fit")
        else:
            moving = plan.step.step_ms_by_part.get("collectives", 0.0) / plan.step_ms
            lines.append(f"{line}{plan.step_ms:10.2f}{plan.mfu:8.1%}{moving:13.0%}{plan.headroom:10.0%}")
    return "\n".join([*lines, LEFT_OUT])


def scaling_table(rows: Sequence[ScalingRow]) -> str:
    """Weak scaling, then strong."""
    titles = {"weak": "Weak scaling: as much for each chip", "strong": "Strong scaling: the same batch"}
    lines: list[str] = []
    for kind, title in titles.items():
        head = f"{'chips':>6}{'batch':>8}{'step ms':>10}{'MFU':>8}{'tokens/s':>14}{'efficiency':>12}"
        lines += [title, f"  {'':<10}{head}"]
        for row in (row for row in rows if row["scaling"] == kind):
            line = f"  {row['topology']:<10}{row['chips']:6}{row['batch_size']:8}"
            if "error" in row:
                reason = row["error"].removeprefix(f"--topology={row['topology']}: ")
                lines.append(f"{line}  {_short(reason, 52)}")
                continue
            speed = f"{row['mfu']:8.1%}{row['tokens_per_second']:14,.0f}{row['efficiency']:12.0%}"
            lines.append(f"{line}{row['step_ms']:10.2f}{speed}")
        lines.append("")
    return "\n".join([*lines, LEFT_OUT])


def _place(place: Place) -> str:
    slices = f"{place.slices} x " if place.slices > 1 else ""
    return f"{slices}{place.topology}: {place.chips} chips"


def _memory(plan: Plan | DoesNotFit) -> list[str]:
    lines = ["", f"{'HBM of each chip, by the compiler':<34}{'GiB':>10}"]
    lines += [f"  {part:<32}{size / GIB:10.2f}" for part, size in plan.step.hbm_bytes.items()]
    limit = plan.hbm_limit_bytes / GIB
    if isinstance(plan, DoesNotFit):
        what = "this batch" if plan.step.shortage.needed_bytes is not None else "this model"
        return [*lines, "", f"Does NOT fit: {plan.place.topology} is too small for {what}:", f"  {plan.error}"]
    verdict = f"fits: {plan.headroom:.0%} of {limit:.2f} left" if plan.fits else f"does NOT fit {limit:.2f}"
    return [*lines, f"  {'total':<32}{plan.hbm_total_bytes / GIB:10.2f}   {verdict}"]


def _run(run: Run, price: float, listed: str) -> list[str]:
    every = run.checkpoint_every_seconds
    lines = [
        f"The run: {run.steps:,} steps, {run.tokens:,} tokens",
        f"  estimated: {run.days:.2f} days, {run.chip_hours:,.0f} chip-hours",
        f"  a checkpoint: {run.checkpoint_bytes / GIB:.2f} GiB every {every / 60:.1f} minutes (estimated); "
        f"{run.checkpoints_kept} kept: {run.checkpoints_kept_bytes / GIB:,.0f} GiB",
        f"  data for one epoch: {run.dataset_bytes_for_one_epoch / 1e9:,.0f} GB",
    ]
    if run.epochs is not None:
        lines[-1] += f"; this dataset of {run.dataset_tokens:,} tokens: {run.epochs:,.1f} epochs"
    if price:
        source = f" (list of {listed}, on demand)" if listed else ""
        lines.append(f"  at {price:g} dollars a chip-hour{source}: {price * run.chip_hours:,.0f} dollars")
    return lines


def _remedies(remedies: Sequence[Remedy] | None) -> list[str]:
    if remedies is None:
        return []
    lines = ["", "What would make it fit, each compiled:"]
    for row in remedies:
        verdict = (
            _short(row["needs"])
            if "needs" in row
            else (f"fits, {row['headroom']:.0%} left, estimated {row['step_ms']:.1f} ms a step")
        )
        lines += [*(f"  {flag}" for flag in row["change"].split(" ")), f"      {verdict}"]
    if not any("step_ms" in row for row in remedies):
        lines.append("Not enough: choose a larger slice, or a smaller --config.batch_size.")
    return lines


def _short(text: str, width: int = 72) -> str:
    return text if len(text) <= width else f"{text[: width - 3]}..."
