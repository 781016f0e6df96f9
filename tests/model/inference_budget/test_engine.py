"""The engine against `Decoder.generate`, and that a request's tokens depend on nothing but the request."""

import random

import numpy as np

from inference_budget import (
    POLICIES,
    Budgets,
    Decoder,
    Engine,
    GenerationRequest,
)
from tests.support.small_model import LENGTH, VOCAB, make_model, make_tokens

BUDGETS, SELECTIVE = Budgets((3, 9), LENGTH), POLICIES["selective"]
OTHERS = {"tiny": (Budgets((2, 3), LENGTH), POLICIES["oldest"])}


def random_requests(count: int) -> list[GenerationRequest]:
    """Of every kind, and of all lengths that there are."""
    rng, requests = np.random.default_rng(0), []
    for n in range(count):
        length = int(rng.integers(1, LENGTH - 1))
        prompt = [2, *rng.integers(3, VOCAB, length - 1).tolist()]
        request = GenerationRequest(
            prompt,
            num_tokens=int(rng.integers(1, LENGTH - length + 1)),
            temperature=[0, 0.7, 1.5][n % 3],
            top_k=[None, 5, 1][rng.integers(3)],
            top_p=[None, 0.9, 0.3][rng.integers(3)],
            seed=n,
            stop_ids=[[], [7, 20]][n % 2],
            budget_class=["default", "tiny"][rng.integers(2)],
            logprobs=[None, 0, 3][rng.integers(3)],
        )
        requests.append(request)
    return requests


def make_engine(**options) -> Engine:
    return Engine(make_model(tied_embeddings=False), BUDGETS, SELECTIVE, more_classes=OTHERS, **options)


def completed(engine: Engine, requests) -> dict:
    """Completions by request's place."""
    places = {engine.submit(request): place for place, request in requests}
    return {places[completion.number]: completion for completion in engine}


def test_tokens_do_not_depend_on_rows_steps_or_order():
    requests = list(enumerate(random_requests(200)))
    results = []
    for rows, steps in ((1, 16), (3, 1), (8, 5)):
        random.Random(rows).shuffle(requests)
        results.append(completed(make_engine(rows=rows, steps=steps, block=8), requests))
    for place, request in requests:
        first, *others = (result[place] for result in results)
        assert first.request == request
        assert [(c.tokens, c.finish_reason) for c in others] == [(first.tokens, first.finish_reason)] * 2


def test_greedy_tokens_are_those_of_a_decoder():
    model = make_model(tied_embeddings=False)
    prompts = [row[:length].tolist() for row, length in zip(make_tokens(batch=5), (1, 5, 8, 13, 17), strict=True)]
    expected = Decoder(model, BUDGETS, SELECTIVE).generate(prompts, 7, temperature=0)
    for block in (4, None):
        engine = Engine(model, BUDGETS, SELECTIVE, rows=2, steps=3, block=block)
        requests = [GenerationRequest(prompt, 7, temperature=0) for prompt in prompts]
        found = completed(engine, enumerate(requests))
        assert [found[n].tokens for n in range(5)] == expected
