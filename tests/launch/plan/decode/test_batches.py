"""The largest batch that fits, where what a program needs is known beforehand."""

import itertools
import math

import pytest

from launch.plan.decode.batches import largest_batch, next_up, rounded_down

LIMIT, WEIGHTS = 30.75, 0.34  # GiB
NEEDS = {
    "in proportion": lambda rows: WEIGHTS + 0.07 * rows,
    "of tiny rows": lambda rows: WEIGHTS + 0.0007 * rows,
    "growing faster": lambda rows: WEIGHTS + 0.01 * rows + 0.0003 * rows**2,
    "growing slower": lambda rows: WEIGHTS + 2 * math.sqrt(rows),
    "in steps": lambda rows: WEIGHTS + 0.07 * (-(-rows // 100) * 100),
    "with a refusal that says no number": lambda rows: WEIGHTS + 0.01 * rows if rows < 700 else math.inf,
    "with a refusal that says little": lambda rows: WEIGHTS + 0.01 * rows if rows < 700 else 31.0,
    "of one row a chip": lambda rows: 20.0 * rows,
}


@pytest.mark.parametrize("guess", [1, 37, 1000, 1_000_000])
@pytest.mark.parametrize("needs", NEEDS.values(), ids=NEEDS)
def test_the_next_larger_batch_does_not_fit(needs, guess):
    tried = []

    def used(rows: int) -> float:
        tried.append(rows)
        return needs(rows)

    found = largest_batch(used, LIMIT, WEIGHTS, guess)
    sizes = [1]
    while needs(next_up(sizes[-1])) <= LIMIT:
        sizes.append(next_up(sizes[-1]))
    assert found == sizes[-1]
    assert {found, next_up(found)} <= set(tried)  # both by the compiler's own words
    assert len(tried) == len(set(tried))


def test_it_is_found_by_three_programs_where_the_guess_is_good():
    tried = []
    largest_batch(lambda rows: tried.append(rows) or NEEDS["in proportion"](rows), LIMIT, WEIGHTS, guess=380)
    assert len(tried) <= 3


def test_a_row_that_does_not_fit_is_no_batch():
    assert largest_batch(lambda rows: 40.0 * rows, LIMIT, WEIGHTS, guess=1) == 0


def test_sizes_are_at_most_a_sixteenth_apart():
    sizes = [1]
    while sizes[-1] < 100_000:
        sizes.append(next_up(sizes[-1]))
    assert sizes[:33] == [*range(1, 33), 34]
    assert all(after - before <= max(before / 16, 1) for before, after in itertools.pairwise(sizes))
    assert all(rounded_down(size) == size and rounded_down(next_up(size) - 1) == size for size in sizes)
