"""A pod on this machine: one process a host, each with emulated CPU devices, joined by `jax.distributed`.

    python -m launch.emulate --hosts 2 --devices-per-host 4 [--restart] -- \\
        --config=configs/demo.py --workdir=runs/pod --config.data.path=runs/demo/data

What follows `--` goes to the trainer of every host. SIGTERM and Ctrl-C go to all hosts, which save and exit; a second
one kills them. With --restart this is the pod's supervisor as well: when a host is preempted or crashes, it ends the
others and starts all of them again, as often as --max-restarts says, which counts anew from each newer checkpoint. The
exit code is that of the first host that ended with another one than 0.
"""

import argparse
import contextlib
import ctypes
import os
import queue
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Sequence

from trainer.checkpoints.reached import read_reached
from trainer.errors import ExitCode
from trainer.hosts import last_words

NO_RETRY = {code for code in ExitCode if not code.retried}
_SIGNALS = {signal.SIGTERM, signal.SIGINT}
_PR_SET_PDEATHSIG = 1
_LONGEST_PAUSE = 60.0
_STDOUT, _MOST_LINES, _CLOSING_SECONDS = 1, 10_000, 5.0


class Output:
    """Lines on stdout, written by a thread of their own: whoever reads them may stop, and the disk that they go to may
    be full, without the pod standing still. What cannot be written is dropped and counted.
    """

    def __init__(self) -> None:
        self._lines: queue.Queue[str | None] = queue.Queue(_MOST_LINES)
        self._dropped = 0
        self._thread = threading.Thread(target=self._write_all, name="output", daemon=True)
        self._thread.start()

    def say(self, line: str) -> None:
        """Returns at once."""
        try:
            self._lines.put_nowait(line)
        except queue.Full:
            self._dropped += 1

    def close(self) -> None:
        """Returns when everything is written, or nobody takes it; stderr then hears how much is missing."""
        with contextlib.suppress(queue.Full):
            self._lines.put(None, timeout=_CLOSING_SECONDS)
            self._thread.join(_CLOSING_SECONDS)
        missing = self._dropped + sum(line is not None for line in list(self._lines.queue)) + self._thread.is_alive()
        if missing:
            last_words.say(f"[pod] the last {missing} lines are missing: nobody took them, or there was no space")

    def _write_all(self) -> None:
        while (line := self._lines.get()) is not None:
            dropped = self._dropped
            if dropped:
                line = f"[pod] {dropped} lines are missing here: nobody took them, or there was no space\n{line}"
            try:
                content = f"{line}\n".encode(errors="replace")
                while content:
                    content = content[os.write(_STDOUT, content) :]
                self._dropped -= dropped
            except OSError:
                self._dropped += 1


