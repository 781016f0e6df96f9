"""A server on a socket: what OpenAI's client gets of it, and what hostile clients do."""

import json
import re
import signal
import subprocess

import pytest

from inference_budget.__main__ import main
from inference_budget.server.text import TextStream
from tests.support import ROOT

openai = pytest.importorskip("openai")
for name in ("prometheus_client", "starlette", "uvicorn"):
    pytest.importorskip(name)

LONG = {"prompt": "the mask", "max_tokens": 1900, "temperature": 0}


@pytest.fixture(scope="module")
def server(served):
    with served.serve("--budget-class=tight=tight.json", "--client-seconds=2", "--max-body=10000") as server:
        yield server


@pytest.fixture
def client(server):
    with openai.OpenAI(base_url=server.url, api_key="none", max_retries=0) as client:
        yield client


def test_a_completion_is_what_the_decoder_says(served, client):
    (tokens,) = served.continued(["the mask of a token"], 40)
    answer = client.completions.create(model="small", prompt="the mask of a token", max_tokens=40, temperature=0)
    (choice,) = answer.choices
    assert choice.text == served.text(tokens)
    assert (choice.finish_reason, choice.index) == ("length", 0)
    prompt = len(served.tokenizer.encode("the mask of a token"))
    assert answer.usage.model_dump(include={"prompt_tokens", "completion_tokens", "total_tokens"}) == {
        "prompt_tokens": prompt, "completion_tokens": 40, "total_tokens": prompt + 40,
    }  # fmt: skip


def test_text_and_token_ids_mean_the_same(served, client):
    options = {"model": "small", "max_tokens": 8, "temperature": 0}
    texts = ["the mask", "", "old words"]
    ids = [served.tokenizer.encode(text) for text in texts]
    by_text = [choice.text for choice in client.completions.create(prompt=texts, **options).choices]
    assert by_text == [served.text(tokens) for tokens in served.continued(texts, 8)]
    assert [choice.text for choice in client.completions.create(prompt=ids, **options).choices] == by_text
    assert client.completions.create(prompt=ids[2], **options).choices[0].text == by_text[2]


def test_a_stream_is_the_whole_in_parts(served, client):
    texts = ["the mask of", "a token"]
    options = {"model": "small", "prompt": texts, "max_tokens": 50, "temperature": 0}
    found, reasons, usage = ["", ""], [], None
    for chunk in client.completions.create(**options, stream=True, stream_options={"include_usage": True}):
        for choice in chunk.choices:
            found[choice.index] += choice.text
            reasons += [choice.finish_reason] if choice.finish_reason else []
        usage = chunk.usage or usage
    assert found == [served.text(tokens) for tokens in served.continued(texts, 50)]
    assert reasons == ["length", "length"]
    assert usage.completion_tokens == 100


def test_choices_are_drawn_apart_and_again_the_same_by_their_seed(client):
    options = {"model": "small", "prompt": ["the", "a"], "max_tokens": 12, "n": 3, "seed": 5, "top_p": 0.9}
    first = [choice.text for choice in client.completions.create(**options).choices]
    assert len(set(first)) == 6
    assert [choice.text for choice in client.completions.create(**options).choices] == first
    alone = client.completions.create(**options | {"n": 1, "prompt": "the"})
    assert alone.choices[0].text == first[0]
    unseeded = options | {"n": 1, "prompt": "the", "seed": None}
    assert len({client.completions.create(**unseeded).choices[0].text for _ in range(3)}) == 3


@pytest.mark.parametrize("stream", [False, True])
def test_a_stop_string_over_the_borders_of_tokens_ends_the_text_before_it(served, client, stream):
    (tokens,) = served.continued(["the mask of"], 60)
    whole = served.text(tokens)
    at = next(n for n in range(10, 40) if whole.find(whole[n : n + 4]) == n)
    options = {"model": "small", "prompt": "the mask of", "max_tokens": 60, "temperature": 0, "stream": stream}
    answer = client.completions.create(**options, stop=["never", whole[at : at + 4]])
    choices = [choice for chunk in (answer if stream else [answer]) for choice in chunk.choices]
    assert "".join(choice.text for choice in choices) == whole[:at]
    assert choices[-1].finish_reason == "stop"


