"""Runs tasks in processes of their own on this machine: what a task takes is given back when it ends."""

import errno
import multiprocessing
import os
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from typing import TypeVar, cast

from data.manifest import DataError

Task = TypeVar("Task")
Result = TypeVar("Result")
_ATTEMPTS = 2


def run_tasks(
    function: Callable[[Task], Result], tasks: Iterable[Task], workers: int, preload: str
) -> Iterator[tuple[Task, Result]]:
    """Yields (task, result) as tasks end, at most `workers` at once; `preload` is the module to load once for all.

    A process that dies (killed, out of memory) is retried once. Raises DataError, naming the task by its `str`, when it
    dies again or `function` raises something else than a DataError, which names it itself.
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([preload])
    waiting = deque((task, 1) for task in tasks)
    running: dict[Connection, tuple[BaseProcess, Task, int]] = {}
    try:
        while waiting or running:
            while waiting and len(running) < workers:
                task, attempt = waiting.popleft()
                ours, theirs = context.Pipe()
                process: BaseProcess = context.Process(target=_work, args=(theirs, function, task), daemon=True)
                process.start()
                theirs.close()
                running[ours] = (process, task, attempt)
            for connection in cast("list[Connection]", wait(list(running))):
                process, task, attempt = running.pop(connection)
                try:
                    succeeded, result = connection.recv()
                except EOFError:
                    process.join()
                    if attempt == _ATTEMPTS:
                        raise DataError(
                            f"{task}: the worker died {attempt} times (exit code {process.exitcode}; -9 is often a "
                            "lack of memory); what is done is kept, run the same command again"
                        ) from None
                    waiting.appendleft((task, attempt + 1))
                    continue
                finally:
                    connection.close()
                process.join()
                if not succeeded:
                    raise DataError(result)
                yield task, result
    finally:
        for child, _, _ in running.values():
            child.kill()


def _work(connection: Connection, function: Callable, task: object) -> None:
    threading.Thread(target=_end_with_parent, args=(connection,), daemon=True).start()
    try:
        connection.send((True, function(task)))
    except DataError as error:
        connection.send((False, str(error)))
    except OSError as error:
        hint = "; free some space and run the same command again" if error.errno == errno.ENOSPC else ""
        connection.send((False, f"{task}: {error}{hint}"))
    except Exception as error:
        connection.send((False, f"{task}: {type(error).__name__}: {error}"))


def _end_with_parent(connection: Connection) -> None:
    """The parent never sends: the only thing to receive is the end of the pipe, when it is gone."""
    try:
        connection.recv()
    except (EOFError, OSError):
        os._exit(1)
