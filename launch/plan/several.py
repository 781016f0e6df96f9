"""Several compilations at once, with a word beforehand on how long they take, and a progress bar."""

import math
import os
import sys
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from typing import Any, TypeVar

from tqdm import tqdm

# Of one core, for a train step of d12 on an idle machine; larger models and longer contexts take longer.
MINUTES = 1.5
Result = TypeVar("Result")


def compile_all(one: Callable[[Any], Result], of: Sequence[Any], what: str, minutes: float = MINUTES) -> list[Result]:
    """`one(x)` for each x, several at once; in the order of `of`. Ctrl-C starts no more of them.

    `what` they are, such as "meshes", and how many minutes of a core each takes are for the person who waits.
    """
    print(announcement(len(of), what, workers(), minutes), file=sys.stderr)
    with ThreadPoolExecutor(workers()) as pool:
        try:
            futures = [pool.submit(one, x) for x in of]
            for _ in tqdm(as_completed(futures), total=len(futures), desc=f"Compiling {what}", unit="", ncols=79):
                pass
        except KeyboardInterrupt:
            pool.shutdown(wait=False, cancel_futures=True)  # the terminal has interrupted those that run
            raise
        return [future.result() for future in futures]


def announcement(number: int, what: str, at_once: int, minutes: float = MINUTES) -> str:
    """How many compilations there are, and how long they should take."""
    together = math.ceil(math.ceil(number / at_once) * minutes)
    return (
        f"Compiling {number} {what}, {at_once} at once: roughly {together} minutes; Ctrl-C stops.\n"
        f"({minutes} minutes of a core each, as d12 takes; larger models take longer.)"
    )


def workers() -> int:
    """How many programs to compile at once: a compilation uses about a core and a few GiB."""
    return min(os.cpu_count() or 1, 8)
