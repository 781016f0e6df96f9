"""The state machine of a run, in a small model of the cloud in which anything may happen at any time."""

import dataclasses
import itertools

from hypothesis import given, settings
from hypothesis import strategies as st

from launch.pod import decide
from launch.pod.gcloud import Kind
from launch.pod.state import (
    ABSENT,
    DEAD,
    FOR_GOOD,
    QUEUED,
    UNKNOWN,
    Create,
    Delete,
    Dropped,
    End,
    Limits,
    Lock,
    Nodes,
    Observation,
    Save,
    SetUp,
    Setup,
    State,
)  # fmt: skip

POLL = 30.0
LIMITS = Limits(max_attempts=6, max_hours=10, provision=300, repair=240, silent=150, setup=300, backoff=900, poll=POLL)
STATES = (*QUEUED, "PROVISIONING", "ACTIVE", "SUSPENDING", *DEAD, "DELETING", "A_NEW_STATE")
REFUSALS = (Kind.QUOTA, Kind.NO_QUOTA, Kind.CAPACITY, Kind.NETWORK, Kind.RATE, Kind.AUTH, Kind.PERMISSION, Kind.ABSENT,
            Kind.INVALID)  # fmt: skip
MESSAGES = ("", "the request has expired", "There is no more capacity in the zone", "an internal error has occurred",
            "Quota limit 'TPUV4' has been exceeded. Limit: 32 in region us-central2.")  # fmt: skip


class World:
    """One project with one name in it, and the watcher of one run."""

    def __init__(self) -> None:
        self.request: str | None = None  # its state
        self.ours = False
        self.hidden = 0  # looks for which what was made is not found yet
        self.lock = Lock.OURS
        self.setup = Setup.NONE
        self.nodes, self.result, self.beating = Nodes.READY, "running", True
        self.code, self.message = "", ""
        self.up, self.now = 0.0, 0.0
        self.refuse: tuple[Kind, bool] | None = None  # what the next create says, and whether it works all the same
        self.deletes_fail = False
        self.state = State()
        self.end: End | None = None
        self.created = 0

    def look(self, blind: str = "") -> Observation:
        """What the watcher sees; `blind` is what it cannot see this time."""
        request = self.request or ABSENT
        if self.hidden:
            self.hidden, request = self.hidden - 1, ABSENT
        if blind == "flicker" and self.hidden == 0:
            request = ABSENT
        if blind == "request":
            request = UNKNOWN
        return Observation(
            lock=Lock.UNKNOWN if blind == "lock" else self.lock,
            request=request,
            ours=self.ours and request not in (ABSENT, UNKNOWN),
            code=self.code,
            message=self.message,
            nodes=self.nodes if request == "ACTIVE" else Nodes.UNKNOWN,
            result="unknown" if blind == "workers" else self.result,
            beating=self.beating and self.state.set_up,
            setup=Setup.DONE if self.state.set_up else self.setup,
            billed=self.up,
        )

    def step(self, blind: str = "") -> None:
        """One round of the watcher, and what comes between two."""
        if self.end is not None:
            return
        ours = self.request is not None and self.ours
        self.state, action = decide.decide(self.look(blind), self.state, self.now, LIMITS)
        if isinstance(action, SetUp | Save | Delete):
            assert ours, f"{action} on a slice that is not the run's"
        if isinstance(action, Create):
            assert not ours, "a second slice"
            self._create(action)
        elif isinstance(action, SetUp):
            assert self.lock is Lock.OURS
            self.setup = Setup.RUNNING
        elif isinstance(action, Delete) and not self.deletes_fail:
            self.request, self.setup = None, Setup.NONE
        elif isinstance(action, Dropped):
            self.state = decide.dropped(self.state, action.ending, self.now, LIMITS)
        elif isinstance(action, End):
            self.end = action
            if action.how in ("finished", "failed", "ended"):
                assert not ours, f"the watcher ended ({action.how}) with a slice left"
        elif self.setup in (Setup.DONE, Setup.FAILED):
            self.setup = Setup.NONE
        self.pass_time(POLL)

    def pass_time(self, seconds: float) -> None:
        self.now += seconds
        if self.request == "ACTIVE" and self.ours:
            self.up += seconds

    def _create(self, action: Create) -> None:
        kind, works = self.refuse or (Kind.OK, True)
        self.refuse = None
        if self.request is not None:
            kind, works = Kind.EXISTS, False
        if works:
            self.request, self.ours, self.hidden = "CREATING", True, min(self.hidden, 2)
            self.code, self.message, self.result, self.nodes = "", "", "running", Nodes.READY
            self.created += 1
        self.state = decide.asked_for(self.state, action, kind, "words", self.now, LIMITS)

    def apply(self, event: tuple) -> None:
        match event:
            case ("state", state) if self.request is not None:
                self.request = state
            case ("failed", code, message) if self.request is not None:
                self.request, self.code, self.message = "FAILED", code, message
            case ("gone",):  # by the service, a person or the slice itself
                self.request = None
            case ("hidden", looks):
                self.hidden = looks if self.request is None else 0
            case ("colleague", state):
                if self.request is None or not self.ours:
                    self.request, self.ours = state, False
            case ("nodes", nodes):
                self.nodes = nodes
            case ("result", result):
                self.result = result
            case ("beating", beating):
                self.beating = beating
            case ("setup", setup) if self.setup is Setup.RUNNING:
                self.setup = setup
            case ("lock", lock):
                self.lock = lock
            case ("refuse", kind, works):
                self.refuse = (kind, works)
            case ("deletes fail", fail):
                self.deletes_fail = fail
            case ("sleep", seconds):
                self.pass_time(seconds)
            case ("watcher dies",):
                asked = self.now if self.state.asked is not None else None
                attempt = self.state.attempt
                self.state = State(
                    attempt=attempt, uncounted=self.state.uncounted, stages=self.state.stages, asked=asked
                )
                self.setup = Setup.NONE


