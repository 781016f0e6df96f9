"""How a kernel's cycles follow from its schedule."""

import pytest

from launch.plan.schedule import Region, Schedule


@pytest.mark.parametrize(
    ("blocks", "start", "every", "steps", "tiles"),
    [
        ((4, 4), 0, True, 16, 6),
        ((4, 4), 0, False, 10, 6),
        ((2, 4), 1, True, 8, 3),
        ((2, 4), 1, False, 6, 3),  # the mean of two chunks: 2 + 1 + 1 + 1 and 2 + 2 + 2 + 1 steps
    ],
)
def test_a_grid_of_living_tiles_has_no_steps_above_the_diagonal(blocks, start, every, steps, tiles):
    schedule = Schedule(Region(1000, {}, 0), Region(600, {}, 0), ends=0, other=1)
    assert schedule.cycles(*blocks, start, every=every) == 1000 * tiles + 600 * blocks[0] + steps
