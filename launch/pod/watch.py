"""The loop that brings a run to its end: it looks, lets `decide` say what is next, and does that.

It can be killed anywhere and started again: what it must not forget is in the bucket and with the service.
"""

import functools
import time

from . import decide, hosts, queued
from . import notify as notice
from .clock import now
from .gcloud import Gcloud, Kind, seconds
from .history import History, failed_stages, uncounted
from .lock import LOST, OURS, Lock, shown
from .logs import Log
from .places import Places
from .record import Run
from .state import (
    ABSENT,
    UNKNOWN,
    Action,
    Create,
    Delete,
    Dropped,
    End,
    Ending,
    Limits,
    Nodes,
    Observation,
    Save,
    SetUp,
    Setup,
    State,
)
from .state import Lock as HeldLock
from .terminal import UsageError, printable, say

# How often a trouble that goes on is said again.
_SAY_AGAIN = 900


def limits_of(run: Run, watch: bool) -> Limits:
    return Limits(
        max_attempts=run.max_attempts,
        max_hours=run.max_hours,
        valid_until=run.valid_until,
        watch=watch,
        places=len(run.places),
        poll=seconds("POLL", 30),
        provision=seconds("PROVISION", 7200),
        repair=seconds("REPAIR", 3600),
        silent=seconds("SILENT", 1200),
    )


