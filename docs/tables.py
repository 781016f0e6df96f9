"""Writes the tables of these pages that the TPU compiler makes again, each with the commit that it was made at.

    make results [ONLY=WORD]    # WORD: part of the command above a table, such as sweep

A table follows a line that names its command and commit. So are the plans of the paper's experiments, which
`python -m configs.list` prints: those that are not in configs/plans.json yet. Takes six hours on two cores, of which
the experiments (ONLY=--json) take four; no TPU is needed. Stopped, it goes on with the experiment where it was.
"""

import json
import re
import shlex
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

from configs import experiments
from launch import slices

ROOT = Path(__file__).parents[1]
PLAN = "python -m launch.plan --config=configs/c4.py:d12"
KERNELS = "python benchmarks/tpu_kernels.py --generations v4,v5e,v5p,v6e"
DECODE = "python -m launch.plan --decode --memory-factor=1,4,16,47 --topology=v4-8 --config=configs/c4.py:"
PARTS = {"forward": "forward", "backward": "backward", "fwd": "forward", "dkv": "backward", "dq": "backward"}
FULL = {"standard": "full, standard model", "full": "full, selective model"}
DOES_NOT_FIT = 3  # exit code of launch.plan
PROGRAMS = {"selective": "ours, selective", "standard": "ours, selection off", "splash": "splash, no selection"}


def main() -> None:
    if _output("git status --porcelain --untracked-files=no"):
        sys.exit("error: a table names the commit that it was made at; commit what you have changed first")
    commit = _output("git rev-parse --short HEAD").strip()
    for command, made in TABLES.items():
        if all(word in command for word in sys.argv[1:]):
            print(f"== {command}", flush=True)
            _replace(command, commit, made(command))
    plan_experiments(commit, sys.argv[1:])


def plan_experiments(commit: str, words: list[str]) -> None:
    """Plans each config that has no figures yet and whose command has all of `words`; forgets those of no config."""
    configs = {name: experiments.load(name) for name in reversed(experiments.CONFIGS)}
    # The first of those whose step is the same, and none that is for a laptop.
    names = {experiments.step_key(config): name for name, config in configs.items() if not config.data.task}
    plans = {key: plan for key, plan in experiments.read_plans().items() if key in names}
    with tempfile.TemporaryDirectory() as folder:
        for key, name in reversed(names.items()):
            file = Path(folder, f"{key}.json")
            command = f"python -m launch.plan --config={name} --json"
            if key in plans or not all(word in command for word in words):
                continue
            print(f"== {command}", flush=True)
            _output(f"{command}={file}", allowed=(0, DOES_NOT_FIT))
            plans[key] = step_plan(json.loads(file.read_text()), commit)
            experiments.PLANS_FILE.write_text(json.dumps(plans, indent=1, sort_keys=True) + "\n")


def step_plan(plan: dict[str, Any], commit: str) -> experiments.StepPlan:
    """What configs/plans.json keeps of a plan."""
    price, date = slices.find(plan["topology"]).list_price
    return experiments.StepPlan(
        topology=plan["topology"],
        chips=plan["chips"],
        fits=plan["fits"],
        headroom=round(plan.get("headroom", 0.0), 4),
        step_ms=round(plan.get("step_ms", 0.0), 3),
        price=price,
        price_date=date,
        commit=commit,
    )


def printed(command: str) -> str:
    """What the command prints, as it is."""
    return f"```text\n{_output(command)}```"


def kernels(command: str) -> str:
    """Bundles of each pass, from the rows of benchmarks/tpu_kernels.py."""
    bundles: dict[tuple[str, str], dict[str, list[float]]] = {}
    for row in json.loads(_output(f"{command} --json")):
        passes = bundles.setdefault((row["generation"], row["program"]), {"forward": [], "backward": []})
        passes[PARTS[row["kernel"].split("_")[-1]]].append(row["bundles"])
    lines = ["| | | forward | backward | together |", "|---|---|---|---|---|"]
    for (generation, program), passes in bundles.items():
        shown = (" + ".join(f"{value:.2f}" for value in values) for values in passes.values())
        lines.append(
            f"| {generation} | {PROGRAMS[program]} | {' | '.join(shown)} | {sum(map(sum, passes.values())):.2f} |"
        )
    return "\n".join(lines)


