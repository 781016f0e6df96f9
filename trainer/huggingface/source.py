"""What is exported: a model, its tokenizer, and what is known of it."""

import dataclasses
import json
from pathlib import Path

from etils import epath

from data import DataError, load_tokenizer
from data.manifest import MANIFEST_FILE, TOKENIZER_FILE, TOKENIZER_JSON, Manifest
from data.tokenizer import SentencePieceTokenizer
from selective_attention import Transformer, import_safetensors
from trainer.checkpoints.folder import checkpoint_folder, read_metadata
from trainer.errors import ConfigError
from trainer.export import load_model
from trainer.huggingface.card import model_card, run_facts, title_of
from trainer.huggingface.tokenizer import tokenizer_files

# What a tokenizer and its use are there, as far as a folder has it.
TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "tokenizer.model",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template.jinja",
    "generation_config.json",
)


@dataclasses.dataclass(frozen=True)
class Source:
    """A model, and by name the files that go with it."""

    model: Transformer
    files: dict[str, bytes]


def read_source(checkpoint: str, tokenizer: str | None) -> Source:
    """What `checkpoint` holds: a run's workdir, or a folder of `trainer.export` or `trainer.import_hf`.

    Args:
      checkpoint: where.
      tokenizer: a dataset's folder, a SentencePiece model, or a folder with a tokenizer.json; None for the run's own.

    Raises:
      ConfigError: there is no tokenizer, or it is not the model's.
      ResumeError, ValueError, OSError: there is no model, or it cannot be read.
    """
    title = title_of(checkpoint)
    if (epath.Path(checkpoint) / "config.json").exists():
        model = import_safetensors(checkpoint)
        files = read_tokenizer(Path(tokenizer or checkpoint))
        return Source(model, {**files, "README.md": model_card(title, model.config, {}).encode()})
    model, settings, step = load_model(checkpoint)
    fingerprint = read_metadata(checkpoint_folder(checkpoint) / str(step))["dataset_fingerprint"]
    path = Path(tokenizer or settings.data.path)
    if tokenizer is None and _fingerprint(path) != fingerprint:
        raise ConfigError(f"{path} does not hold the run's dataset any more; give its tokenizer with --tokenizer")
    card = model_card(title, model.config, run_facts(checkpoint, settings, step, fingerprint))
    return Source(model, {**read_tokenizer(path), "README.md": card.encode()})


def read_tokenizer(path: Path) -> dict[str, bytes]:
    """The files of the tokenizer in a dataset's folder, a SentencePiece model, or a folder with a tokenizer.json.

    Raises:
      ConfigError: there is none, or one of another kind.
    """
    if (path / TOKENIZER_JSON).is_file():
        files = {name: (path / name).read_bytes() for name in TOKENIZER_FILES if (path / name).is_file()}
        return {**_generation_config(path), **files}
    file = path / TOKENIZER_FILE if path.is_dir() else path
    if not file.is_file():
        raise ConfigError(f"there is no tokenizer in {path}; give --tokenizer, a file or a folder")
    try:
        tokenizer = load_tokenizer(file)
    except DataError as error:
        raise ConfigError(str(error)) from error
    if not isinstance(tokenizer, SentencePieceTokenizer):
        return read_tokenizer(file.parent)
    return tokenizer_files(tokenizer)


def _generation_config(folder: Path) -> dict[str, bytes]:
    """With the ids that a dataset's documents have; none where the tokenizer is of a kind that is not known here."""
    try:
        tokenizer = load_tokenizer(folder)
    except DataError:
        return {}
    ids = {f"{name}_token_id": getattr(tokenizer, f"{name}_id") for name in ("pad", "bos", "eos")}
    return {"generation_config.json": (json.dumps(ids, indent=1) + "\n").encode()}


def _fingerprint(path: Path) -> str | None:
    try:
        return Manifest.from_json((path / MANIFEST_FILE).read_text()).fingerprint
    except (OSError, DataError):
        return None
