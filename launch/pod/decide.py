"""The state machine of a run: `decide` says, from one look at the cloud, the one next thing to do.

What holds of it, whatever it is shown: it asks for a slice only when the request is surely gone, touches only a request
that carries the run's own label, and once a run is to end it goes on until nothing is left that bills.
"""

import dataclasses

from .gcloud import Kind, classify
from .state import (
    ABSENT,
    DEAD,
    FINAL_CODES,
    FOR_GOOD,
    QUEUED,
    STAGES,
    UNKNOWN,
    Action,
    Create,
    Delete,
    Dropped,
    End,
    Ending,
    Limits,
    Lock,
    Nodes,
    Observation,
    Save,
    SetUp,
    Setup,
    State,
    Wait,
)


def decide(look: Observation, state: State, now: float, limits: Limits) -> tuple[State, Action]:
    """The next action and what to remember.

    Args:
      look: what was just seen.
      state: what the last call returned, changed only by `asked_for` and `dropped`.
      now: seconds on a clock that never goes back.
      limits: of the run.
    """
    if look.lock is Lock.LOST:
        return state, End("lost")
    if look.lock is Lock.REVOKED:
        state = dataclasses.replace(state, absences=state.absences + 1 if look.request == ABSENT else 0)
        return state, _undo(look, state, now, limits)
    present = look.request not in (ABSENT, UNKNOWN)
    if present and not look.ours:
        return state, End("foreign", code=2)
    state = _note(look, state, now, limits)
    if state.ending is None:
        state = dataclasses.replace(state, ending=_judge(look, state, now, limits))
    if look.lock is Lock.UNKNOWN and not _limits_passed(look, state, now, limits):
        return state, Wait()  # somebody else may have the run by now
    if state.ending is not None:
        return _end(look, state, now, limits)
    if look.request == ABSENT:
        return _ask(look, state, now, limits)
    if look.request == "ACTIVE" and look.nodes is Nodes.READY and not state.set_up:
        return _set_up(look, state, now)
    return state, Wait()


def asked_for(state: State, action: Create, kind: Kind, reason: str, now: float, limits: Limits) -> State:
    """The state after a request was made, whatever gcloud said: the next looks tell whether it is there."""
    refused = kind not in (Kind.OK, Kind.EXISTS)
    refusals = state.refusals + refused  # until a slice is granted
    wait = min(limits.backoff, limits.poll * 2 ** min(refusals, 10)) if refused else 0.0
    return dataclasses.replace(
        State(attempt=action.attempt, uncounted=state.uncounted, stages=state.stages, tried=state.tried),
        asked=now,
        refused=kind if refused else Kind.OK,
        refusal=reason if refused else "",
        refusals=refusals,
        next_ask=now + wait,
    )


def dropped(state: State, ending: Ending, now: float, limits: Limits) -> State:
    """The state after a slice that was dropped is gone."""
    refusals = 0 if state.served else state.refusals + 1
    rounds = refusals // limits.places  # another place is tried at once
    wait = min(limits.backoff, limits.poll * 2 ** min(rounds, 10)) if rounds else 0.0
    return State(
        attempt=state.attempt,
        uncounted=state.uncounted + ending.uncounted,
        stages=(*state.stages, ending.stage) if ending.stage else () if state.has_beaten else state.stages,
        tried=state.tried,
        refusals=refusals,
        next_ask=now + wait,
        absences=2,  # it was looked at
    )


def _undo(look: Observation, state: State, now: float, limits: Limits) -> Action:
    """A stop or a delete came between the last look and a request that was made after it: that is taken back."""
    if state.asked is None:
        return End("lost")
    if look.request == ABSENT:
        return Wait() if not _surely_gone(state, now, limits) else End("lost")
    if look.request == UNKNOWN:
        return Wait()
    return Delete() if look.ours else End("lost")


