"""`python -m inference_budget generate`: what it writes, that it is taken up again, and its errors."""

import json
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from sentencepiece import SentencePieceTrainer

from data import open_dataset
from inference_budget import POLICIES, Budgets, Decoder, save_budgets
from inference_budget.__main__ import main
from inference_budget.text import TextTokenizer
from selective_attention import export_safetensors, import_safetensors
from tests.support.small_model import LENGTH, make_model, make_tokens

BUDGETS = Budgets((3, 9), LENGTH)
PROMPTS = [row[: 3 + n].tolist() for n, row in enumerate(make_tokens(batch=12))]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """With an exported model, its budgets, and a file of prompts, every other one sampled."""
    folder = tmp_path_factory.mktemp("generate")
    model = make_model(tied_embeddings=False)
    export_safetensors(model, folder / "export")
    save_budgets(folder / "budgets.json", model, BUDGETS, POLICIES["selective"], checkpoint=folder / "export")
    lines = [{"id": f"p{n}", "tokens": prompt, "temperature": n % 2} for n, prompt in enumerate(PROMPTS)]
    (folder / "prompts.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return folder


def arguments(folder: Path, output: Path, *more: str, prompts: Path | None = None) -> list[str]:
    files = [f"--budgets={folder / 'budgets.json'}", f"--prompts={prompts or folder / 'prompts.jsonl'}"]
    return ["generate", *files, f"--output={output}", "--rows=2", "--steps=4", "--num-tokens=6", *more]


@pytest.fixture(scope="module")
def whole(folder: Path) -> dict[str, dict]:
    """The completions of an undisturbed run."""
    main(arguments(folder, folder / "whole.jsonl"))
    return read(folder / "whole.jsonl")


def read(path: Path) -> dict[str, dict]:
    completions = [json.loads(line) for line in path.read_text().splitlines()]
    found = {completion["id"]: completion for completion in completions}
    assert len(found) == len(completions)  # nothing twice
    return found


def test_each_prompt_has_its_completion(folder, whole):
    model = import_safetensors(folder / "export")
    expected = Decoder(model, BUDGETS, POLICIES["selective"]).generate(PROMPTS, 6, temperature=0)
    assert whole.keys() == {f"p{n}" for n in range(12)}
    for n, prompt in enumerate(PROMPTS):
        done = whole[f"p{n}"]
        assert (done["finish_reason"], done["prompt_tokens"], done["drawn_tokens"]) == ("length", len(prompt), 6)
        assert n % 2 or done["tokens"] == expected[n]
    assert {n for n in range(12) if whole[f"p{n}"]["tokens"] == expected[n]} != set(range(12))  # some were sampled


@pytest.mark.parametrize("half", [slice(40), slice(3), slice(-2)], ids=["half", "begun", "almost whole"])
def test_the_same_command_completes_a_file_that_ends_in_half_a_line(folder, whole, tmp_path, capsys, half):
    lines = (folder / "whole.jsonl").read_bytes().splitlines(keepends=True)
    output = tmp_path / "out.jsonl"
    output.write_bytes(b"".join(lines[:5]) + lines[5][half])
    main(arguments(folder, output))
    assert read(output) == whole
    assert output.read_bytes().startswith(b"".join(lines[:5]))
    said = capsys.readouterr()
    assert "5 of 12 completions are in" in said.err
    assert re.search(r"7 prompts, 42 tokens, [\d.,]+ tokens/s$", said.out.strip())
    content = output.read_bytes()
    main(arguments(folder, output))
    assert output.read_bytes() == content


def test_a_last_line_that_lacks_only_its_end_is_kept(folder, whole, tmp_path, capsys):
    content = (folder / "whole.jsonl").read_bytes()
    output = tmp_path / "out.jsonl"
    output.write_bytes(b"".join(content.splitlines(keepends=True)[:6])[:-1])
    main(arguments(folder, output))
    assert "6 of 12 completions are in" in capsys.readouterr().err
    assert read(output) == whole


@pytest.mark.slow
def test_a_killed_command_is_completed_by_the_same_command(folder, tmp_path):
    prompts, output = tmp_path / "prompts.jsonl", tmp_path / "out.jsonl"
    prompts.write_text("".join(json.dumps({"tokens": PROMPTS[n % 12], "seed": n}) + "\n" for n in range(600)))
    command = arguments(folder, output, prompts=prompts)
    process = subprocess.Popen([sys.executable, "-m", "inference_budget", *command], stdout=subprocess.DEVNULL)
    while not output.exists() or output.read_bytes().count(b"\n") < 20:
        assert process.poll() is None
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.wait()
    before = output.read_bytes()
    assert 20 <= before.count(b"\n") < 600
    main(command)
    assert output.read_bytes().startswith(before[: before.rindex(b"\n") + 1])
    undisturbed = tmp_path / "undisturbed.jsonl"
    main(arguments(folder, undisturbed, prompts=prompts))
    assert read(output) == read(undisturbed)
    assert len(read(output)) == 600


def test_text_is_taken_and_given_with_a_tokenizer(dataset_path, tmp_path):
    tokenizer = open_dataset(dataset_path).tokenizer()
    model = make_model(vocab_size=tokenizer.vocab_size + 4, num_layers=1)
    export_safetensors(model, tmp_path / "export")
    (tmp_path / "export" / "tokenizer.model").write_bytes((dataset_path / "tokenizer.model").read_bytes())
    (tmp_path / "prompts.jsonl").write_text('{"prompt": "The", "num_tokens": 5, "stop_ids": []}\n')
    files = [f"--prompts={tmp_path / 'prompts.jsonl'}", f"--output={tmp_path / 'out.jsonl'}"]
    main(["generate", f"--checkpoint={tmp_path / 'export'}", *files, "--temperature=0", "--rows=1"])
    done = read(tmp_path / "out.jsonl")[1]
    prompt = [tokenizer.bos_id, *tokenizer.encode("The")]
    full = Decoder(model, Budgets.full(1, LENGTH), POLICIES["oldest"])
    assert done["tokens"] == full.generate([prompt], 5, temperature=0)[0]
    assert done["text"] == tokenizer.decode([token for token in done["tokens"] if token < tokenizer.vocab_size])


def test_a_continuation_keeps_its_first_space(tmp_path):
    """With a tokenizer that puts a space before every text, and takes it off again."""
    with open(tmp_path / "tokenizer.model", "wb") as file:
        texts = iter(["the cat sat on the mat", "a dog ran over the hill"] * 50)
        options = {"pad_id": 0, "unk_id": 1, "bos_id": 2, "eos_id": 3, "hard_vocab_limit": False, "minloglevel": 2}
        SentencePieceTrainer.train(sentence_iterator=texts, model_writer=file, vocab_size=60, **options)
    tokenizer = TextTokenizer(tmp_path)
    prompt, whole = tokenizer.encode("the cat"), tokenizer.encode("the cat sat")
    assert whole[: len(prompt)] == prompt
    assert tokenizer.continuation(prompt, whole[len(prompt) :]) == " sat"


def test_a_cache_in_int8_says_its_own_tokens_and_is_no_continuation_of_another(folder, whole, tmp_path, capsys):
    output = tmp_path / "out.jsonl"
    main(arguments(folder, output, "--cache-dtype=int8"))
    model = import_safetensors(folder / "export")
    decoder = Decoder(model, BUDGETS, POLICIES["selective"], cache_dtype="int8", block=64)
    expected = decoder.generate(PROMPTS, 6, temperature=0)
    assert all(read(output)[f"p{n}"]["tokens"] == expected[n] for n in range(0, 12, 2))
    assert_refused(arguments(folder, output), "line . is of another request than id 'p", capsys)


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{", "line 2 is no JSON: Expecting property name"),
        ("[2, 3]", "line 2 is no JSON object"),
        ('{"tokens": [2], "temprature": 1}', "line 2: unknown field 'temprature'; did you mean 'temperature'?"),
        ('{"id": 7}', "line 2: give either prompt, a text, or tokens"),
        ('{"tokens": [2], "id": 1}', "line 2: id 1 is that of line 1, too"),
        ('{"tokens": [2], "id": [1]}', r"line 2: id must be text or a whole number, got \[1\]"),
        ('{"tokens": "two"}', "line 2: the prompt is 'two', not a list of token ids"),
        ('{"tokens": [2, 99]}', "line 2: the prompt has token 99 at position 1"),
        (json.dumps({"tokens": [2] * 24}), "line 2: a prompt of 24 tokens is too long"),
        ('{"tokens": [2], "num_tokens": 24}', "line 2: num_tokens must be from 1 to 23"),
        ('{"tokens": [2], "temperature": "hot"}', "line 2: temperature must be a number, got 'hot'"),
        ('{"tokens": [2], "stop_ids": 3}', "line 2: stop_ids must be a list of tokens, got 3"),
        ('{"tokens": [2], "budget_class": "huge"}', "line 2: budget_class must be one of default, got 'huge'"),
        ('{"prompt": "two"}', "line 2: prompt is text, and there is no tokenizer; give one with --tokenizer"),
    ],
)
def test_a_line_that_cannot_be_used_is_named(folder, tmp_path, capsys, line, message):
    prompts = tmp_path / "prompts.jsonl"
    prompts.write_text(f'{{"tokens": [2]}}\n{line}\n')
    assert_refused(arguments(folder, tmp_path / "out.jsonl", prompts=prompts), message, capsys)
    assert not (tmp_path / "out.jsonl").exists()


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--prompts=none.jsonl"], "none.jsonl cannot be read: No such file or directory"),
        (["--budgets=none.json"], "none.json cannot be read: No such file or directory"),
        (["--checkpoint=none"], "none holds no exported model; make one with python -m trainer.export"),
        (["--tokenizer=none"], "none: No such file or directory; give a tokenizer.model"),
        (["--output=none/out.jsonl"], "--output=none/out.jsonl cannot be written: No such file or directory"),
        (["--budget-class=tiny"], "--budget-class=tiny: give NAME=FILE"),
        (["--cache-dtype=int4"], "argument --cache-dtype: invalid choice: 'int4' .choose from '?float32'?, '?bfloat16"),
        (["--rows=0"], "argument --rows: must be at least 1, not 0; see python -m inference_budget generate --help"),
        (["--top-k=50"], "line 1: top_k must be from 1 to vocab_size=40, got 50"),
    ],
)
def test_an_option_that_cannot_be_used_is_named(folder, tmp_path, monkeypatch, capsys, more, message):
    monkeypatch.chdir(tmp_path)
    assert_refused(arguments(folder, tmp_path / "out.jsonl", *more), message, capsys)


@pytest.mark.parametrize(
    ("content", "more", "message"),
    [
        ("hello\n", [], "line 1 is no completion of these prompts; give another --output"),
        ("a letter without an end of line", [], "line 1 is no completion of these prompts"),
        ('{"id": "p1", "tokens": [2, 5]}', [], "line 1 is no completion of these prompts"),
        ('{"id": "p99", "request": "0"}\n', [], "line 1 is no completion of these prompts"),
        (None, ["--temperature=0.5", "--seed=1"], "line 2 is of another request than id 'p"),
    ],
)
def test_another_file_s_completions_are_not_completed(folder, whole, tmp_path, capsys, content, more, message):
    output = tmp_path / "out.jsonl"
    output.write_text(content or (folder / "whole.jsonl").read_text())
    before = output.read_bytes()
    assert_refused(arguments(folder, output, *more), message.replace("line 2", "line ."), capsys)
    assert output.read_bytes() == before


def assert_refused(arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    """In one line, with exit code 2."""
    with pytest.raises(SystemExit) as left:
        main(arguments)
    (line,) = capsys.readouterr().err.splitlines()
    assert left.value.code == 2
    assert re.match(f"error: .*{message}", line)
