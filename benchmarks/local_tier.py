"""What a save on the hosts' own storage keeps the training loop for, beside one in the workdir, on an emulated pod.

    python benchmarks/local_tier.py [--data DATASET --vocab-size N] [--width=6] [--steps=80] [--folder=/dev/shm]

Two processes of four devices on this machine, `configs/demo.py` at the given width. With fsdp = 8 every host also takes
its neighbour's shards; with data = 8 both hold everything, and nothing moves. What is printed are medians of what the
trainer itself says in TensorBoard.
"""

import argparse
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from launch import demo

EVERY, LOCAL_EVERY = 20, 4  # steps


def main() -> None:
    """Prints the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", help="a dataset; by default that of `make train`, made if need be")
    parser.add_argument("--vocab-size", type=int, default=2048, help="of that dataset")
    parser.add_argument("--width", type=int, default=6, help="of the model")
    parser.add_argument("--steps", type=int, default=80, help="of each run")
    parser.add_argument("--folder", help="for the hosts' own copies; by default a temporary one")
    options = parser.parse_args()
    data = options.data or demo.prepare_dataset(Path("runs/demo"))
    fields = {"data.path": data, "model.width": options.width, "model.vocab_size": options.vocab_size}
    fields |= {"context_length": 64, "batch_size": 16, "steps": options.steps, "eval.every_steps": 1_000_000}
    fields |= {"checkpoint.every_steps": EVERY, "checkpoint.local_every_steps": LOCAL_EVERY}
    print(f"{'median seconds':16}{'a step':>10}{'workdir save':>14}{'local save':>12}{'of it':>8}{'MB a host':>11}")
    for name, mesh in (("fsdp = 8", {"mesh.data": 1, "mesh.fsdp": 8}), ("data = 8", {"mesh.data": 8, "mesh.fsdp": 1})):
        with tempfile.TemporaryDirectory() as workdir, tempfile.TemporaryDirectory(dir=options.folder) as local:
            size = run(Path(workdir), Path(local), fields | mesh)
            events = EventAccumulator(f"{workdir}/tensorboard", size_guidance={"scalars": 0}).Reload()
            step, save, local_save = (
                statistics.median(event.value for event in events.Scalars(tag)[1:])  # the first one compiles
                for tag in ("train/step_seconds", "checkpoint/stall_seconds", "checkpoint/local_stall_seconds")
            )
        print(
            f"{name:16}{step:10.3f}{save:14.3f}{local_save:12.3f}{local_save / save:8.2f}{size / 1e6:11.1f}", flush=True
        )


def run(workdir: Path, local: Path, fields: dict[str, object]) -> int:
    """Trains; the bytes that a host keeps."""
    flags = [f"--config.{name}={value}" for name, value in (fields | {"checkpoint.local_folder": local}).items()]
    pod = [sys.executable, "-m", "launch.emulate", "--hosts=2", "--devices-per-host=4", "--"]
    process = subprocess.Popen(
        [*pod, "--config=configs/demo.py", f"--workdir={workdir}", "--config.log_every_steps=1", *flags],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    assert process.stdout is not None
    seen, size = [], 0
    for line in process.stdout:
        seen.append(line)
        size = max([size, *(arrays.stat().st_size for arrays in local.glob("*/host-0/*/arrays") if arrays.exists())])
    if process.wait():
        sys.exit(f"error: the pod failed:\n{''.join(seen)}")
    return size


if __name__ == "__main__":
    main()
