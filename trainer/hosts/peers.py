"""Watches the other hosts: whoever falls silent is named, and everybody leaves, instead of hanging in a collective.

JAX's coordination service notices a lost process too, but late, without its name, and by aborting from C++. Here every
host counts up a number of its own in the service's key-value store, and a thread reads everybody's. A host that leaves
says so there, so that the others need not wait for its silence.
"""

import ctypes
import os
import signal
import socket
import sys
import threading
import time
from typing import Any

from trainer.errors import EXIT_PEER_LOST, ExitCode
from trainer.hosts import compilation_cache, last_words
from trainer.hosts.key_value import KeyValueStore

_BEAT, _NAME, _LEFT = "peers/beat/", "peers/name/", "peers/left/"
_SHARED_CODES = {code for code in ExitCode if code.shared}
_PARTING_SECONDS = 2.0


class Peers:
    """The processes of a run, as this one sees them."""

    def __init__(self, store: KeyValueStore, process_id: int, num_processes: int, coordinator: str, name: str) -> None:
        """`coordinator` is the host:port of process 0."""
        self._store, self._id, self._number = store, process_id, num_processes
        self._coordinator = coordinator
        self._names = {process_id: name}
        self._last_beats: dict[int, tuple[str, float]] = {}  # of each host: its count, and when it last changed
        self._last_reply = time.monotonic()
        self._leaving = threading.Event()

    def watch(self, timeout_seconds: float) -> None:
        """Starts the threads that end this process when a host is silent for `timeout_seconds`."""
        self._timeout = timeout_seconds
        self._interval = min(1.0, timeout_seconds / 8)
        self._store.put(f"{_NAME}{self._id}", self._names[self._id])
        _handle_abort(self._on_abort)
        for target in (self._beat, self._watch_replies):
            threading.Thread(target=target, name=f"peers-{target.__name__}", daemon=True).start()

    def leave(self, code: int) -> None:
        """Tells the others that this host exits with `code`, on its own; process 0 gives them time to hear it."""
        self._leaving.set()
        # The call has no deadline of its own, and the coordinator may be what is gone.
        said = threading.Thread(target=self._say_left, args=(code,), daemon=True)
        said.start()
        said.join(_PARTING_SECONDS)
        if self._id == 0:
            time.sleep(_PARTING_SECONDS)  # its end takes the store with it

    def wait_for_verdict(self) -> None:
        """After a failed collective: sleeps long enough for the threads to end this process if another host is gone."""
        time.sleep(self._timeout + 2 * self._interval)

    def stop_watching(self) -> None:
        """Call when all hosts end together, before `jax.distributed.shutdown`: silence means nothing any more."""
        self._leaving.set()

    def _say_left(self, code: int) -> None:
        try:
            self._store.put(f"{_LEFT}{self._id}", str(code))
        except Exception as error:
            last_words.say(f"could not tell the other hosts: {error}")

    def _beat(self) -> None:
        count = 0
        while not self._leaving.wait(self._interval):
            count += 1
            try:
                self._store.put(f"{_BEAT}{self._id}", str(count))
                beats = self._store.by_host(_BEAT)
                if len(self._names) < self._number:
                    self._names |= self._store.by_host(_NAME)
                left = self._store.by_host(_LEFT)
            except Exception as error:
                # With the coordinator gone JAX aborts this process a moment later: be quicker.
                if not self._leaving.is_set():
                    self._exit(f"{self._describe(0)} does not answer ({_last_line(error)})", EXIT_PEER_LOST)
                return
            now = self._last_reply = time.monotonic()
            for host, code in left.items():
                exit_code = int(code) if int(code) in _SHARED_CODES else EXIT_PEER_LOST
                self._exit(f"{self._describe(host)} has left with exit code {code}", exit_code)
            for host in range(self._number):
                beat = beats.get(host, "")
                if host not in self._last_beats or self._last_beats[host][0] != beat:
                    self._last_beats[host] = beat, now
                elif now - self._last_beats[host][1] > self._timeout:
                    silence = now - self._last_beats[host][1]
                    self._exit(f"{self._describe(host)} has been silent for {silence:.1f} s", EXIT_PEER_LOST)

    def _watch_replies(self) -> None:
        # A coordinator that is stopped, not dead, lets the calls of the other thread wait for ever.
        while not self._leaving.wait(self._interval):
            silence = time.monotonic() - self._last_reply
            if silence > self._timeout + 2 * self._interval:
                self._exit(f"{self._describe(0)} has not answered for {silence:.1f} s", EXIT_PEER_LOST)

    def _describe(self, host: int) -> str:
        role = ", the coordinator" if host == 0 else ""
        return f"host {host} of {self._number} ({self._names.get(host, 'name unknown')}{role})"

    def _exit(self, message: str, code: int) -> None:
        if self._leaving.is_set():  # this host is on its way out already
            return
        self._leaving.set()
        try:
            last_words.say(
                f"\nhost {self._id}: {message}; leaving with exit code {code}", stacks=code == EXIT_PEER_LOST
            )
            compilation_cache.part()
            if self._id == 0:
                time.sleep(_PARTING_SECONDS)  # its end aborts the others, who may be about to see the same
        finally:
            os._exit(code)

    def _on_abort(self) -> None:
        """JAX is aborting this process. If that is because of another host, say which and leave with our code."""
        silent = [
            host
            for host, (_, changed) in list(self._last_beats.items())
            if host != self._id and time.monotonic() - changed > self._timeout / 2
        ]
        if self._id != 0 and not _answers(self._coordinator):
            silent = [0]
        if silent:
            names = " and ".join(self._describe(host) for host in silent)
            message = f"\nhost {self._id}: {names} is gone; leaving with exit code {EXIT_PEER_LOST}\n"
            os.write(sys.stderr.fileno(), message.encode())
            os._exit(EXIT_PEER_LOST)


def _handle_abort(callback: Any) -> None:
    # Python's own signal handlers run in the main thread, later: an abort does not come back. So this one is C's.
    libc = ctypes.CDLL(None)
    handler_type = ctypes.CFUNCTYPE(None, ctypes.c_int)

    @handler_type
    def on_abort(_: int) -> None:
        libc.alarm(5)  # should this very handler hang
        callback()

    _handle_abort.keep = on_abort  # type: ignore[attr-defined]  # C holds no reference
    libc.signal.argtypes, libc.signal.restype = (ctypes.c_int, handler_type), ctypes.c_void_p
    libc.signal(signal.SIGABRT, on_abort)


def _answers(address: str) -> bool:
    host, _, port = address.rpartition(":")
    try:
        with socket.create_connection((host.strip("[]"), int(port)), timeout=1.0):
            return True
    except OSError:
        return False


def _last_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[-1]
