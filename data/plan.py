"""What is to be prepared, decided before it is done: the inputs, the options, and the cut of tokens into shards."""

import dataclasses
import json
import re
from collections.abc import Iterator
from dataclasses import dataclass

from fsspec.implementations.local import LocalFileSystem
from tqdm import tqdm

from data.errors import DataError
from data.folder import Folder
from data.sources import BadDocument, filesystem, in_validation, read_documents
from data.stages import FileTask, Receipt, ShardTask, SplitCount, TokenRange

# About 1,000 shards for C4: enough to spread over hosts and retries, few enough to keep open.
SHARD_BYTES = 128 << 20
# Validation files by their names: c4-validation.*, wiki.valid.tokens, news.en.heldout-*, validation-*.parquet.
_VALIDATION_NAME = re.compile(r"(^|[^a-z])(validation|valid|heldout)([^a-z]|$)")


@dataclass(frozen=True)
class Input:
    """One input file; `split` is None where a hash of each document decides."""

    url: str
    bytes: int
    split: str | None


@dataclass(frozen=True)
class Plan:
    """Everything that decides the output's bytes. `tokenizer_sha256` is None where one is trained."""

    source: str
    inputs: tuple[Input, ...]
    vocab_size: int
    tokenizer_sha256: str | None
    record_length: int
    shards: int | None
    validation_fraction: float
    sample_bytes: int

    def as_json(self) -> dict:
        return json.loads(json.dumps(dataclasses.asdict(self)))

    def file_tasks(self, work: Folder) -> list[FileTask]:
        return [
            FileTask(work, index, file.url, file.bytes, self.source, file.split, self.validation_fraction)
            for index, file in enumerate(self.inputs)
        ]

    def sample_texts(self) -> Iterator[str]:
        """What the tokenizer learns from: as many bytes from the start of each training file, in order."""
        inputs = [file for file in self.inputs if file.split != "validation"]
        with tqdm(total=self.sample_bytes, desc="sample", unit="B", unit_scale=True) as progress:
            for file in inputs:
                room = -(-self.sample_bytes // len(inputs))
                for document in read_documents(file.url, self.source):
                    if isinstance(document, BadDocument):
                        continue
                    if file.split is None and in_validation(document.text, self.validation_fraction):
                        continue
                    text = document.text.encode()[:room]
                    room -= len(text)
                    progress.update(len(text))
                    yield text.decode(errors="ignore")  # the last character may be cut
                    if not room:
                        break


def find_inputs(patterns: list[str], validation_patterns: list[str]) -> tuple[Input, ...]:
    """The files that the patterns match, each once, in the order of the patterns and sorted within one.

    Raises:
      DataError: a pattern matches nothing, or only validation files are found.
    """
    found: dict[str, tuple[int, bool]] = {}
    for pattern, validation in [(p, True) for p in validation_patterns] + [(p, False) for p in patterns]:
        opened, path = filesystem(pattern)
        files = sorted(
            (name, info["size"]) for name, info in opened.glob(path, detail=True).items() if info["type"] == "file"
        )
        if not files:
            raise DataError(f"{pattern!r} matches no file")
        for name, size in files:
            url = name if isinstance(opened, LocalFileSystem) else opened.unstrip_protocol(name)
            is_validation = validation or _VALIDATION_NAME.search(name.rsplit("/", 1)[-1].lower()) is not None
            found.setdefault(url, (size, is_validation))
    if all(validation for _, validation in found.values()):
        raise DataError("all inputs are validation files; give training files with --input")
    has_validation = any(validation for _, validation in found.values())
    return tuple(
        Input(url, size, "validation" if validation else "train" if has_validation else None)
        for url, (size, validation) in found.items()
    )


def split_totals(receipts: list[Receipt], split: str) -> SplitCount:
    counts = [receipt.splits[split] for receipt in receipts if split in receipt.splits]
    return SplitCount(
        *(sum(getattr(count, field.name) for count in counts) for field in dataclasses.fields(SplitCount))
    )


def shard_tasks(
    work: Folder, output: Folder, plan: Plan, split: str, receipts: list[Receipt], token_bytes: int
) -> list[ShardTask]:
    """Cuts a split's tokens, all files in order, into shards of as equal a number of records as can be.

    `plan.shards` is the number for the training split; validation is always cut by size.
    """
    tokens = split_totals(receipts, split).tokens
    records = -(-tokens // plan.record_length)
    by_size = -(-records * plan.record_length * token_bytes // SHARD_BYTES)
    count = min(plan.shards if plan.shards and split == "train" else by_size, records)
    files = [
        (task.token_file(split), receipt.splits[split].tokens)
        for task, receipt in zip(plan.file_tasks(work), receipts, strict=True)
        if split in receipt.splits
    ]
    tasks = []
    for number in range(count):
        first, last = (records * (number + i) // count for i in (0, 1))
        ranges = tuple(_ranges(files, first * plan.record_length, min(last * plan.record_length, tokens)))
        name = f"{split}-{number:05d}-of-{count:05d}.arrayrecord"
        tasks.append(ShardTask(work, output, name, ranges, last - first, plan.record_length))
    return tasks


def _ranges(files: list[tuple[str, int]], start: int, end: int) -> Iterator[TokenRange]:
    """The parts of `files`, each (name, tokens), that make up tokens [start, end) of their concatenation."""
    position = 0
    for name, tokens in files:
        first, last = max(start, position), min(end, position + tokens)
        if first < last:
            yield TokenRange(name, first - position, last - first)
        position += tokens