def _note(look: Observation, state: State, now: float, limits: Limits) -> State:
    """Counts how long what is seen has been so."""

    def since(before: float | None, true: bool) -> float | None:
        return None if not true else now if before is None else before

    seen, active = look.request not in (ABSENT, UNKNOWN), look.request == "ACTIVE"
    slept = now - state.looked  # since the last look
    granted = active or look.request == "PROVISIONING"
    waits = active and (look.nodes is Nodes.WAIT or (look.nodes is Nodes.UNKNOWN and state.unready is not None))
    state = dataclasses.replace(
        state,
        absences=state.absences + 1 if look.request == ABSENT else 0,
        gone=state.gone + 1 if active and look.nodes is Nodes.GONE else 0,
        queued=since(state.queued, look.request in QUEUED),
        granted=since(state.granted, granted or state.granted is not None),  # once granted it stays so
        unready=since(state.unready, waits),
        ending_since=since(state.ending_since, seen and not granted and look.request not in (*QUEUED, *DEAD)),
        # Of the bucket alone: without network or login nothing is known of it, nor after a sleep of the machine.
        unlocked=since(None if slept >= limits.repair else state.unlocked, look.lock is Lock.UNKNOWN and seen),
        looked=now,
    )
    if seen:
        state = dataclasses.replace(state, asked=None, refused=Kind.OK, refusal="")
    if active and look.nodes is Nodes.READY:
        state = dataclasses.replace(state, refusals=0, served=True)
    if look.setup is Setup.DONE and not state.set_up:
        return dataclasses.replace(state, set_up=True, tried=True, beat=now, has_beaten=False)
    if state.set_up and (look.beating or look.nodes is Nodes.WAIT):
        return dataclasses.replace(state, beat=now, has_beaten=state.has_beaten or look.beating)
    if look.result == "unknown":  # hosts of which nothing can be read are not silent
        return dataclasses.replace(state, beat=state.beat + slept)
    return state


def _limits_passed(look: Observation, state: State, now: float, limits: Limits) -> bool:
    """What ends a run even where it is not known whose it is: its slice is ours by its label."""
    too_long = look.billed >= limits.max_hours * 3600
    return too_long or (state.unlocked is not None and now - state.unlocked >= limits.repair)


def _judge(look: Observation, state: State, now: float, limits: Limits) -> Ending | None:
    """Whether the slice is to be deleted, and what for."""
    present = look.request != ABSENT
    if look.result == "finished":
        return Ending("finish", "finished", code=0)
    if present and look.billed >= limits.max_hours * 3600:
        return Ending("fail", _no_hours(limits))
    if present and state.unlocked is not None and now - state.unlocked >= limits.repair:
        return Ending("fail", f"the bucket could not be read for {limits.repair:.0f} s")
    if look.request in DEAD:
        return _judge_dead(look, state, now, limits)
    if look.request in QUEUED:
        overdue = state.queued is not None and now - state.queued >= limits.valid + 3600
        return _drop("the request outlived its end", state, uncounted=True) if overdue else None
    if state.ending_since is not None and now - state.ending_since >= limits.provision:
        return _drop(f"{look.request} for {limits.provision:.0f} s", state)
    if look.request == "PROVISIONING" and state.granted is not None and now - state.granted >= limits.provision:
        return _drop(f"not up after {limits.provision:.0f} s", state, "provision")
    return _judge_active(look, state, now, limits) if look.request == "ACTIVE" else None


def _judge_dead(look: Observation, state: State, now: float, limits: Limits) -> Ending:
    """Of a request that is SUSPENDED or FAILED, and holds quota and blocks the name until it is deleted."""
    failure = f"{look.code} {look.message}".strip()
    named = f"{look.request}{': ' + failure if failure else ''}"
    kind = classify(look.message)
    if look.request == "FAILED" and state.granted is None:
        asked_long_ago = state.queued is not None and now - state.queued >= limits.valid
        if "expired" in look.message or asked_long_ago:
            if limits.valid_until:
                return Ending("fail", f"no slice within {limits.valid_until} ({failure})")
            return _drop(named, state, uncounted=True)
        # Taken by somebody else while the run had no slice: theirs ends too.
        if kind is Kind.QUOTA and state.attempt - state.uncounted > 1:
            return _drop(named, state, uncounted=True)
    if look.request == "FAILED" and not state.set_up:
        if kind in (Kind.INVALID, Kind.NO_QUOTA, Kind.QUOTA, Kind.PERMISSION) or look.code in FINAL_CODES:
            return Ending("fail", f"the slice was refused: {failure}")
        if kind is Kind.CAPACITY or look.code == "8":
            return _drop(named, state, uncounted=True)
    return _drop(named, state)


