"""The engine's thread, with a stand-in that says its prompt again and again, a token a step."""

import asyncio
from collections.abc import Callable, Coroutine
from typing import Any

import pytest

from inference_budget import GenerationRequest, Progress
from inference_budget.server.errors import ApiError
from inference_budget.server.worker import Worker


class Echo:
    """Two rows; fails at a request for token 13, refuses one for token 7."""

    def __init__(self) -> None:
        self.live: dict[int, tuple[GenerationRequest, int]] = {}
        self.cancelled: list[int] = []
        self.count = 0

    @property
    def pending(self) -> int:
        return len(self.live)

    def submit(self, request: GenerationRequest) -> int:
        if request.prompt[0] == 7:
            raise ValueError("there is no token 7")
        self.count += 1
        self.live[self.count] = request, 0
        return self.count

    def cancel(self, number: int) -> None:
        self.cancelled.append(number)
        del self.live[number]

    def step(self) -> list[Progress]:
        news = []
        for number, (request, drawn) in list(self.live.items())[:2]:
            if request.prompt[0] == 13:
                raise RuntimeError("out of memory")
            ended = drawn + 1 == request.num_tokens
            news.append(Progress(number, [request.prompt[0]], None, "length" if ended else None))
            self.live[number] = request, drawn + 1
            if ended:
                del self.live[number]
        return news


def asked(token: int, num_tokens: int) -> GenerationRequest:
    return GenerationRequest([token], num_tokens)


def run(test: Callable[[Worker, Echo], Coroutine[Any, Any, None]], queue_limit: int = 10) -> None:
    async def whole() -> None:
        engine = Echo()
        worker = Worker(engine, 2, queue_limit)
        async with asyncio.timeout(60), worker.running():
            await test(worker, engine)

    asyncio.run(whole())


async def all_of(worker: Worker, requests: list[GenerationRequest]) -> list[list[int]]:
    tokens: list[list[int]] = [[] for _ in requests]
    with worker.submitted(requests) as answers:
        going = len(requests)
        while going:
            index, progress = await answers.get()
            tokens[index] += progress.tokens
            going -= progress.finish_reason is not None
    return tokens


def test_answers_come_back_to_who_asked():
    async def test(worker: Worker, engine: Echo) -> None:
        groups = [[asked(100 * n + k, 5) for k in range(3)] for n in range(1, 4)]
        found = await asyncio.gather(*(all_of(worker, group) for group in groups))
        assert found == [[[request.prompt[0]] * 5 for request in group] for group in groups]
        assert worker.pending.total() == 0 and engine.cancelled == []

    run(test)


def test_whoever_leaves_frees_what_it_asked_for_and_nobody_else_s():
    async def test(worker: Worker, engine: Echo) -> None:
        with worker.submitted([asked(5, 10**9), asked(6, 10**9), asked(8, 10**9)]) as answers:
            other = asyncio.create_task(all_of(worker, [asked(9, 3)]))
            await answers.get()
            answers.cancel(0)
            while engine.cancelled != [1]:
                await answers.get()
        assert await other == [[9, 9, 9]]
        while worker.pending.total():
            await asyncio.sleep(0)
        assert sorted(engine.cancelled) == [1, 2, 3] and not engine.live

    run(test)


def test_what_finds_no_room_in_the_queue_is_told_to_come_again():
    async def test(worker: Worker, engine: Echo) -> None:
        with worker.submitted([asked(5, 10**9)] * 4):
            assert (worker.decoding, worker.waiting) == (2, 2)
            with pytest.raises(ApiError) as error, worker.submitted([asked(6, 1)] * 2):
                pass
            assert (error.value.status, error.value.headers) == (429, {"Retry-After": "1"})
            assert worker.pending.total() == 4
            with worker.submitted([asked(6, 1)]):
                pass
        while worker.pending.total():
            await asyncio.sleep(0)
        assert await all_of(worker, [asked(6, 1)] * 5) == [[6]] * 5

    run(test, queue_limit=3)


def test_what_the_engine_refuses_is_the_client_s_mistake():
    async def test(worker: Worker, engine: Echo) -> None:
        with pytest.raises(ApiError, match="there is no token 7") as error:
            await all_of(worker, [asked(5, 1), asked(7, 1)])
        assert error.value.status == 400
        assert await all_of(worker, [asked(5, 2)]) == [[5, 5]]
        assert worker.pending.total() == 0

    run(test)


def test_an_engine_that_fails_is_told_to_all_who_wait_and_to_the_server(caplog):
    told = []

    async def whole() -> None:
        worker = Worker(Echo(), 2, 10, lambda: told.append(True))
        async with asyncio.timeout(60), worker.running():
            waiting = asyncio.gather(
                *(all_of(worker, [asked(token, 10**9)]) for token in (5, 13, 6)), return_exceptions=True
            )
            for error in await waiting:
                assert isinstance(error, ApiError) and error.status == 500 and "out of memory" not in str(error)
            with pytest.raises(ApiError) as error, worker.submitted([asked(5, 1)]):
                pass
            assert error.value.status == 503

    asyncio.run(whole())
    assert told == [True]
    assert "out of memory" in caplog.text
