"""The engine against `Decoder.generate`, and that a request's tokens depend on nothing but the request."""

import dataclasses
import gc
import random
import resource
import threading

import jax
import numpy as np
import pytest
from flax import nnx

from inference_budget import POLICIES, Budgets, BudgetsError, Decoder, Engine, GenerationRequest, cache_bytes
from inference_budget.rows import decode_rows
from selective_attention import SamplingError, Transformer
from tests.support.small_model import LENGTH, VOCAB, make_model, make_tokens

BUDGETS, SELECTIVE = Budgets((3, 9), LENGTH), POLICIES["selective"]
PROMPTS = [row[:length].tolist() for row, length in zip(make_tokens(batch=5), (1, 5, 8, 13, 17), strict=True)]
GREEDY = [GenerationRequest(prompt, 7, temperature=0) for prompt in PROMPTS]


@pytest.fixture(scope="module")
def model() -> Transformer:
    return make_model(tied_embeddings=False)


@pytest.fixture(scope="module")
def expected(model) -> list[list[int]]:
    """What a decoder says to the greedy requests."""
    return Decoder(model, BUDGETS, SELECTIVE).generate(PROMPTS, 7, temperature=0)


def random_request(number: int) -> GenerationRequest:
    """Of every kind, and of all lengths that there are."""
    rng = np.random.default_rng(number)
    length = int(rng.integers(1, LENGTH))
    return GenerationRequest(
        [2, *rng.integers(3, VOCAB, length - 1).tolist()],
        num_tokens=int(rng.integers(1, LENGTH - length + 1)),
        temperature=[0, 0.7, 1.5][rng.integers(3)],
        top_k=[None, 5, 1][rng.integers(3)],
        top_p=[None, 0.9, 0.3][rng.integers(3)],
        seed=number,
        stop_ids=[[], [7, 20]][rng.integers(2)],
        logprobs=[None, 0, 3][rng.integers(3)],
    )


def answers(engine: Engine, requests) -> dict:
    """By each request's key: (tokens, why it ended)."""
    keys = {engine.submit(request): key for key, request in requests}
    return {keys[done.number]: (done.tokens, done.finish_reason) for done in engine}


def test_200_requests_have_the_same_tokens_in_any_number_of_rows_and_any_order(model):
    requests = [(number, random_request(number)) for number in range(200)]
    results = []
    for rows, steps in ((1, 2), (2, 3), (8, 5)):
        random.Random(rows).shuffle(requests)
        results.append(answers(Engine(model, BUDGETS, SELECTIVE, rows=rows, steps=steps, block=8), requests))
    assert len(results[0]) == 200
    assert {reason for _, reason in results[0].values()} == {"stop", "length"}
    assert results[0] == results[1] == results[2]


@pytest.mark.parametrize("block", [8, None])
def test_greedy_tokens_are_those_of_a_decoder(model, expected, block):
    engine = Engine(model, BUDGETS, SELECTIVE, rows=2, steps=3, block=block)
    assert answers(engine, enumerate(GREEDY)) == {n: (tokens, "length") for n, tokens in enumerate(expected)}


def test_a_class_has_its_own_budgets(model, expected):
    tiny = Budgets((2, 3), LENGTH), POLICIES["oldest"]
    engine = Engine(model, BUDGETS, SELECTIVE, rows=2, steps=3, block=8, more_classes={"tiny": tiny})
    mixed = [(n, dataclasses.replace(r, budget_class=["default", "tiny"][n % 2])) for n, r in enumerate(GREEDY)]
    in_tiny = Decoder(model, *tiny).generate(PROMPTS, 7, temperature=0)
    assert in_tiny != expected
    found = answers(engine, mixed)
    assert [found[n][0] for n in range(5)] == [[expected, in_tiny][n % 2][n] for n in range(5)]


