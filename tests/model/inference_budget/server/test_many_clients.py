"""Many clients at once: nothing is lost, nothing mixed up, and memory does not grow."""

import asyncio
import random

import pytest

from tests.support.datasets import SENTENCE

openai = pytest.importorskip("openai")
for name in ("prometheus_client", "starlette", "uvicorn"):
    pytest.importorskip(name)

pytestmark = pytest.mark.slow
CLIENTS = 500


def prompts(seed: int, count: int) -> list[str]:
    """All different, of 1 to 40 words."""
    rng = random.Random(seed)
    words = SENTENCE.split()
    return [" ".join([str(number), *rng.choices(words, k=rng.randrange(40))]) for number in range(count)]


async def _ask(server, texts, retries):
    """What each of the prompts is answered, on a connection of its own; every other one as a stream."""
    async with openai.AsyncOpenAI(base_url=server.url, api_key="none", max_retries=retries, timeout=600) as client:

        async def one(number: int, text: str) -> str:
            options = {"model": "small", "prompt": text, "max_tokens": 30, "temperature": 0}
            if number % 2:
                return (await client.completions.create(**options)).choices[0].text
            stream = await client.completions.create(**options, stream=True)
            return "".join([chunk.choices[0].text async for chunk in stream])

        return await asyncio.gather(*(one(number, text) for number, text in enumerate(texts)))


def test_500_clients_at_once_get_what_each_asked_for_in_bounded_memory(served):
    with served.serve() as server:
        used = []
        for seed in range(2):
            texts = prompts(seed, CLIENTS)
            found = asyncio.run(_ask(server, texts, 0))
            assert found == [served.text(tokens) for tokens in served.continued(texts, 30)]
            used.append(server.memory)
        assert server.metric('requests_total{status="200"}') == 2 * CLIENTS
        assert server.metric("rows_in_use") == server.metric("queue_length") == 0
        assert used[1] - used[0] < 50 << 20


def test_clients_that_find_the_queue_full_come_again_and_are_answered(served):
    texts = prompts(9, 100)
    with served.serve("--queue=10") as server:
        found = asyncio.run(_ask(server, texts, 1000))
        assert found == [served.text(tokens) for tokens in served.continued(texts, 30)]
        assert server.metric('requests_total{status="429"}') > 0
        status, _, _ = server.ask("POST", "/v1/completions", {"model": "small", "prompt": ["a"] * 19})
        assert status == 400  # it never has room