class Watcher:
    """Of one run.

    Args:
      watch: make new slices.
      notify: whom to tell, see notify.py.
      resubmitted: the flags are those of the submit before, so that its end is this one's.
    """

    def __init__(
        self,
        gcloud: Gcloud,
        run: Run,
        lock: Lock,
        history: History,
        watch: bool,
        resubmitted: bool = True,
        notify: str = "",
    ) -> None:
        self._notify = functools.partial(notice.notify, notify, run.name)
        self._gcloud, self._run, self._lock, self._history = gcloud, run, lock, history
        self._limits, self._resubmitted = limits_of(run, watch), resubmitted
        events = history.events
        self._state = State(
            attempt=history.attempt,
            uncounted=uncounted(events),
            stages=failed_stages(events),
            # A request that the watcher before made at its end may not be found yet.
            asked=now() if history.asked else None,
        )
        self._places, self._sweep = Places(gcloud, run, lock), seconds("SWEEP", 900)
        self._job: hosts.Job | None = None
        self._log = Log(gcloud, run, 0)
        self._workers: list[hosts.Worker] = []
        self._beats: set[str] = set()
        self._stale: set[str] | None = None  # what workers said before this watcher started them
        self._billed, self._looked = history.billed(), now()
        self._said: dict[str, float] = {}
        self._request = ""
        self._told = False

    def watch(self) -> End:
        """Until the run is at its end, or somebody else's."""
        try:
            while True:
                look = self._look()
                before = self._state
                self._state, action = decide.decide(look, before, now(), self._limits)
                if self._state.ending is not None and before.ending is None:
                    self._announce(self._state.ending)
                if isinstance(action, End):
                    if action.how in ("finished", "failed", "ended"):
                        self._notify("finished" if action.how == "finished" else "failed", action.why)
                    if action.how == "lost" and self._state.asked is not None:
                        self._places.leave()
                    return action
                if not self._act(action):
                    self._places.elsewhere(self._sweep)
                    self._pause()
        finally:
            if self._job is not None:
                self._job.end()

    def _pause(self) -> None:
        """Until the next look; what is being set up is looked at as soon as that is done."""
        if self._job is not None:
            self._job.wait(self._limits.poll)
        else:
            time.sleep(self._limits.poll)

    def _look(self) -> Observation:
        lock = self._look_at_lock()
        request = queued.look(self._gcloud, self._run)
        if request.trouble:
            self._say_now_and_again(request.trouble)
        if request.state != self._request and request.state != UNKNOWN:
            say(f"slice {self._run.name}: {request.state}")
            self._request = request.state
        mine = lock is HeldLock.OURS and (request.ours or request.state == ABSENT)
        if mine and request.state == ABSENT and self._history.slice_is_up:
            self._history.add("gone")
        result, result_detail = self._look_at_workers()
        nodes, node_detail = Nodes.UNKNOWN, ""
        if request.state == "ACTIVE" and request.ours:
            nodes, node_detail = queued.look_at_nodes(self._gcloud, self._run)
            if nodes is Nodes.UNKNOWN:
                self._say_now_and_again(f"cannot see {node_detail}")
            if mine and nodes is Nodes.READY and not self._history.slice_is_up:
                self._history.add("ready")
        setup, setup_detail = self._look_at_job()
        # Against the state before this look: what was just set up has not had the time to beat.
        beating = self._state.set_up and hosts.all_beat(self._workers, self._beats, self._run.hosts)
        if beating:
            self._beats = {worker.line for worker in self._workers}
        if self._state.set_up and nodes is Nodes.READY:
            self._log.follow(self._workers, self._history.attempt)
        return Observation(
            lock=lock,
            request=request.state,
            ours=request.ours,
            code=request.code,
            message=request.message,
            nodes=nodes,
            node_detail=node_detail,
            result=result,
            result_detail=result_detail,
            beating=beating,
            setup=setup,
            setup_detail=setup_detail,
            billed=self._count_billed(),
        )

    def _look_at_lock(self) -> HeldLock:
        held = self._lock.look()
        if held == LOST:
            taken_back = self._lock.holder.startswith(("deleted", "stopped"))
            return HeldLock.REVOKED if taken_back else HeldLock.LOST
        if held != OURS:
            trouble = self._lock.trouble
            expired = trouble.kind is Kind.AUTH
            self._say_now_and_again(queued.LOGIN_EXPIRED if expired else f"cannot reach the bucket: {trouble.reason}")
            return HeldLock.UNKNOWN
        return HeldLock.OURS

    def _look_at_workers(self) -> tuple[str, str]:
        workers, kind = hosts.read_workers(self._gcloud, self._run, self._history.attempt)
        if kind is not Kind.OK:
            self._workers = []
            if kind is Kind.ABSENT and self._stale is None:
                self._stale = set()
            return "unknown" if kind is not Kind.ABSENT else "running", ""
        self._workers = workers
        if self._stale is None:
            self._stale = {worker.line for worker in workers}
            # What an earlier run of the same flags brought to its end is not done again; other flags ask for more.
            if self._resubmitted and hosts.judge(workers)[0] == "finished":
                return "finished", ""
        return hosts.judge([worker for worker in workers if worker.line not in self._stale])

    def _look_at_job(self) -> tuple[Setup, str]:
        if self._job is None:
            return Setup.DONE if self._state.set_up else Setup.NONE, ""
        if not self._job.wait(0):
            return Setup.RUNNING, ""
        failure, self._job = self._job.failure, None
        if failure:
            say(failure)
            return Setup.FAILED, failure
        self._history.add("started", f"attempt {self._history.attempt}")
        return Setup.DONE, ""

    def _count_billed(self) -> float:
        """By the history and by a clock that nobody sets, for what happens while this watches."""
        passed, self._looked = now() - self._looked, now()
        if self._history.slice_is_up:
            self._billed += passed
        return self._billed

    def _say_now_and_again(self, text: str) -> None:
        if now() - self._said.get(text, -_SAY_AGAIN) >= _SAY_AGAIN:
            self._said[text] = now()
            say(text)

    def _announce(self, ending: Ending) -> None:
        if ending.kind == "drop":
            stage = f" [{ending.stage}]" if ending.stage else ""
            if ending.uncounted:
                self._history.add("unserved", f"attempt {self._state.attempt}")
            self._history.add("dropped", f"attempt {self._state.attempt}: {ending.why}{stage}")
            self._notify("preempted", ending.why)
        elif ending.kind == "fail":
            say(f"stopping: {ending.why}")
        else:
            self._log.follow(self._workers, self._history.attempt)
            say("finished; deleting the slice")

    def _act(self, action: Action) -> bool:
        """Does it. Returns whether to look again at once."""
        match action:
            case Create():
                return self._create(action)
            case SetUp():
                say(f"setting up {self._run.hosts} hosts")
                self._job = hosts.Job(self._run, self._history.attempt, "setup", "start")
            case Save():
                self._end_job()
                hosts.save(self._run, self._history.attempt)
                return True
            case Delete():
                self._end_job()
                if self._look_at_lock() is HeldLock.LOST:  # the slice may be another one by now
                    return True
                answer = queued.delete(self._gcloud, self._run)
                if not answer.ok:
                    say(f"deleting failed, trying again: {answer.reason}")
                    if not self._told:
                        self._notify("still billing", answer.reason)
                    self._told = True
                return answer.ok
            case Dropped(ending):
                self._state = decide.dropped(self._state, ending, now(), self._limits)
                if ending.uncounted:
                    self._places.move()
                return True
        return False

    def _end_job(self) -> None:
        if self._job is not None:
            self._job.end()
            self._job = None

    def _create(self, action: Create) -> bool:
        if not action.again:
            # Written before, so that an attempt whose creation was cut short is found again.
            trouble = self._history.add("attempt", str(action.attempt))
            if trouble:
                say(f"cannot write the run's history, so nothing is created: {trouble}")
                self._history.events.pop()
                return False
            self._log.restart()
            self._beats, self._stale = set(), set()
        if self._places.elsewhere():
            return False
        # The machine may have slept since the look, and somebody else have the run by now, in another zone.
        if self._lock.look() != OURS:
            return False
        run = self._run
        script = queued.write_startup_script(run, action.attempt, run.max_hours * 3600 - self._billed)
        answer = self._gcloud.call(*queued.create_command(run, str(script)), limit=seconds("CREATE", 600))
        self._state = decide.asked_for(self._state, action, answer.kind, answer.reason, now(), self._limits)
        if answer.ok:
            say(f"asked for {run.slices} x {run.type} in {run.zone} ({run.tier})")
        elif answer.kind is Kind.EXISTS:
            say("the slice is there already")
        elif answer.kind is Kind.AUTH:
            say(queued.LOGIN_EXPIRED)
        else:
            say(f"cannot tell or not now, will look again: {answer.reason}")
        return False


