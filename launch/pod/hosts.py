"""The hosts of a slice, over ssh: one connection each, since gcloud mixes the output of several."""

import concurrent.futures
import dataclasses
import shlex
import threading
from pathlib import Path

from .gcloud import Gcloud, Kind, reason_of, seconds
from .record import Run
from .terminal import printable, say

# At once: more handshakes through one path are unreliable.
PARALLEL = 16
SSH_KEY = Path.home() / ".ssh/google_compute_engine"
# ssh ends by itself when the other side does not answer.
ALIVE = [
    f"--ssh-flag=-o{option}" for option in ("ConnectTimeout=30", "ServerAliveInterval=15", "ServerAliveCountMax=8")
]
# Whoever sets a run up first has its home on the host; a watcher with another name on its machine acts for that user.
_AS_OWNER = (
    "as=; user=$(systemctl show --property=User --value trainer-{}); "
    '[ "${{user:-$(id -un)}}" = "$(id -un)" ] || as="sudo -H -u $user"; cd / && $as bash -c'
)
LIMITS = {"setup": 1800.0, "start": 240.0, "stop": 240.0}


def ssh_command(run: Run, attempt: int, host: int, verb: str) -> list[str]:
    """The call that lets launch/host.sh do setup, start or stop on a host.

    What is in the remote command was checked against patterns that hold no character of the shell.
    """
    home, code = f"runs/{run.name}", f"runs/{run.name}/code-{run.tree}"
    remote = {
        # The hashes come over ssh: what others may have written to the bucket is not executed, nor says what is.
        "setup": f"umask 077 && mkdir -p {code} && "
        f"gcloud storage cp --quiet {run.url}/code/{run.tree}.tar.gz {home}/code.tar.gz && "
        f'echo "{run.code_sha256}  {home}/code.tar.gz" | sha256sum --check --quiet && '
        f"tar -xzf {home}/code.tar.gz -C {code} && "
        f"bash {code}/launch/host.sh setup {run.name} {run.url} {run.tree} {attempt} {host} {run.flags_sha256}",
        "start": f"bash {code}/launch/host.sh start {run.name}",
        "stop": f"test ! -e {home}/current || bash {home}/current/launch/host.sh stop {run.name}",
    }[verb]
    command = f"{_AS_OWNER.format(run.name)} {shlex.quote(f'cd && {remote}')}"
    return [*node_ssh(run, host), *ALIVE, f"--command={command}", "--quiet"]


def node_ssh(run: Run, host: int) -> list[str]:
    slice_index, worker = divmod(host, run.topology.num_hosts)
    command = ["compute", "tpus", "tpu-vm", "ssh", run.node(slice_index), *run.place, f"--worker={worker}"]
    if run.tunnel_through_iap:  # which only that track knows
        return ["alpha", *command, "--tunnel-through-iap"]
    return [*command, "--internal-ip"] if run.internal_ips else command


