"""A small model, a small dataset, and a search of both."""

import numpy as np
import pytest
import sentencepiece
from array_record.python.array_record_module import ArrayRecordWriter

from data import Manifest, load_tokenizer
from data.manifest import Shard, Split, file_crc32
from launch.budgets.__main__ import main
from selective_attention import export_safetensors
from tests.support.searches import search
from tests.support.small_model import make_model

PIECES, RECORD = 36, 64
WORDS = ["the", "mask", "of", "a", "token", "grows", "with", "every", "later", "query", "stale", "words", "fade"]


@pytest.fixture(scope="session")
def folder(tmp_path_factory):
    """`model` and `other` (exported), `data` (a dataset), and a search's budgets.json."""
    folder = tmp_path_factory.mktemp("budgets")
    for seed, name in enumerate(("model", "other")):
        export_safetensors(make_model(seed, max_length=16, tied_embeddings=False), folder / name)
    data, rng = folder / "data", np.random.default_rng(0)
    data.mkdir()
    text = [" ".join(rng.choice(WORDS, 12)) for _ in range(300)]
    special = {"pad_id": 0, "unk_id": 1, "bos_id": 2, "eos_id": 3}
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(text), model_prefix=str(data / "tokenizer"), vocab_size=PIECES, minloglevel=2, **special
    )
    tokenizer = load_tokenizer(data / "tokenizer.model")
    tokens = np.concatenate([[*tokenizer.encode(line), tokenizer.eos_id] for line in text]).astype(np.uint16)
    splits = {}
    for split, records in (("train", 4), ("validation", 2)):
        path = data / f"{split}.arrayrecord"
        out = ArrayRecordWriter(str(path), "group_size:1")
        for record in tokens[: records * RECORD].reshape(records, RECORD):
            out.write(record.tobytes())
        out.close()
        shard = Shard(path.name, records, path.stat().st_size, file_crc32(path))
        splits[split] = Split(documents=0, tokens=records * RECORD, text_bytes=0, shards=(shard,))
    manifest = Manifest({}, tokenizer.identity, PIECES, RECORD, splits)
    (data / "manifest.json").write_text(manifest.to_json())
    main(search(folder, "--target-perplexity=1e9", "--output", str(folder / "budgets.json")))
    return folder
