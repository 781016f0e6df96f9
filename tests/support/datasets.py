"""Small texts, and datasets that data.prepare makes of them."""

import gzip
import json
import random
from collections.abc import Iterable
from pathlib import Path

from data import prepare

SENTENCE = "the mask of a token grows with every later query that finds it stale so old words fade from view"
RARE = "ABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789"


def write_json_lines(path: Path, texts: Iterable[str]) -> None:
    """Writes documents as C4 has them."""
    with gzip.open(path, "wt") as stream:
        stream.writelines(json.dumps({"text": text, "timestamp": "", "url": ""}) + "\n" for text in texts)


def prepare_c4(folder: Path, texts: dict[str, list[str]], **options: object) -> Path:
    """Prepares the documents of `train` and `validation`; options are given as `record_length=64`."""
    for name, documents in texts.items():
        write_json_lines(folder / f"c4-{name}.json.gz", documents)
    arguments = [f"--{name.replace('_', '-')}={value}" for name, value in options.items()]
    inputs = ["--source=c4", "--input", str(folder / "c4-*.json.gz")]
    prepare.main([*inputs, f"--output={folder}/prepared", "--workers=1", *arguments])
    return folder / "prepared"


def prepare_for_training(folder: Path) -> Path:
    """About 40,000 tokens in records of 64, 300 pieces."""
    generator = random.Random(0)

    def documents(number: int) -> list[str]:
        texts = [" ".join(generator.choices(SENTENCE.split(), k=generator.randrange(5, 60))) for _ in range(number)]
        return texts + [f"{SENTENCE} {letter} {SENTENCE}" for letter in RARE]  # each in one document only

    texts = {"train": documents(1500), "validation": documents(60)}
    return prepare_c4(folder, texts, vocab_size=300, record_length=64)
