"""A long run of a tiny model with many restarts and resizes: does anything grow, or become slower?

    python benchmarks/soak.py [--steps=100000] [--restarts=200] [--seed=0] [--data DATASET --vocab-size N]

An emulated pod on this machine is killed, interrupted and started again on other numbers of hosts and other meshes, at
steps drawn by the seed. Prints what was seen in the first and in the last quarter of the starts on the first mesh:
medians over starts, of host 0. `make soak` runs all of it, which takes hours.
"""

import argparse
import dataclasses
import os
import random
import re
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from launch import demo

SHAPES = [  # hosts, devices of each, mesh
    (2, 4, {"data": 2, "fsdp": 4}),
    (1, 8, {"data": 1, "fsdp": 4, "context": 2}),
    (4, 2, {"data": 8}),
]
LOG_EVERY = 20  # steps


@dataclasses.dataclass
class Life:
    """What was seen of host 0 between one start and its end."""

    shape: int
    startup: float = 0.0  # seconds from the process's start to its first step
    step: float = 0.0  # seconds a step, over all but the first lines
    memory: float = 0.0  # MB, at the first line
    growth: float = 0.0  # MB more at the last line, per 1,000 steps
    files: int = 0  # open at the last line
    threads: int = 0
    workdir_files: int = 0
    workdir_size: float = 0.0  # MB


ROWS = {
    "start-up, s": "startup",
    "a step, ms": "step",
    "memory, MB": "memory",
    "growth, MB in 1,000 steps": "growth",
    "open files": "files",
    "threads": "threads",
    "files in the workdir": "workdir_files",
    "workdir, MB": "workdir_size",
}


def main() -> None:
    """Prints the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", help="a dataset; by default that of `make train`, made if need be")
    parser.add_argument("--vocab-size", type=int, default=2048, help="of that dataset")
    parser.add_argument("--steps", type=int, default=100_000, help="of the whole run")
    parser.add_argument("--restarts", type=int, default=200, help="spread over them at random")
    parser.add_argument("--seed", type=int, default=0, help="of when and how")
    options = parser.parse_args()
    generator = random.Random(options.seed)
    stops = sorted(generator.sample(range(2 * LOG_EVERY, options.steps - LOG_EVERY), options.restarts))
    data = options.data or demo.prepare_dataset(Path("runs/demo"))
    lives, shape = [], 0
    with tempfile.TemporaryDirectory() as folder:
        fields = {"data.path": data, "model.width": 1, "model.num_heads": 2, "model.vocab_size": options.vocab_size}
        fields |= {"context_length": 32, "batch_size": 16, "steps": options.steps, "log_every_steps": LOG_EVERY}
        fields |= {"eval.every_steps": max(1, options.steps // 20), "checkpoint.every_steps": 500}
        fields |= {"checkpoint.local_folder": f"{folder}/local", "checkpoint.local_every_steps": 100}
        for stop in [*stops, None]:
            life, code = live(Path(folder, "run"), fields, shape, stop, generator)
            lives.append(life)
            print(f"{len(lives) - 1} restarts, step {stop or options.steps}, exit code {code}: {life}", flush=True)
            shape = generator.choice([0, 0, 1, 2])
    alike = [life for life in lives if life.shape == 0 and life.step]
    quarter = max(1, len(alike) // 4)
    print(f"{options.steps:,} steps, {options.restarts} restarts, seed {options.seed}")
    print(f"{'':28}{'first quarter':>14}{'last quarter':>14}{'ratio':>8}")
    for name, field in ROWS.items():
        first, last = (
            statistics.median(getattr(x, field) for x in part) for part in (alike[:quarter], alike[-quarter:])
        )
        scale = 1000 if field == "step" else 1
        print(f"{name:28}{scale * first:14.1f}{scale * last:14.1f}{last / first if first else 0:8.2f}")


def live(
    workdir: Path, fields: dict[str, object], number: int, stop: int | None, generator: random.Random
) -> tuple[Life, int]:
    """One start, ended at step `stop` by a signal to a host or to the supervisor; None lets it finish."""
    hosts, devices, mesh = SHAPES[number]
    axes = {f"mesh.{axis}": mesh.get(axis, 1) for axis in ("data", "fsdp", "context", "tensor")}
    pod = [sys.executable, "-m", "launch.emulate", f"--hosts={hosts}", f"--devices-per-host={devices}", "--"]
    flags = [f"--config.{name}={value}" for name, value in (fields | axes).items()]
    process = subprocess.Popen(
        [*pod, "--config=configs/demo.py", f"--workdir={workdir}", *flags],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    assert process.stdout is not None
    life, pids, lines, told, seen = Life(number), [0], list[tuple[int, float, float]](), False, list[str]()
    for line in process.stdout:
        seen.append(line)
        if found := re.search(r"started host 0: process (.*)", line):
            pids = [int(pid) for pid in re.findall(r"(\d+)(?:,|$)", found[1])]
        if found := re.search(r"first step done ([\d.]+) s", line):
            life.startup = float(found[1])
        if not (found := re.search(r"step (\d+) loss", line)) or told:
            continue
        lines.append((int(found[1]), time.monotonic(), resident_megabytes(pids[0])))
        life.files, life.threads = (len(os.listdir(f"/proc/{pids[0]}/{kind}")) for kind in ("fd", "task"))
        if stop is not None and lines[-1][0] >= stop:
            told = True
            target = generator.choice([process.pid, *pids])
            os.kill(
                target, signal.SIGTERM if target == process.pid else generator.choice([signal.SIGTERM, signal.SIGKILL])
            )
    code = process.wait()
    if code not in (0, 70, 75, 134, 137):
        sys.exit(f"error: exit code {code}:\n{''.join(seen[-100:])}")
    if len(lines) > 2:
        (first, begun, memory), (last, ended, most) = lines[1], lines[-1]
        life.step, life.memory = (ended - begun) / (last - first), memory
        life.growth = (most - memory) / (last - first) * 1000
    paths = [path for path in workdir.rglob("*") if path.is_file()]
    life.workdir_files, life.workdir_size = len(paths), sum(path.stat().st_size for path in paths) / 1e6
    return life, code


def resident_megabytes(pid: int) -> float:
    with open(f"/proc/{pid}/statm") as stream:
        return int(stream.read().split()[1]) * os.sysconf("SC_PAGE_SIZE") / 1e6


if __name__ == "__main__":
    main()
