"""Generation under budgets against a loop over the parallel evaluation, and on a mesh."""

import jax
import numpy as np
import pytest
from flax import nnx
from small_model import LENGTH, STANDARD, VOCAB, make_model, make_tokens

from inference_budget import POLICIES, Budgets, cache_bytes, eviction_times, generate, init_pruned_cache
from inference_budget.generation import Sampling, decode
from selective_attention import Transformer
from selective_attention.transformer.decoding import unstacked

BUDGETS = Budgets((3, 9), LENGTH)
PROMPTS = [make_tokens()[0, :15].tolist(), [2], make_tokens()[2, :8].tolist()]
GREEDY = {"temperature": 0}


@pytest.mark.parametrize(("name", "changes"), [("selective", {}), ("h2o-per-head", STANDARD)])
def test_ragged_prompts_go_on_as_the_parallel_evaluation_says(name, changes):
    model = make_model(**changes)
    continuations = generate(model, PROMPTS, BUDGETS, POLICIES[name], 9, **GREEDY)
    for prompt, continuation in zip(PROMPTS, continuations, strict=True):
        whole = np.zeros((1, LENGTH), np.int32)
        whole[0, : len(prompt) + 9] = prompt + continuation
        logits_1NV = np.asarray(eviction_times(model, whole, BUDGETS, POLICIES[name])[1])
        likeliest = logits_1NV[0].argmax(-1)[len(prompt) - 1 : len(prompt) + 8]
        assert continuation == likeliest.tolist()


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
def test_the_compiled_scan_updates_the_cache_in_place_and_copies_neither_it_nor_the_parameters(batch):
    model, budgets = make_model(max_length=512), Budgets((300, 400), 512)
    cache = init_pruned_cache(model.config, batch, budgets, POLICIES["selective"])
    graph, parameters = nnx.split(unstacked(model))
    logits_BV, keys = np.zeros((batch, VOCAB), np.float32), jax.random.split(jax.random.key(0), 4)
    program = decode.lower(graph, parameters, logits_BV, cache, keys, Sampling(temperature=0.0))
    memory = program.compile().memory_analysis()
    assert memory.alias_size_in_bytes == cache_bytes(cache) + logits_BV.nbytes + cache.position.nbytes
    one_layers_slots = cache.layers[0].k.nbytes + cache.layers[0].v.nbytes
    assert memory.temp_size_in_bytes < one_layers_slots


@pytest.mark.parametrize(
    ("name", "changes"),
    [
        ("selective", {}),
        pytest.param("tova", {}, marks=pytest.mark.slow),
        ("h2o-per-head", {**STANDARD, "num_kv_heads": 2}),
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
        ([[2, 5], []], {}, "prompt 1 is empty"),
        ([[2] * 20], {}, "num_tokens must be from 1 to 4, what max_length=24 leaves after a prompt of 20; got 5"),
        ([[2]], {"top_p": 0.0}, "top_p must be above 0 and at most 1, got 0.0"),
        ([[2]], {"top_k": 41}, "top_k must be from 1 to vocab_size=40, got 41"),
    ],
)
def test_what_cannot_be_generated_is_refused(prompts, options, message):
    with pytest.raises(ValueError, match=message):
        generate(make_model(), prompts, BUDGETS, POLICIES["selective"], 5, **options)
