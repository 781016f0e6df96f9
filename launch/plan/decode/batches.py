"""The largest batch that fits, by the compiler's own words: found by compiling.

Sizes are tried that have at most five binary digits before their zeros: 1, 2, ..., 32, 34, ..., 64, 68 and so on, each
at most a sixteenth above the one before.
"""

import math
from collections.abc import Callable

DIGITS = 5
STRAIGHT = 3  # tries that take bytes to be in proportion to rows; then the interval is halved


def rounded_down(rows: int) -> int:
    """The largest of the sizes that is not above `rows`, which is at least 1."""
    step = 1 << max(rows.bit_length() - DIGITS, 0)
    return rows - rows % step


def next_up(rows: int) -> int:
    """The size after this one."""
    return rows + (1 << max(rows.bit_length() - DIGITS, 0)) if rows else 1


def largest_batch(used: Callable[[int], float], limit: float, fixed: float, guess: int) -> int:
    """The largest of the sizes that fits, 0 if not even one row does: the next one does not fit.

    Args:
      used: bytes that a program for so many rows needs, by compiling it, infinite if that is all that is known.
      limit: bytes of a chip.
      fixed: bytes that no row needs, about: those of the weights.
      guess: rows to begin with.
    """
    fits, refused, tries = 0, 0, 0  # the largest that does, the smallest that does not; 0 where none is known
    rows = rounded_down(max(guess, 1))
    while True:
        needed, tries = used(rows), tries + 1
        if needed <= limit:
            fits = rows
        else:
            refused = rows
        if refused == next_up(fits):
            return fits
        least = next_up(fits)
        if refused and (tries > STRAIGHT or math.isinf(needed)):
            aim = (least + refused) // 2
        else:  # as bytes grow with rows, the limit is met about here
            aim = int((limit - fixed) * rows / max(needed - fixed, 1.0))
        rows = max(rounded_down(max(min(aim, refused - 1) if refused else aim, 1)), least)
