"""Generation under budgets against a loop over the parallel evaluation, what it compiles and holds, and on a mesh."""

import gc

import jax
import numpy as np
import pytest
from flax import nnx

from inference_budget import (
    POLICIES,
    Budgets,
    BudgetsError,
    Decoder,
    cache_bytes,
    eviction_times,
    generate,
    init_pruned_cache,
    memory_factor,
)
from inference_budget.generation import Sampling, decode
from selective_attention import SamplingError, Transformer
from selective_attention.transformer.decoding import for_decoding
from tests.support.small_model import LENGTH, STANDARD, VOCAB, make_model, make_tokens

BUDGETS = Budgets((3, 9), LENGTH)
PROMPTS = [make_tokens()[0, :15].tolist(), [2], make_tokens()[2, :8].tolist()]
GREEDY = {"temperature": 0}


@pytest.mark.parametrize(
    ("name", "changes", "block"),
    [
        ("selective", {}, None),
        ("h2o-per-head", STANDARD, None),
        ("selective", {"positions": "learned"}, 7),  # whose last block has places beyond the model's positions
    ],
)
def test_ragged_prompts_go_on_as_the_parallel_evaluation_says(name, changes, block):
    model = make_model(**changes)
    continuations = generate(model, PROMPTS, BUDGETS, POLICIES[name], 9, block=block, **GREEDY)
    for prompt, continuation in zip(PROMPTS, continuations, strict=True):
        whole = np.zeros((1, LENGTH), np.int32)
        whole[0, : len(prompt) + 9] = prompt + continuation
        logits_1NV = np.asarray(eviction_times(model, whole, BUDGETS, POLICIES[name])[1])
        likeliest = logits_1NV[0].argmax(-1)[len(prompt) - 1 : len(prompt) + 8]
        assert continuation == likeliest.tolist()


def test_300_ragged_prompts_compile_at_most_six_programs(compiled):
    model, budgets = make_model(max_length=256, num_layers=1, tied_embeddings=False), Budgets((32,), 256)
    rng = np.random.default_rng(0)
    lengths = rng.permutation(np.linspace(1, 200, 300).astype(int))
    prompts = [[2, *rng.integers(3, VOCAB, length - 1).tolist()] for length in lengths]
    compiled.clear()
    decoder = Decoder(model, budgets, POLICIES["selective"])
    for start in range(0, 300, 32):
        batch = prompts[start : start + 32]
        num_tokens = 1 + start % 27
        assert [len(row) for row in decoder.generate(batch, num_tokens)] == [num_tokens] * len(batch)
    assert 3 <= len(compiled) <= 6, compiled
    other = Decoder(make_model(1, max_length=256, num_layers=1, tied_embeddings=False), budgets, decoder.policy)
    compiled.clear()
    other.generate(prompts[:32], 40, temperature=0.5)
    assert compiled == []


@pytest.mark.slow
def test_a_prompt_goes_on_alone_as_in_a_batch():
    decoder = Decoder(make_model(), BUDGETS, POLICIES["selective"], block=8)
    together = decoder.generate(PROMPTS, 9, **GREEDY)
    assert [decoder.generate([prompt], 9, **GREEDY)[0] for prompt in PROMPTS] == together


def test_a_decoder_holds_the_weights_once():
    def held() -> int:
        gc.collect()
        return sum(x.nbytes for x in jax.live_arrays())

    before = held()
    model = make_model()
    parameters = sum(x.nbytes for x in jax.tree.leaves(nnx.state(model, nnx.Param)))
    decoder = Decoder(model, BUDGETS, POLICIES["selective"])
    del model
    decoder.generate(PROMPTS, 5)
    assert held() - before == parameters
    assert decoder


def test_the_cache_that_decodes_has_the_bytes_that_are_said():
    decoder = Decoder(make_model(), BUDGETS, POLICIES["selective"], cache_dtype="bfloat16")
    _, cache = decoder.prefill([[2], [2, 5]])
    said = init_pruned_cache(decoder.config, 2, BUDGETS, POLICIES["selective"], "bfloat16")
    assert cache_bytes(cache) == cache_bytes(said)
    assert memory_factor(cache, LENGTH) == memory_factor(said, LENGTH)


def test_stop_ids_end_a_continuation_and_streaming_gives_the_same_tokens():
    model, policy = make_model(num_layers=1, tied_embeddings=False), POLICIES["selective"]
    whole = generate(model, PROMPTS, Budgets((5,), LENGTH), policy, 9, **GREEDY)
    stop = whole[0][4]
    streamed = [[], [], []]

    def on_tokens(tokens):
        for row, new in zip(streamed, tokens, strict=True):
            row.extend(new)

    stopped = generate(model, PROMPTS, Budgets((5,), LENGTH), policy, 9, stop_ids=[stop], on_tokens=on_tokens, **GREEDY)
    assert stopped == [row[: row.index(stop)] if stop in row else row for row in whole]
    assert streamed == stopped