def test_log_probabilities_are_of_the_tokens_and_add_up_to_the_text(served, client):
    (tokens,) = served.continued(["the mask of"], 30)
    pieces = served.tokenizer.pieces()
    options = {"model": "small", "prompt": "the mask of", "max_tokens": 30, "temperature": 0, "logprobs": 3}
    logprobs = client.completions.create(**options).choices[0].logprobs
    stream, offsets = TextStream(pieces), []
    for token in tokens:
        offsets.append(stream.length)
        stream.add(token)
    assert logprobs.text_offset == offsets
    for token, shown, nats, top in zip(
        tokens, logprobs.tokens, logprobs.token_logprobs, logprobs.top_logprobs, strict=True
    ):
        assert shown.startswith("bytes:") or shown == pieces[token].decode()
        assert nats == max(top.values()) and len(top) == 3
    streamed = [chunk.choices[0].logprobs for chunk in client.completions.create(**options, stream=True)]
    assert [token for part in streamed for token in part.tokens] == logprobs.tokens
    assert [at for part in streamed for at in part.text_offset] == offsets


@pytest.mark.parametrize("stream", [False, True])
def test_an_echo_has_the_prompt_s_log_probabilities_before_the_completion_s(served, client, stream):
    """With `max_tokens` 0 it is the prompt alone, and its tokens have what they had when they were drawn."""
    options = {"model": "small", "temperature": 0, "logprobs": 2, "stream": stream}

    def asked(prompt, **changed):
        made = client.completions.create(prompt=prompt, echo=True, **options | changed)
        choices = [choice for chunk in (made if stream else [made]) for choice in chunk.choices]
        parts = [choice.logprobs.model_dump() for choice in choices if choice.logprobs]
        fields = ("tokens", "token_logprobs", "top_logprobs", "text_offset")
        joined = {name: [one for part in parts for one in part[name]] for name in fields} if parts else None
        return "".join(choice.text for choice in choices), joined, choices[-1].finish_reason

    (drawn,) = served.continued(["the mask of"], 20)
    prompt, answer = served.tokenizer.encode("the mask of"), served.text(drawn)
    text, logprobs, reason = asked("the mask of", max_tokens=20)
    assert (text, reason) == ("the mask of" + answer, "length")
    assert len(logprobs["tokens"]) == len(prompt) + 20
    assert logprobs["token_logprobs"][0] is None and logprobs["top_logprobs"][0] is None
    assert logprobs["text_offset"][len(prompt)] == len("the mask of")
    for at, shown in zip(logprobs["text_offset"], logprobs["tokens"], strict=True):
        assert text[at:].startswith(shown) or shown.startswith(("bytes:", "token_id:"))
    alone, scores, reason = asked([*prompt, *drawn], max_tokens=0)
    assert (alone, reason, scores["tokens"]) == (text, "length", logprobs["tokens"])
    assert scores["token_logprobs"][1:] == pytest.approx(logprobs["token_logprobs"][1:], abs=1e-5)
    for nats, top in zip(scores["token_logprobs"][-20:], scores["top_logprobs"][-20:], strict=True):
        assert nats == max(top.values())  # by which lm-eval finds what is greedy
    assert asked("the mask of", max_tokens=0, logprobs=None) == ("the mask of", None, "length")
    assert asked("the mask of", max_tokens=20, logprobs=None)[0] == text
    assert asked("", max_tokens=0)[1]["token_logprobs"] == [None]


def test_choices_of_an_echo_all_begin_with_their_prompt(client):
    texts = ["the mask", "old words"]
    answer = client.completions.create(model="small", prompt=texts, max_tokens=6, n=2, echo=True, seed=1)
    for prompt, choice in zip([texts[0]] * 2 + [texts[1]] * 2, answer.choices, strict=True):
        assert choice.text.startswith(prompt) and choice.logprobs is None
    assert answer.usage.completion_tokens == 24