EVENTS = st.one_of(
    st.tuples(st.just("state"), st.sampled_from(STATES)),
    st.tuples(st.just("state"), st.just("ACTIVE")),
    st.tuples(st.just("failed"), st.sampled_from(["", "3", "5", "7", "8", "9", "10", "13"]), st.sampled_from(MESSAGES)),
    st.tuples(st.just("gone")),
    st.tuples(st.just("hidden"), st.integers(0, 2)),
    st.tuples(st.just("colleague"), st.sampled_from(STATES)),
    st.tuples(st.just("nodes"), st.sampled_from(list(Nodes))),
    st.tuples(st.just("result"), st.sampled_from(["running", "finished", "lost", "corrupt", *FOR_GOOD])),
    st.tuples(st.just("beating"), st.booleans()),
    st.tuples(st.just("setup"), st.sampled_from([Setup.DONE, Setup.FAILED])),
    st.tuples(
        st.just("lock"), st.sampled_from([Lock.OURS, Lock.OURS, Lock.OURS, Lock.UNKNOWN, Lock.LOST, Lock.REVOKED])
    ),
    st.tuples(st.just("refuse"), st.sampled_from(REFUSALS), st.booleans()),
    st.tuples(st.just("deletes fail"), st.booleans()),
    st.tuples(st.just("sleep"), st.sampled_from([1.0, 100.0, 1000.0, 90000.0])),
    st.tuples(st.just("watcher dies")),
)
BLIND = st.sampled_from(["", "", "", "", "request", "lock", "workers", "flicker"])
STORY = st.lists(st.tuples(st.lists(EVENTS, max_size=3), BLIND), max_size=40)


def told(story) -> World:
    world, flickered = World(), False
    for events, blind in story:
        for event in events:
            world.apply(event)
        # The service may lose sight of a request for a look, not for two in a row.
        flickered = blind == "flicker" and not flickered
        world.step("" if blind == "flicker" and not flickered else blind)
    return world


@settings(max_examples=1500, derandomize=True, deadline=None)
@given(STORY)
def test_one_slice_at_most_and_nothing_is_done_to_one_that_is_not_the_runs(story):
    told(story)  # its steps assert it


@settings(max_examples=700, derandomize=True, deadline=None)
@given(STORY)
def test_whatever_was_seen_a_run_whose_hours_are_used_up_ends_with_nothing_that_bills(story):
    world = told(story)
    world.deletes_fail, world.hidden, world.up = False, 0, LIMITS.max_hours * 3600.0
    if world.lock in (Lock.LOST, Lock.REVOKED):
        return  # another watcher has it
    for _ in range(40):
        world.step()
    assert world.end is not None
    assert world.request is None or not world.ours or world.end.how in ("lost", "foreign")


@settings(max_examples=700, derandomize=True, deadline=None)
@given(STORY)
def test_whatever_was_seen_a_run_that_is_granted_slices_and_finishes_ends_so(story):
    world = told(story)
    if world.end is not None or world.state.ending is not None or (world.request is not None and not world.ours):
        return
    world.deletes_fail, world.hidden, world.up, world.refuse, world.lock = False, 0, 0.0, None, Lock.OURS
    world.nodes, world.result, world.beating = Nodes.READY, "finished", True
    for _ in range(60):
        world.step()
    assert world.end == End("finished", "finished", 0) and world.request is None


