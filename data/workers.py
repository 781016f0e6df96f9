"""Runs tasks in processes of their own on this machine: what a task takes is given back when it ends."""

import ctypes
import errno
import multiprocessing
import os
import signal
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator, MutableSequence
from dataclasses import dataclass
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from typing import Protocol, cast

from tqdm import tqdm

from data.errors import DataError, WorkError

_ATTEMPTS = 2
_REFRESH_SECONDS = 0.5

# Where a task is: [line of its input, or 0; how much of its `size` is done].
Position = MutableSequence[int]


class Task(Protocol):
    """Anything picklable with a size, in the progress bar's unit, and a name (`str`) for messages."""

    @property
    def size(self) -> int: ...


@dataclass
class _Running:
    task: Task
    attempt: int
    process: BaseProcess
    position: Position


def run_tasks(
    function: Callable[[Task, Position], None], tasks: Iterable[Task], progress: tqdm, *, workers: int
) -> Iterator[Task]:
    """Calls `function` with each task in a process of its own, at most `workers` at once; yields the tasks as they end.

    A process that dies (killed, out of memory) is retried once.

    Raises:
      DataError: `function` raised it.
      WorkError: `function` raised something else, or a process died again; the message names the task and its line.
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([function.__module__])
    waiting = deque((task, 1) for task in tasks)
    running: dict[Connection, _Running] = {}
    done = progress.n
    try:
        while waiting or running:
            while waiting and len(running) < workers:
                task, attempt = waiting.popleft()
                ours, theirs = context.Pipe()
                position = cast(Position, context.RawArray(ctypes.c_int64, 2))
                process = context.Process(target=_work, args=(theirs, function, task, position), daemon=True)
                process.start()
                theirs.close()
                running[ours] = _Running(task, attempt, process, position)
            for connection in cast("list[Connection]", wait(list(running), _REFRESH_SECONDS)):
                ended = running.pop(connection)
                if _succeeded(connection, ended):
                    done += ended.task.size
                    yield ended.task
                else:
                    waiting.appendleft((ended.task, ended.attempt + 1))
            progress.n = done + sum(worker.position[1] for worker in running.values())
            progress.refresh()
    finally:
        for worker in running.values():
            worker.process.kill()
            worker.process.join()


def _succeeded(connection: Connection, ended: _Running) -> bool:
    """False if the process died and may be tried again."""
    try:
        problem = connection.recv()
    except EOFError:
        ended.process.join()
        if ended.attempt < _ATTEMPTS:
            return False
        line = f":{ended.position[0]}" if ended.position[0] else ""
        raise WorkError(
            f"{ended.task}{line}: the worker died here {ended.attempt} times (exit code {ended.process.exitcode}; -9 "
            "is often a lack of memory); what is done is kept, run the same command again"
        ) from None
    finally:
        connection.close()
    ended.process.join()
    if problem:
        raise problem
    return True


def _work(connection: Connection, function: Callable, task: Task, position: Position) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the whole group; the parent ends its workers
    threading.Thread(target=_end_with_parent, args=(connection,), daemon=True).start()
    problem: DataError | None = None
    try:
        function(task, position)
    except DataError as error:
        problem = error
    except OSError as error:
        hint = "; free some space and run the same command again" if error.errno == errno.ENOSPC else ""
        problem = WorkError(f"{task}: {error}{hint}")
    except Exception as error:
        problem = WorkError(f"{task}: {type(error).__name__}: {error}")
    connection.send(problem)


def _end_with_parent(connection: Connection) -> None:
    """The parent never sends: the only thing to receive is the end of the pipe, when it is gone."""
    try:
        connection.recv()
    except (EOFError, OSError):
        os._exit(1)