def test_budgets_of_another_class_answer_as_their_own_decoder(served, client):
    (tokens,) = served.continued(["the mask of a token " * 5], 40, "tight")
    options = {"prompt": "the mask of a token " * 5, "max_tokens": 40, "temperature": 0}
    by_field = client.completions.create(model="small", extra_body={"budget": "tight"}, **options)
    by_name = client.completions.create(model="small@tight", **options)
    assert by_field.choices[0].text == by_name.choices[0].text == served.text(tokens)
    assert by_name.model == "small@tight"
    assert client.completions.create(model="small", **options).choices[0].text != served.text(tokens)


def test_mistakes_are_the_client_s_exceptions(client):
    with pytest.raises(openai.BadRequestError) as error:
        client.completions.create(model="small", prompt="a", max_tokens=5000)
    assert (error.value.status_code, error.value.param) == (400, "max_tokens")
    with pytest.raises(openai.BadRequestError) as error:
        client.completions.create(model="small", prompt=[2] * 2040)
    assert error.value.code == "context_length_exceeded"
    with pytest.raises(openai.NotFoundError) as error:
        client.completions.create(model="large", prompt="a", stream=True)
    assert error.value.code == "model_not_found"
    with pytest.raises(openai.NotFoundError, match="POST /v1/completions"):
        client.chat.completions.create(model="small", messages=[])


def test_models_health_and_metrics(server, client):
    assert [model.id for model in client.models.list()] == ["small", "small@default", "small@tight"]
    assert client.models.retrieve("small@tight").id == "small@tight"
    with pytest.raises(openai.NotFoundError):
        client.models.retrieve("large")
    assert server.ask("GET", "/health")[::2] == (200, b'{"status":"ok"}')
    before = server.metric("generated_tokens_total")
    server.completion("the mask", max_tokens=7, temperature=0)
    assert server.metric("generated_tokens_total") == before + 7
    assert server.metric('requests_total{status="200"}') > 0
    assert server.metric("time_to_first_token_seconds_count") > 0
    assert server.metric('memory_factor{budget_class="tight"}') > server.metric('memory_factor{budget_class="default"}')


def test_the_page_s_examples_work(server, monkeypatch):
    page = (ROOT / "docs" / "serving.md").read_text().replace("demo-export", "small")
    (shell,) = re.findall(r"^```bash\n(.*?)^```$", page, re.DOTALL | re.MULTILINE)
    (python,) = re.findall(r"^```py\n(.*?)^```$", page, re.DOTALL | re.MULTILINE)
    here, there = "http://127.0.0.1:8000/v1", server.url
    assert here in shell and here in python
    shown = subprocess.run(["sh", "-ec", shell.replace(here, there)], capture_output=True, text=True, check=True).stdout
    assert json.loads(shown)["usage"]["completion_tokens"] == 20
    exec(python.replace(here, there), {})


BAD = [
    ("POST", "/v1/completions", b"{", {}, 400, "is not JSON"),
    ("POST", "/v1/completions", b"[1]", {}, 400, "must be a JSON object"),
    ("POST", "/v1/completions", b'{"model": "small"}', {}, 400, "prompt is missing"),
    ("POST", "/v1/completions", b'{"model": "small", "prompt": {}}', {}, 400, "prompt must be"),
    ("POST", "/v1/completions", b'{"model": "small", "prompt": [5]}', {}, 400, "must begin with <BOS>"),
    ("POST", "/v1/completions", b'{"model": "small", "prompt": "\\ud800"}', {}, 400, "surrogate"),
    ("POST", "/v1/completions", b'{"model": "small", "prompt": "a", "max_token\\ud800": 1}', {}, 400, "is the nearest"),
    ("POST", "/v1/completions", b'{"model": "\\ud800", "prompt": "a"}', {}, 404, "there is no model"),
    ("POST", "/v1/completions", b'{"model": "small", "prompt": "a", "n": 9999}', {}, 400, "n must be from 1"),
    (
        "POST",
        "/v1/completions",
        b'{"model": "small", "prompt": "a", "suffix": "b"}',
        {},
        400,
        "suffix is not supported",
    ),
    ("POST", "/v1/completions", b'{"model": "small", "prompt": "a", "top_p": NaN}', {}, 400, "NaN is no number"),
    ("POST", "/v1/completions", b'{"model": "other", "prompt": "a"}', {}, 404, "there is no model 'other'"),
    ("POST", "/v1/completions", b"{}", {"Content-Type": "text/plain"}, 415, "send Content-Type: application/json"),
    ("POST", "/v1/completions", b" " * 20_000, {}, 413, "larger than 10000 bytes"),
    ("POST", "/v1/completions", b"[" * 9_999, {}, 400, "nested too deeply"),
    ("GET", "/v1/completions", None, {}, 405, "Method Not Allowed"),
    ("POST", "/v1/embeddings", b"{}", {}, 404, "this server has POST /v1/completions"),
    ("GET", "/v1/models/none", None, {}, 404, "there is no model 'none'"),
    ("FETCH", "/v1/completions", None, {}, 405, "Method Not Allowed"),
]