def at(world: World, **seen) -> tuple[State, decide.Action]:
    return decide.decide(dataclasses.replace(world.look(), **seen), world.state, world.now, LIMITS)


def test_stock_out_is_waited_for_longer_and_longer_and_is_no_attempt():
    world = World()
    waits, asked = [], 0.0
    while len(waits) < 8:
        before = world.created
        if world.request == "CREATING":
            world.apply(("failed", "8", MESSAGES[2]))
        world.step()
        if world.created > before:
            waits.append(world.now - asked)
            asked = world.now
    assert world.end is None and world.created > LIMITS.max_attempts
    assert waits[1] < waits[2] < waits[3] and max(waits) <= LIMITS.backoff + 5 * POLL


def test_same_stage_that_fails_on_two_slices_ends_the_run_with_its_reason():
    world = World()
    for _ in range(60):
        if world.request in QUEUED:
            world.apply(("state", "ACTIVE"))
        world.apply(("setup", Setup.FAILED))
        world.step()
    assert world.created == 2 and world.end is not None and world.request is None
    assert world.end.why.startswith("two slices in a row failed at setting up the hosts: its hosts could not be set up")


def test_codes_that_no_retry_cures_end_the_run():
    for code in ("3", "5", "7", "9"):
        world = World()
        for _ in range(20):
            if world.request == "CREATING":
                world.apply(("failed", code, "no words that are known"))
            world.step()
        assert world.created == 1 and world.end is not None and world.end.why.startswith("the slice was refused"), code


def test_request_that_persists_although_its_creation_failed_is_gone_on_with():
    for kind in (Kind.PERMISSION, Kind.ABSENT, Kind.INVALID):
        world = World()
        world.refuse = (kind, True)
        for _ in range(6):
            world.step()
        assert world.end is None and world.created == 1 and world.request == "CREATING", kind


def test_request_that_is_not_found_right_after_its_creation_wastes_no_attempt():
    world = World()
    world.hidden = 2
    world.step()
    world.hidden = 2
    for _ in range(6):
        world.step()
    assert world.created == 1 and world.state.attempt == 1


def test_quota_that_somebody_took_while_the_run_had_no_slice_is_waited_for():
    world = World()
    world.refuse = (Kind.QUOTA, False)
    for _ in range(12):
        world.step()
    assert world.end is not None and world.end.how == "failed"  # the first time: the person has none
    world = World()
    world.state = State(attempt=2, absences=2)
    world.refuse = (Kind.QUOTA, False)
    for _ in range(20):
        world.step()
    assert world.end is None and world.created == 1


def test_delete_that_comes_between_a_look_and_a_request_takes_the_request_back():
    world = World()
    world.step()
    assert world.created == 1
    world.lock = Lock.REVOKED
    for _ in range(8):
        world.step()
    assert world.request is None and world.end is not None and world.end.how == "lost"


def test_bucket_that_is_gone_does_not_keep_a_slice():
    world = World()
    world.step()
    world.apply(("state", "ACTIVE"))
    for _ in range(30):
        world.step("lock")
    assert world.request is None


def test_state_that_nobody_knows_is_not_waited_for_without_end():
    world = World()
    world.step()
    world.apply(("state", "A_NEW_STATE"))
    for _ in range(18):
        world.step()
    assert world.created == 2


def test_slices_that_are_taken_back_before_they_come_up_are_asked_for_more_and_more_slowly():
    world = World()
    asked = []
    for _ in range(200):
        before = world.created
        if world.request == "CREATING":
            world.apply(("state", "PROVISIONING"))
        elif world.request == "PROVISIONING":
            world.apply(("failed", "13", MESSAGES[3]))
        world.step()
        if world.created > before:
            asked.append(world.now)
    waits = [after - before for before, after in itertools.pairwise(asked)]
    assert waits[0] < waits[1] < waits[2] and world.created == LIMITS.max_attempts


def test_slice_on_which_a_chip_computes_wrongly_is_replaced_and_a_second_in_a_row_ends_the_run():
    world = World()
    for _ in range(60):
        if world.request in QUEUED:
            world.apply(("state", "ACTIVE"))
        world.apply(("setup", Setup.DONE))
        world.apply(("result", "corrupt" if world.state.set_up else "running"))
        world.step()
    assert world.created == 2 and world.end is not None and world.request is None
    assert "failed at computing alike on all chips: a chip computes wrongly" in world.end.why
