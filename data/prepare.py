"""Prepares text for training: documents -> tokenizer -> ArrayRecord shards and a manifest.

    python -m data.prepare --source c4 --input 'c4/c4-*.json.gz' --output DIR --vocab-size 8k
    python -m data.prepare --runner beam ... -- --runner=DataflowRunner --project=P --region=R --temp_location=gs://B/T

The same options and inputs give the same bytes, with any number of workers and any runner. It can be stopped and run
again at any time: only what is missing is done. See docs/data.md.
"""

import argparse
import dataclasses
import functools
import json
import os
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from tqdm import tqdm

from data.errors import DataError, end
from data.folder import Folder
from data.manifest import MANIFEST_FILE, TOKENIZER_FILE, Manifest, Shard, Split, record_dtype
from data.plan import SHARD_BYTES, Plan, find_inputs, shard_tasks, split_totals
from data.sources import SOURCES
from data.stages import Receipt, tokenize_file, write_shard
from data.tokenizer import Tokenizer, train_tokenizer
from data.tokenizer_files import load_tokenizer, read_tokenizer, write_tokenizer
from data.workers import run_tasks

WORK_FOLDER = ".prepare"
PRESETS = {"8k": 8_192, "32k": 32_768}
SPLITS = ("train", "validation")
_REQUESTS = 32  # at once, since a bucket takes long for each

# Calls a stage with each task, somewhere, and yields the tasks as they end, while the progress bar follows.
Runner = Callable[[Callable, list, tqdm], Iterator]


def prepare(
    plan: Plan, output: str, *, run: Runner, max_bad_fraction: float, tokenizer: Tokenizer | None = None
) -> Manifest:
    """Makes the dataset in the folder `output`, or finishes one that was begun with the same plan.

    `tokenizer` is the given one if the plan names one.

    Raises:
      DataError: `output` holds something else or is in use, an input cannot be read, or more than `max_bad_fraction` of
        the documents are bad.
      WorkError: what was done is kept; running again may go on.
    """
    folder = Folder(output)
    work = folder / WORK_FOLDER
    if folder.exists(MANIFEST_FILE):
        manifest = Manifest.from_json(folder.read(MANIFEST_FILE).decode())
        if manifest.source.get("plan") != plan.as_json():
            raise DataError(
                f"{output} holds a dataset of other options or inputs; choose another --output or remove it"
            )
        for shard in manifest.shards:
            if folder.size(shard.file) != shard.bytes:
                raise DataError(f"{shard.file} in {output} is missing or not whole; remove {output} and prepare again")
    else:
        with work.lock():
            folder.remove_partial()
            try:
                manifest = _make(plan, folder, work, run, max_bad_fraction, tokenizer)
            except BaseException:
                folder.remove_partial()  # one worker failed, and the others were ended in the middle of a file
                raise
    folder.remove_partial()
    work.remove()
    return manifest


def _make(
    plan: Plan, folder: Folder, work: Folder, run: Runner, max_bad_fraction: float, tokenizer: Tokenizer | None
) -> Manifest:
    _record_plan(work, plan)
    if (begun := read_tokenizer(work)) is not None:
        tokenizer = begun
    else:
        tokenizer = tokenizer or train_tokenizer(plan.sample_texts(), plan.vocab_size)
        write_tokenizer(work, tokenizer)
    receipts = [
        Receipt.from_json(content)
        for content in _run_stage(run, tokenize_file, plan.file_tasks(work), work, desc="tokenize", unit="B")
    ]
    _report_bad(plan, receipts, max_bad_fraction)
    token_bytes = int(record_dtype(tokenizer.vocab_size)[-1])
    tasks = {split: shard_tasks(work, folder, plan, split, receipts, token_bytes) for split in SPLITS}
    written = _run_stage(
        run, write_shard, [task for split in SPLITS for task in tasks[split]], work, "shards", " records"
    )
    shards = (Shard(**json.loads(content)) for content in written)
    splits = {
        split: Split(
            **dataclasses.asdict(split_totals(receipts, split)), shards=tuple(next(shards) for _ in tasks[split])
        )
        for split in SPLITS
    }
    source = {
        "plan": plan.as_json(),
        "bad_documents": sum(receipt.bad_documents for receipt in receipts),
        "changed_documents": sum(receipt.changed_documents for receipt in receipts),
    }
    manifest = Manifest(source, tokenizer.identity, tokenizer.vocab_size, plan.record_length, splits)
    write_tokenizer(folder, tokenizer)
    folder.write(MANIFEST_FILE, manifest.to_json().encode())
    return manifest


def _record_plan(work: Folder, plan: Plan) -> None:
    """Writes the plan down, or compares it with that of the work that is continued.

    Raises:
      DataError: that is another.
    """
    if not work.exists("plan.json"):
        work.write("plan.json", json.dumps(plan.as_json()).encode())
    elif json.loads(work.read("plan.json")) != plan.as_json():
        raise DataError(
            f"{work.url} holds an unfinished preparation of other options or inputs; "
            "run it again with those, or remove the folder"
        )


def _run_stage(run: Runner, stage: Callable, tasks: list[Any], work: Folder, desc: str, unit: str) -> list[bytes]:
    """Runs the tasks that have no receipt yet, and returns the receipts of all."""
    receipts = [task.receipt_file for task in tasks]
    with ThreadPoolExecutor(_REQUESTS) as pool:
        missing = [task for task, exists in zip(tasks, pool.map(work.exists, receipts), strict=True) if not exists]
    with tqdm(total=sum(task.size for task in tasks), desc=desc, unit=unit, unit_scale=True) as progress:
        progress.update(progress.total - sum(task.size for task in missing))
        for _ in run(stage, missing, progress):
            pass
    with ThreadPoolExecutor(_REQUESTS) as pool:
        return list(pool.map(work.read, receipts))


