"""Prints the paper's experiments: the configs of each, and what the plan says of them on their slices.

    python -m configs.list [NAME...]    # of experiments; by default all

Days and dollars are of the whole run, from the step's time by the TPU compiler (docs/plan.md) and the list price.
The figures are those of configs/plans.json, which `make results ONLY=--json` makes: compiling takes minutes a config.
One without them has been changed since, or was not planned yet; `python -m launch.plan --config=...` does it now.
"""

import signal
import sys
import textwrap

from ml_collections import ConfigDict

from configs.experiments import EXPERIMENTS, StepPlan, load, read_plans, step_key

WIDTH = 80  # of a terminal


def main(names: list[str]) -> None:
    """Prints the experiments of these names; ends with exit code 2 where there is none of a name."""
    for name in names:
        if name not in EXPERIMENTS:
            print(f"error: {name!r} is not an experiment; choose from {', '.join(EXPERIMENTS)}", file=sys.stderr)
            sys.exit(2)
    plans = read_plans()
    print("\n\n".join(describe(name, plans) for name in names or EXPERIMENTS))
    commits = sorted({plan["commit"] for plan in plans.values()})
    dates = sorted({plan["price_date"] for plan in plans.values() if plan["price_date"]})
    if commits:
        print(f"\nEstimates of python -m launch.plan, commit {', '.join(commits)}.")
        print(f"Dollars are on demand at the list prices of {', '.join(dates)}.")


def describe(name: str, plans: dict[str, StepPlan]) -> str:
    """One experiment as text: what to compare, then a line for each config."""
    experiment = EXPERIMENTS[name]
    lines = textwrap.wrap(f"{name}: {experiment.compare}", WIDTH)
    lines.append(f"  {'--config':<42}{'slice':<7}{'HBM left':>9}{'days':>8}{'dollars':>11}")
    for config in experiment.configs:
        loaded = load(config)
        lines.append(f"  {config:<42}{_figures(loaded, plans.get(step_key(loaded)))}")
    return "\n".join(lines)


def _figures(config: ConfigDict, plan: StepPlan | None) -> str:
    if config.data.task:
        return "this machine"
    if plan is None:
        return f"{config.mesh.topology:<7}not planned"
    if not plan["fits"]:
        return f"{plan['topology']:<7}does not fit"
    days = config.steps * plan["step_ms"] / 1e3 / 86_400
    dollars = f"{days * 24 * plan['chips'] * plan['price']:11,.0f}" if plan["price"] else ""
    return f"{plan['topology']:<7}{plan['headroom']:9.0%}{days:8.2f}{dollars}"


if __name__ == "__main__":
    signal.signal(signal.SIGPIPE, signal.SIG_DFL)  # for `| head`
    main(sys.argv[1:])
