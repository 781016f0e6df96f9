"""One run at a time in a workdir.

The files in its folder `lease` are numbered, and the highest number counts: it says who holds the workdir, and its time
of change when that process last gave a sign of life. Whoever wants the workdir makes the next number, exclusively, so
that of several only one does. Ages are told by the storage's own clock, whatever the hosts' clocks say.
"""

import contextlib
import dataclasses
import functools
import json
import logging
import math
import os
import socket
import threading
import time
from collections.abc import Callable
from typing import Any

import fsspec
import jax

from trainer.checkpoints.disk import root_cause
from trainer.checkpoints.folder import checkpoint_folder
from trainer.errors import EXIT_FAILED, LeaseError
from trainer.hosts import last_words
from trainer.hosts.gather import Gatherer

LEASE_FOLDER = "lease"
LEASE_SECONDS = 60.0  # without a sign of life from another machine, after which the workdir may be taken from it
_RENEWAL_SECONDS = 10.0
_LOOK_SECONDS = 1.0  # between looks at a lease that may be held, or may have been taken
_PARTING_SECONDS = 2.0
logger = logging.getLogger("trainer")


@dataclasses.dataclass(frozen=True)
class Holder:
    """A process that has taken a workdir: the first of its pod."""

    host: str = "an unknown host"
    pid: int = 0
    processes: int = 1  # of its pod
    since: float = 0.0  # seconds since the epoch
    machine: str = ""  # where `pid` means something; empty if that is not known
    started: str = ""  # when the process began, as its machine counts: numbers of processes are used again

    def __str__(self) -> str:
        pod = f" and {self.processes - 1} more of its pod" if self.processes > 1 else ""
        since = time.strftime("%Y-%m-%d %H:%M:%S UTC", time.gmtime(self.since))
        return f"process {self.pid} on {self.host}{pod} since {since}"

    @property
    def is_here(self) -> bool:
        """Whether this machine can tell if it runs."""
        return self.machine != "" and self.machine == _machine() and not _is_hidden(self.pid)

    @property
    def is_gone(self) -> bool:
        """Whether it does not run any more, as far as this machine can tell; this process is never in its own way."""
        return self.is_here and (self.pid == os.getpid() or _start_of(self.pid) != self.started)


@dataclasses.dataclass(frozen=True)
class Sight:
    """What a workdir's lease looks like to somebody who only reads."""

    holder: Holder | None  # None: it was given back
    silent_seconds: float  # since the last sign of life, if this machine's clock and the storage's agree

    @property
    def is_held(self) -> bool:
        """Whether a process trains there."""
        if self.holder is None:
            return False
        return not self.holder.is_gone if self.holder.is_here else self.silent_seconds < LEASE_SECONDS


