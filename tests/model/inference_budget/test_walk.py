"""The commands one after the other, as a person would run them, on a small model and a small dataset."""

import io
import json
import re

import numpy as np
import pytest
import sentencepiece
from array_record.python.array_record_module import ArrayRecordWriter

from data import Manifest, Tokenizer
from data.manifest import Shard, Split, file_crc32
from launch.budgets.__main__ import main
from launch.budgets.result import Journal, read_search
from selective_attention import export_safetensors
from tests.support.small_model import make_model

PIECES, RECORD = 36, 64
WORDS = ["the", "mask", "of", "a", "token", "grows", "with", "every", "later", "query", "stale", "words", "fade"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """`model` and `other` (exported), `data` (a dataset), and a search's budgets.json."""
    folder = tmp_path_factory.mktemp("walk")
    for seed, name in enumerate(("model", "other")):
        export_safetensors(make_model(seed, max_length=16, tied_embeddings=False), folder / name)
    data, rng = folder / "data", np.random.default_rng(0)
    data.mkdir()
    text = [" ".join(rng.choice(WORDS, 12)) for _ in range(300)]
    special = {"pad_id": 0, "unk_id": 1, "bos_id": 2, "eos_id": 3}
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(text), model_prefix=str(data / "tokenizer"), vocab_size=PIECES, minloglevel=2, **special
    )
    tokenizer = Tokenizer.from_file(data / "tokenizer.model")
    tokens = np.concatenate([[*tokenizer.encode(line), tokenizer.eos_id] for line in text]).astype(np.uint16)
    splits = {}
    for split, records in (("train", 4), ("validation", 2)):
        path = data / f"{split}.arrayrecord"
        out = ArrayRecordWriter(str(path), "group_size:1")
        for record in tokens[: records * RECORD].reshape(records, RECORD):
            out.write(record.tobytes())
        out.close()
        shard = Shard(path.name, records, path.stat().st_size, file_crc32(path))
        splits[split] = Split(documents=0, tokens=records * RECORD, text_bytes=0, shards=(shard,))
    manifest = Manifest({}, tokenizer.identity, PIECES, RECORD, splits)
    (data / "manifest.json").write_text(manifest.to_json())
    main(search(folder, "--target-perplexity=1e9", "--output", str(folder / "budgets.json")))
    return folder


def search(folder, *more):
    paths = [f"--checkpoint={folder}/model", f"--data={folder}/data"]
    return ["search", *paths, "--step=7", "--windows=6", "--validation-windows=5", *more]


def output_of(capsys, *arguments):
    main(list(arguments))
    return capsys.readouterr().out


def mistake_of(capsys, *arguments):
    """The one line that a refused command ends with."""
    with pytest.raises(SystemExit) as exit_info:
        main(list(arguments))
    assert exit_info.value.code == 2
    return capsys.readouterr().err.splitlines()[-1]


def changed(folder, **changes):
    path = folder / "changed.json"
    path.write_text(json.dumps(read_search(folder / "budgets.json") | changes))
    return str(path)


def test_evaluate_gives_the_perplexities_of_the_search_on_the_same_windows(folder, capsys):
    content = read_search(folder / "budgets.json")
    for split, expected in (("train", content["found"]), ("validation", content["validation"]["pruned"])):
        shown = output_of(capsys, "evaluate", f"--budgets={folder}/budgets.json", f"--split={split}")
        pruned = float(re.search(r"selective, 8.00x fewer tokens: perplexity ([0-9.]+)", shown)[1])
        assert pruned == pytest.approx(expected["perplexity"], rel=1e-6)


