"""A run that trains well is never given up, whatever the watcher cannot see, and for however long it sleeps."""

import dataclasses

from hypothesis import given, settings
from hypothesis import strategies as st

from launch.pod import decide
from launch.pod.state import Lock, Nodes, Setup

from .test_pod_decide import LIMITS, POLL, World

PATIENT = dataclasses.replace(LIMITS, max_hours=10**6)
# What cannot be seen at a look, and for how long nobody looked before it.
LOOKS = st.tuples(st.sampled_from(["", "request", "lock", "workers", "nodes", "network"]), st.floats(0, 90_000))


def training() -> World:
    """A world whose run trains on its first slice."""
    world = World()
    world.step()
    world.apply(("state", "ACTIVE"))
    world.step()
    world.apply(("setup", Setup.DONE))
    world.step()
    assert world.state.set_up
    return world


def look(world: World, blind: str) -> decide.Action:
    seen = world.look("" if blind == "network" else blind)
    if blind == "network":
        seen = dataclasses.replace(world.look("request"), lock=Lock.UNKNOWN, result="unknown")
    if blind == "nodes":
        seen = dataclasses.replace(seen, nodes=Nodes.UNKNOWN)
    if seen.result == "unknown":
        seen = dataclasses.replace(seen, beating=False)
    world.state, action = decide.decide(seen, world.state, world.now, PATIENT)
    return action


@settings(max_examples=500, derandomize=True, deadline=None)
@given(st.lists(LOOKS, max_size=30))
def test_run_that_trains_is_left_alone_through_sleep_and_blindness(looks):
    world, bucket = training(), 0.0
    for blind, slept in looks:
        # That the bucket alone cannot be read for an hour while all else can does end a run.
        bucket = bucket + slept + POLL if blind == "lock" else 0.0
        world.pass_time(slept if bucket < PATIENT.repair else 0.0)
        if bucket >= PATIENT.repair:
            blind, bucket = "", 0.0
        assert isinstance(look(world, blind), decide.Wait), (blind, world.state.ending)
        world.pass_time(POLL)


def test_login_that_expired_over_night_ends_nothing():
    world = training()
    for _ in range(1000):
        look(world, "network")
        world.pass_time(POLL)
    assert world.state.ending is None
