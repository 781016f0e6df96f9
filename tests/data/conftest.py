"""A small text and a dataset made of it, shared by the tests of this folder."""

import gzip
import json
import random
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from data import Dataset, open_dataset, prepare

ODD_TEXTS = [
    "",
    " ",
    "  leading and trailing  ",
    "double  spaces   and\n\n\nnewlines\r\n\ttabs\t\t",
    "emoji \U0001f600 \U0001f469\u200d\U0001f469\u200d\U0001f467 and accents e\u0301 \u00e9 \ufb01",
    "control \x00\x01\x7f\x85 characters \ufeff\ufffd\uffff\U0010ffff",
    "日本語のテキスト и русский",
    "<s> </s> <pad> <unk> <0x0A> \u2047",
    "\n" * 9 + " " * 50,
]
SENTENCE = "the mask of a token grows with every later query that finds it stale so old words fade from view"


def random_text(generator: random.Random) -> str:
    return " ".join(generator.choices(SENTENCE.split(), k=generator.randrange(1, 80))) + "."


def write_json_lines(path: Path, texts: list[str]) -> None:
    with gzip.open(path, "wt") as stream:
        stream.writelines(json.dumps({"text": text, "timestamp": "", "url": ""}) + "\n" for text in texts)


@pytest.fixture(scope="session")
def odd_texts() -> list[str]:
    return ODD_TEXTS


@pytest.fixture(scope="session")
def texts() -> dict[str, list[str]]:
    """The documents of two training files, fifty of them in both, and of a validation file."""
    generator = random.Random(0)
    first = [random_text(generator) for _ in range(300)] + ODD_TEXTS
    second = [random_text(generator) for _ in range(200)] + first[:50]
    return {"a": first, "b": second, "c": [random_text(generator) for _ in range(60)]}


@pytest.fixture(scope="session")
def inputs(texts: dict[str, list[str]], tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("text")
    for name, documents in texts.items():
        write_json_lines(folder / f"{name}.json.gz", documents)
    return folder


Prepare = Callable[..., Path]


@pytest.fixture(scope="session")
def run_prepare() -> Prepare:
    """Runs data.prepare with small sizes; options are given as `record_length=64`."""

    def run(output: Path, **options: object) -> Path:
        small = {"source": "jsonl", "vocab_size": 300, "record_length": 64, "workers": 1}
        arguments = ["--output", str(output)]
        for name, value in (small | options).items():
            values = value if isinstance(value, list) else [value]
            arguments += [f"--{name.replace('_', '-')}", *map(str, values)]
        prepare.main(arguments)
        return output

    return run


@pytest.fixture(scope="session")
def read_split() -> Callable[[Dataset, str], list[str]]:
    """The texts of a split, decoded from its records."""

    def read(dataset: Dataset, split: str) -> list[str]:
        info = dataset.manifest.splits[split]
        tokens = dataset.read_records(split, range(info.records)).reshape(-1)[: info.tokens]
        ends = np.flatnonzero(tokens == dataset.manifest.tokenizer.eos_id)
        assert ends[-1] == len(tokens) - 1
        tokenizer = dataset.tokenizer()
        return [tokenizer.decode(part) for part in np.split(tokens, ends[:-1] + 1)]

    return read


@pytest.fixture(scope="session")
def dataset_folder(inputs: Path, run_prepare: Prepare, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two files of training text in three shards and one of validation: records of 64 tokens, 300 pieces. Read only."""
    return run_prepare(
        tmp_path_factory.mktemp("dataset"),
        input=[inputs / "a.json.gz", inputs / "b.json.gz"],
        validation_input=inputs / "c.json.gz",
        shards=3,
    )


@pytest.fixture(scope="session")
def dataset(dataset_folder: Path) -> Dataset:
    return open_dataset(dataset_folder)
