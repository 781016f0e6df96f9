"""A long run's numbers: fewer and fewer, in order, and all of them where something went wrong."""

import itertools

from trainer.metrics.thinning import Thinned, is_kept
from trainer.metrics.writer import Metrics, MetricsWriter

FULL_RUN = 524_288


class Steps(MetricsWriter):
    def __init__(self):
        self.steps = []

    def write(self, step, scalars):
        self.steps.append(step)


def test_a_short_run_has_all_steps_and_a_full_one_a_few_ten_thousand():
    assert all(is_kept(step) for step in range(1, 8192))
    kept = [step for step in range(1, FULL_RUN + 1) if is_kept(step)]
    assert len(kept) < 40_000 and kept[-1] == FULL_RUN
    assert max(b - a for a, b in itertools.pairwise(kept)) <= 128


def test_what_is_due_every_so_many_steps_is_thinned_alike():
    assert [step for step in range(1, 40) if is_kept(step, 10)] == [10, 20, 30]
    assert sum(is_kept(step, 10) for step in range(1, FULL_RUN)) < 4_000


def test_all_steps_around_trouble_are_written_in_order():
    writer = Steps()
    thinned = Thinned(writer)
    first, bad = 300_000, 300_201
    for step in range(first, first + 600):
        thinned.write(step, {"run/loss": 0.0}, trouble=step == bad)
    assert writer.steps == sorted(set(writer.steps))
    last_kept = max(step for step in range(first, bad) if is_kept(step))
    assert set(range(last_kept, bad + 65)) <= set(writer.steps)
    assert len(writer.steps) < 150


def test_what_a_failure_leaves_is_written_when_it_is_explained():
    writer = Steps()
    thinned = Thinned(writer)
    for step in range(300_033, 300_050):
        thinned.write(step, {"run/loss": 0.0}, trouble=False)
    thinned.explain()
    assert writer.steps == list(range(300_033, 300_050))


def test_of_two_parts_of_the_loop_that_say_the_same_of_a_step_the_first_is_written():
    writer = Steps()
    metrics = Metrics([writer])
    metrics.write(5, {"run/goodput": 0.5})
    metrics.write(5, {"run/goodput": 0.5})
    metrics.withdraw(4)
    metrics.write(4, {"run/goodput": 0.5})
    assert writer.steps == [5, 4]
