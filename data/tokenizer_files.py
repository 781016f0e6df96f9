"""Reads a tokenizer of either kind: from a path, or from the folder of a dataset or of its preparation."""

from collections.abc import Callable
from pathlib import Path

from data.errors import DataError, UnreachableError
from data.files import read_file
from data.folder import Folder
from data.manifest import TOKENIZER_FILE, TOKENIZER_JSON
from data.tokenizer import SentencePieceTokenizer, Tokenizer
from data.tokenizer_json import CONFIG_FILE, JsonTokenizer

# By the file that says of which kind it is.
_KINDS: dict[str, Callable[[dict[str, bytes]], Tokenizer]] = {
    TOKENIZER_FILE: lambda files: SentencePieceTokenizer(files[TOKENIZER_FILE]),
    TOKENIZER_JSON: JsonTokenizer,
}
_BESIDE = {TOKENIZER_FILE: (), TOKENIZER_JSON: (CONFIG_FILE,)}


def load_tokenizer(path: str | Path) -> Tokenizer:
    """The tokenizer in a file, a SentencePiece model or a `tokenizer.json` with a `tokenizer_config.json` beside it, or
    in a folder that has one of these.

    Raises:
      UnreachableError: it cannot be read, or is not there.
      DataError: it is none that can be used.
    """
    path = Path(path)
    if path.is_dir():
        path = path / (TOKENIZER_JSON if (path / TOKENIZER_JSON).is_file() else TOKENIZER_FILE)
    kind = TOKENIZER_JSON if path.suffix == ".json" else TOKENIZER_FILE
    try:
        beside = {name: read_file(path.parent / name) for name in _BESIDE[kind]}
        return _KINDS[kind]({kind: read_file(path), **beside})
    except UnreachableError:
        raise
    except DataError as error:
        raise DataError(f"{path}: {error}") from None


def write_tokenizer(folder: Folder, tokenizer: Tokenizer) -> None:
    """Writes its files, the one by which `read_tokenizer` finds it last."""
    for name, content in reversed(tokenizer.files.items()):
        folder.write(name, content)


def read_tokenizer(folder: Folder) -> Tokenizer | None:
    """What `write_tokenizer` wrote; None if that is not all there."""
    for file, make in _KINDS.items():
        if folder.exists(file):
            return make({name: folder.read(name) for name in (file, *_BESIDE[file])})
    return None
