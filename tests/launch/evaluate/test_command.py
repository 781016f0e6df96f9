"""What the command measures, prints and writes, and how it says what is wrong."""

import gzip
import json
import math

import pytest

from launch.evaluate.__main__ import main
from tests.launch.evaluate.conftest import QUESTIONS, request_rows, write_requests

WORDS = ["--checkpoint=model", "--data=data", "--requests=requests", "--tasks=words,last_word"]


@pytest.fixture(scope="module")
def evaluated(folder, tmp_path_factory):
    """The file of an evaluation of two tasks with two caches, and what was printed."""
    output = tmp_path_factory.mktemp("out") / "results.json"
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        main([*WORDS, "--budgets=budgets.json", f"--output={output}"])
    return output


def test_each_question_counts_once_and_all_its_metrics_are_written(evaluated):
    full, pruned = json.loads(evaluated.read_text())["results"]
    assert [full["cache"], pruned["cache"]] == ["full cache", "selective 16.00x"]
    words, last_word = full["tasks"]["words"], full["tasks"]["last_word"]
    assert list(words["metrics"]) == ["acc", "acc_norm", "bits_per_byte"]
    assert list(words["items"]["acc"]) == ["0", "1", "2", "3"]
    assert words["chance"] == pytest.approx((1 / 3 + 1 / 2 + 1 / 4 + 1 / 2) / 4)
    assert list(last_word["metrics"]) == ["bits_per_byte", "exact"]
    assert last_word["chance"] is None


def test_a_mean_has_the_standard_error_of_its_items_and_a_difference_that_of_the_pairs(evaluated):
    full, pruned = json.loads(evaluated.read_text())["results"]

    def stated(values):
        middle = sum(values) / len(values)
        return middle, math.sqrt(sum((x - middle) ** 2 for x in values) / (len(values) - 1) / len(values))

    bits = [of["tasks"]["words"]["items"]["bits_per_byte"] for of in (full, pruned)]
    found = full["tasks"]["words"]["metrics"]["bits_per_byte"]
    assert (found["value"], found["standard_error"]) == pytest.approx(stated(list(bits[0].values())))
    difference = pruned["tasks"]["words"]["minus_full_cache"]["bits_per_byte"]
    pairs = [bits[1][key] - bits[0][key] for key in bits[0]]
    assert (difference["value"], difference["standard_error"]) == pytest.approx(stated(pairs))
    assert any(abs(pair) > 1e-4 for pair in pairs)


