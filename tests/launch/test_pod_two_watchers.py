"""Two watchers of one run, on machines that may sleep between a look and what they do after it, and two zones."""

import dataclasses

from hypothesis import example, given, settings
from hypothesis import strategies as st

from launch.pod import decide
from launch.pod.gcloud import Kind
from launch.pod.state import ABSENT, Create, Delete, Dropped, End, Lock, Nodes, Observation, State, Wait

from .test_pod_decide import LIMITS, POLL

ZONES = ("one", "two")
PATIENT = dataclasses.replace(LIMITS, places=2, max_attempts=10**6, backoff=POLL)


class Project:
    """The run's requests in both zones, its lock, and its record, which both watchers read when they take the lock."""

    def __init__(self) -> None:
        self.requests: dict[str, str] = {}  # their states, by zone
        self.hidden = 0
        self.holder, self.zone, self.attempt, self.asked = "", ZONES[0], 0, False
        self.now = 0.0
        self.watchers: dict[str, tuple[State, str] | None] = {"a": None, "b": None}
        self.pending: dict[str, decide.Action] = {}

    def take(self, who: str) -> None:
        self.holder = who
        self.pending.pop(who, None)
        asked = self.now if self.asked else None
        self.watchers[who] = State(attempt=self.attempt, asked=asked), self.zone

    def look(self, who: str) -> None:
        """Looks and decides; what it does then may come much later."""
        watcher = self.watchers[who]
        if watcher is None or who in self.pending:
            return
        state, zone = watcher
        request = self.requests.get(zone, ABSENT)
        if self.hidden:
            self.hidden, request = self.hidden - 1, ABSENT
        lock = Lock.OURS if self.holder == who else Lock.REVOKED if self.holder == "deleted" else Lock.LOST
        seen = Observation(lock=lock, request=request, ours=request != ABSENT, nodes=Nodes.READY, beating=state.set_up)
        if request == "FAILED":
            seen = dataclasses.replace(seen, code="8", message="There is no more capacity in the zone")
        if request != ABSENT:
            self.asked = False
        state, self.pending[who] = decide.decide(seen, state, self.now, PATIENT)
        self.watchers[who] = state, zone

    def act(self, who: str) -> None:
        """As launch/pod/watch.py, which looks at the lock once more before it asks for a slice, deletes or moves."""
        watcher, action = self.watchers[who], self.pending.pop(who, None)
        if watcher is None or action is None:
            return
        state, zone = watcher
        if isinstance(action, End):
            self.watchers[who] = None
            return
        if isinstance(action, Create) and self.holder == who:
            kind = Kind.EXISTS if zone in self.requests else Kind.OK
            self.requests.setdefault(zone, "WAITING_FOR_RESOURCES")
            self.attempt, self.asked, self.hidden = action.attempt, True, min(self.hidden + 2, 2)
            assert len(self.requests) == 1, "two slices for one run"
            state = decide.asked_for(state, action, kind, "", self.now, PATIENT)
        elif isinstance(action, Delete) and self.holder in (who, "deleted"):
            self.requests.pop(zone, None)
        elif isinstance(action, Dropped):
            state = decide.dropped(state, action.ending, self.now, PATIENT)
            if action.ending.uncounted and self.holder == who:
                zone = self.zone = ZONES[1 - ZONES.index(zone)]
        self.watchers[who] = state, zone

    def delete(self) -> None:
        """As the command does, which looks until the request is gone, and longer where it may not be found yet."""
        self.holder, self.hidden, self.asked = "deleted", 0, False
        self.requests.pop(self.zone, None)


# "a" may sleep between a look and what it does then; "b" does not, and takes the run over when it comes.
EVENTS = st.sampled_from(
    [*3 * ["a goes on"], "a takes", "b works", "stock-out", "stock-out", "granted", "later", "delete"]
)
STORY = st.lists(EVENTS, max_size=14)


def told(story) -> Project:
    project = Project()
    project.take("a")
    for event in story:
        match event:
            case "a goes on":  # until there is something to do, and falls asleep
                project.act("a")
                for _ in range(10):
                    project.look("a")
                    if not isinstance(project.pending.get("a"), Wait):
                        break
                    project.act("a")
                    project.now += POLL
            case "a takes":
                project.take("a")
            case "b works":
                if project.holder != "b":
                    project.take("b")
                for _ in range(10):
                    project.look("b")
                    project.act("b")
                    project.now += POLL
            case "stock-out" | "granted":
                state = "FAILED" if event == "stock-out" else "ACTIVE"
                project.requests = dict.fromkeys(project.requests, state)
            case "later":
                project.now += 90_000.0
            case "delete":
                project.delete()
    return project


@settings(max_examples=400, derandomize=True, deadline=None)
@given(STORY)
@example(["a goes on", "b works", "stock-out", "b works", "a goes on"])  # b has moved on when a asks
@example([*2 * ["a goes on"], "stock-out", *2 * ["a goes on"], "b works", "a goes on"])  # b has asked when a moves
def test_two_watchers_never_make_two_slices_and_the_record_says_where_the_one_is(story):
    project = told(story)  # which asserts the first
    for zone in project.requests:
        assert zone == project.zone or project.holder == "deleted"


@settings(max_examples=200, derandomize=True, deadline=None)
@given(STORY)
def test_after_a_delete_whoever_was_watching_leaves_nothing(story):
    project = told(story)
    project.delete()
    for _ in range(20):
        for who in ("a", "b"):
            project.act(who)
            project.look(who)
        project.now += POLL
    assert project.requests == {}
