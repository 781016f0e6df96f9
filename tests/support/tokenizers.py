"""Small tokenizers as pretrained models have them; needs the package tokenizers."""

import json
from pathlib import Path

from tests.support.datasets import SENTENCE

BYTE_LEVEL, SPACES = "byte_level", "spaces"  # like Llama 3's and Qwen's, and like Llama 2's
SPECIAL = ["<|begin|>", "<|end|>", "<|pad|>"]


def make_tokenizer(
    folder: Path, kind: str = BYTE_LEVEL, config: dict | None = None, content: dict | None = None
) -> Path:
    """Trains one into the folder; `config` changes its tokenizer_config.json, `content` its tokenizer.json."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers

    if kind == BYTE_LEVEL:
        tokenizer, names = Tokenizer(models.BPE()), SPECIAL
        tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        tokenizer.decoder = decoders.ByteLevel()
        alphabet = pre_tokenizers.ByteLevel.alphabet()
    else:
        tokenizer, names = Tokenizer(models.BPE(unk_token="<unk>", byte_fallback=True)), ["<s>", "</s>", "<unk>"]
        tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
        spaces = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
        tokenizer.decoder, alphabet = decoders.Sequence(spaces), []
    bytes_ = [] if kind == BYTE_LEVEL else [f"<0x{byte:02X}>" for byte in range(256)]
    trainer = trainers.BpeTrainer(
        vocab_size=340, special_tokens=[*names, *bytes_], initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator([SENTENCE] * 9, trainer)
    tokenizer.add_tokens([AddedToken("<think>", special=False, normalized=False)])
    tokenizer.enable_truncation(5)  # which some files say, and which is none of ours
    tokenizer.enable_padding(length=9)
    said = json.loads(tokenizer.to_str())
    said["added_tokens"] = [token for token in said["added_tokens"] if not token["content"].startswith("<0x")]
    (folder / "tokenizer.json").write_text(json.dumps(said | (content or {})))
    bos, eos, third = names
    special = {"bos_token": bos, "eos_token": {"__type": "AddedToken", "content": eos}, "pad_token": third}
    if kind == SPACES:
        special = {"bos_token": bos, "eos_token": eos, "unk_token": third, "pad_token": None}
    special |= {"tokenizer_class": "PreTrainedTokenizerFast"} | (config or {})
    (folder / "tokenizer_config.json").write_text(json.dumps(special))
    return folder