def test_a_tiny_nucleus_or_one_candidate_is_greedy():
    model, policy = make_model(num_layers=1, tied_embeddings=False), POLICIES["selective"]
    greedy = generate(model, PROMPTS, Budgets((5,), LENGTH), policy, 5, **GREEDY)
    assert generate(model, PROMPTS, Budgets((5,), LENGTH), policy, 5, top_p=1e-6) == greedy
    assert generate(model, PROMPTS, Budgets((5,), LENGTH), policy, 5, top_k=1) == greedy


@pytest.mark.parametrize("batch", [1, 4])
def test_the_compiled_loop_updates_the_cache_in_place_and_copies_neither_it_nor_the_parameters(batch):
    model, budgets = make_model(max_length=512), Budgets((300, 400), 512)
    cache = init_pruned_cache(model.config, batch, budgets, POLICIES["selective"])
    graph, parameters = nnx.split(for_decoding(model))
    logits_BV, key = np.zeros((batch, VOCAB), np.float32), jax.random.key(0)
    program = decode.lower(graph, parameters, logits_BV, cache, key, 0, 4, Sampling(temperature=0.0))
    memory = program.compile().memory_analysis()
    assert memory.alias_size_in_bytes == cache_bytes(cache) + logits_BV.nbytes + cache.position.nbytes
    one_layers_slots = cache.layers[0].k.nbytes + cache.layers[0].v.nbytes
    assert memory.temp_size_in_bytes < one_layers_slots


@pytest.mark.parametrize(
    ("name", "changes"),
    [
        ("selective", {}),
        pytest.param("forgotten", {}, marks=pytest.mark.slow),
        pytest.param("tova", {}, marks=pytest.mark.slow),
        pytest.param("h2o-per-head", {**STANDARD, "num_kv_heads": 2}, marks=pytest.mark.slow),
    ],
)
def test_a_mesh_gives_the_tokens_of_one_device(name, changes):
    model, prompts = make_model(tied_embeddings=False, **changes), [*PROMPTS, PROMPTS[0][:4]]
    expected = generate(model, prompts, BUDGETS, POLICIES[name], 6, **GREEDY)
    mesh = jax.make_mesh((2, 2), ("data", "tensor"))
    with jax.set_mesh(mesh):
        graph, parameters = nnx.split(model)
        sharded = jax.jit(lambda: nnx.state(Transformer(model.config, rngs=nnx.Rngs(params=0)), nnx.Param))()
        moved = jax.tree.map(lambda x, like: jax.device_put(x, like.sharding), parameters, sharded)
        assert generate(nnx.merge(graph, moved), prompts, BUDGETS, POLICIES[name], 6, **GREEDY) == expected


@pytest.mark.parametrize(
    ("prompts", "options", "message"),
    [
        ([], {}, "there is no prompt; give at least one"),
        ([[2, 5], []], {}, "prompt 1 is empty"),
        ([2, 5], {}, "prompt 0 is 2, not a list of token ids; one prompt alone is a list of one list"),
        ([[2.5]], {}, r"prompt 0 is \[2.5\], not a list of token ids"),
        ([[2, 5], [2, 40]], {}, "prompt 1 has token 40 at position 1; the model's are from 0 to 39"),
        ([[2, 5, -1]], {}, "prompt 0 has token -1 at position 2"),
        ([[2, 5], [5, 2]], {}, "prompt 1 starts with token 5; put <BOS>, which is 2, before it"),
        ([[5, 2]], {"bos_id": 2}, "prompt 0 starts with token 5; put <BOS>, which is 2, before it"),
        ([[2] * 20], {}, "num_tokens must be from 1 to 4, what max_length=24 leaves after a prompt of 20; got 5"),
        ([[2] * 24], {}, "a prompt of 24 tokens is too long: the model was made for 24, .*; shorten it to at most 23"),
        ([[2]], {"block": 0}, "block must be at least 1, got 0"),
        ([[2]], {"top_p": 0.0}, "top_p must be above 0 and at most 1, got 0.0"),
        ([[2]], {"top_k": 41}, "top_k must be from 1 to vocab_size=40, got 41"),
        ([[2]], {"budgets": [3, 9]}, r"budgets are given as Budgets\(tokens, context_length\), not as \[3, 9\]"),
        ([[2]], {"budgets": Budgets((3, 9), 25)}, "contexts of 25 tokens; the model was made for at most 24"),
        ([[2]], {"policy": "selective"}, r"'selective' is no eviction policy; take POLICIES\[name\], with one of sel"),
    ],
)
def test_what_cannot_be_generated_is_refused(prompts, options, message):
    arguments = {"budgets": BUDGETS, "policy": POLICIES["selective"], **options}
    with pytest.raises((BudgetsError, SamplingError), match=message):
        generate(make_model(), prompts, num_tokens=5, **arguments)
