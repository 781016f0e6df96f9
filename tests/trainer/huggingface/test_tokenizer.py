"""`tokenizer.json` gives the ids of the SentencePiece model that it was made from."""

import io
from pathlib import Path

import pytest
import sentencepiece

from data import load_tokenizer
from data.tokenizer import SentencePieceTokenizer
from tests.support.datasets import SENTENCE
from trainer.errors import ConfigError
from trainer.huggingface.tokenizer import tokenizer_files

transformers = pytest.importorskip("transformers")

TEXTS = [
    SENTENCE,
    f" {SENTENCE}\n\t{SENTENCE}  A Z0\n",
    "naïve 東京 \U0001f600 \x07 \u3000 ﬁ",
    "<s> </s> <unk> <pad> <0x41> a<s>b <0x0A>",
    "",
]


@pytest.fixture(scope="module")
def pair(dataset_path: Path, tmp_path_factory: pytest.TempPathFactory):
    """The tokenizer here and there."""
    folder, ours = tmp_path_factory.mktemp("tokenizer"), load_tokenizer(dataset_path / "tokenizer.model")
    for name, content in tokenizer_files(ours).items():
        (folder / name).write_bytes(content)
    return ours, transformers.AutoTokenizer.from_pretrained(folder)


def test_data_reads_it_as_the_same_tokenizer(pair, tmp_path):
    ours = pair[0]
    for name, content in tokenizer_files(ours).items():
        (tmp_path / name).write_bytes(content)
    again, ids = load_tokenizer(tmp_path), range(ours.vocab_size)
    assert [again.encode(text) for text in TEXTS] == [ours.encode(text) for text in TEXTS]
    assert [again.piece(token) for token in ids] == [ours.piece(token) for token in ids]
    assert again.piece_bytes().tolist() == ours.piece_bytes().tolist()


@pytest.mark.parametrize("text", TEXTS)
def test_ids_are_the_same_after_bos_and_give_the_text_back(pair, text):
    ours, theirs = pair
    ids = theirs(text)["input_ids"]
    assert ids == [ours.bos_id, *ours.encode(text)]
    assert theirs.decode(ids, skip_special_tokens=True) == text


def test_special_tokens_are_those_of_the_model_and_padding_is_left(pair):
    ours, theirs = pair
    found = theirs.pad_token_id, theirs.unk_token_id, theirs.bos_token_id, theirs.eos_token_id
    assert found == (ours.pad_id, ours.unk_id, ours.bos_id, ours.eos_id)
    batch = theirs([SENTENCE, "the"], padding=True)
    assert batch["input_ids"][1][0] == ours.pad_id and batch["attention_mask"][1][0] == 0
    assert len(theirs) == ours.vocab_size


@pytest.mark.parametrize(
    ("options", "why"),
    [
        ({"model_type": "bpe"}, "is a BPE model"),
        ({"byte_fallback": False}, "has no byte fallback"),
        ({"normalization_rule_name": "nmt_nfkc"}, "changes the text"),
        ({"add_dummy_prefix": True}, "changes the text"),
        ({"remove_extra_whitespaces": True}, "changes the text"),
    ],
)
def test_tokenizers_of_other_kinds_are_refused(options, why):
    model = io.BytesIO()
    kind = {"model_type": "unigram", "byte_fallback": True, "normalization_rule_name": "identity"}
    spaces = {"add_dummy_prefix": False, "remove_extra_whitespaces": False}
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter([SENTENCE, "1 2 3"] * 20),
        model_writer=model,
        vocab_size=290 if options.get("byte_fallback", True) else 34,
        pad_id=0,
        unk_id=1,
        bos_id=2,
        eos_id=3,
        minloglevel=2,
        **{**kind, **spaces, **options},
    )
    with pytest.raises(ConfigError, match=why):
        tokenizer_files(SentencePieceTokenizer(model.getvalue()))