def decoding(command: str) -> str:
    """A row for each cache of a plan of decoding."""
    with tempfile.NamedTemporaryFile() as file:
        _output(f"{command} --json={file.name}")
        return decoding_table(json.load(file)["plans"])


def decoding_table(plans: list[dict[str, Any]]) -> str:
    """The first of the plans is what the others are compared with; where chips talk, a column says how long."""
    baseline = plans[0]["tokens_per_second_per_chip"]
    talk = any(plan["step_ms_by_part"]["collectives"] for plan in plans)
    names = ["cache", "slots a layer", "batch", "ms a step", *["of which collectives"] * talk, "HBM allows"]
    names += ["tokens/s of a chip", "", "million tokens a dollar"]
    lines = ["|".join(["", *(f" {name} " if name else " " for name in names), ""]), "|---" * len(names) + "|"]
    for plan in plans:
        speed = plan["tokens_per_second_per_chip"]
        cells = (
            FULL.get(plan["name"], f"{plan['memory_factor']:.1f}x smaller"),
            f"{sum(plan['budgets']) / len(plan['budgets']):,.0f}",
            f"{plan['batch_size']:,}",
            f"{plan['step_ms']:.2f}",
            *[f"{plan['step_ms_by_part']['collectives']:.2f}"] * talk,
            f"{plan['hbm_limit_ms']:.2f}",
            f"{speed:,.0f}",
            f"{speed / baseline:.1f}x",
            f"{plan['tokens_per_dollar'] / 1e6:.1f}",
        )
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def under_a_line(command: str) -> str:
    """The table that the command prints under a line of its own."""
    return _output(command).partition("\n")[2]


TABLES: dict[str, Callable[[str], str]] = {
    KERNELS: kernels,
    "python benchmarks/tpu_kernels.py --decode": under_a_line,
    "python benchmarks/tpu_eviction.py --policies selective,tova,h2o": under_a_line,
    PLAN: printed,
    f"{DECODE}d12,n2048 --batch=128 --cache-dtype=int8": decoding,
    f"{DECODE}d12,n2048 --cache-dtype=int8": decoding,
    f"{DECODE}d12,n2048": decoding,
    f"{DECODE}d12,n2048 --batch=128": decoding,
    f"{DECODE}d28,n2048": decoding,
    f"{DECODE}d28,n2048 --batch=128": decoding,
    f"{DECODE}d28,n2048 --mesh=tensor=4": decoding,
    f"{PLAN} --topology=v4-16 --sweep": printed,
    f"{PLAN} --topology=v4-8,v4-32,v4-128,v4-512,v4-2048": printed,
}


def find(command: str, page: str) -> re.Match[str] | None:
    """The line of a command, and the block of text or the table under it."""
    line = rf"`{re.escape(command)}`, commit `\w+`:\n\n"
    return re.search(rf"{line}(?:```text\n.*?```|(?:\|[^\n]*\n)*\|[^\n]*)", page, re.DOTALL)


def _replace(command: str, commit: str, table: str) -> None:
    for path in sorted((ROOT / "docs").glob("*.md")):
        page = path.read_text()
        if found := find(command, page):
            new = f"`{command}`, commit `{commit}`:\n\n{table.rstrip()}"
            path.write_text(page[: found.start()] + new + page[found.end() :])
            return
    sys.exit(f"error: no page has a table of {command}")


def _output(command: str, allowed: tuple[int, ...] = (0,)) -> str:
    words = [sys.executable if word == "python" else word for word in shlex.split(command)]
    done = subprocess.run(words, cwd=ROOT, stdout=subprocess.PIPE, text=True)
    if done.returncode not in allowed:
        sys.exit(f"error: {command} ended with exit code {done.returncode}")
    return done.stdout


if __name__ == "__main__":
    main()