def test_sampled_tokens_follow_the_model_s_distribution(model):
    engine = Engine(model, BUDGETS, SELECTIVE, rows=8, steps=5, block=8)
    request = GenerationRequest([2], 1, temperature=0.9, top_k=6, top_p=0.8, logprobs=20)
    drawn = [engine.submit(dataclasses.replace(request, seed=seed)) for seed in range(600)]
    completions = list(engine)
    assert sorted(done.number for done in completions) == drawn
    likeliest = completions[0].logprobs[0].likeliest[:6]
    p = np.exp(np.array([logprob for _, logprob in likeliest]) / 0.9)
    p /= p.sum()
    p[np.cumsum(p) - p >= 0.8] = 0
    counts = np.array([sum(done.tokens == [token] for done in completions) for token, _ in likeliest])
    assert counts.sum() == 600
    assert (counts[p == 0] == 0).all()
    assert np.abs(counts / 600 - p / p.sum()).max() < 0.07


def test_logprobs_are_those_of_the_model(model):
    engine = Engine(model, Budgets.full(2, LENGTH), SELECTIVE, rows=2, block=8)
    engine.submit(GenerationRequest(PROMPTS[1], 6, temperature=2.0, top_k=3, logprobs=4))
    (done,) = engine
    whole = np.zeros((1, LENGTH), np.int32)
    whole[0, :11] = PROMPTS[1] + done.tokens
    log_NV = np.asarray(jax.nn.log_softmax(model(whole)))[0, 4:10]
    for one, log_V, token in zip(done.logprobs, log_NV, done.tokens, strict=True):
        np.testing.assert_allclose(one.logprob, log_V[token], atol=1e-5)
        assert [token for token, _ in one.likeliest] == np.argsort(-log_V)[:4].tolist()
        np.testing.assert_allclose([x for _, x in one.likeliest], np.sort(log_V)[::-1][:4], atol=1e-5)


def test_a_prompt_s_scores_are_those_that_its_tokens_had_when_they_were_drawn(model, expected):
    """Under budgets, over the borders of blocks, without a row and with one, and whatever else runs."""
    engine = Engine(model, BUDGETS, SELECTIVE, rows=2, steps=3, block=8)
    drawn = {key: engine.submit(dataclasses.replace(r, logprobs=3)) for key, r in enumerate(GREEDY)}
    by_number = {done.number: done for done in engine}
    first = [by_number[number] for number in drawn.values()]
    assert [done.tokens for done in first] == expected and not any(done.prompt_logprobs for done in first)
    wholes = [PROMPTS[key] + tokens for key, tokens in enumerate(expected)]
    for prompt in wholes:
        for num_tokens in (0, 2) if len(prompt) + 2 <= LENGTH else (0,):
            engine.submit(GenerationRequest(prompt, num_tokens, temperature=0, logprobs=3, score_prompt=True))
        engine.submit(GenerationRequest(prompt[:-1], 1))
    scored = [done for done in engine if done.request.score_prompt]
    assert len(scored) > len(wholes)
    for done in scored:
        assert len(done.tokens) == len(done.logprobs) == done.request.num_tokens and done.finish_reason == "length"
        assert len(done.prompt_logprobs) == len(done.request.prompt) - 1
        once = first[wholes.index(done.request.prompt)].logprobs
        for again, before in zip(done.prompt_logprobs[-len(once) :], once, strict=True):
            np.testing.assert_allclose(again.logprob, before.logprob, atol=1e-5)
            assert [token for token, _ in again.likeliest] == [token for token, _ in before.likeliest]
            np.testing.assert_allclose([x for _, x in again.likeliest], [x for _, x in before.likeliest], atol=1e-5)


def test_progress_adds_up_to_completions(model, expected):
    engine = Engine(model, BUDGETS, SELECTIVE, rows=2, steps=3, block=8)
    numbers = [engine.submit(request) for request in GREEDY]
    tokens, reasons = {number: [] for number in numbers}, {}
    while engine.pending:
        for progress in engine.step():
            assert progress.number not in reasons
            assert len(progress.tokens) <= 3
            tokens[progress.number] += progress.tokens
            if progress.finish_reason:
                reasons[progress.number] = progress.finish_reason
    assert list(tokens.values()) == expected
    assert set(reasons.values()) == {"length"}
    assert engine.step() == []


