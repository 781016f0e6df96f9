"""What a body asks for, and what is said about one that asks for nothing that there is."""

import json
from pathlib import Path
from types import SimpleNamespace

import pytest

from inference_budget.server.completions import CompletionRequest, Served, parse
from inference_budget.server.errors import ApiError
from inference_budget.text import TextTokenizer

BOS, EOS = 2, 3


@pytest.fixture(scope="module")
def served(dataset_path: Path) -> Served:
    return Served("small", TextTokenizer(dataset_path), ("default", "tight"), 64, 400, max_sequences=8, max_logprobs=20)


def parsed(served: Served, **fields: object) -> CompletionRequest:
    return parse(json.dumps({"model": "small", "prompt": "the mask", **fields}).encode(), served)


def test_what_is_left_out_is_as_with_openai(served):
    asked = parsed(served)
    assert asked.prompts == (tuple(served.tokenizer.encode("the mask")),) and asked.prompts[0][0] == BOS
    assert (asked.n, asked.max_tokens, asked.temperature, asked.top_p, asked.top_k) == (1, 16, 1, None, None)
    assert (asked.stop, asked.stop_ids, asked.logprobs, asked.stream) == ((), (EOS,), None, False)
    nothing = dict.fromkeys(("n", "temperature", "stop", "stream", "top_p", "logprobs", "best_of", "echo"))
    assert parsed(served, seed=5, **nothing) == parsed(served, seed=5)
    assert len({parsed(served).seed for _ in range(4)}) > 1


@pytest.mark.parametrize(
    ("prompt", "count"), [("", 1), (["", "a"], 2), ([BOS, 5], 1), ([[BOS, 5], [BOS]], 2), (["a", [BOS]], 2)]
)
def test_prompts_of_every_kind(served, prompt, count):
    prompts = parsed(served, prompt=prompt).prompts
    assert len(prompts) == count
    assert all(ids[0] == BOS for ids in prompts)


@pytest.mark.parametrize(
    ("fields", "budget"),
    [({}, "default"), ({"budget": "tight"}, "tight"), ({"model": "small@tight"}, "tight"),
     ({"model": "small@tight", "budget": "tight"}, "tight"), ({"model": "small@default"}, "default")],
)  # fmt: skip
def test_a_budget_is_named_by_a_field_or_by_the_model(served, fields, budget):
    assert parsed(served, **fields).budget_class == budget


def test_choices_have_seeds_of_their_own_and_the_first_the_request_s(served):
    asked = parsed(served, seed=-7, n=4)
    seeds = [asked.seed_of(index) for index in range(4)]
    assert seeds[0] == 2**32 - 7 and len(set(seeds)) == 4 and all(0 <= seed < 2**32 for seed in seeds)


def test_fields_that_change_nothing_pass(served):
    neutral = {"presence_penalty": 0.0, "logit_bias": {}, "suffix": None, "best_of": 1, "user": "me"}
    assert parsed(served, **neutral, seed=1, other_servers_field=[1]) == parsed(served, seed=1)


MISTAKES = [
    ({"model": None}, "model", "model is missing; this server has small, small@default, small@tight"),
    ({"model": 3}, "model", "model must be a string, not a whole number"),
    ({"prompt": None}, "prompt", "prompt is missing"),
    ({"prompt": {}}, "prompt", "not an object"),
    ({"prompt": []}, "prompt", "not an empty list"),
    ({"prompt": ["a", 3]}, "prompt", "prompt 1 is a whole number"),
    ({"prompt": ["a"] * 9}, "prompt", "9 prompts are too many; this server takes 8"),
    ({"prompt": [5, 6]}, "prompt", "prompt 0 must begin with <BOS>, which is 2"),
    ({"prompt": [[]]}, "prompt", "prompt 0 must begin with <BOS>"),
    ({"prompt": [BOS, 400]}, "prompt", "token 400 at position 1; the model's are from 0 to 399"),
    ({"prompt": [BOS, -1]}, "prompt", "token -1 at position 1"),
    ({"prompt": [BOS, True]}, "prompt", "prompt 0 has true or false at position 1"),
    ({"prompt": [BOS, 1.5]}, "prompt", "prompt 0 has a number with a point at position 1; token ids are whole"),
    ({"prompt": "\ud800"}, "prompt", "half a surrogate pair"),
    ({"prompt": "the mask " * 30}, "prompt", "maximum context length is 64 tokens, but prompt 0 has 64 and"),
    ({"prompt": "x" * 10**6}, "prompt", "maximum context length is 64 tokens, but prompt 0 has at least"),
    ({"prompt": [BOS] * 60}, "prompt", "prompt 0 has 60 and max_tokens=16; shorten one of them"),
    ({"max_tokens": 0}, "max_tokens", "max_tokens must be from 1 to 63, not 0"),
    ({"max_tokens": 64}, "max_tokens", "max_tokens must be from 1 to 63, not 64"),
    ({"max_tokens": 1.0}, "max_tokens", "max_tokens must be a whole number, not a number with a point"),
    ({"max_tokens": True}, "max_tokens", "max_tokens must be a whole number, not true or false"),
    ({"max_token": 3}, "max_token", "there is no field 'max_token'; 'max_tokens' is the nearest"),
    ({"temperature": -1}, "temperature", "temperature must be from 0 to 100, not -1"),
    ({"temperature": 10**400}, "temperature", "temperature must be from 0 to 100, not 1000"),
    ({"temperature": "hot"}, "temperature", "temperature must be a number, not a string"),
    ({"top_p": 0}, "top_p", "top_p must be above 0"),
    ({"top_p": 1.1}, "top_p", "top_p must be from 0 to 1, not 1.1"),
    ({"top_k": 0}, "top_k", "top_k must be from 1 to 400, not 0"),
    ({"n": 0}, "n", "n must be from 1 to 8, not 0"),
    ({"n": 4, "prompt": ["a", "b", "c"]}, "n", "3 prompts with n=4 are 12 continuations; this server takes at most 8"),
    ({"best_of": 2}, "best_of", "best_of=2 is not supported unless it is n, which is 1"),
    ({"echo": 1}, "echo", "echo must be true or false, not a whole number"),
    ({"echo": True, "max_tokens": 64}, "max_tokens", "max_tokens must be from 0 to 63, not 64"),
    ({"echo": True, "max_tokens": 0, "prompt": [BOS] * 65}, "prompt", "prompt 0 has 65 and max_tokens=0"),
    ({"suffix": "a"}, "suffix", "suffix is not supported by this server; leave it out"),
    ({"logit_bias": {"5": 1}}, "logit_bias", "logit_bias is not supported"),
    ({"frequency_penalty": 0.5}, "frequency_penalty", "frequency_penalty is not supported"),
    ({"stop": 3}, "stop", "stop must be a string or a list of strings"),
    ({"stop": ["a", ""]}, "stop", "stop may be at most 16 strings of 1 to 256 characters"),
    ({"stop": ["a"] * 17}, "stop", "stop may be at most 16 strings"),
    ({"stop_token_ids": [400]}, "stop_token_ids", "token 400 at position 0"),
    ({"logprobs": 21}, "logprobs", "logprobs must be from 0 to 20, not 21"),
    ({"logprobs": True}, "logprobs", "logprobs must be a whole number, not true or false"),
    ({"seed": 2**63}, "seed", "seed must be from -"),
    ({"stream": 1}, "stream", "stream must be true or false, not a whole number"),
    ({"stream_options": {"include_usage": True}}, "stream_options", "stream_options belong to stream=true"),
    ({"stream": True, "stream_options": []}, "stream_options", "stream_options must be an object, not an empty list"),
    ({"stream": True, "stream_options": {"include_usage": 1}}, "stream_options.include_usage", "must be true or false"),
    ({"budget": "loose"}, "budget", "there is no budget 'loose'; this server has default, tight"),
    ({"model": "small@tight", "budget": "default"}, "budget", "contradicts the model 'small@tight'"),
]


