"""lm-evaluation-harness finds what our own reader does, in texts that begin with <BOS>, once."""

import importlib.util
import json
from functools import partial
from types import SimpleNamespace

import jax
import numpy as np
import pytest

from data import Tokenizer, load_tokenizer
from inference_budget import POLICIES, Budgets, Scorer, eviction_times
from launch.commands import InputError
from launch.evaluate.__main__ import main
from launch.evaluate.items import encode_pair, fitted
from selective_attention import import_safetensors
from tests.launch.evaluate.conftest import LENGTH, QUESTIONS

if not importlib.util.find_spec("lm_eval"):
    pytest.skip("the extra lm-eval is not installed", allow_module_level=True)

TASK = """
task: {name}
dataset_path: json
dataset_kwargs: {{data_files: {{validation: {folder}/items.jsonl}}, cache_dir: {folder}/cache}}
output_type: multiple_choice
validation_split: validation
doc_to_text: "{{{{query}}}}"
doc_to_target: "{{{{gold}}}}"
doc_to_choice: "choices"
metric_list: [{{metric: acc}}, {{metric: acc_norm}}]
metadata: {{version: 1.0}}
"""


@pytest.fixture(scope="module", params=[Budgets((4,), LENGTH), pytest.param(None, marks=pytest.mark.slow)], ids=str)
def scorer(request, folder) -> Scorer:
    policy = None if request.param is None else POLICIES["selective"]
    return Scorer(import_safetensors(folder / "model"), request.param, policy, bos_id=2)


@pytest.fixture(scope="module")
def tokenizer(folder) -> Tokenizer:
    return load_tokenizer(folder / "data" / "tokenizer.model")


@pytest.fixture
def harness_model(scorer, tokenizer):
    from launch.evaluate.harness import HarnessModel

    return HarnessModel(scorer, tokenizer)


def asked(*arguments: tuple) -> list[SimpleNamespace]:
    return [SimpleNamespace(args=argument) for argument in arguments]


def test_its_pairs_have_the_scores_of_our_reader(harness_model, scorer, tokenizer):
    pairs = [(context, answer) for context, answers, _ in QUESTIONS for answer in answers]
    pairs.append(("so old wor", "ds fade from view and grow with every later token"))
    ours = scorer.score([fitted(encode_pair(tokenizer, *pair, "x"), LENGTH, "x") for pair in pairs])
    theirs = harness_model.loglikelihood(asked(*pairs), disable_tqdm=True)
    for (log_probability, greedy), score in zip(theirs, ours, strict=True):
        assert log_probability == pytest.approx(score.log_probability, abs=1e-5)
        assert greedy == score.greedy


def test_a_text_without_context_is_scored_after_bos_alone(harness_model, scorer, tokenizer):
    ((log_probability, _),) = harness_model.loglikelihood(asked(("", "old words")), disable_tqdm=True)
    (score,) = scorer.score([encode_pair(tokenizer, "", "old words", "x")])
    assert log_probability == pytest.approx(score.log_probability, abs=1e-5)


def test_a_long_text_is_predicted_once_each_token_in_windows_that_begin_with_bos(harness_model, folder, tokenizer):
    text = " ".join(["so old words fade, from view"] * 40)
    tokens, window = tokenizer.encode(text), LENGTH - 1
    rest = len(tokens) % window
    assert len(tokens) > 2 * window and rest
    ends = [*range(window, len(tokens), window), len(tokens)]
    rows = [[2, *tokens[:window]], *([2, *tokens[end - window - 1 : end]] for end in ends[1:])]
    counts = [window] * (len(rows) - 1) + [rest]
    model, decoder = import_safetensors(folder / "model"), harness_model.scorer.decoder
    wanted = 0.0
    for row, count in zip(rows, counts, strict=True):
        logits = eviction_times(model, np.array([row[:-1]]), decoder.budgets, decoder.policy)[1][0]
        log_NV = np.asarray(jax.nn.log_softmax(logits), np.float64)
        wanted += sum(log_NV[len(row) - 1 - n, row[len(row) - n]] for n in range(1, count + 1))
    (found,) = harness_model.loglikelihood_rolling(asked((text,)), disable_tqdm=True)
    assert found == pytest.approx(wanted, rel=1e-5)