@pytest.mark.parametrize("number", range(len(BAD)))
def test_a_bad_request_gets_one_clear_error(server, number):
    method, path, body, headers, status, message = BAD[number]
    found, answered, content = server.ask(method, path, body, **headers)
    assert (found, answered["content-type"]) == (status, "application/json")
    error = json.loads(content)["error"]
    assert error.keys() == {"message", "type", "param", "code"}
    assert message in error["message"]
    assert server.completion("the mask", max_tokens=1)["choices"]


def test_what_is_no_http_gets_an_error_too(server):
    with server.connected() as connection:
        connection.sendall(b"hello\r\n\r\n")
        answer = connection.makefile("rb").read()
    assert answer.startswith(b"HTTP/1.1 400 ") and json.loads(answer.partition(b"\r\n\r\n")[2])["error"]


def test_a_client_that_goes_away_frees_its_rows(server):
    before = server.metric('requests_total{status="499"}')
    for stream in (True, False):
        connection = server.opened(LONG | {"n": 100, "stream": stream})
        if stream:
            assert connection.recv(1) == b"H"
        else:
            server.wait_for(lambda: server.metric("rows_in_use") == 8)
        connection.close()
        server.wait_for(lambda: server.metric("rows_in_use") + server.metric("queue_length") == 0)
    assert server.metric('requests_total{status="499"}') == before + 2


@pytest.mark.slow
def test_a_body_that_does_not_end_is_refused_and_its_connection_closed(server):
    head = b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"
    with server.connected() as connection:
        connection.sendall(head + b"Content-Length: 1000\r\n\r\n{")
        assert b" 408 " in connection.makefile("rb").read().splitlines()[0]
    with server.connected() as connection:
        connection.sendall(head + b"Content-Length: 99999999999\r\n\r\n")
        assert b" 413 " in connection.makefile("rb").readline()
    with server.connected() as connection:
        connection.sendall(head + b"Transfer-Encoding: chunked\r\n\r\n")
        with pytest.raises(OSError):
            while True:
                connection.sendall(b"2000\r\n" + b" " * 8192 + b"\r\n")


def test_half_a_head_is_not_waited_for(server):
    with server.connected() as connection:
        connection.sendall(b"POST /v1/completions HTTP/1.1\r\nHost:")
        assert connection.makefile("rb").read() == b""


def test_a_client_that_never_reads_is_given_up_and_holds_nobody_up(server):
    before = server.metric('requests_total{status="499"}')
    with server.opened(LONG | {"n": 4, "logprobs": 20, "stream": True}, receive_buffer=4096) as connection:
        assert server.completion("the mask", max_tokens=3)["choices"]
        server.wait_for(lambda: server.metric('requests_total{status="499"}') > before)
        assert server.metric("rows_in_use") == 0
        said = connection.makefile("rb").read()
        assert b"[DONE]" not in said[-100:]


@pytest.fixture(scope="module")
def locked(served):
    (served.folder / "keys.txt").write_text("first-key\n\n  second-key\n")
    with served.serve("--api-key-file=keys.txt") as server:
        yield server


def test_whoever_has_a_key_is_answered(locked):
    for key in ("first-key", "second-key"):
        with openai.OpenAI(base_url=locked.url, api_key=key, max_retries=0) as client:
            assert client.completions.create(model="small", prompt="a", max_tokens=2).usage.completion_tokens == 2
            assert client.models.retrieve("small").id == client.models.list().data[0].id == "small"
    assert locked.ask("GET", "/health")[0] == locked.ask("GET", "/metrics")[0] == 200


