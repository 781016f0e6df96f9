"""Shows what a prepared dataset holds, and checks it.

python -m data.inspect DIR [--verify]
"""

import argparse

from tqdm import tqdm

from data.dataset import Dataset, open_dataset
from data.errors import DataError, end
from data.manifest import Manifest

_SHOWN_TOKENS = 64


def table(rows: list[tuple[str, ...]]) -> str:
    """Columns side by side, the first to the left and the others to the right."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return "\n".join(
        "  ".join(
            cell.rjust(width) if i else cell.ljust(width)
            for i, (cell, width) in enumerate(zip(row, widths, strict=True))
        )
        for row in rows
    )


def describe(manifest: Manifest) -> str:
    """The manifest's contents as two tables."""
    plan = manifest.source.get("plan", {})
    inputs = plan.get("inputs", [])
    facts = [
        ("fingerprint", manifest.fingerprint[:16]),
        (
            "source",
            f"{plan.get('source', 'unknown')}, {len(inputs):,} files, {sum(i['bytes'] for i in inputs):,} bytes",
        ),
        ("vocabulary", f"{manifest.vocab_size:,} ids, tokenizer {manifest.tokenizer.sha256[:16]}"),
        ("record", f"{manifest.record_length:,} tokens of {manifest.record_dtype}"),
        ("bad documents skipped", f"{manifest.source.get('bad_documents', 0):,}"),
        ("documents that do not come back", f"{manifest.source.get('changed_documents', 0):,}"),
    ]
    width = max(len(name) for name, _ in facts)
    rows: list[tuple[str, ...]] = [
        ("split", "documents", "tokens", "records", "shards", "text bytes", "bytes/token", "shard bytes")
    ]
    for name, split in manifest.splits.items():
        counts = (split.documents, split.tokens, split.records, len(split.shards), split.text_bytes)
        size = sum(shard.bytes for shard in split.shards)
        rows.append((name, *(f"{count:,}" for count in counts), f"{split.bytes_per_token:.3f}", f"{size:,}"))
    return "\n".join(f"{name.ljust(width)}  {value}" for name, value in facts) + "\n\n" + table(rows)


def windows(dataset: Dataset) -> list[tuple[str, str]]:
    """(where, text) of three windows, at the start, the middle and the end of the training split."""
    tokenizer, train = dataset.tokenizer(), dataset.manifest.splits["train"]
    records = [0, train.records // 2, max(train.records - 1, 0)]
    return [
        (f"train, record {record:,}", tokenizer.decode(tokens[:_SHOWN_TOKENS]))
        for record, tokens in zip(records, dataset.read_records("train", records), strict=True)
    ]


def verify(dataset: Dataset) -> None:
    """Reads every byte of every shard.

    Raises:
      DataError: the checksum of a shard is wrong.
    """
    with tqdm(
        total=sum(shard.bytes for shard in dataset.manifest.shards), desc="verify", unit="B", unit_scale=True
    ) as progress:
        for shard in dataset.manifest.shards:
            dataset.verify(shard, progress.update)


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m data.inspect", description="Shows what a dataset holds.")
    parser.add_argument("dataset", help="the folder that data.prepare made")
    parser.add_argument("--verify", action="store_true", help="read every byte and compare the checksums")
    options = parser.parse_args(arguments)
    try:
        dataset = open_dataset(options.dataset)
        print(describe(dataset.manifest))
        for where, text in windows(dataset):
            print(f"\n{where}: {text!r}")
        if options.verify:
            verify(dataset)
            print(f"\nall {len(dataset.manifest.shards):,} shards have the right checksums")
    except DataError as error:
        end(error)


if __name__ == "__main__":
    main()
