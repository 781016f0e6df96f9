"""The whole path on this machine, as `make train` runs it: text, tokens, two trainings on an emulated pod, a report.

    python -m launch.demo --workdir runs/demo --report report

Half-way through the first training it sends its own trainer SIGTERM and starts it again with the same command, to show
that nothing is lost. Run again after an interruption, it goes on where it was.
"""

import argparse
import os
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path

from configs import demo
from data import corpus, prepare
from trainer.hosts.interrupt import EXIT_PREEMPTED

DEVICES = 8
VARIANTS = ("selective", "standard")


def main() -> None:
    """Runs the demo; exits 0 if all of it worked."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--workdir", type=Path, default=Path("runs/demo"), help="text, dataset and both runs")
    parser.add_argument("--report", type=Path, default=Path("report"), help="folder of the page")
    options = parser.parse_args()
    workdir, report_page = options.workdir, options.report / "index.html"
    results = {variant: workdir / variant / "result.json" for variant in VARIANTS}
    if report_page.exists() and all(path.exists() for path in results.values()):
        print(f"The work is done: see {report_page}. To do it again: rm -r {workdir} {options.report}")
        return
    start = time.monotonic()
    dataset = prepare_dataset(workdir)
    for variant in VARIANTS:
        train(variant, workdir / variant, dataset, interrupt_halfway=variant == VARIANTS[0])
    _say("Report")
    # Imported late and run here with one device: the page needs the models, the steps above no JAX.
    os.environ["JAX_PLATFORMS"] = "cpu"
    from launch.report import __main__ as report

    workdirs = {variant: workdir / variant for variant in VARIANTS}
    runs = report.write_report(workdirs, options.report, dataset_path=dataset)
    print(f"\n{report.terminal_table(runs)}\n")
    print(f"Done in {(time.monotonic() - start) / 60:.1f} minutes. The page: {report_page}")
    print(f"Watch the runs: {sys.executable} -m tensorboard.main --logdir {workdir}")


def prepare_dataset(workdir: Path) -> Path:
    """The embedded corpus as text in C4's format, then as a dataset; returns the dataset's folder."""
    text, dataset = workdir / "text", workdir / "data"
    _say("Text: the English documentation inside this Python installation")
    if not list(text.glob("c4-validation.*")):
        corpus.build(text)
    _say("Tokens: SentencePiece and ArrayRecord")
    vocab_size = demo.get_config().model.vocab_size
    inputs = ["--source=c4", "--input", f"{text}/c4-*.json.gz"]
    # A tokenizer trained on a fifth of the text is as good, and much sooner done.
    prepare.main([*inputs, f"--output={dataset}", f"--vocab-size={vocab_size}", "--sample-bytes=2000000"])
    return dataset


def train(variant: str, workdir: Path, dataset: Path, interrupt_halfway: bool) -> None:
    """Trains one variant as a process of its own on eight emulated devices."""
    command = [sys.executable, "-m", "trainer", f"--config=configs/demo.py:{variant}", f"--workdir={workdir}"]
    command.append(f"--config.data.path={dataset}")
    _say(f"Training the {variant} transformer\n$ {shlex.join(command)}")
    halfway = workdir / "checkpoints" / str(demo.get_config(variant).steps // 2)
    interrupt = interrupt_halfway and not halfway.exists()
    code = _run(command, interrupt_at=halfway if interrupt else None)
    if interrupt and code == EXIT_PREEMPTED:
        _say("Interrupted on purpose by SIGTERM, and saved. The same command goes on from there.")
        code = _run(command)
    if code:
        sys.exit(f"error: training the {variant} transformer failed with exit code {code}; see its output above")


def _run(command: list[str], interrupt_at: Path | None = None) -> int:
    """The command's exit code; it is sent SIGTERM once the checkpoint `interrupt_at` is there."""
    flags = f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count={DEVICES}".strip()
    # XLA's pool has a thread a device, and waits forever if collectives that may run at once hold all of them.
    threads = str(4 * DEVICES)
    process = subprocess.Popen(command, env=os.environ | {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": flags, "NPROC": threads})
    try:
        while interrupt_at is not None and process.poll() is None:
            if interrupt_at.exists():
                process.send_signal(signal.SIGTERM)
                interrupt_at = None
            time.sleep(0.2)
        return process.wait()
    except KeyboardInterrupt:  # the trainer got it too, and saves
        process.wait()
        sys.exit(EXIT_PREEMPTED)


def _say(text: str) -> None:
    print(f"\n== {text}", flush=True)


if __name__ == "__main__":
    main()
