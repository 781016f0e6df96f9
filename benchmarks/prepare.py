"""How fast one core prepares text, beside Hugging Face `datasets` and `tokenizers` doing the same job.

    python benchmarks/prepare.py [--input 'c4/c4-train.*.json.gz'] [--repeat 8]

The job: read gzipped JSON lines, tokenize with 8,192 pieces, end each document with EOS, join, cut into records of
2,048 tokens, write them. Each contender runs in a process of its own, on one core, with a tokenizer trained before on
the same sample; the clock is the process's CPU time. The peer needs `pip install '.[benchmark]'`. Without --input the
text is the embedded corpus.
"""

import argparse
import itertools
import multiprocessing
import os
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

from data import corpus
from data.folder import Folder
from data.manifest import TOKENIZER_FILE
from data.plan import find_inputs
from data.sources import Document, read_documents
from data.stages import FileTask, Receipt, ShardTask, TokenRange, tokenize_file, write_shard
from data.tokenizer import train_tokenizer

VOCAB_SIZE = 8_192
RECORD_LENGTH = 2_048
SAMPLE_DOCUMENTS = 4_000


def _texts(files: list[str]) -> Iterator[str]:
    return (item.text for file in files for item in read_documents(file, "c4") if isinstance(item, Document))


def ours(folder: Path, files: list[str], sample: list[str]) -> Callable[[], int]:
    """data.prepare's two stages. Returns the job, which returns the number of tokens it wrote."""
    work = Folder(str(folder / "work"))
    work.write(TOKENIZER_FILE, train_tokenizer(sample, VOCAB_SIZE).model)
    tasks = [FileTask(work, i, file, os.path.getsize(file), "c4", "train", 0.0) for i, file in enumerate(files)]

    def job() -> int:
        for task in tasks:
            tokenize_file(task, [0, 0])
        counts = [Receipt.from_json(work.read(task.receipt_file)).splits["train"].tokens for task in tasks]
        ranges = tuple(
            TokenRange(task.token_file("train"), 0, tokens) for task, tokens in zip(tasks, counts, strict=True)
        )
        records = -(-sum(counts) // RECORD_LENGTH)
        write_shard(ShardTask(work, Folder(str(folder / "out")), "shard", ranges, records, RECORD_LENGTH), [0, 0])
        return sum(counts)

    return job


def hugging_face(folder: Path, files: list[str], sample: list[str]) -> Callable[[], int]:
    """load_dataset, tokenize in batches, group into records, save: the way of its own examples, with byte-level BPE."""
    os.environ |= {"HF_HUB_OFFLINE": "1", "HF_DATASETS_CACHE": str(folder / "cache"), "TOKENIZERS_PARALLELISM": "false"}
    import datasets
    import pyarrow.compute
    import tokenizers

    datasets.disable_progress_bars()
    tokenizer = tokenizers.ByteLevelBPETokenizer()
    tokenizer.train_from_iterator(sample, vocab_size=VOCAB_SIZE, special_tokens=["</s>"], show_progress=False)
    eos = tokenizer.token_to_id("</s>")

    def tokenize(batch: dict) -> dict:
        return {"ids": [[*encoding.ids, eos] for encoding in tokenizer.encode_batch(batch["text"])]}

    def group(batch: dict) -> dict:
        ids = list(itertools.chain.from_iterable(batch["ids"]))
        return {"ids": [ids[start : start + RECORD_LENGTH] for start in range(0, len(ids), RECORD_LENGTH)]}

    def job() -> int:
        text = datasets.load_dataset("json", data_files=files, split="train")
        features = datasets.Features({"ids": datasets.Sequence(datasets.Value("uint16"))})
        tokens = text.map(tokenize, batched=True, remove_columns=text.column_names, features=features)
        records = tokens.map(group, batched=True, features=features)
        records.save_to_disk(str(folder / "out"))
        return pyarrow.compute.sum(pyarrow.compute.list_value_length(records.data["ids"])).as_py()

    return job


def _measure(connection, contender: Callable, files: list[str], sample: list[str]) -> None:
    os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})
    with tempfile.TemporaryDirectory() as scratch:
        try:
            job = contender(Path(scratch), files, sample)
        except ImportError as error:
            connection.send(str(error))
            return
        start = time.process_time()
        tokens = job()
        connection.send((time.process_time() - start, tokens))


def main() -> None:
    parser = argparse.ArgumentParser(prog="python benchmarks/prepare.py", description=__doc__.split("\n\n")[0])
    parser.add_argument("--input", nargs="+", metavar="PATTERN", help="JSON lines; by default the embedded corpus")
    parser.add_argument("--repeat", type=int, default=8, help="copies of the input, so that fixed costs count little")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        if options.input:
            originals = [file.url for file in find_inputs(options.input, [])]
        else:
            corpus.build(Path(scratch) / "corpus")
            originals = [str(path) for path in sorted((Path(scratch) / "corpus").glob("c4-train.*"))]
        files = []
        for number, original in itertools.product(range(options.repeat), originals):
            files.append(f"{scratch}/{number}-{Path(original).name}")
            shutil.copy(original, files[-1])
        megabytes = sum(len(text.encode()) for text in _texts(files)) / 1e6
        sample = list(itertools.islice(_texts(originals), SAMPLE_DOCUMENTS))
        print(f"{megabytes:.1f} MB of text in {len(files)} files, {VOCAB_SIZE:,} pieces, one core\n")
        print("| | MB of text/s/core | bytes per token |")
        print("|---|---|---|")
        context = multiprocessing.get_context("spawn")
        for name, contender in (("data.prepare", ours), ("Hugging Face datasets + tokenizers", hugging_face)):
            receiver, sender = context.Pipe(duplex=False)
            process = context.Process(target=_measure, args=(sender, contender, files, sample))
            process.start()
            sender.close()
            try:
                result = receiver.recv()
            except EOFError:
                result = "it failed, see above"
            process.join()
            if isinstance(result, str):
                print(f"| {name} | not measured: {result} | |")
            else:
                seconds, tokens = result
                print(f"| {name} | {megabytes / seconds:.1f} | {megabytes * 1e6 / tokens:.2f} |")


if __name__ == "__main__":
    main()