def finish(end: End, gcloud: Gcloud, run: Run, lock: Lock, history: History) -> int:
    """Writes down and says how the watching ended. Returns the exit code."""
    if end.how == "lost":
        holder = shown(printable(lock.holder)) or "somebody else has it"
        say(f"this watcher ends: {holder}")
        return 0 if holder.startswith(("watched", "stopped", "deleted")) else 1
    if end.how == "foreign":
        lock.leave("failed")
        raise UsageError(queued.foreign(run))
    if end.how == "ended":
        lock.leave("ended")
        say(
            "the slice is gone and does not bill; the same submit goes on from the last checkpoint, "
            "with --watch by itself"
        )
        return end.code
    if end.how == "failed":
        history.add("failed", end.why)
        lock.leave("failed")
        say(
            f"nothing bills any more; launch/tpu_pod.sh logs --name {run.name} shows the log, "
            "submit goes on from the last checkpoint"
        )
        return end.code
    history.add("finished", f"attempt {history.attempt}")
    lock.leave("finished")
    report_result(gcloud, run)
    return 0


def report_result(gcloud: Gcloud, run: Run) -> None:
    folder = run.workdir if run.workdir.startswith("gs://") else run.url
    answer = gcloud.cat(f"{folder}/result.json")
    if answer.ok:
        print(printable(answer.out), flush=True)
    say(f"the checkpoints are in {run.workdir}")