def test_a_search_of_any_target_ends_at_the_smallest_budgets_and_resumes_to_the_same(folder, capsys, monkeypatch):
    again = folder / "again.json"
    command = search(folder, "--target-perplexity=1e9", "--output", str(again))
    with monkeypatch.context() as patch:
        patch.setattr(Journal, "remove", lambda journal: None)
        main(command)
    journal = folder / "again.json.journal"
    lines = journal.read_text().splitlines(keepends=True)
    journal.write_text("".join(lines[: len(lines) // 2]))  # as a search that was killed leaves it
    again.unlink()
    shown = output_of(capsys, *command)
    assert "selective: 8.00x fewer tokens, budgets [2, 2]" in shown
    assert again.read_text() == (folder / "budgets.json").read_text()
    assert not journal.exists() and not (folder / "budgets.json.journal").exists()


@pytest.mark.parametrize("command", ["search", "evaluate"])
def test_the_memory_that_is_printed_is_counted_in_bytes_of_the_cache(folder, capsys, command):
    commands = {
        "search": search(folder, "--target-perplexity=1e9", "--output", str(folder / "memory.json")),
        "evaluate": ["evaluate", f"--budgets={folder}/budgets.json"],
    }
    key_and_value, position, f = 2 * 4 * 8 * 4, 4, 4  # bytes of a slot
    held, full = (2 + 2) * (key_and_value + position + f), 2 * 16 * (key_and_value + f)
    line = f"cache of one sequence: {held:,} bytes, {full / held:.2f}x less than a full cache"
    assert line in output_of(capsys, *commands[command])


def test_generate_goes_on_from_the_prompt_and_from_standard_input_alike(folder, capsys, monkeypatch):
    common = ["generate", f"--budgets={folder}/budgets.json", "--tokens=5", "--seed=1"]
    shown = output_of(capsys, *common, "--prompt=the mask")
    monkeypatch.setattr("sys.stdin", io.StringIO("the mask"))
    assert output_of(capsys, *common) == shown
    assert shown.startswith("the mask") and len(shown) > len("the mask\n")


def test_generate_draws_what_the_context_leaves_where_nothing_else_is_said(folder, capsys):
    shown = output_of(capsys, "generate", f"--budgets={folder}/budgets.json", "--seed=1", "--prompt=the mask")
    assert shown.startswith("the mask") and len(shown) > len("the mask\n")


def test_the_report_shows_every_search_and_the_survivors_of_the_first(folder, capsys):
    shown = output_of(capsys, "report", f"{folder}/budgets.json", f"--output={folder}/page.html")
    assert "model, selective | 8.00 |" in shown
    page = (folder / "page.html").read_text()
    assert "Which tokens survive: model, selective" in page and page.count("2 of 16") == 2


def test_a_target_out_of_reach_names_the_best_that_is_not(folder, capsys):
    line = mistake_of(capsys, *search(folder, "--target-perplexity=1.5", "--output", str(folder / "none.json")))
    assert line.startswith("error: the target perplexity of 1.500 is out of reach: the best is ")
    assert not (folder / "none.json").exists()


def test_an_empty_prompt_is_refused(folder, capsys):
    line = mistake_of(capsys, "generate", f"--budgets={folder}/budgets.json", "--prompt=")
    assert line == "error: the prompt is empty; give --prompt, or text on standard input"


def test_budgets_are_refused_on_another_model(folder, capsys):
    line = mistake_of(capsys, "evaluate", f"--budgets={folder}/budgets.json", f"--checkpoint={folder}/other")
    assert line.startswith(f"error: these budgets were found for another model, {folder}/model")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"budgets": [1, 4]}, "error: the budget of layer 0 is 1; it must be from 2"),
        ({"budgets": [4, 17]}, "error: the budget of layer 1 is 17; it must be from 2"),
        ({"budgets": [4, 4, 4]}, "error: there are 3 budgets, but the model has 2 layers"),
        ({"policy": "lru"}, "error: the budgets file lacks, or does not know, 'lru'"),
        ({"format": "inference_budget.Budgets/2"}, "does not say that its format is"),
    ],
)
def test_files_that_cannot_be_used_are_refused(folder, capsys, changes, message):
    assert message in mistake_of(
        capsys, "generate", f"--budgets={changed(folder, **changes)}", "--prompt=the", "--tokens=2"
    )


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--step=0"], "argument --step: must be at least 1, not 0"),
        (["--context=12"], "error: a context of 12 tokens does not divide this dataset's records of 64"),
        (["--context=32"], "error: --context=32: the model was made for contexts of 16 tokens"),
        (["--first-step=3"], "error: steps must be from 1 to 15, the first at least the last; got 3 and 7"),
    ],
)
def test_options_of_a_search_out_of_range_are_refused(folder, capsys, options, message):
    common = "--target-perplexity=9", "--output", str(folder / "none.json")
    assert message in mistake_of(capsys, *search(folder, *common, *options))
