"""Time from a process's start to its first step, cold (nothing compiled yet) and warm (a restart of the same run).

    python benchmarks/restart.py [--data DATASET --vocab-size N]

Real processes on this machine: one with eight emulated devices, and a pod of 2 x 4. The config is `configs/demo.py` at
d = 4.
"""

import argparse
import os
import re
import signal
import subprocess
import sys
import tempfile
from pathlib import Path

from launch import demo

PROGRAMS = {
    "1 process x 8": ["trainer"],
    "2 processes x 4": ["launch.emulate", "--hosts=2", "--devices-per-host=4", "--"],
}


def main() -> None:
    """Prints the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", help="a dataset; by default that of `make train`, made if need be")
    parser.add_argument("--vocab-size", type=int, default=2048, help="of that dataset")
    options = parser.parse_args()
    data = options.data or demo.prepare_dataset(Path("runs/demo"))
    flags = ["--config=configs/demo.py", f"--config.data.path={data}", "--config.model.width=4"]
    flags += [f"--config.model.vocab_size={options.vocab_size}", "--config.context_length=64"]
    print(f"{'':<18}{'cold, s':>10}{'warm, s':>10}{'ratio':>8}")
    for name, program in PROGRAMS.items():
        with tempfile.TemporaryDirectory() as workdir:
            cold, warm = (first_step_seconds([*program, *flags, f"--workdir={workdir}"]) for _ in range(2))
        print(f"{name:<18}{cold:>10.1f}{warm:>10.1f}{warm / cold:>8.2f}", flush=True)


def first_step_seconds(command: list[str]) -> float:
    """As the trainer says it; the run is then told to save and stop."""
    device_count = "--xla_force_host_platform_device_count=8"
    environment = os.environ | {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": device_count}
    process = subprocess.Popen(
        [sys.executable, "-m", *command], env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    assert process.stdout is not None
    seconds, seen = 0.0, []
    for line in process.stdout:
        seen.append(line)
        if not seconds and (found := re.search(r"first step done ([\d.]+) s", line)):
            seconds = float(found[1])
            process.send_signal(signal.SIGTERM)
    process.wait()
    if not seconds:
        sys.exit(f"error: the trainer never made a step:\n{''.join(seen)}")
    return seconds


if __name__ == "__main__":
    main()
