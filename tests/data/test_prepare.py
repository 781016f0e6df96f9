"""Preparing text: what goes in comes out, and nothing crosses from train to validation."""

import gzip
import json
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
from tqdm import tqdm

from data import Dataset, open_dataset
from data.plan import Plan, find_inputs
from data.prepare import prepare


def same_files(a: Path, b: Path) -> bool:
    names = sorted(path.name for path in a.iterdir())
    assert names == sorted(path.name for path in b.iterdir())
    return all((a / name).read_bytes() == (b / name).read_bytes() for name in names)


def test_every_document_comes_back_in_order(dataset: Dataset, texts: dict[str, list[str]], read_split) -> None:
    assert read_split(dataset, "train") == texts["a"] + texts["b"]
    assert read_split(dataset, "validation") == texts["c"]


def test_only_the_tail_of_a_split_is_padded(dataset: Dataset) -> None:
    for split, info in dataset.manifest.splits.items():
        tokens = dataset.read_records(split, range(info.records)).reshape(-1)
        assert tokens[: info.tokens].all()
        assert not tokens[info.tokens :].any()
        assert len(tokens) - info.tokens < dataset.manifest.record_length


def test_the_manifest_counts_what_is_there(dataset: Dataset, texts: dict[str, list[str]]) -> None:
    train = dataset.manifest.splits["train"]
    assert train.documents == len(texts["a"] + texts["b"])
    assert train.text_bytes == sum(len(text.encode()) for text in texts["a"] + texts["b"])
    assert [shard.records for shard in train.shards] in (
        [train.records // 3 + (i >= 3 - train.records % 3) for i in range(3)],
    )


def test_a_hash_split_never_parts_equal_documents(
    inputs: Path, texts: dict, tmp_path: Path, run_prepare, read_split
) -> None:
    folder = run_prepare(tmp_path / "out", input=[inputs / "a.json.gz", inputs / "b.json.gz"], validation_fraction=0.3)
    dataset = open_dataset(folder)
    train, validation = read_split(dataset, "train"), read_split(dataset, "validation")
    assert sorted(train + validation) == sorted(texts["a"] + texts["b"])
    assert not set(train) & set(validation)
    assert 0.2 < len(validation) / (len(train) + len(validation)) < 0.4


def test_the_number_of_workers_changes_no_byte(inputs: Path, dataset_folder: Path, tmp_path: Path, run_prepare) -> None:
    folder = run_prepare(
        tmp_path / "out",
        input=[inputs / "a.json.gz", inputs / "b.json.gz"],
        validation_input=inputs / "c.json.gz",
        shards=3,
        workers=2,
    )
    assert same_files(folder, dataset_folder)


def test_files_named_validation_are_the_validation_split(
    inputs: Path, texts: dict, tmp_path: Path, run_prepare, read_split
) -> None:
    text = tmp_path / "text"
    text.mkdir()
    (text / "c4-train.00000-of-00001.json.gz").write_bytes((inputs / "a.json.gz").read_bytes())
    (text / "c4-validation.00000-of-00001.json.gz").write_bytes((inputs / "c.json.gz").read_bytes())
    dataset = open_dataset(run_prepare(tmp_path / "out", source="c4", input=text / "c4-*.json.gz"))
    assert read_split(dataset, "validation") == texts["c"]


def test_a_vocabulary_over_16_bits_has_records_of_four_bytes(
    inputs: Path, texts: dict, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, read_split
) -> None:
    monkeypatch.setattr("data.manifest.MAX_UINT16_VOCAB", 200)
    plan = Plan(
        source="jsonl",
        inputs=find_inputs([str(inputs / "a.json.gz")], [str(inputs / "c.json.gz")]),
        vocab_size=300,
        tokenizer_sha256=None,
        record_length=64,
        shards=2,
        validation_fraction=0,
        sample_bytes=20_000,
    )

    def run(stage: Callable, tasks: list, progress: tqdm) -> Iterator:  # Here, where the limit is another.
        for task in tasks:
            stage(task, [0, 0])
            yield task

    manifest = prepare(plan, str(tmp_path / "out"), run=run, max_bad_fraction=0)
    dataset = open_dataset(tmp_path / "out")
    assert manifest == dataset.manifest and manifest.record_dtype == "<u4"
    assert dataset.read_records("train", [0]).dtype == np.uint32
    assert read_split(dataset, "train") == texts["a"]


def test_a_pattern_that_matches_nothing_is_an_error(tmp_path: Path, run_prepare) -> None:
    with pytest.raises(SystemExit, match=r"matches no file"):
        run_prepare(tmp_path / "out", input=tmp_path / "*.json.gz")


@pytest.mark.shared
def test_real_c4_comes_back(tmp_path: Path, run_prepare, read_split) -> None:
    source = Path(__file__).parents[3] / "shared" / "data" / "c4"
    if not source.exists():
        pytest.skip("needs ../shared")
    folder = run_prepare(
        tmp_path / "out", source="c4", input=source / "c4-*.json.gz", vocab_size=1000, record_length=2048
    )
    for split in ("train", "validation"):
        lines = [gzip.decompress(path.read_bytes()) for path in sorted(source.glob(f"c4-{split}.*"))]
        expected = [json.loads(line)["text"] for line in b"".join(lines).splitlines()]
        assert read_split(open_dataset(folder), split) == expected