def test_text_is_generated_up_to_its_stop_string(harness_model, tokenizer):
    options = {"until": [], "max_gen_toks": 6, "do_sample": False}
    (whole,) = harness_model.generate_until(asked(("the mask of", options)), disable_tqdm=True)
    prompt = [2, *tokenizer.encode("the mask of")]
    drawn = harness_model.scorer.decoder.generate([prompt], 6, temperature=0, stop_ids=[3])[0]
    assert whole == tokenizer.decode(drawn) and len(whole) > 2
    stop = whole[len(whole) // 2 :]
    (cut,) = harness_model.generate_until(asked(("the mask of", options | {"until": [stop]})), disable_tqdm=True)
    assert cut == whole[: whole.index(stop)]
    with pytest.raises(InputError, match="max_gen_toks=63 leaves no room for a prompt in a context of 64"):
        harness_model.generate_until(asked(("the", options | {"max_gen_toks": 63})), disable_tqdm=True)


def test_texts_are_generated_together_as_one_by_one(harness_model, monkeypatch):
    decoder, batches = harness_model.scorer.decoder, []
    generate = decoder.generate

    def counted(prompts, *arguments, **options):
        batches.append(len(prompts))
        return generate(prompts, *arguments, **options)

    monkeypatch.setattr(decoder, "generate", counted)
    options = {"until": ["w", "q"], "max_gen_toks": 20, "do_sample": False}
    asked_for = [(context, options) for context, *_ in QUESTIONS]
    asked_for.insert(1, ("old", options | {"until": "a", "max_gen_toks": 3}))
    one_by_one = [harness_model.generate_until(asked(one), disable_tqdm=True)[0] for one in asked_for]
    assert len(batches) == 5 and batches == [1] * 5
    assert harness_model.generate_until(asked(*asked_for), disable_tqdm=True) == one_by_one
    assert sorted(batches[5:]) == [1, 4]


def test_generation_ends_where_every_text_has_its_stop_string(harness_model, monkeypatch):
    drawn = []
    monkeypatch.setattr(harness_model, "_tokenizer", AnyText(harness_model._tokenizer, drawn))
    options = {"until": ["b"], "max_gen_toks": 40, "do_sample": False}
    texts = harness_model.generate_until(asked(("the mask", options), ("old", options)), disable_tqdm=True)
    assert texts == ["a", "a"]
    assert max(drawn) <= 16  # what is drawn between two looks


class AnyText:
    """A tokenizer whose continuations are all "abc"; `lengths` are told how many tokens they had."""

    def __init__(self, tokenizer: Tokenizer, lengths: list[int]) -> None:
        self._tokenizer, self._lengths = tokenizer, lengths

    def continuation(self, prompt, ids):
        self._lengths.append(len(ids))
        return "abc"

    def __getattr__(self, name):
        return getattr(self._tokenizer, name)


def test_a_task_of_one_s_own_has_the_results_of_the_same_questions_as_requests(folder, tmp_path, monkeypatch, capsys):
    """Without a network: the data are in a file beside the task."""
    lines = [
        {"query": text.strip(), "choices": [answer.strip() for answer in answers], "gold": gold}
        for text, answers, gold in QUESTIONS
    ]
    (tmp_path / "items.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    (tmp_path / "words_task.yaml").write_text(TASK.format(name="words_task", folder=tmp_path))
    monkeypatch.chdir(folder)
    options = ["--checkpoint=model", "--data=data", "--budgets=budgets.json"]
    main([*options, "--tasks=words_task", f"--include_path={tmp_path}", f"--output={tmp_path}/theirs.json"])
    main([*options, "--tasks=words", "--requests=requests", f"--output={tmp_path}/ours.json"])
    theirs, ours = (json.loads((tmp_path / f"{name}.json").read_text())["results"] for name in ("theirs", "ours"))
    for one, other in zip(theirs, ours, strict=True):
        mine, same = one["tasks"]["words_task"], other["tasks"]["words"]
        assert mine["items"] == {metric: same["items"][metric] for metric in ("acc", "acc_norm")}
        assert mine["metrics"] == {metric: same["metrics"][metric] for metric in ("acc", "acc_norm")}
        assert mine["chance"] == pytest.approx(same["chance"])
    assert "words_task: 4 items, acc by chance 0.396" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("more", "line"),
    [
        (["--include_path={folder}"], "there is no task 'words_tsk' in lm-eval "),
        (["--include_path=nowhere"], "--include_path=nowhere is no folder; give one with the task's YAML file"),
    ],
)
def test_a_task_that_there_is_not_is_named(more, line, folder, tmp_path, monkeypatch, capsys):
    from launch.evaluate import harness

    own = partial(harness.TaskManager, include_path=None)  # its own tasks are thousands, and take seconds to list
    monkeypatch.setattr(harness, "TaskManager", lambda **options: own(**options | {"include_defaults": False}))
    monkeypatch.chdir(folder)
    with pytest.raises(SystemExit, match="2"):
        main(["--checkpoint=model", "--data=data", "--tasks=words_tsk", *(x.format(folder=tmp_path) for x in more)])
    said = capsys.readouterr().err
    assert said.splitlines()[-1].startswith("error: ") and line in said.splitlines()[-1], said


def test_data_that_cannot_be_read_are_named(folder, tmp_path, monkeypatch, capsys):
    (tmp_path / "words_task.yaml").write_text(TASK.format(name="words_task", folder=tmp_path))
    monkeypatch.chdir(folder)
    with pytest.raises(SystemExit, match="2"):
        main(["--checkpoint=model", "--data=data", "--tasks=words_task", f"--include_path={tmp_path}"])
    line = capsys.readouterr().err.splitlines()[-1]
    assert line.startswith("error: words_task: Unable to find ") and line.endswith("for tasks without one")