def test_whoever_has_none_is_told_so(locked):
    before = locked.metric('requests_total{status="401"}')
    with openai.OpenAI(base_url=locked.url, api_key="third-key", max_retries=0) as client:
        for ask in (
            lambda: client.completions.create(model="small", prompt="a"),
            lambda: client.completions.create(model="large", prompt="a", stream=True),
            lambda: client.models.list(),
            lambda: client.models.retrieve("large"),
        ):
            with pytest.raises(openai.AuthenticationError, match="not one of the server's keys") as error:
                ask()
            assert (error.value.status_code, error.value.code) == (401, "invalid_api_key")
    assert locked.metric('requests_total{status="401"}') == before + 2
    for given in ("", "Bearer", "Bearer ", "Basic first-key", "first-key", "Bearer first-ke", "Bearer first-key2",
                  "Bearer first-key second-key", "Bearer \xfcber", "Bearer " + "x" * 8000):  # fmt: skip
        status, headers, body = locked.ask("POST", "/v1/completions", b"no JSON", Authorization=given)
        assert (status, headers["www-authenticate"]) == (401, "Bearer"), given
        assert json.loads(body)["error"].keys() == {"message", "type", "param", "code"}
        assert b"first" not in body


@pytest.mark.slow
def test_sigterm_finishes_what_runs_and_takes_nothing_new(served):
    with served.serve() as server:
        connection = server.opened(LONG | {"n": 8, "stream": True})
        answer = connection.makefile("rb")
        assert b" 200 " in answer.readline()
        server.process.send_signal(signal.SIGTERM)
        assert answer.read()[-100:].endswith(b"data: [DONE]\n\n\r\n0\r\n\r\n")
        assert server.process.wait(60) == 0
        with pytest.raises(ConnectionRefusedError):
            server.connected()


@pytest.mark.slow
def test_sigterm_waits_no_longer_than_it_was_told(served):
    with served.serve("--drain-seconds=1") as server:
        streaming = server.opened(LONG | {"n": 500, "stream": True})
        assert streaming.recv(1) == b"H"
        waiting = server.opened(LONG | {"n": 500})
        server.wait_for(lambda: server.metric("queue_length") > 500)
        server.process.send_signal(signal.SIGTERM)
        said = streaming.makefile("rb").read()
        assert b"this server stops" in said[-1000:]
        assert b" 503 " in waiting.makefile("rb").readline()
        assert server.process.wait(60) == 0


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--checkpoint=small", "--port=70000"], "argument --port: must be from 0 to 65535"),
        (["--checkpoint=small", "--port=-1"], "argument --port: must be from 0 to 65535"),
        (["--checkpoint=small", "--host=256.1.1.1"], "cannot listen on 256.1.1.1:8000"),
        (["--checkpoint=bare", "--port=0"], "give its tokenizer.model or dataset with --tokenizer"),
        (["--checkpoint=none", "--port=0"], "none holds no exported model"),
        (["--checkpoint=small", "--api-key-file=none.txt"], "--api-key-file=none.txt cannot be read: No such file"),
        (["--checkpoint=small", "--api-key-file=blank.txt"], "--api-key-file=blank.txt has no key; write one a line"),
        (["--checkpoint=small", "--api-key-file=two.txt"], "two.txt, line 2: a key is of ASCII characters without"),
        (["--checkpoint=small", "--api-key-file=small/model.safetensors"], "cannot be read: no text"),
    ],
)  # fmt: skip
def test_a_command_with_a_mistake_says_so_in_a_line(served, monkeypatch, capsys, arguments, message):
    monkeypatch.chdir(served.folder)
    (served.folder / "blank.txt").write_text("\n \n")
    (served.folder / "two.txt").write_text("one\ntwo in a line\n")
    with pytest.raises(SystemExit) as ended:
        main(["serve", *arguments])
    assert ended.value.code == 2
    shown = capsys.readouterr().err
    assert message in shown and len(shown.splitlines()) == 1