def test_other_threads_submit_while_it_runs(model, expected):
    engine = Engine(model, BUDGETS, SELECTIVE, rows=2, steps=3, block=8)
    places: dict[int, int] = {}

    def submit() -> None:
        for place, request in enumerate(GREEDY * 4):
            places[engine.submit(request)] = place % 5

    threads = [threading.Thread(target=submit) for _ in range(3)]
    for thread in threads:
        thread.start()
    done = {}
    while engine.pending or any(thread.is_alive() for thread in threads):
        done |= {completion.number: completion.tokens for completion in engine}
    assert sorted(done) == list(range(60))
    assert all(tokens == expected[places[number]] for number, tokens in done.items())


def test_cancelled_requests_leave_queue_lane_and_row_to_others(model, expected):
    engine = Engine(model, BUDGETS, SELECTIVE, rows=1, steps=2, block=8)
    numbers = [engine.submit(request) for request in GREEDY]
    decoding, lane, waiting = numbers[0], numbers[1], numbers[3]
    assert [progress.number for progress in engine.step()] == [decoding]
    assert engine._batches["default"]._lane.live.number == lane
    for number in (waiting, lane, decoding, waiting, 99):
        engine.cancel(number)
    done = {completion.number: completion for completion in engine}
    for number in (decoding, lane, waiting):
        assert done[number].finish_reason == "cancelled"
    assert done[decoding].tokens == expected[0][:2]
    for number in (numbers[2], numbers[4]):
        assert done[number].tokens == expected[number]
    engine.cancel(decoding)
    assert engine.step() == []


def test_what_a_free_row_holds_never_leaks(model, expected):
    engine = Engine(model, BUDGETS, SELECTIVE, rows=8, steps=5, block=8)
    batch = engine._batches["default"]

    def poisoned(x: jax.Array) -> jax.Array:
        return x * float("nan") if np.issubdtype(x.dtype, np.floating) else x

    batch._rows = jax.tree.map(poisoned, batch._rows)
    few, rest = list(enumerate(GREEDY[:3])), list(enumerate(GREEDY))[3:]
    found = answers(engine, few)
    assert np.isnan(batch._rows.logits[3:]).all()  # they have stayed free
    found |= answers(engine, rest)
    assert [found[n][0] for n in range(5)] == expected


def test_few_programs_are_compiled_whatever_is_asked_for(compiled):
    model = make_model(num_layers=1, tied_embeddings=False)
    compiled.clear()
    engine = Engine(model, Budgets((7,), LENGTH), SELECTIVE, rows=2, block=6)
    before = len(compiled)
    answers(engine, [(n, random_request(n)) for n in range(20)])
    assert sorted(set(compiled[before:])) == ["jit(admit)", "jit(decode_rows)", "jit(take_chunk)"]
    assert len(compiled) - before == 4  # the first chunk of a prompt, and any later one


def test_the_compiled_round_updates_the_rows_in_place():
    rows = 4
    model = make_model(max_length=512)
    engine = Engine(model, Budgets((300, 400), 512), SELECTIVE, rows=rows)
    batch = engine._batches["default"]
    program = decode_rows.lower(*batch._model, batch._rows, np.ones(rows, bool), np.bool_(True), steps=16)
    memory = program.compile().memory_analysis()
    assert memory.alias_size_in_bytes == sum(x.nbytes for x in jax.tree.leaves(batch._rows))
    layer = batch._rows.cache.layers[0]
    assert memory.temp_size_in_bytes < layer.k.nbytes + layer.v.nbytes
    assert cache_bytes(batch._rows.cache) > 10 * layer.position.nbytes


@pytest.mark.slow
def test_a_mesh_gives_the_tokens_of_one_device(model, expected):
    with jax.set_mesh(jax.make_mesh((2, 2), ("data", "tensor"))):
        graph, parameters = nnx.split(model)
        sharded = jax.jit(lambda: nnx.state(Transformer(model.config, rngs=nnx.Rngs(params=0)), nnx.Param))()
        moved = jax.tree.map(lambda x, like: jax.device_put(x, like.sharding), parameters, sharded)
        engine = Engine(nnx.merge(graph, moved), BUDGETS, SELECTIVE, rows=2, steps=3, block=8)
        options = {"temperature": 1, "top_p": 0.9, "logprobs": 2, "score_prompt": True}
        sampled = [(n + 5, dataclasses.replace(r, **options)) for n, r in enumerate(GREEDY[:2])]
        found = answers(engine, [*enumerate(GREEDY), *sampled])
    assert [found[n][0] for n in range(5)] == expected
    assert [found[n] for n, _ in sampled] == [
        *answers(Engine(model, BUDGETS, SELECTIVE, rows=2, steps=3, block=8), sampled).values()
    ]


