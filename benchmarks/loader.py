"""How fast one process loads training batches, and how fast it opens a large dataset.

    python benchmarks/loader.py [--shards 1024] [--shard-bytes 536870912]

The dataset is synthetic: one shard of random tokens on the disk, which all the others are links to, so that 512 GB take
the room of 512 MB. A read therefore comes from the page cache: what is measured is the loader, not the disk.
"""

import argparse
import dataclasses
import json
import os
import tempfile
import time
from pathlib import Path

import numpy as np

from data import Manifest, TrainBatches, open_dataset
from data.folder import Folder
from data.manifest import MANIFEST_FILE, TOKENIZER_FILE, Shard, Split
from data.plan import SHARD_BYTES
from data.stages import ShardTask, TokenRange, write_shard
from data.tokenizer import train_tokenizer

RECORD_LENGTH = 2_048
CONTEXT_LENGTH = 512
BATCH_SIZE = 256

# The d = 12 model of configs/c4.py on a v4-256 slice: 12 layers, 768 wide, 8,192 ids.
CHIPS, HOSTS, PEAK_FLOPS, MODEL_FLOPS_UTILIZATION = 128, 32, 275e12, 0.5
LAYERS, WIDTH, VOCAB_SIZE = 12, 768, 8_192
PARAMETERS = 12 * LAYERS * WIDTH**2 + VOCAB_SIZE * WIDTH
FLOPS_PER_TOKEN = 6 * PARAMETERS + 6 * LAYERS * WIDTH * CONTEXT_LENGTH
NEEDED_PER_HOST = CHIPS * PEAK_FLOPS * MODEL_FLOPS_UTILIZATION / FLOPS_PER_TOKEN / HOSTS


def synthetic_dataset(folder: Path, shards: int, shard_bytes: int) -> Path:
    """`shards` shards of about `shard_bytes` each, of random ids, all the same file."""
    generator = np.random.default_rng(0)
    words = ["".join(word) for word in generator.choice(list("abcdefgh"), (200, 4))]
    tokenizer = train_tokenizer((" ".join(generator.choice(words, 40)) for _ in range(200)), 400)
    records = shard_bytes // (RECORD_LENGTH * 2)
    work = Folder(str(folder / "work"))
    work.write(TOKENIZER_FILE, tokenizer.model)
    block = generator.integers(4, tokenizer.vocab_size, 1 << 20).astype("<u2").tobytes()
    with work.writing("tokens") as path, path.open("wb") as stream:
        for start in range(0, records * RECORD_LENGTH, 1 << 20):
            stream.write(block[: 2 * (records * RECORD_LENGTH - start)])
    output = Folder(str(folder / "dataset"))
    first = f"train-{0:05d}-of-{shards:05d}.arrayrecord"
    whole = (TokenRange("tokens", 0, records * RECORD_LENGTH),)
    task = ShardTask(work, output, first, whole, records, RECORD_LENGTH)
    write_shard(task, [0, 0])
    shard = Shard(**json.loads(work.read(task.receipt_file)))
    dataset = folder / "dataset"
    names = [f"train-{number:05d}-of-{shards:05d}.arrayrecord" for number in range(shards)]
    for name in names[1:]:
        os.link(dataset / first, dataset / name)
    copies = tuple(dataclasses.replace(shard, file=name) for name in names)
    split = Split(1, shards * records * RECORD_LENGTH, 0, copies)
    manifest = Manifest({}, tokenizer.identity, tokenizer.vocab_size, RECORD_LENGTH, {"train": split})
    output.write(TOKENIZER_FILE, tokenizer.model)
    output.write(MANIFEST_FILE, manifest.to_json().encode())
    return dataset


def resident_mib() -> float:
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE") / 2**20


def tokens_per_second(batches: TrainBatches, rows: range, seconds: float) -> tuple[float, float]:
    """(per second of the clock, per second of one core)."""
    step, start, start_cpu = 0, time.perf_counter(), time.process_time()
    while time.perf_counter() - start < seconds:
        batches.rows(step, rows)
        step += 1
    tokens = step * len(rows) * CONTEXT_LENGTH
    return tokens / (time.perf_counter() - start), tokens / (time.process_time() - start_cpu)


def main() -> None:
    parser = argparse.ArgumentParser(prog="python benchmarks/loader.py", description=__doc__.split("\n\n")[0])
    parser.add_argument("--shards", type=int, default=1_024)
    parser.add_argument("--shard-bytes", type=int, nargs="+", default=[512 << 20, SHARD_BYTES])
    parser.add_argument("--seconds", type=float, default=5.0, help="of each measurement")
    options = parser.parse_args()
    columns = ("opened in", "memory", f"rows of {CONTEXT_LENGTH} tokens", "M tokens/s", "per core")
    print(f"| {options.shards:,} shards of | {' | '.join(columns)} |")
    print("|---|---|---|---|---|---|")
    for shard_bytes in options.shard_bytes:
        with tempfile.TemporaryDirectory() as scratch:
            path = synthetic_dataset(Path(scratch), options.shards, shard_bytes)
            before, start = resident_mib(), time.perf_counter()
            dataset = open_dataset(path)
            opened = f"{time.perf_counter() - start:.1f} s | {resident_mib() - before:.0f} MiB"
            batches = TrainBatches(dataset, context_length=CONTEXT_LENGTH, batch_size=BATCH_SIZE, seed=0)
            for rows in (BATCH_SIZE, BATCH_SIZE // HOSTS):
                tokens_per_second(batches, range(rows), options.seconds / 5)
                clock, core = tokens_per_second(batches, range(rows), options.seconds)
                label = f"{shard_bytes / 2**20:.0f} MiB | {opened}"
                print(f"| {label} | {rows} of {BATCH_SIZE} | {clock / 1e6:.1f} | {core / 1e6:.1f} |")
    print(
        f"\nA host of a v4-256 needs {NEEDED_PER_HOST / 1e6:.1f} M tokens/s at d = 12 and 50% of peak, {HOSTS} hosts."
    )


if __name__ == "__main__":
    main()
