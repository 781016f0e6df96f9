"""Zones and types that a run tries in turn: there is one slice of it, in the place that its record names."""

import dataclasses
from collections.abc import Callable

from . import queued, record
from .clock import now
from .gcloud import Gcloud
from .lock import OURS, Lock
from .record import Run
from .terminal import say


class Places:
    """Of a run that a watcher has. What another watcher asked for, and did not live to see, may still come."""

    def __init__(self, gcloud: Gcloud, run: Run, lock: Lock) -> None:
        self._gcloud, self._run, self._lock = gcloud, run, lock
        self._swept: float | None = None

    def move(self) -> None:
        """To the next place to try: only now, when the request in the one before is surely gone."""
        if self._lock.look() != OURS:  # the record is another watcher's by now
            return
        run, places = self._run, self._run.places
        here = places.index((run.zone, run.type)) if (run.zone, run.type) in places else -1
        before = run.zone, run.type
        run.zone, run.type = places[(here + 1) % len(places)]
        if (run.zone, run.type) == before:
            return
        file = run.local / "run"
        file.write_text(run.text())
        answer = self._gcloud.put_surely(file, f"{run.url}/run")
        if answer.ok:
            say(f"next: {run.type} in {run.zone}")
            return
        # Others would look for the slice where it is not.
        run.zone, run.type = before
        file.write_text(run.text())
        say(f"cannot write {run.url}/run, so the place stays: {answer.reason}")

    def elsewhere(self, every: float = 0.0) -> bool:
        """Deletes requests of the run in its other zones; whether there was one. At most once in `every` seconds."""
        if self._swept is not None and now() - self._swept < every:
            return False
        self._swept = now()
        return delete_elsewhere(self._gcloud, self._run, lambda: self._lock.look() == OURS)

    def leave(self) -> None:
        """Takes back what was just asked for, if another watcher has the run by now, and has it elsewhere."""
        url = f"{self._run.url}/run"
        answer = self._gcloud.cat(url)
        if not answer.ok or record.parse(answer.out, url).zone == self._run.zone:
            return
        if queued.look_surely(self._gcloud, self._run, asked=True).ours:
            _take_back(self._gcloud, self._run)


def delete_elsewhere(gcloud: Gcloud, run: Run, may: Callable[[], bool] = lambda: True) -> bool:
    """Deletes requests of the run in other zones than the one it is in, if it still `may`.

    Returns:
      Whether there was one. A zone that cannot be seen holds nothing up.
    """
    found = False
    for zone in run.other_zones:
        there = dataclasses.replace(run, zone=zone)
        if queued.look(gcloud, there).ours and may():
            found = True
            _take_back(gcloud, there)
    return found


def _take_back(gcloud: Gcloud, run: Run) -> None:
    say(f"this run has a slice in {run.zone} too, which was on its way when another watcher took over; deleting it")
    answer = queued.delete(gcloud, run)
    if not answer.ok:
        say(f"deleting it failed: {answer.reason}")