@pytest.mark.slow
def test_memory_does_not_grow_over_10000_short_requests():
    engine = Engine(make_model(num_layers=1, tied_embeddings=False), Budgets((7,), LENGTH), SELECTIVE, block=6)

    def held(requests: int) -> tuple[int, int]:
        """Bytes of arrays, and the most that the process had, after so many more."""
        for start in range(0, requests, 100):
            for n in range(start, start + 100):
                engine.submit(GenerationRequest([2, 3 + n % 30], 2, seed=n, stop_ids=[3], logprobs=1))
            assert len(list(engine)) == 100
        gc.collect()
        arrays = sum(x.nbytes for x in jax.live_arrays())
        return arrays, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024

    (arrays, process), (arrays_later, process_later) = held(1000), held(9000)
    assert arrays_later == arrays
    assert process_later - process < 32 << 20
    assert engine.pending == 0


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"prompt": []}, "the prompt is empty"),
        ({"prompt": [2, 40]}, "the prompt has token 40 at position 1; the model's are from 0 to 39"),
        ({"prompt": [5]}, "the prompt starts with token 5; put <BOS>, which is 2, before it"),
        ({"prompt": [2] * 24}, "a prompt of 24 tokens is too long"),
        ({"num_tokens": 24}, "num_tokens must be from 1 to 23.* got 24"),
        ({"num_tokens": 1.5}, "num_tokens must be a whole number, got 1.5"),
        ({"temperature": -1}, "temperature must not be negative, got -1"),
        ({"temperature": "hot"}, "temperature must be a number, got 'hot'"),
        ({"temperature": float("nan")}, "temperature must be a number, got nan"),
        ({"top_k": 41}, "top_k must be from 1 to vocab_size=40, got 41"),
        ({"top_p": 0}, "top_p must be above 0 and at most 1, got 0"),
        ({"seed": -1}, "seed must not be negative, got -1"),
        ({"seed": True}, "seed must be a whole number, got True"),
        ({"stop_ids": [3, 40]}, "stop_ids must be tokens from 0 to 39, got 40"),
        ({"logprobs": 21}, "logprobs must be from 0 to 20, got 21"),
        ({"num_tokens": 0}, "num_tokens must be from 1 to 23"),
        ({"score_prompt": True}, "score_prompt needs logprobs"),
        (
            {"prompt": [2] * 25, "num_tokens": 0, "logprobs": 0, "score_prompt": True},
            "the prompt has 25 tokens; the model was made for 24",
        ),
        ({"budget_class": "huge"}, "budget_class must be one of default, got 'huge'"),
    ],
)
def test_what_cannot_be_generated_is_refused_at_once(model, changes, message):
    engine = Engine(model, BUDGETS, SELECTIVE, bos_id=2)
    with pytest.raises((BudgetsError, SamplingError), match=message):
        engine.submit(dataclasses.replace(GREEDY[0], **changes))
    assert engine.pending == 0


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"rows": 0}, "rows must be at least 1, got 0"),
        ({"steps": 0}, "steps must be at least 1, got 0"),
        ({"block": 0}, "block must be at least 1, got 0"),
        ({"more_classes": {"default": (BUDGETS, SELECTIVE)}}, "'default' is the class of the budgets themselves"),
        ({"more_classes": {"other": (Budgets((3,), LENGTH), SELECTIVE)}}, "there are 1 budgets, but the model has 2"),
    ],
)
def test_an_engine_that_cannot_be_is_refused(model, options, message):
    with pytest.raises(BudgetsError, match=message):
        Engine(model, BUDGETS, SELECTIVE, **options)