class Job:
    """Verbs, one after another, each on all hosts at once, in the background: the watcher goes on looking meanwhile."""

    def __init__(self, run: Run, attempt: int, *verbs: str) -> None:
        self.failure = ""
        self._run, self._attempt = run, attempt
        self._gcloud, self._ended, self._done = Gcloud(), threading.Event(), threading.Event()
        threading.Thread(target=self._work, args=(verbs,), daemon=True).start()

    def wait(self, limit: float | None) -> bool:
        """Whether it is done, after `limit` seconds at most."""
        return self._done.wait(limit)  # not join, after which a signal lets a thread at work look as if it had ended

    def end(self) -> None:
        """Ends what still runs."""
        self._ended.set()
        while not self.wait(0.1):
            self._gcloud.processes.end()

    def _work(self, verbs: tuple[str, ...]) -> None:
        try:
            for verb in verbs:
                if not self.failure and not self._ended.is_set():
                    self._on_all(verb)
        except Exception as error:  # what is not foreseen is a failure too, not a job without an end
            self.failure = f"{type(error).__name__}: {error}"
        finally:
            self._done.set()

    def _on_all(self, verb: str) -> None:
        # gcloud makes its key at the first call, and several at once would overwrite each other's.
        first = 0 if SSH_KEY.exists() else 1
        done = [self._on_one(host, verb) for host in range(first)]
        with concurrent.futures.ThreadPoolExecutor(PARALLEL) as pool:
            done += pool.map(lambda host: self._on_one(host, verb), range(first, self._run.hosts))
        failed = [host for host, ok in enumerate(done) if not ok]
        if failed and not self._ended.is_set():
            log = self._log(failed[0], verb)
            self.failure = f"host {failed[0]}: {verb} failed, see {log}: {_last_words(log)}"

    def _on_one(self, host: int, verb: str) -> bool:
        if self._ended.is_set():
            return False
        log, limit = self._log(host, verb), seconds(verb.upper(), LIMITS[verb])
        answer = self._gcloud.call(*ssh_command(self._run, self._attempt, host, verb), limit=limit, log=log)
        if not answer.ok and answer.error:
            with log.open("a") as file:
                file.write(f"ERROR: {answer.error}\n")
        return answer.ok

    def _log(self, host: int, verb: str) -> Path:
        return self._run.local / f"{verb}-{host}.log"


def _last_words(log: Path) -> str:
    lines = [line for line in log.read_text(errors="replace").splitlines() if line.strip()][-5:]
    return reason_of("\n".join([line for line in lines if "ERROR" in line][-1:] or lines[-1:]))


def save(run: Run, attempt: int) -> bool:
    """Lets the trainers save and stop, for as long as that may take."""
    job = Job(run, attempt, "stop")
    try:
        done = job.wait(seconds("STOP", LIMITS["stop"]))
    finally:  # Ctrl-C does not wait for hosts that hang
        job.end()
    if not done:
        say("not every host has stopped in time")
        return False
    if job.failure:
        say(job.failure)
    return not job.failure


@dataclasses.dataclass(frozen=True)
class Worker:
    """What the worker of a host last wrote of itself."""

    line: str  # the whole of it: a new one is a sign of life
    host: int
    state: str
    code: str
    restarts: str
    log_bytes: int
    detail: str


def read_workers(gcloud: Gcloud, run: Run, attempt: int) -> tuple[list[Worker], Kind]:
    """The workers that have written, in order of hosts."""
    if attempt == 0:
        return [], Kind.ABSENT
    answer = gcloud.cat(f"{run.url}/attempts/{attempt}/host-*.status")
    workers = []
    for line in printable(answer.out).splitlines() if answer.ok else []:
        host, state, code, restarts, size, _, detail = [*line.split(" ", 6), *[""] * 7][:7]
        if host.isdigit() and state:
            workers.append(Worker(line, int(host), state, code, restarts, int(size) if size.isdigit() else 0, detail))
    return sorted(workers, key=lambda worker: worker.host), answer.kind


def judge(workers: list[Worker]) -> tuple[str, str]:
    """The run's result by its workers, and which host and why: host 0 writes the result, so it decides if finished."""
    result, detail = "running", ""
    for worker in workers:
        why = f"host {worker.host}, exit code {worker.code}: {worker.detail}"
        if worker.state == "finished" and worker.host == 0:
            return "finished", ""
        if worker.state in ("mistake", "out_of_memory", "diverged", "corrupt"):
            result, detail = worker.state, why
        elif worker.state in ("crashed", "lost") and result in ("running", "lost"):
            # Of several hosts the one with the cause counts, not those that lost it.
            result, detail = worker.state, why
    return result, detail


def all_beat(workers: list[Worker], before: set[str], hosts: int) -> bool:
    """Whether every host is at work and has written something that is not in `before`."""
    at_work = [
        worker
        for worker in workers
        if worker.state == "finished" or (worker.state in ("running", "restarting") and worker.line not in before)
    ]
    return len(at_work) == hosts
