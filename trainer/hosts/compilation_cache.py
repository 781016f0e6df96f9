"""The compiled programs that a restart finds, so that it compiles nothing anew.

JAX takes what lies in its cache on trust: a flipped bit there computes other numbers, or crashes every start. Here an
entry is sealed, and verified before JAX reads it; and programs that a process died with, before they had run once, are
compiled anew. A seal tells damage, not malice: an entry is native code, and runs with this process's rights.
"""

import contextlib
import hashlib
import logging
import os
import threading
import uuid
from pathlib import Path
from typing import Any

import jax
from etils import epath
from jax._src import compilation_cache, compiler, distributed
from jax._src.compilation_cache_interface import CacheInterface

logger = logging.getLogger("trainer")
_SEAL_BYTES = hashlib.sha256().digest_size
_PARTING_SECONDS = 1.0


class SealedCache(CacheInterface):
    """Programs in a folder: `KEY.sealed` is the SHA-256 of the key and the program, then the program.

    `suspects` holds the keys of the programs that were loaded and have not been proven. While there are some, so does a
    file, by which the next process knows what a dead one was running.
    """

    def __init__(self, folder: epath.Path, suspects_file: Path | None) -> None:
        """Without a file, processes may share the folder at once, and nothing is held against one that died."""
        self._path, self._suspects_file = folder, suspects_file
        self._suspects: list[str] = []
        self._lock = threading.Lock()  # programs are compiled in several threads
        self._refused = False
        self._distrusted: set[str] | None = None  # not known before the first program is asked for

    def get(self, key: str) -> bytes | None:
        """The program; None if there is none, or none that can be trusted. The first call takes the suspects of the
        process before, which has to have ended.
        """
        with self._lock:
            if self._distrusted is None:
                self._distrusted = self._take_suspects()
        if key in self._distrusted:
            return None
        path = self._entry(key)
        try:
            content = path.read_bytes()
        except FileNotFoundError:
            return None
        except OSError as error:
            self._refuse(error)
            return None
        seal, program = content[:_SEAL_BYTES], content[_SEAL_BYTES:]
        if seal != _seal(key, program):
            logger.warning("%s is damaged: removing it, and compiling that program anew", path)
            self._remove(path)
            return None
        if self._suspects_file is not None:
            with self._lock, contextlib.suppress(OSError):  # a workdir that cannot be written is for others to report
                self._suspects.append(key)
                self._suspects_file.write_text("\n".join(self._suspects))
        return program

    def put(self, key: str, value: bytes) -> None:
        """Writes a program, whole or not at all; in place of one that was not trusted."""
        temporary = self._path / f"{uuid.uuid4().hex}.tmp"  # other hosts may write the same program
        try:
            self._path.mkdir(parents=True, exist_ok=True)
            temporary.write_bytes(_seal(key, value) + value)
            temporary.replace(self._entry(key))
        except OSError as error:
            self._remove(temporary)
            self._refuse(error)
            return
        if self._distrusted is not None:
            self._distrusted.discard(key)

    def prove(self) -> None:
        """All programs loaded so far have run, or this process ends for another reason."""
        if self._suspects and self._suspects_file is not None:
            with self._lock, contextlib.suppress(OSError):
                self._suspects.clear()
                self._suspects_file.unlink(missing_ok=True)

    def _take_suspects(self) -> set[str]:
        keys = set[str]()
        if self._suspects_file is None:
            return keys
        with contextlib.suppress(OSError):  # mostly there is no file
            keys.update(self._suspects_file.read_text(errors="replace").split())
        if keys:
            found = f"the last start died with {len(keys)} programs from {self._path} that had not run once"
            logger.warning("%s: compiling them anew", found)
        for key in keys:
            if "/" not in key:
                self._remove(self._entry(key))
        with contextlib.suppress(OSError):
            self._suspects_file.unlink(missing_ok=True)
        return keys

    def _refuse(self, error: OSError) -> None:
        if not self._refused:
            logger.warning("compiled programs cannot be kept, so a restart compiles them anew: %s", error)
        self._refused = True

    def _entry(self, key: str) -> epath.Path:
        return self._path / f"{key}.sealed"  # not JAX's own name, so that programs without seals can share the folder

    def _remove(self, path: epath.Path) -> None:
        with contextlib.suppress(OSError):  # of a cache that can only be read
            path.unlink(missing_ok=True)


_cache: SealedCache | None = None  # JAX has one, too


def open_cache(folder: str, workdir: str) -> None:
    """Lets JAX keep compiled programs. Call it after the processes have joined, before anything is compiled; and take
    the workdir before anything is, too, since what a start left there that died is then judged.

    Args:
      folder: A path or a URL; if empty JAX_COMPILATION_CACHE_DIR, or else `compilation_cache` in the workdir. Whoever
        may write to a bucket shall not thereby run code: of a workdir that is a URL it is on this host's own disk.
      workdir: Of the run.
    """
    global _cache
    own = _own_folder(workdir)
    state = distributed.global_state
    given = folder or os.environ.get("JAX_COMPILATION_CACHE_DIR")
    _cache = _use(given or f"{own}/compilation_cache", own / f".unproven_programs-{state.process_id}")
    # JAX lets process 0 alone write. On TPU all hosts share a key; on CPU a key holds the process's own topology, so
    # that the others would compile at every restart, and process 0 would wait for them.
    is_shared = given is not None or own == Path(workdir)
    if state.num_processes > 1 and (jax.default_backend() == "cpu" or not is_shared):
        _let_every_process_write()


def open_shared_cache() -> None:
    """The same for commands, of which several may run at once: in the user's cache folder, or where
    JAX_COMPILATION_CACHE_DIR says.
    """
    _use(os.environ.get("JAX_COMPILATION_CACHE_DIR") or str(_users_folder() / "compiled"), None)


def prove() -> None:
    """Call it when a step has been read: whatever was loaded before has run."""
    if _cache is not None:
        _cache.prove()


def part() -> None:
    """Call it when this process ends on its own, and not for a program's sake. Does not wait for storage that hangs."""
    thread = threading.Thread(target=prove, daemon=True)
    thread.start()
    thread.join(_PARTING_SECONDS)


def _seal(key: str, program: bytes) -> bytes:
    digest = hashlib.sha256(key.encode())
    digest.update(program)
    return digest.digest()


def _own_folder(workdir: str) -> Path:
    if "://" not in workdir:
        return Path(workdir)
    folder = _users_folder() / hashlib.sha256(workdir.encode()).hexdigest()[:16]
    with contextlib.suppress(OSError):
        folder.mkdir(parents=True, exist_ok=True)
    return folder


def _users_folder() -> Path:
    return Path(os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache"), "selective-attention-trainer")


def _use(folder: str, suspects_file: Path | None) -> SealedCache:
    cache = SealedCache(epath.Path(folder), suspects_file)
    compilation_cache.get_file_cache = lambda path: (cache, path)
    jax.config.update("jax_compilation_cache_dir", folder)
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
    # XLA's own caches lie in the folder, and their path would be part of every key: of a run that was moved none would
    # be found.
    jax.config.update("jax_persistent_cache_enable_xla_caches", "none")
    return cache


def _let_every_process_write() -> None:
    write, lock = compiler._cache_write, threading.Lock()  # programs are compiled in several threads

    def write_as_process_0(*arguments: Any) -> None:
        state = distributed.global_state
        with lock:
            process_id, state.process_id = state.process_id, 0
            try:
                write(*arguments)
            finally:
                state.process_id = process_id

    compiler._cache_write = write_as_process_0  # type: ignore[assignment]