class Pod:
    """The processes of one start."""

    def __init__(self, hosts: int, devices_per_host: int, trainer_flags: Sequence[str], output: Output) -> None:
        address = f"127.0.0.1:{_free_port()}"
        flags = [f for f in os.environ.get("XLA_FLAGS", "").split() if "host_platform_device_count" not in f]
        flags.append(f"--xla_force_host_platform_device_count={devices_per_host}")
        shared = {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": " ".join(flags), "PYTHONUNBUFFERED": "1"}
        shared |= {"COORDINATOR_ADDRESS": address, "NUM_PROCESSES": str(hosts)}
        self.processes = [
            subprocess.Popen(
                [sys.executable, "-m", "trainer", *trainer_flags],
                env=os.environ | shared | {"PROCESS_ID": str(host)},
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                text=True,
                errors="replace",
                start_new_session=True,  # Ctrl-C is passed on, not received twice
                preexec_fn=_die_with_parent,
            )
            for host in range(hosts)
        ]
        started = ", ".join(f"host {host}: process {p.pid}" for host, p in enumerate(self.processes))
        output.say(f"[pod] started {started}")
        self._printers = [
            threading.Thread(target=_pass_on, args=(host, process, output), daemon=True)
            for host, process in enumerate(self.processes)
        ]
        for printer in self._printers:
            printer.start()

    def send(self, number: int) -> None:
        """A signal to every host that still runs."""
        for process in self.processes:
            if process.poll() is None:
                process.send_signal(number)

    def first_end(self) -> int | None:
        """The exit code of a host that has ended badly, else 0 once all have ended, else None."""
        codes = [process.poll() for process in self.processes]
        bad = [code for code in codes if code not in (None, ExitCode.FINISHED)]
        if bad:
            return min(bad, key=lambda code: code not in NO_RETRY)  # a cause goes before its consequences
        return None if None in codes else ExitCode.FINISHED

    def end(self, grace_seconds: float) -> None:
        """Waits for all hosts; those that have not ended by themselves are killed."""
        deadline = time.monotonic() + grace_seconds
        for process in self.processes:
            try:
                process.wait(max(0.0, deadline - time.monotonic()))
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
        for printer in self._printers:
            printer.join()

    def codes(self) -> str:
        """Every host's exit code, for people."""
        return ", ".join(f"host {host}: {process.returncode}" for host, process in enumerate(self.processes))


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the pod; the exit code."""
    options, trainer_flags = _parse(sys.argv[1:] if argv is None else list(argv))
    with _signals_held():  # by its thread for ever, so that they come to this one
        output = Output()
    code = _supervise(options, trainer_flags, output)
    output.close()
    return 128 - code if code < 0 else code  # of a signal, as shells say it


def _supervise(options: argparse.Namespace, trainer_flags: Sequence[str], output: Output) -> int:
    """Starts the pod as often as it takes; how the last start ended."""
    interrupts = 0
    pod: Pod | None = None

    def interrupt(number: int, _: object) -> None:
        nonlocal interrupts
        interrupts += 1
        if pod is not None:
            pod.send(signal.SIGTERM if interrupts == 1 else signal.SIGKILL)

    for number in _SIGNALS:
        signal.signal(number, interrupt)
    reached, code = _newest_checkpoint(trainer_flags), int(ExitCode.PREEMPTED)
    restarts, pause = 0, options.backoff_seconds
    while True:
        with _signals_held():  # one that comes while hosts are started goes to all of them
            if interrupts:
                return code
            pod = Pod(options.hosts, options.devices_per_host, trainer_flags, output)
        while (first := pod.first_end()) is None:
            time.sleep(0.1)
        pod.end(options.grace_seconds)
        code = pod.first_end() or first
        output.say(f"[pod] all hosts have ended ({pod.codes()})")
        if code == ExitCode.CORRUPT:
            output.say(
                "[pod] not started again: a chip computes wrongly, and would again; replace the host named above"
            )
        if interrupts or not options.restart or code in NO_RETRY:
            return code
        if (newest := _newest_checkpoint(trainer_flags)) > reached:
            reached, restarts, pause = newest, 0, options.backoff_seconds
        if restarts == options.max_restarts:
            output.say(f"[pod] giving up after {restarts} restarts without a newer checkpoint")
            return code
        restarts += 1
        output.say(f"[pod] restart {restarts} of at most {options.max_restarts} in {pause:.0f} s")
        deadline = time.monotonic() + pause
        while not interrupts and time.monotonic() < deadline:
            time.sleep(0.05)
        pause = min(2 * pause, _LONGEST_PAUSE)


def _parse(argv: list[str]) -> tuple[argparse.Namespace, list[str]]:
    """The pod's own options, and the trainer's flags."""
    parser = argparse.ArgumentParser(
        prog="python -m launch.emulate", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--hosts", type=_positive, required=True, help="processes")
    parser.add_argument("--devices-per-host", type=_positive, required=True, help="emulated devices of each")
    parser.add_argument("--restart", action="store_true", help="start again after a preemption or a crash")
    parser.add_argument(
        "--max-restarts", type=_positive, default=100, help="give up after so many without a newer checkpoint (100)"
    )
    parser.add_argument("--backoff-seconds", type=float, default=1.0, help="pause before the first restart; doubles")
    parser.add_argument(
        "--grace-seconds", type=float, default=60.0, help="for the other hosts to end by themselves (default 60)"
    )
    separator = argv.index("--") if "--" in argv else len(argv)
    if {"-h", "--help"} & set(argv[:separator]):
        parser.parse_args(["--help"])
    if separator == len(argv):
        parser.error("give the trainer's flags after --, e.g. -- --config=configs/demo.py --workdir=runs/pod")
    options, unknown = parser.parse_known_args(argv[:separator])
    if unknown:
        parser.error(f"{unknown[0]} is no flag of the pod (--help lists them); the trainer's go behind --")
    return options, argv[separator + 1 :]


def _pass_on(host: int, process: subprocess.Popen[str], output: Output) -> None:
    assert process.stdout is not None
    for line in process.stdout:
        if not line.startswith("[Gloo] Rank "):  # dozens, all good news
            output.say(f"[host {host}] {line.rstrip()}")


@contextlib.contextmanager
def _signals_held() -> Iterator[None]:
    """Signals come when the block has ended. Processes that it starts hold them too, until they ask for them."""
    signal.pthread_sigmask(signal.SIG_BLOCK, _SIGNALS)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_UNBLOCK, _SIGNALS)


def _newest_checkpoint(trainer_flags: Sequence[str]) -> int:
    """The step of the newest checkpoint that the run has made; -1 if there is none."""
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument("--workdir")
    workdir = parser.parse_known_args(trainer_flags)[0].workdir
    try:
        reached = read_reached(workdir) if workdir else None
    except OSError:  # it will be asked again after the next start
        reached = None
    return -1 if reached is None else reached


def _die_with_parent() -> None:
    # However this program ends, no trainer stays: even one that hangs and would not hear SIGTERM.
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)


def _free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])


def _positive(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"{value} must be at least 1")
    return value


if __name__ == "__main__":
    sys.exit(main())