class Lease:
    """A workdir's, as one process sees it. As a context it gives back what was taken, but not after an error: saves may
    still be under way until the process has ended, which others then find out.
    """

    def __init__(self, on_exit: Callable[[int], None] = lambda code: None) -> None:
        """`on_exit` is called with the exit code before this process ends because the workdir was taken from it."""
        self._on_exit, self._stop, self._number = on_exit, threading.Event(), 0
        self._renewed = math.inf  # seconds of the monotonic clock: before the last sign of life that succeeded
        self._thread: threading.Thread | None = None

    def take(self, workdir: str) -> None:
        """Process 0 takes `workdir`, which must be there, for all of its pod; they wait for it. From now on it gives
        signs of life, and ends this process if another one has taken the workdir nevertheless.

        Raises:
          LeaseError: another process holds it, or storage does not let it be taken.
        """
        problem = None
        if jax.process_index() == 0:
            try:
                self._take(workdir)
            except LeaseError as error:
                problem = f"--workdir={workdir} {error}"
            except Exception as error:  # those of object stores have no base of their own
                problem = f"--workdir={workdir} cannot be taken: {root_cause(error)}"
        problem = Gatherer("lease", 3 * LEASE_SECONDS).from_first_host(problem)
        if problem is not None:
            raise LeaseError(problem)

    def confirm(self) -> None:
        """Call it before anything is written that another run would miss.

        Raises:
          LeaseError: another process may have taken the workdir, which this one has not been able to see for so long.
        """
        silent = time.monotonic() - self._renewed
        if silent > LEASE_SECONDS:
            raise LeaseError(f"no sign of life for {silent:.0f} s in {self._folder}: another run may have taken over")

    def __enter__(self) -> "Lease":
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if self._thread is None:
            return
        self._stop.set()
        if kind is None:
            thread = threading.Thread(target=self._give_back, args=(self._thread,), daemon=True)
            thread.start()
            thread.join(_PARTING_SECONDS)
            if thread.is_alive():
                logger.warning("%s cannot be given back: storage does not answer", self._folder)

    def _give_back(self, renewing: threading.Thread) -> None:
        renewing.join()
        try:
            self._storage.pipe_file(self._path(self._number), json.dumps({"free": str(self._holder)}).encode())
        except Exception as error:
            logger.warning("%s cannot be given back: %s", self._folder, error)

    def look(self, workdir: str) -> Sight | None:
        """Who holds `workdir`, as far as its files tell; None if nobody ever took it. Writes nothing.

        Raises:
          Exception: storage does not say; errors of object stores have no base of their own.
        """
        self._open(workdir)
        number = self._newest()
        return Sight(self._read(number), time.time() - self._changed(number)) if number else None

    def _open(self, workdir: str) -> None:
        self._folder = os.fspath(checkpoint_folder(workdir).parent / LEASE_FOLDER)
        # What others write must be seen at once.
        self._storage: Any = fsspec.core.url_to_fs(self._folder, use_listings_cache=False)[0]

    def _take(self, workdir: str) -> None:
        self._open(workdir)
        self._storage.makedirs(self._folder, exist_ok=True)
        seen = None
        while True:
            number = self._newest()
            holder = self._read(number)
            if holder is None or holder.is_gone:
                if self._make(number + 1):
                    break
                continue
            if holder.is_here:
                raise LeaseError(_in_use(holder))
            renewed = self._changed(number)
            silent = self._now() - renewed
            if silent > LEASE_SECONDS:
                logger.warning("%s has given no sign of life for %.0f s: taking over", holder, silent)
                if self._make(number + 1):
                    break
                continue
            if seen is None:
                logger.warning("the workdir was left by %s, or is in use: looking for %.0f s", holder, LEASE_SECONDS)
            elif seen != (number, renewed):
                raise LeaseError(_in_use(holder))
            seen = number, renewed
            time.sleep(_LOOK_SECONDS)
        self._thread = threading.Thread(target=self._renew, name="lease", daemon=True)
        self._thread.start()

    def _make(self, number: int) -> bool:
        """Whether this process holds the workdir now, by this number."""
        self._holder = Holder(
            socket.gethostname(), os.getpid(), jax.process_count(), time.time(), _machine(), _start_of(os.getpid())
        )
        self._content = json.dumps(dataclasses.asdict(self._holder)).encode()
        try:
            with self._storage.open(self._path(number), "xb") as stream:
                stream.write(self._content)
        except FileExistsError:
            try:
                if self._storage.cat_file(self._path(number)) != self._content:  # else an answer was lost on its way
                    return False
            except FileNotFoundError:
                return False
        except OSError:  # no space: nobody shall find half of it
            with contextlib.suppress(OSError):
                self._storage.rm_file(self._path(number))
            raise
        if self._newest() != number:  # it was taken and left since this process looked
            return False
        self._number = number
        for older in self._numbers():
            if older < number:
                with contextlib.suppress(Exception):
                    self._storage.rm_file(self._path(older))
        return True

    def _renew(self) -> None:
        trouble, self._renewed = False, time.monotonic()
        while not self._stop.wait(
            _LOOK_SECONDS if time.monotonic() - self._renewed > LEASE_SECONDS else _RENEWAL_SECONDS
        ):
            looked = time.monotonic()
            try:
                newest = self._newest()
                if newest > self._number:
                    break
                path = self._path(self._number)
                try:
                    self._storage.touch(path, truncate=False)  # needs no space
                except NotImplementedError:  # object stores change whole objects
                    self._storage.pipe_file(path, self._content)
                trouble, self._renewed = False, looked
            except Exception as error:  # of storage, which others may reach: they take over after LEASE_SECONDS
                if not trouble:
                    logger.warning("no sign of life can be written to %s for now: %s", self._folder, error)
                trouble = True
        else:
            return
        with contextlib.suppress(Exception):
            last_words.say(f"\nerror: the workdir was taken over by {self._read(newest)}; leaving without writing")
        try:
            self._on_exit(EXIT_FAILED)
        finally:
            os._exit(EXIT_FAILED)

    def _read(self, number: int) -> Holder | None:
        """Who holds the workdir by this number; None if nobody does any more."""
        if number == 0:
            return None
        try:
            content = json.loads(self._storage.cat_file(self._path(number)))
            return None if "free" in content else Holder(**content)
        except FileNotFoundError:
            return None  # a higher one is there now
        except (ValueError, TypeError):  # it is being written, or the process was killed while it wrote
            return Holder()

    def _path(self, number: int) -> str:
        return f"{self._folder}/{number}"

    def _numbers(self) -> list[int]:
        try:
            names = [path.rpartition("/")[2] for path in self._storage.ls(self._folder, detail=False)]
        except FileNotFoundError:  # an object store has no empty folders
            return []
        return [int(name) for name in names if name.isdecimal()]

    def _newest(self) -> int:
        return max(self._numbers(), default=0)

    def _changed(self, number: int) -> float:
        """When the file was last changed, by the storage's clock."""
        try:
            return self._storage.modified(self._path(number)).timestamp()
        except FileNotFoundError:
            return 0.0

    def _now(self) -> float:
        """The storage's clock."""
        probe = f"{self._folder}/now-{socket.gethostname()}-{os.getpid()}"
        self._storage.pipe_file(probe, b"now")
        now = self._storage.modified(probe).timestamp()
        self._storage.rm_file(probe)
        return now


def _in_use(holder: Holder) -> str:
    return f"is in use by {holder}; let that end first, or give another --workdir"


@functools.cache
def _machine() -> str:
    """This machine since it was started, and the space where its processes have numbers; empty if it does not say."""
    try:
        with open("/proc/sys/kernel/random/boot_id") as stream:
            return f"{stream.read().strip()} {os.readlink('/proc/self/ns/pid')}"
    except OSError:
        return ""


def _is_hidden(pid: int) -> bool:
    """Whether a process runs of which this machine says no more: another user's, where /proc hides those."""
    try:
        os.kill(pid, 0)
    except PermissionError:
        return not os.access(f"/proc/{pid}/stat", os.R_OK)
    except OSError:
        pass
    return False


def _start_of(pid: int) -> str:
    """When a process of this machine began; empty if it has ended."""
    try:
        with open(f"/proc/{pid}/stat") as stream:
            state, *fields = stream.read().rpartition(")")[2].split()
    except OSError:
        return ""
    return "" if state in "ZX" else fields[18]