def _report_bad(plan: Plan, receipts: list[Receipt], max_bad_fraction: float) -> None:
    """Prints where the first bad documents are.

    Raises:
      DataError: they are too many, or there is nothing else.
    """
    bad = sum(receipt.bad_documents for receipt in receipts)
    good = sum(split_totals(receipts, split).documents for split in SPLITS)
    for file, receipt in zip(plan.inputs, receipts, strict=True):
        for line, reason in receipt.bad:
            print(f"{file.url}:{line}: skipped: {reason}", file=sys.stderr)
        if receipt.bad_documents > len(receipt.bad):
            print(f"{file.url}: ... {receipt.bad_documents:,} in all", file=sys.stderr)
    if bad > max_bad_fraction * (bad + good):
        raise DataError(
            f"{bad:,} of {bad + good:,} documents are bad, more than --max-bad-fraction {max_bad_fraction:g} allows; "
            "mend the inputs and remove the output, or run again with a larger fraction"
        )
    if not good:
        raise DataError("the inputs hold no document")


def summary(manifest: Manifest) -> str:
    """A line for each split, and one for what is not as it was."""
    lines = [
        f"{name}: {split.documents:,} documents, {split.tokens:,} tokens, {split.bytes_per_token:.2f} bytes per token, "
        f"{len(split.shards):,} shard{'s' if len(split.shards) != 1 else ''}"
        for name, split in manifest.splits.items()
    ]
    bad, changed = manifest.source["bad_documents"], manifest.source["changed_documents"]
    if bad or changed:
        reason = "hold U+2581, which comes back as a space"
        if manifest.tokenizer.file != TOKENIZER_FILE:
            reason = "do not come back as they were: the tokenizer changes them"
        lines.append(f"{bad:,} bad documents skipped; {changed:,} {reason}")
    return "\n".join(lines)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m data.prepare", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )

    def add(name: str, text: str, **options: Any) -> None:
        default = options.get("default")
        shown = f" (default {default})" if isinstance(default, int | float | str) else ""
        parser.add_argument(name, help=(text + shown).replace("%", "%%"), **options)

    sources = "; ".join(f"{name}: {text}" for name, text in SOURCES.items())
    names = "those named validation, valid or heldout are the validation split"
    add("--source", sources, choices=SOURCES, required=True)
    add("--input", f"files, globs or fsspec URLs; {names}", nargs="+", required=True, metavar="PATTERN")
    add("--validation-input", "validation files of other names", nargs="+", default=[], metavar="PATTERN")
    add("--output", "folder for the dataset, local or an fsspec URL", required=True)
    add("--vocab-size", "pieces to train, or 8k or 32k", type=vocabulary_size, default="8k")
    add(
        "--tokenizer",
        "to use as it is, instead of training one: a SentencePiece model, a tokenizer.json, or a folder with one",
        metavar="PATH",
    )
    add("--sample-bytes", "of text that the tokenizer is trained on", type=positive_integer, default=32_000_000)
    add("--record-length", "tokens in a record: the longest context", type=positive_integer, default=2_048)
    add("--shards", f"number of training shards; by default one per {SHARD_BYTES >> 20} MiB", type=positive_integer)
    add("--workers", "processes of the local runner", type=positive_integer, default=os.cpu_count())
    add("--validation-fraction", "of the documents, by hash, if no input is validation", type=fraction, default=0.01)
    add("--max-bad-fraction", "of the documents that may be bad, and are skipped", type=fraction, default=1e-4)
    add(
        "--runner",
        "this machine, or Apache Beam with the arguments after --",
        choices=("local", "beam"),
        default="local",
    )
    return parser


def positive_integer(text: str) -> int:
    if int(text) < 1:
        raise ValueError
    return int(text)


def fraction(text: str) -> float:
    if not 0 <= float(text) <= 1:
        raise ValueError
    return float(text)


def vocabulary_size(text: str) -> int:
    return PRESETS.get(text.lower()) or positive_integer(text)


def _runner(name: str, workers: int, beam_arguments: list[str]) -> Runner:
    if name == "local":
        return functools.partial(run_tasks, workers=workers)
    from data.beam_runner import run_on_beam  # an extra

    return functools.partial(run_on_beam, pipeline_arguments=beam_arguments)


def main(arguments: list[str] | None = None) -> None:
    arguments = sys.argv[1:] if arguments is None else arguments
    split_at = arguments.index("--") if "--" in arguments else len(arguments)
    parser = _parser()
    options = parser.parse_args(arguments[:split_at])
    beam_arguments = arguments[split_at + 1 :]
    if beam_arguments and options.runner != "beam":
        parser.error(f"{' '.join(beam_arguments)}: arguments after -- are for --runner beam")
    try:
        tokenizer = load_tokenizer(options.tokenizer) if options.tokenizer else None
        plan = Plan(
            source=options.source,
            inputs=find_inputs(options.input, options.validation_input),
            vocab_size=tokenizer.vocab_size if tokenizer else options.vocab_size,
            tokenizer_sha256=tokenizer.identity.sha256 if tokenizer else None,
            record_length=options.record_length,
            shards=options.shards,
            validation_fraction=options.validation_fraction,
            sample_bytes=options.sample_bytes,
        )
        run = _runner(options.runner, options.workers, beam_arguments)
        manifest = prepare(
            plan, options.output, run=run, max_bad_fraction=options.max_bad_fraction, tokenizer=tokenizer
        )
    except (DataError, OSError) as error:
        end(error)
    except KeyboardInterrupt:
        sys.exit("stopped; run the same command again to go on")
    print(summary(manifest))
    print(f"dataset {manifest.fingerprint[:12]} in {options.output}")


if __name__ == "__main__":
    main()
