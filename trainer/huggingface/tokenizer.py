"""A SentencePiece model of `data.prepare` as `tokenizer.json`, which the package tokenizers reads.

It gives the same ids, but for exact ties: of two ways to cut a text that are equally likely, such as a run of spaces,
the two programs may take different ones. BOS comes first, as in training. Text that reads like a special piece, such
as `<s>` or `<0x41>`, stays text: it is cut after its first character before pieces are looked for.
"""

import json
import re

import sentencepiece

from data.tokenizer import SPACE_SYMBOL, SentencePieceTokenizer
from trainer.errors import ConfigError

_PROBE = "  \ufb01t \uff21\u3000 b "  # which any normalisation but `identity` changes


def tokenizer_files(tokenizer: SentencePieceTokenizer) -> dict[str, bytes]:
    """The contents of `tokenizer.json`, `tokenizer_config.json` and `generation_config.json`, which has its ids.

    Raises:
      ConfigError: the tokenizer is of another kind than `data.prepare` trains.
    """
    processor = sentencepiece.SentencePieceProcessor(model_proto=tokenizer.model)
    ids = range(tokenizer.vocab_size)
    special = {
        "pad_token": tokenizer.pad_id,
        "unk_token": tokenizer.unk_id,
        "bos_token": tokenizer.bos_id,
        "eos_token": tokenizer.eos_id,
    }

    def never(token: int) -> bool:
        return processor.is_control(token) or processor.is_unknown(token) or processor.is_byte(token)

    learned = [processor.get_score(token) for token in ids if not never(token)]
    _check_kind(processor, learned)
    least = min(learned)  # below which both programs put a character that has no piece
    scores = [least if never(token) else processor.get_score(token) for token in ids]
    pieces = [processor.id_to_piece(token) for token in ids]
    bos = pieces[tokenizer.bos_id]
    with_bos = [{"SpecialToken": {"id": bos, "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}]
    content = {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [_added(token, pieces[token]) for token in sorted(special.values())],
        "normalizer": {"type": "Replace", "pattern": {"String": " "}, "content": SPACE_SYMBOL},
        "pre_tokenizer": {
            "type": "Split",
            "pattern": {"Regex": _beginnings([pieces[token] for token in ids if never(token)])},
            "behavior": "MergedWithPrevious",
            "invert": False,
        },
        "post_processor": {
            "type": "TemplateProcessing",
            "single": with_bos,
            "pair": [*with_bos, {"Sequence": {"id": "B", "type_id": 1}}],
            "special_tokens": {bos: {"id": bos, "ids": [tokenizer.bos_id], "tokens": [bos]}},
        },
        "decoder": {
            "type": "Sequence",
            "decoders": [
                {"type": "Replace", "pattern": {"String": SPACE_SYMBOL}, "content": " "},
                {"type": "ByteFallback"},
                {"type": "Fuse"},
            ],
        },
        "model": {
            "type": "Unigram",
            "unk_id": tokenizer.unk_id,
            "vocab": list(zip(pieces, scores, strict=True)),
            "byte_fallback": True,
        },
    }
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        **{name: pieces[token] for name, token in special.items()},
        "split_special_tokens": True,  # "<s>" in a text is text
        "clean_up_tokenization_spaces": False,
        "padding_side": "left",
        "model_input_names": ["input_ids", "attention_mask"],
    }
    generation = {f"{name}_id": token for name, token in special.items() if name != "unk_token"}
    contents = {"tokenizer.json": content, "tokenizer_config.json": config, "generation_config.json": generation}
    return {name: (json.dumps(x, ensure_ascii=False, indent=1) + "\n").encode() for name, x in contents.items()}


def _beginnings(pieces: list[str]) -> str:
    """A pattern of the first character of text that reads like one of the pieces."""
    return "|".join(f"{re.escape(piece[0])}(?={re.escape(piece[1:])})" for piece in pieces)


def _check_kind(processor: sentencepiece.SentencePieceProcessor, scores: list[float]) -> None:
    if all(score == -rank for rank, score in enumerate(scores)):
        kind = "is a BPE model"
    elif not any(processor.is_byte(token) for token in range(processor.vocab_size())):
        kind = "has no byte fallback"
    elif processor.normalize(_PROBE) != _PROBE.replace(" ", SPACE_SYMBOL):
        kind = "changes the text before it cuts it"
    else:
        return
    raise ConfigError(
        f"the tokenizer {kind}; only unigram models with byte fallback and identity normalisation, as "
        "`python -m data.prepare` trains, become a tokenizer.json here. Convert it yourself, and give its folder with "
        "--tokenizer"
    )


def _added(token: int, piece: str) -> dict[str, object]:
    places = {"single_word": False, "lstrip": False, "rstrip": False}
    return {"id": token, "content": piece, **places, "normalized": False, "special": True}
