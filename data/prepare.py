"""Prepares text for training: documents -> tokenizer -> ArrayRecord shards and a manifest.

    python -m data.prepare --source c4 --input 'c4/c4-*.json.gz' --output DIR --vocab-size 8k

The same options and inputs give the same bytes, with any number of workers. It can be stopped and run again at any
time: only what is missing is done. See data/README.md.
"""

import argparse
import dataclasses
import itertools
import json
import os
import re
import sys
from collections.abc import Iterator
from dataclasses import dataclass

import fsspec
from tqdm import tqdm

from data.folder import Folder
from data.manifest import MANIFEST_FILE, TOKENIZER_FILE, DataError, Manifest, Shard, Split, record_dtype
from data.sources import SOURCES, Document, read_documents
from data.stages import FileTask, Receipt, ShardTask, SplitCount, TokenRange, tokenize_file, write_shard
from data.tokenizer import Tokenizer, train_tokenizer
from data.workers import run_tasks

WORK_FOLDER = ".prepare"
PRESETS = {"8k": 8_192, "32k": 32_768}
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
    sample_documents: int

    def as_json(self) -> dict:
        return json.loads(json.dumps(dataclasses.asdict(self)))


def find_inputs(patterns: list[str], validation_patterns: list[str]) -> tuple[Input, ...]:
    """The files that the patterns match, each once, in the order of the patterns and sorted within one.

    Raises DataError if a pattern matches nothing.
    """
    found: dict[str, tuple[int, bool]] = {}
    for pattern, validation in [(p, True) for p in validation_patterns] + [(p, False) for p in patterns]:
        filesystem, path = fsspec.core.url_to_fs(pattern)
        matches = filesystem.glob(path, detail=True)
        files = sorted((name, info["size"]) for name, info in matches.items() if info["type"] == "file")
        if not files:
            raise DataError(f"--input {pattern!r} matches no file")
        for name, size in files:
            url = (
                name
                if isinstance(filesystem, fsspec.implementations.local.LocalFileSystem)
                else filesystem.unstrip_protocol(name)
            )
            is_validation = validation or _VALIDATION_NAME.search(name.rsplit("/", 1)[-1].lower()) is not None
            found.setdefault(url, (size, is_validation))
    if all(validation for _, validation in found.values()):
        raise DataError("all inputs are validation files; give training files with --input")
    has_validation = any(validation for _, validation in found.values())
    return tuple(
        Input(url, size, "validation" if validation else "train" if has_validation else None)
        for url, (size, validation) in found.items()
    )