@pytest.mark.parametrize(("fields", "param", "message"), MISTAKES, ids=range(len(MISTAKES)))
def test_a_mistake_names_its_field_and_what_it_may_be(served, fields, param, message):
    with pytest.raises(ApiError) as error:
        parsed(served, **fields)
    assert error.value.status == 400
    assert error.value.body["error"]["type"] == "invalid_request_error"
    assert error.value.body["error"]["param"] == param
    assert message in str(error.value) and "\n" not in str(error.value) and len(str(error.value)) < 300


@pytest.mark.parametrize("name", ["small@loose", "large", "small@", "x" * 10**5, "@tight"])
def test_another_model_is_not_found(served, name):
    with pytest.raises(ApiError, match="this server has small, small@default, small@tight") as error:
        parsed(served, model=name)
    assert (error.value.status, error.value.body["error"]["code"]) == (404, "model_not_found")
    assert len(str(error.value)) < 300


def test_an_answer_has_an_end():
    tokenizer = SimpleNamespace(bos_id=BOS, eos_id=EOS)
    served = Served("small", tokenizer, ("default",), 2048, 400, max_sequences=1000, max_logprobs=20)  # type: ignore
    fields = {"prompt": [BOS], "n": 100, "max_tokens": 2000}
    assert parsed(served, **fields, logprobs=4).n == 100
    with pytest.raises(ApiError, match="n=100 are 100 continuations of max_tokens=2000, with logprobs=5") as error:
        parsed(served, **fields, logprobs=5)
    assert error.value.body["error"]["param"] == "max_tokens"
    echo = {"prompt": [BOS] * 2000, "n": 100, "max_tokens": 0, "echo": True}
    assert parsed(served, **echo, logprobs=4).echo
    with pytest.raises(ApiError, match="1200000 values"):
        parsed(served, **echo, logprobs=5)


def test_too_long_a_prompt_has_openai_s_code(served):
    with pytest.raises(ApiError) as error:
        parsed(served, prompt=[BOS] * 60)
    assert error.value.body["error"]["code"] == "context_length_exceeded"


BODIES = {
    b"": "is not JSON",
    b"{": "is not JSON",
    b"\xff\xfe": "is not JSON",
    b"[]": "must be a JSON object, not an empty list",
    b"null": "must be a JSON object, not null",
    b'{"temperature": NaN}': "NaN is no number of JSON",
    b'{"temperature": -Infinity}': "-Infinity is no number of JSON",
    json.dumps(dict.fromkeys(map(str, range(101)))).encode(): "the body has 101 fields",
    b'{"n": ' + b"9" * 5000 + b"}": "is not JSON",
    b'{"prompt": ' + b"[" * 200_000: "nested too deeply",
}


@pytest.mark.parametrize("number", range(len(BODIES)))
def test_a_body_that_is_no_object_of_json(served, number):
    body, message = list(BODIES.items())[number]
    with pytest.raises(ApiError, match=message) as error:
        parse(body, served)
    assert error.value.status == 400 and len(str(error.value)) < 300
