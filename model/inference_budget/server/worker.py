"""The engine in a thread of its own, and how asyncio talks to it.

The engine is touched by that thread alone. What asyncio wants of it goes through one queue; what came out of each of
its steps comes back in one call. Nothing waits for a client: what a client has not read yet waits in its `Answers`, and
is never more than the tokens that it asked for.
"""

import asyncio
import collections
import contextlib
import dataclasses
import functools
import logging
import queue
import threading
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from typing import Protocol

from ..requests import GenerationRequest, Progress
from .errors import ApiError

logger = logging.getLogger("inference_budget.server")


class Engine(Protocol):
    """What this module needs of `inference_budget.Engine`."""

    @property
    def pending(self) -> int: ...

    def submit(self, request: GenerationRequest) -> int: ...

    def cancel(self, number: int) -> None: ...

    def step(self) -> list[Progress]: ...


class Answers:
    """What comes out of some requests that belong together.

    Attributes:
      tickets: of the requests, in their order.
    """

    def __init__(self, worker: "Worker", requests: Sequence[GenerationRequest]) -> None:
        self.tickets = [Ticket(request, self, index) for index, request in enumerate(requests)]
        self._worker = worker
        self._queue: asyncio.Queue[tuple[int, Progress] | ApiError] = asyncio.Queue()

    async def get(self) -> tuple[int, Progress]:
        """The next thing that one of the requests, the first number, came to.

        Raises:
          ApiError: the engine failed, or does not take one of the requests.
        """
        item = await self._queue.get()
        if isinstance(item, ApiError):
            raise item
        return item

    def put(self, item: tuple[int, Progress] | ApiError) -> None:
        self._queue.put_nowait(item)

    def cancel(self, index: int) -> None:
        """Frees the row of one of the requests, unless it has ended."""
        self._worker.cancel(self.tickets[index])


@dataclasses.dataclass(eq=False)
class Ticket:
    """One request on its way through the engine."""

    request: GenerationRequest
    answers: Answers
    index: int  # of it in `answers`
    number: int = -1  # the engine's; its thread alone looks at it
    ended: bool = False  # the event loop alone looks at it


class Worker:
    """Runs an engine.

    Args:
      engine: what is run.
      rows: how many requests of each of its budget classes it decodes at a time.
      queue_limit: how many more may wait, of all classes together.
      on_failure: called in the event loop when the engine failed, once; nothing can be generated any more.

    Attributes:
      pending: by budget class, how many requests have not come to their end.
      failed: whether the engine has.
    """

    def __init__(
        self, engine: Engine, rows: int, queue_limit: int, on_failure: Callable[[], object] = lambda: None
    ) -> None:
        self.rows, self.queue_limit, self.failed = rows, queue_limit, False
        self.pending: collections.Counter[str] = collections.Counter()
        self._engine, self._on_failure = engine, on_failure
        self._inbox: queue.SimpleQueue[Callable[[], object] | None] = queue.SimpleQueue()
        self._tickets: dict[int, Ticket] = {}  # by the engine's numbers; the thread's own
        self._open: set[Answers] = set()
        self._thread = threading.Thread(target=self._run, name="engine")

    @property
    def waiting(self) -> int:
        """Requests that no row decodes yet."""
        return sum(max(pending - self.rows, 0) for pending in self.pending.values())

    @property
    def decoding(self) -> int:
        """Rows in use."""
        return sum(min(pending, self.rows) for pending in self.pending.values())

    @contextlib.asynccontextmanager
    async def running(self) -> AsyncIterator[None]:
        """Runs the engine's thread, for the event loop that this is entered in."""
        self._loop = asyncio.get_running_loop()
        self._thread.start()
        try:
            yield
        finally:
            self._inbox.put(None)
            await asyncio.to_thread(self._thread.join)

    @contextlib.contextmanager
    def submitted(self, requests: Sequence[GenerationRequest]) -> Iterator[Answers]:
        """Has the requests generated for as long as this lasts; those that have not ended then are cancelled.

        Raises:
          ApiError: the queue has no room for all of them, or the engine failed before.
        """
        if self.failed:
            raise ApiError(503, "the engine has failed, and this server stops")
        answers = Answers(self, requests)
        self._count(answers.tickets, 1)
        if self.waiting > self.queue_limit:
            self._count(answers.tickets, -1)
            what = f"{self.waiting} continuations are waiting, and at most {self.queue_limit} may; try again later"
            raise ApiError(429, what, code="rate_limit_exceeded", headers={"Retry-After": "1"})
        self._open.add(answers)
        for ticket in answers.tickets:
            self._inbox.put(functools.partial(self._submit, ticket))
        try:
            yield answers
        finally:
            self._open.discard(answers)
            for ticket in answers.tickets:
                self.cancel(ticket)

    def cancel(self, ticket: Ticket) -> None:
        """Has the engine forget a request, unless it has ended."""
        if not ticket.ended:
            self._inbox.put(functools.partial(self._cancel, ticket))

    def _run(self) -> None:
        try:
            while self._take_orders():
                done = self._engine.step()
                found = [(self._tickets[p.number], p) for p in done if p.number in self._tickets]
                for ticket, progress in found:
                    if progress.finish_reason is not None:
                        del self._tickets[ticket.number]
                if found:
                    self._tell(self._deliver, found)
        except Exception as error:
            logger.critical("the engine failed", exc_info=error)
            self._tell(self._fail)

    def _take_orders(self) -> bool:
        """Does what asyncio wants, waiting for it if there is nothing else to do; False at the end."""
        while True:
            try:
                order = self._inbox.get(block=not self._engine.pending)
            except queue.Empty:
                return True
            if order is None:
                return False
            order()

    def _submit(self, ticket: Ticket) -> None:
        try:
            ticket.number = self._engine.submit(ticket.request)
        except ValueError as error:  # what `completions` let pass and the engine does not
            self._tell(self._refuse, ticket, error)
        else:
            self._tickets[ticket.number] = ticket

    def _cancel(self, ticket: Ticket) -> None:
        if self._tickets.pop(ticket.number, None) is not None:
            self._engine.cancel(ticket.number)
            self._tell(self._end, ticket)

    def _tell(self, function: Callable[..., object], *arguments: object) -> None:
        with contextlib.suppress(RuntimeError):  # the loop is closed: nobody listens any more
            self._loop.call_soon_threadsafe(function, *arguments)

    # What follows runs in the event loop.

    def _deliver(self, found: list[tuple[Ticket, Progress]]) -> None:
        for ticket, progress in found:
            if progress.finish_reason is not None:
                self._end(ticket)
            ticket.answers.put((ticket.index, progress))

    def _refuse(self, ticket: Ticket, error: ValueError) -> None:
        self._end(ticket)
        ticket.answers.put(ApiError(400, str(error)))

    def _end(self, ticket: Ticket) -> None:
        ticket.ended = True
        self._count([ticket], -1)

    def _count(self, tickets: Sequence[Ticket], change: int) -> None:
        for ticket in tickets:
            self.pending[ticket.request.budget_class] += change

    def _fail(self) -> None:
        self.failed = True
        for answers in self._open:
            answers.put(ApiError(500, "the engine failed; the server's log says why"))
        self._on_failure()