def _judge_active(look: Observation, state: State, now: float, limits: Limits) -> Ending | None:
    if look.nodes is Nodes.GONE and state.gone >= 2:  # a node may not be found right after ACTIVE
        return _drop(look.node_detail, state)
    if look.nodes is Nodes.WAIT and state.unready is not None and now - state.unready >= limits.repair:
        return _drop(f"{look.node_detail} for {limits.repair:.0f} s", state, "provision")
    if not state.set_up:
        too_long = state.setup_began is not None and now - state.setup_began >= limits.setup
        if too_long or (look.setup is Setup.FAILED and state.setups >= limits.max_setups):
            return _drop(f"its hosts could not be set up ({look.setup_detail or 'not in time'})", state, "setup")
        return None
    if look.result in FOR_GOOD:
        return Ending("fail", f"{FOR_GOOD[look.result]} ({look.result_detail})")
    if look.nodes is Nodes.READY and look.result == "lost":
        return _drop(f"hosts keep losing each other ({look.result_detail})", state, "lost")
    if look.result == "corrupt":  # only another machine helps
        return _drop(f"a chip computes wrongly ({look.result_detail})", state, "corrupt")
    if look.nodes is Nodes.READY and now - state.beat >= limits.silent:
        # A host that was heard of before has a machine that broke; one that never was may not be able to write.
        return _drop(f"a host is silent for {limits.silent:.0f} s", state, "" if state.has_beaten else "silent")
    return None


def _drop(why: str, state: State, stage: str = "", uncounted: bool = False) -> Ending:
    if stage and state.stages and state.stages[-1] == stage:
        return Ending("fail", f"two slices in a row failed at {STAGES[stage]}: {why}", stage)
    return Ending("drop", why, stage, uncounted)


def _no_hours(limits: Limits) -> str:
    return f"slices were up for {limits.max_hours} hours in all; submit again with a higher --max-hours"


def _end(look: Observation, state: State, now: float, limits: Limits) -> tuple[State, Action]:
    """The next step until the slice is gone, and what comes then."""
    ending = state.ending
    assert ending is not None
    stuck = state.ending_since is not None and now - state.ending_since >= limits.repair
    if look.request == UNKNOWN or (look.request == "DELETING" and not stuck):
        return state, Wait()
    if look.request != ABSENT:
        if ending.kind == "fail" and look.request == "ACTIVE" and not state.saved:
            return dataclasses.replace(state, saved=True), Save()
        return state, Delete()
    if not _surely_gone(state, now, limits):
        return state, Wait()
    if ending.kind == "drop":
        return dataclasses.replace(state, ending=None), Dropped(ending)
    return state, End("finished" if ending.kind == "finish" else "failed", ending.why, ending.code)


def _surely_gone(state: State, now: float, limits: Limits) -> bool:
    """One look that finds nothing says little: the service may not know yet of what it has just taken."""
    settled = state.asked is None or now - state.asked >= limits.settle
    return settled and (state.absences >= 2 or state.attempt == 0)


def _ask(look: Observation, state: State, now: float, limits: Limits) -> tuple[State, Action]:
    """The request is not there: asks for one, when it surely is not and another may be made."""
    if not _surely_gone(state, now, limits):
        return state, Wait()
    if state.tried and not limits.watch:
        return state, End("ended", code=75)
    if why := _refused_for_good(state):
        return state, End("failed", why, 1)
    used = state.attempt - state.uncounted
    again = state.refused is not Kind.OK
    if not again and used >= limits.max_attempts:
        return state, End("failed", f"{used} attempts are used up; submit again with a higher --max-attempts", 1)
    if look.billed >= limits.max_hours * 3600:
        return state, End("failed", _no_hours(limits), 1)
    if now < state.next_ask:
        return state, Wait()
    return state, Create(state.attempt + (not again), again)


def _refused_for_good(state: State) -> str:
    """Why asking again does not help, or nothing."""
    words = {
        Kind.NO_QUOTA: f"no quota at all of this kind: {state.refusal}; another zone or tier, or ask for quota",
        Kind.PERMISSION: f"not allowed: {state.refusal}; you need the role TPU Admin",
        Kind.INVALID: f"refused: {state.refusal}",
        Kind.CONFLICT: f"refused: {state.refusal}",
        Kind.ABSENT: f"refused: {state.refusal}",
    }
    # What a run had before, somebody else has taken for now.
    if state.refused is Kind.QUOTA and state.attempt - state.uncounted <= 1:
        return f"quota: {state.refusal}; delete other slices or ask for more quota, then submit again"
    return words.get(state.refused, "")


def _set_up(look: Observation, state: State, now: float) -> tuple[State, Action]:
    if look.setup is Setup.RUNNING:
        return state, Wait()
    began = state.setup_began if state.setup_began is not None else now
    return dataclasses.replace(state, setup_began=began, setups=state.setups + 1), SetUp()
