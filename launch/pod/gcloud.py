"""Calling gcloud: every call ends in time, and what it says is sorted: "failed" never means "does not exist"."""

import contextlib
import dataclasses
import enum
import os
import signal
import subprocess
import threading
import time
from collections.abc import Callable
from pathlib import Path

from .terminal import printable


def seconds(name: str, default: float) -> float:
    """A time that tests shorten."""
    return float(os.environ.get(f"TPU_POD_{name}_SECONDS", default))


class Kind(enum.StrEnum):
    OK = "ok"
    AUTH = "auth"
    INVALID = "invalid"
    RATE = "rate"
    NO_QUOTA = "no-quota"
    QUOTA = "quota"
    CAPACITY = "capacity"
    CONFLICT = "conflict"
    EXISTS = "exists"
    PERMISSION = "permission"
    ABSENT = "absent"
    NETWORK = "network"  # and everything that is not known


# Order matters: a name that cannot be resolved is reported as tokens that cannot be refreshed; a rate limit and a quota
# both come as 429, followed by a remark about network connectivity.
_TEXTS: tuple[tuple[Kind, tuple[str, ...]], ...] = (
    (Kind.NETWORK, ("Max retries exceeded", "Failed to resolve", "Name or service not known", "NameResolutionError",
                    "Temporary failure in name resolution", "Unable to find the server")),
    (Kind.AUTH, ("do not currently have an active account", "refreshing your current auth tokens", "Reauthentication",
                 "invalid_grant", "UNAUTHENTICATED", "Failed to load credential file", "credentials file")),
    (Kind.INVALID, ("Invalid choice", "Reservation not found", "LOCATION_POLICY_VIOLATED",
                    "could not be found in the zonal accelerator")),
    (Kind.RATE, ("Quota exceeded for quota metric", "RATE_LIMIT_EXCEEDED", "rateLimitExceeded")),
    (Kind.NO_QUOTA, ()),
    (Kind.QUOTA, ("Quota limit '", "Quota '", "ForTPUAPI")),
    (Kind.CAPACITY, ("no more capacity", "nsufficient reserved capacity", "nsufficient capacity")),
    (Kind.CONFLICT, ("HTTPError 412", "conditionNotMet", "recondition", "pre-condition")),
    (Kind.EXISTS, ("ALREADY_EXISTS", "already exists")),
    (Kind.PERMISSION, ("PERMISSION_DENIED", "Permission '", "does not have", "Read access to project",
                       "HTTPError 403", "is not authorized")),
    (Kind.ABSENT, ("NOT_FOUND", "was not found", "matched no objects", "not found: 404", "HTTPError 404")),
    (Kind.INVALID, ("INVALID_ARGUMENT", "is not supported", "Invalid value", "unrecognized arguments")),
    (Kind.RATE, ("'status': 429", "Too Many Requests")),
)  # fmt: skip


def classify(error: str) -> Kind:
    """What an error of gcloud or of the service means; NETWORK where that is not known."""
    for kind, texts in _TEXTS:
        if kind is Kind.NO_QUOTA:
            if "uota" in error and ("Limit: 0" in error or "Limit 0 " in error):
                return kind
        elif any(text in error for text in texts):
            if texts[0] == "PERMISSION_DENIED" and "does not have" in error and "access" not in error:
                continue
            return kind
    return Kind.NETWORK


def reason_of(error: str) -> str:
    """The line of an error that says what is wrong."""
    lines = [line for line in printable(error).splitlines() if line.strip()]
    return next((line for line in lines if "ERROR" in line), lines[0] if lines else "gcloud said nothing")[:400]


@dataclasses.dataclass(frozen=True)
class Answer:
    kind: Kind
    out: str = ""
    error: str = ""

    @property
    def ok(self) -> bool:
        return self.kind is Kind.OK

    @property
    def reason(self) -> str:
        return reason_of(self.error)


class Processes:
    """Those that run now, so that all can be ended: each is a group, since gcloud starts ssh and others."""

    def __init__(self) -> None:
        self._running: set[subprocess.Popen[bytes]] = set()
        self._lock = threading.Lock()

    def run(self, command: list[str], limit: float, log: Path | None = None) -> tuple[int, str, str]:
        """The exit code, output and errors of a command, -1 if it did not end within `limit` seconds."""
        with contextlib.ExitStack() as stack:
            stdout = stderr = subprocess.PIPE
            if log is not None:
                stdout = stack.enter_context(log.open("wb")).fileno()
                stderr = subprocess.STDOUT
            process = subprocess.Popen(
                command, stdin=subprocess.DEVNULL, stdout=stdout, stderr=stderr, start_new_session=True
            )
            with self._lock:
                self._running.add(process)
            try:
                out, error = process.communicate(timeout=limit)
            except subprocess.TimeoutExpired:
                # Also after the process itself: what it left behind may hold its output open.
                with contextlib.suppress(ProcessLookupError, PermissionError):
                    os.killpg(process.pid, signal.SIGKILL)
                return -1, "", f"gcloud did not answer within {limit:.0f} s"
            finally:
                with contextlib.suppress(ProcessLookupError, PermissionError):
                    if process.poll() is None:
                        os.killpg(process.pid, signal.SIGKILL)
                process.wait()
                with self._lock:
                    self._running.discard(process)
        return process.returncode, (out or b"").decode(errors="replace"), (error or b"").decode(errors="replace")

    def end(self) -> None:
        with self._lock:
            for process in self._running:
                with contextlib.suppress(ProcessLookupError, PermissionError):
                    os.killpg(process.pid, signal.SIGKILL)


class Gcloud:
    def __init__(self) -> None:
        self.processes = Processes()
        self._limit, self._retry = seconds("CALL", 180), seconds("RETRY", 2)

    def call(self, *arguments: str, limit: float | None = None, log: Path | None = None) -> Answer:
        """Runs gcloud once; one that does not end within `limit` seconds is ended, and is a matter of the network."""
        try:
            code, out, error = self.processes.run(["gcloud", *arguments], limit or self._limit, log)
        except FileNotFoundError:
            return Answer(Kind.INVALID, error="gcloud is not installed; see cloud.google.com/sdk/docs/install")
        if code == 0:
            return Answer(Kind.OK, out.rstrip("\n"), error)
        return Answer(classify(error) if code > 0 else Kind.NETWORK, out.rstrip("\n"), error)

    def ask(self, *arguments: str) -> Answer:
        """A call that changes nothing, so it is tried again when the network or a rate limit is in the way."""
        return self._again(lambda: self.call(*arguments), (1, 2, 4, 8))

    def put(self, file: Path, url: str, *flags: str) -> Answer:
        slow = file.stat().st_size / 1e5  # seconds
        return self.call("storage", "cp", "--quiet", *flags, str(file), url, limit=self._limit + slow)

    def put_surely(self, file: Path, url: str) -> Answer:
        """Again and again for a while: losing it would lose the run's history."""
        return self._again(lambda: self.put(file, url), (1, 2, 4, 8, 16))

    def cat(self, url: str, *flags: str) -> Answer:
        return self.ask("storage", "cat", *flags, url)

    def _again(self, call: Callable[[], Answer], waits: tuple[int, ...]) -> Answer:
        end = time.monotonic() + self._limit  # a slice is not kept by calls that hang one after another
        for wait in waits:
            answer = call()
            if answer.kind not in (Kind.NETWORK, Kind.RATE) or time.monotonic() >= end:
                return answer
            time.sleep(self._retry * wait)
        return call()