def test_two_checkpoints_are_compared_item_by_item(evaluated, folder, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(folder)
    output = tmp_path / "other.json"
    options = [*WORDS[1:3], "--tasks=words", "--limit=3", f"--against={evaluated}", f"--output={output}"]
    main([*options, "--checkpoint=other"])
    task = json.loads(output.read_text())["results"][0]["tasks"]["words"]
    before = json.loads(evaluated.read_text())["results"][0]["tasks"]["words"]["items"]["bits_per_byte"]
    pairs = [value - before[key] for key, value in task["items"]["bits_per_byte"].items()]
    assert len(pairs) == 3 and task["minus_other"]["bits_per_byte"]["value"] == pytest.approx(sum(pairs) / 3)
    assert "; minus --against " in capsys.readouterr().out


def test_caches_of_several_dtypes_stand_beside_the_models_full_one(folder, tmp_path, monkeypatch):
    monkeypatch.chdir(folder)
    options = ["--checkpoint=model", "--data=data", "--tasks=perplexity,words", "--requests=requests", "--windows=2"]
    dtypes = ["--memory-factor=16", "--cache-dtype=float32,int8", f"--plot={tmp_path}/x.png"]
    main([*options, *dtypes, f"--output={tmp_path}/x.json"])
    results = json.loads((tmp_path / "x.json").read_text())["results"]
    assert [result["cache"] for result in results] == [
        "full cache", "full cache, float32", "selective 16.00x, float32", "full cache, int8", "selective 16.00x, int8",
    ]  # fmt: skip
    bits = [result["tasks"]["words"]["metrics"]["bits_per_byte"]["value"] for result in results]
    nats = [result["tasks"]["perplexity"]["metrics"]["nats"]["value"] for result in results]
    for found in (bits, nats):
        assert found[0] == pytest.approx(found[1], abs=1e-5)
        assert 1e-5 < abs(found[3] - found[0]) < 0.05 and 1e-5 < abs(found[4] - found[2]) < 0.05


def test_retrieval_against_the_memory_factor_is_one_file_and_one_plot(folder, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(folder)
    options = ["--checkpoint=model", "--data=data", "--tasks=perplexity,needle", "--lengths=64", "--limit=2"]
    main([*options, "--memory-factor=2", "--windows=2", f"--output={tmp_path}/x.json", f"--plot={tmp_path}/x.png"])
    results = json.loads((tmp_path / "x.json").read_text())["results"]
    assert [(result["policy"], result["budgets"]) for result in results] == [(None, [64]), ("selective", [32])]
    assert all(set(result["tasks"]) == {"perplexity", "needle/64"} for result in results)
    assert (tmp_path / "x.png").read_bytes().startswith(b"\x89PNG")
    assert "full cache: 2 contexts taken in for 20 answers" in capsys.readouterr().out


def test_a_cache_that_forgets_needs_no_limit_and_says_how_much_it_holds(folder, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(folder)
    options = ["--checkpoint=model", "--data=data", "--windows=3", f"--output={tmp_path}/x.json"]
    main([*options, "--policy=forgotten-2", "--memory-factor=16"])
    full, unlimited, limited = json.loads((tmp_path / "x.json").read_text())["results"]
    assert [unlimited["cache"], limited["cache"]] == ["forgotten-2 1.00x", "forgotten-2 16.00x"]
    assert "tokens_held" not in full["tasks"]["perplexity"]["metrics"]
    held, fewer = (of["tasks"]["perplexity"]["metrics"] for of in (unlimited, limited))
    assert fewer["most_tokens_held"]["value"] <= 4 < held["most_tokens_held"]["value"] < 64
    assert 2 < fewer["tokens_held"]["value"] < held["tokens_held"]["value"] < held["most_tokens_held"]["value"]
    assert capsys.readouterr().out.count("tokens_held") == 4


@pytest.mark.parametrize(
    ("arguments", "line"),
    [
        (["--checkpoint=nowhere"], "nowhere holds no model"),
        (["--checkpoint="], "there is no model; give --checkpoint"),
        (["--data=nowhere"], "no dataset in nowhere"),
        (["--data="], "model has no tokenizer; give the dataset that the model was trained on with --data"),
        (["--checkpoint=small"], "data has 300 different tokens, the model 200"),
        (["--policy=tova"], "--policy is of a cache that is not full; give --memory-factor or --budgets"),
        (["--cache-dtype=int8,int4"], "argument --cache-dtype: must be of float32, bfloat16, int8, not 'int4'"),
        (["--memory-factor=1"], "argument --memory-factor: must be above 1, which is the full cache, not 1"),
        (["--memory-factor=60"], "1 tokens over 1 layers are out of range: from 2 to 64"),
        (["--memory-factor=2", "--policy=lru"], "there is no policy 'lru'; take selective, h2o, "),
        (["--budgets=nowhere.json"], "nowhere.json cannot be read"),
        (["--budgets=budgets.json", "--checkpoint=other"], "these budgets were found for another model"),
        (["--requests=nowhere"], "--requests=nowhere is neither a file, nor a folder, nor an installed package"),
        (["--requests=pytest"], "--requests=pytest has no file .jsonl or .jsonl.gz"),
        (["--tasks=word"], "--requests=requests has no task 'word'; it has last_word, words"),
        (["--tasks=words,"], "argument --tasks: must be names with commas between them, not 'words,'"),
        (["--tasks=needle", "--lengths=65"], "--lengths=65: the context has 64 tokens; give at most that"),
        (["--tasks=needle", "--lengths=9"], "needle: its lines alone take "),
        (["--tasks=needle", "--split=test"], "data has no split 'test'; it has train, validation"),
        (["--against=budgets.json"], "--against=budgets.json does not say that its format is 'launch.evaluate/1'"),
        (["--against=nowhere"], "--against=nowhere cannot be read"),
        (["--output=no/x"], "--output=no/x: there is no folder no; make it"),
    ],
)
def test_a_mistake_is_one_line_and_exit_code_2(arguments, line, folder, capsys, monkeypatch):
    monkeypatch.chdir(folder)
    with pytest.raises(SystemExit) as exit_info:
        main([*WORDS, *arguments])
    said = capsys.readouterr()
    assert exit_info.value.code == 2 and not said.out
    assert said.err.startswith("error: ") and said.err.count("\n") == 1 and line in said.err, said.err


@pytest.mark.parametrize(
    ("change", "line"),
    [
        ({"request": None}, "line 1 has no object `request`"),
        ({"request": {"context": "the"}}, "line 1: request.continuation is None; it must be text"),
        ({"request": {"context": 5, "continuation": "x"}}, "line 1: request.context is 5; it must be text"),
        ({"doc_id": None}, "line 1: doc_id is None and idx 0; give each question and its answers a number"),
        ({"idx": 1}, "line 2 is the second of doc_id 0 and idx 1; remove one"),
        ({"label": 3}, "label is 3, 1; it must be the number of one of 3 answers"),
        ({"request": {"context": "the", "continuation": " "}}, "answer 0 is empty; give it some text"),
        (
            {"request": {"context": "the", "continuation": " words" * 80}},
            " tokens, longer than the context of 64",
        ),
    ],
)
def test_requests_that_cannot_be_used_are_named(change, line, folder, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(folder)
    rows = request_rows(0, *QUESTIONS[0])
    write_requests(tmp_path / "x.jsonl.gz", [rows[0] | change, *rows[1:]])
    with pytest.raises(SystemExit, match="2"):
        main([*WORDS[:2], f"--requests={tmp_path}/x.jsonl.gz", "--tasks=x"])
    said = capsys.readouterr().err
    assert said.startswith("error: ") and said.count("\n") == 1 and line in said, said


def test_questions_with_too_long_an_answer_can_be_left_out(folder, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(folder)
    rows = [*request_rows(0, "the", [" words" * 80, " mask"], 1), *request_rows(1, *QUESTIONS[3])]
    write_requests(tmp_path / "x.jsonl.gz", rows)
    main([*WORDS[:2], f"--requests={tmp_path}/x.jsonl.gz", "--tasks=x", "--leave-out-too-long"])
    said = capsys.readouterr().out
    assert "x: 1 questions left out, with answers longer than 64 tokens" in said and "x: 1 items" in said
    assert "x: 1 questions cut from the left to 64 tokens, <BOS> kept" in said


@pytest.mark.parametrize("content", [b"\x1f\x8b\x08", gzip.compress(b"{", mtime=0)], ids=["cut", "no JSON"])
def test_files_of_requests_that_are_damaged_are_named(content, folder, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(folder)
    (tmp_path / "x.jsonl.gz").write_bytes(content)
    with pytest.raises(SystemExit, match="2"):
        main([*WORDS[:2], f"--requests={tmp_path}", "--tasks=x"])
    said = capsys.readouterr().err
    assert said.startswith(f"error: {tmp_path}/x.jsonl.gz ") and said.count("\n") == 1, said