def sample_texts(plan: Plan) -> Iterator[str]:
    """The documents that the tokenizer learns from: the same number from the start of each training file, in order."""
    inputs = [file for file in plan.inputs if file.split != "validation"]
    per_file = -(-plan.sample_documents // len(inputs))
    with tqdm(total=plan.sample_documents, desc="sample", unit="document") as progress:
        for file in inputs:
            documents = (item.text for item in read_documents(file.url, plan.source) if isinstance(item, Document))
            for text in itertools.islice(documents, per_file):
                progress.update()
                yield text


def prepare(plan: Plan, output: str, *, tokenizer: Tokenizer | None, workers: int, max_bad_fraction: float) -> Manifest:
    """Makes the dataset in the folder `output`, or finishes one that was begun with the same plan.

    Raises DataError if `output` holds something else, an input cannot be read, or too many documents are bad.
    """
    folder = Folder(output)
    if folder.exists(MANIFEST_FILE):
        return _finished(folder, plan)
    work = Folder(f"{output.rstrip('/')}/{WORK_FOLDER}")
    _begin(work, plan, tokenizer)
    receipts = _tokenize(work, plan, workers)
    _check_bad(plan, receipts, max_bad_fraction)
    shards = _write_shards(work, folder, plan, receipts, workers)
    manifest = _manifest(work, plan, receipts, shards)
    folder.write(TOKENIZER_FILE, work.read(TOKENIZER_FILE))
    folder.write(MANIFEST_FILE, manifest.to_json().encode())
    work.remove("")
    return manifest


def _finished(folder: Folder, plan: Plan) -> Manifest:
    manifest = Manifest.from_json(folder.read(MANIFEST_FILE).decode())
    if manifest.source.get("plan") != plan.as_json():
        raise DataError(
            f"{folder.url} holds a dataset made with other options or inputs; choose another --output or remove it"
        )
    Folder(f"{folder.url.rstrip('/')}/{WORK_FOLDER}").remove("")
    return manifest


def _begin(work: Folder, plan: Plan, tokenizer: Tokenizer | None) -> None:
    """Records the plan and the tokenizer, or checks that they are those of the run that is continued."""
    if work.exists("plan.json"):
        if json.loads(work.read("plan.json")) != plan.as_json():
            raise DataError(
                f"{work.url} holds an unfinished preparation with other options or inputs; "
                "run it again with those, or remove the folder"
            )
    else:
        work.write("plan.json", json.dumps(plan.as_json()).encode())
    if not work.exists(TOKENIZER_FILE):
        tokenizer = tokenizer or train_tokenizer(sample_texts(plan), plan.vocab_size)
        work.write(TOKENIZER_FILE, tokenizer.model)


def _tokenize(work: Folder, plan: Plan, workers: int) -> list[Receipt]:
    tasks = [
        FileTask(work, index, file.url, plan.source, file.split, plan.validation_fraction)
        for index, file in enumerate(plan.inputs)
    ]
    missing = [task for task in tasks if not work.exists(task.receipt_file)]
    with tqdm(total=sum(file.bytes for file in plan.inputs), desc="tokenize", unit="B", unit_scale=True) as progress:
        progress.update(progress.total - sum(plan.inputs[task.index].bytes for task in missing))
        for task, receipt in run_tasks(tokenize_file, missing, workers, preload="data.stages"):
            progress.update(plan.inputs[task.index].bytes)
            for line, reason in receipt.bad:
                tqdm.write(f"{task.url}:{line}: skipped: {reason}", file=sys.stderr)
    return [Receipt.from_json(work.read(task.receipt_file)) for task in tasks]


def _check_bad(plan: Plan, receipts: list[Receipt], max_bad_fraction: float) -> None:
    bad = sum(receipt.bad_documents for receipt in receipts)
    good = sum(count.documents for receipt in receipts for count in receipt.splits.values())
    if bad > max_bad_fraction * (bad + good):
        examples = [
            f"{file.url}:{line}: {reason}"
            for file, receipt in zip(plan.inputs, receipts, strict=True)
            for line, reason in receipt.bad
        ]
        raise DataError(
            f"{bad:,} of {bad + good:,} documents are bad, more than --max-bad-fraction {max_bad_fraction:g} allows:"
            + "".join(f"\n  {example}" for example in examples[:10])
        )


def _split_totals(receipts: list[Receipt], split: str) -> SplitCount:
    counts = [receipt.splits[split] for receipt in receipts if split in receipt.splits]
    return SplitCount(
        *(sum(getattr(count, field.name) for count in counts) for field in dataclasses.fields(SplitCount))
    )


def shard_tasks(
    work: Folder,
    output: Folder,
    split: str,
    receipts: list[Receipt],
    record_length: int,
    itemsize: int,
    shards: int | None,
) -> list[ShardTask]:
    """Cuts a split's tokens, all files in order, into shards of as equal a number of records as can be."""
    tokens = _split_totals(receipts, split).tokens
    records = -(-tokens // record_length)
    count = min(shards or -(-records * record_length * itemsize // SHARD_BYTES), records)
    files = [
        (f"tokens/{index:05d}.{split}.tokens", receipt.splits[split].tokens)
        for index, receipt in enumerate(receipts)
        if split in receipt.splits
    ]
    tasks = []
    for number in range(count):
        first, last = (records * (number + i) // count for i in (0, 1))
        ranges = tuple(_ranges(files, first * record_length, min(last * record_length, tokens)))
        name = f"{split}-{number:05d}-of-{count:05d}.arrayrecord"
        tasks.append(ShardTask(work, output, name, ranges, last - first, record_length))
    return tasks


def _ranges(files: list[tuple[str, int]], start: int, end: int) -> Iterator[TokenRange]:
    """The parts of `files`, each (name, tokens), that make up tokens [start, end) of their concatenation."""
    position = 0
    for name, tokens in files:
        first, last = max(start, position), min(end, position + tokens)
        if first < last:
            yield TokenRange(name, first - position, last - first)
        position += tokens


def _write_shards(
    work: Folder, output: Folder, plan: Plan, receipts: list[Receipt], workers: int
) -> dict[str, tuple[Shard, ...]]:
    vocab_size = Tokenizer(work.read(TOKENIZER_FILE)).vocab_size
    itemsize = int(record_dtype(vocab_size)[-1])
    tasks = {
        # A number of shards is for the training split; validation is cut by size alone.
        split: shard_tasks(
            work, output, split, receipts, plan.record_length, itemsize, plan.shards if split == "train" else None
        )
        for split in ("train", "validation")
    }
    every = [task for split_tasks in tasks.values() for task in split_tasks]
    missing = [task for task in every if not work.exists(task.receipt_file)]
    with tqdm(total=sum(task.records for task in every), desc="shards", unit="record", unit_scale=True) as progress:
        progress.update(progress.total - sum(task.records for task in missing))
        for task, _ in run_tasks(write_shard, missing, workers, preload="data.stages"):
            progress.update(task.records)
    return {
        split: tuple(Shard(**json.loads(work.read(task.receipt_file))) for task in split_tasks)
        for split, split_tasks in tasks.items()
    }


def _manifest(work: Folder, plan: Plan, receipts: list[Receipt], shards: dict[str, tuple[Shard, ...]]) -> Manifest:
    tokenizer = Tokenizer(work.read(TOKENIZER_FILE))
    splits = {
        name: Split(**dataclasses.asdict(_split_totals(receipts, name)), shards=split_shards)
        for name, split_shards in shards.items()
    }
    source = {
        "plan": plan.as_json(),
        "bad_documents": sum(receipt.bad_documents for receipt in receipts),
        "changed_documents": sum(receipt.changed_documents for receipt in receipts),
    }
    return Manifest(source, tokenizer.identity, tokenizer.vocab_size, plan.record_length, splits)


def summary(manifest: Manifest) -> str:
    """One line for each split."""
    return "\n".join(
        f"{name}: {split.documents:,} documents, {split.tokens:,} tokens, {split.bytes_per_token:.2f} bytes per token, "
        f"{len(split.shards)} shard{'s' if len(split.shards) != 1 else ''}"
        for name, split in manifest.splits.items()
    )


def _vocab_size(text: str) -> int:
    return PRESETS.get(text.lower()) or int(text)


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m data.prepare", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    sources = "; ".join(f"{name}: {text}" for name, text in SOURCES.items())
    parser.add_argument("--source", choices=SOURCES, required=True, help=sources)
    parser.add_argument(
        "--input",
        nargs="+",
        required=True,
        metavar="PATTERN",
        help="files, globs or fsspec URLs; those named validation, valid or heldout are the validation split",
    )
    parser.add_argument(
        "--validation-input", nargs="+", default=[], metavar="PATTERN", help="validation files of other names"
    )
    parser.add_argument("--output", required=True, help="folder for the dataset")
    parser.add_argument(
        "--vocab-size", type=_vocab_size, default=PRESETS["8k"], help="pieces, or 8k or 32k (default 8k)"
    )
    parser.add_argument(
        "--tokenizer", metavar="FILE", help="a SentencePiece model to use as it is, instead of training one"
    )
    parser.add_argument(
        "--sample-documents",
        type=int,
        default=100_000,
        help="documents the tokenizer is trained on (default %(default)s)",
    )
    parser.add_argument(
        "--record-length", type=int, default=2_048, help="tokens per record: the longest context (default %(default)s)"
    )
    parser.add_argument("--shards", type=int, help=f"training shards (default: one per {SHARD_BYTES >> 20} MiB)")
    parser.add_argument("--workers", type=int, default=os.cpu_count(), help="processes (default: one per core)")
    parser.add_argument(
        "--validation-fraction",
        type=float,
        default=0.01,
        help="of the documents, by hash, if no input is validation (default %(default)s)",
    )
    parser.add_argument(
        "--max-bad-fraction", type=float, default=1e-4, help="of the documents that may be bad (default %(default)s)"
    )
    options = parser.parse_args(arguments)
    for name in ("vocab_size", "sample_documents", "record_length", "workers"):
        if getattr(options, name) < 1:
            parser.error(f"--{name.replace('_', '-')} must be positive")
    try:
        tokenizer = Tokenizer.from_file(options.tokenizer) if options.tokenizer else None
        plan = Plan(
            source=options.source,
            inputs=find_inputs(options.input, options.validation_input),
            vocab_size=tokenizer.vocab_size if tokenizer else options.vocab_size,
            tokenizer_sha256=tokenizer.identity.sha256 if tokenizer else None,
            record_length=options.record_length,
            shards=options.shards,
            validation_fraction=options.validation_fraction,
            sample_documents=options.sample_documents,
        )
        manifest = prepare(
            plan,
            options.output,
            tokenizer=tokenizer,
            workers=options.workers,
            max_bad_fraction=options.max_bad_fraction,
        )
    except (DataError, OSError) as error:
        sys.exit(f"error: {error}")
    print(summary(manifest))
    print(f"dataset {manifest.fingerprint[:12]} in {options.output}")


if __name__ == "__main__":
    main()
