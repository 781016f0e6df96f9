"""What happened to a run: `events` in its folder of the bucket, lines of seconds since 1970, event and detail."""

import dataclasses
import re
from pathlib import Path

from .clock import BucketClock
from .gcloud import Gcloud, Kind
from .record import Run
from .terminal import BlockedError, one_line, say


@dataclasses.dataclass(frozen=True)
class Event:
    time: float
    name: str
    detail: str = ""


def read(text: str) -> list[Event]:
    events = []
    for line in text.splitlines():
        seconds, _, rest = line.partition("\t")
        name, _, detail = rest.partition("\t")
        if re.fullmatch("[0-9]{1,12}", seconds):
            events.append(Event(float(seconds), name, detail))
    return events


class History:
    """The bucket's copy counts, since the last watcher may have been on another machine."""

    def __init__(self, gcloud: Gcloud, run: Run) -> None:
        self._gcloud, self._file, self._url = gcloud, run.local / "events", f"{run.url}/events"
        self._clock = BucketClock(gcloud, run.url)
        self.events: list[Event] = []

    def load(self, bucket_needed: bool = True) -> None:
        """Raises BlockedError where the bucket cannot be read; without need of it the local copy will do."""
        answer = self._gcloud.cat(self._url)
        if answer.ok:
            _write(self._file, answer.out + "\n")
        elif answer.kind is not Kind.ABSENT and bucket_needed:
            raise BlockedError(f"cannot read {self._url}: {answer.reason}")
        elif answer.kind is Kind.ABSENT and bucket_needed:
            _write(self._file, "")
        self.events = read(self._file.read_text(errors="replace")) if self._file.exists() else []

    def add(self, name: str, detail: str = "") -> str:
        """On the terminal, in the local copy and in the bucket. Returns why the bucket has not got it, or nothing."""
        detail = one_line(detail.replace("\t", " "))
        say(f"{name} {detail}".rstrip())
        event = Event(float(int(self._clock.time())), name, detail)
        self.events.append(event)
        with self._file.open("a") as file:
            file.write(f"{event.time:.0f}\t{name}\t{detail}\n")
        answer = self._gcloud.put_surely(self._file, self._url)
        return "" if answer.ok else answer.reason

    @property
    def attempt(self) -> int:
        """The number of the last attempt; 0 before the first."""
        return attempt(self.events)

    @property
    def last(self) -> str:
        return self.events[-1].name if self.events else ""

    @property
    def slice_is_up(self) -> bool:
        return slice_is_up(self.events)

    @property
    def asked(self) -> bool:
        """Whether a request was made of which nothing was seen since: the service may not find it yet."""
        return next((e.name == "attempt" for e in reversed(self.events) if e.name != "submitted"), False)

    def billed(self) -> float:
        """Seconds that slices were up; the time is asked for only if one still is."""
        return billed(self.events, self._clock.time() if self.slice_is_up else 0.0)


def attempt(events: list[Event]) -> int:
    numbers = [event.detail for event in events if event.name == "attempt"]
    return int(numbers[-1]) if numbers and numbers[-1].isdigit() else 0


def uncounted(events: list[Event]) -> int:
    """Attempts that ended in the queue, for want of machines: they were nobody's fault and cost nothing."""
    return sum(event.name == "unserved" for event in events)


def slice_is_up(events: list[Event]) -> bool:
    return next((event.name == "ready" for event in reversed(events) if event.name in ("ready", "gone")), False)


def billed(events: list[Event], now: float) -> float:
    """Seconds that slices were up, by the events ready and gone; without gone the last one still is.

    A clock that was put back in between takes nothing away.
    """
    total, since = 0.0, None
    for event in events:
        if event.name == "ready" and since is None:
            since = event.time
        elif event.name == "gone" and since is not None:
            total += max(0.0, event.time - since)
            since = None
    return total + (max(0.0, now - since) if since is not None else 0.0)


def failed_stages(events: list[Event]) -> tuple[str, ...]:
    """At which stage the last slices failed, one after another, without having come further in between."""
    stages: list[str] = []
    for event in reversed(events):
        if event.name in ("submitted", "finished"):
            break
        if event.name == "dropped":
            found = re.search(r"\[(\w+)\]$", event.detail)
            if not found:
                break
            stages.insert(0, found[1])
    return tuple(stages)


def _write(file: Path, text: str) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    new = file.with_name(f"{file.name}.new")
    new.write_text(text)
    new.replace(file)
