"""Checksums of a checkpoint's files: the seal that says what a complete one consists of.

Orbax loads a flipped bit of array data silently. So each complete checkpoint `40/` gets a file `40.checksums.json`
beside it: size and CRC-32 of every file, which name the file that changed.
"""

import concurrent.futures
import json
import zlib
from collections.abc import Iterable
from typing import NamedTuple

from etils import epath

from trainer.checkpoints.disk import retried, root_cause, write_file

SUFFIX = ".checksums.json"
_CHUNK_BYTES = 1 << 20
_THREADS = 8


class Checksum(NamedTuple):
    """What tells whether a file was changed."""

    size: int  # bytes
    crc32: int


class Seal(NamedTuple):
    """What a complete checkpoint consisted of when it was read back."""

    loss: float | None  # validation loss of its step, nats per token
    files: dict[str, Checksum]  # by path inside the checkpoint


class DamagedError(Exception):
    """What is wrong with a checkpoint, and with which file."""


def seal_path(folder: epath.Path) -> epath.Path:
    """Where the seal of the checkpoint in `folder` is."""
    return folder.parent / f"{folder.name}{SUFFIX}"


def list_files(folder: epath.Path) -> list[str]:
    """Paths of all files in `folder`, relative to it, sorted."""
    found = []
    for path in folder.iterdir():
        found += [f"{path.name}/{inner}" for inner in list_files(path)] if path.is_dir() else [path.name]
    return sorted(found)


def checksums(folder: epath.Path, names: Iterable[str]) -> dict[str, Checksum]:
    """Reads files of `folder`, several at a time.

    Raises:
      OSError: a file cannot be read.
    """
    names = list(names)
    with concurrent.futures.ThreadPoolExecutor(_THREADS) as pool:  # crc32 and reading let other threads run
        return dict(zip(names, pool.map(lambda name: retried(lambda: _checksum(folder / name)), names), strict=True))


def write_seal(folder: epath.Path, seal: Seal) -> None:
    """Writes the seal of `folder`, and reads it back.

    Raises:
      OSError: it could not be written.
      DamagedError: something else came back.
    """
    body = json.dumps({"loss": seal.loss, "files": {name: list(c) for name, c in seal.files.items()}}, sort_keys=True)
    path = seal_path(folder)
    retried(lambda: write_file(path, json.dumps({"crc32": zlib.crc32(body.encode()), "body": body})))
    if read_seal(folder) != seal:
        raise DamagedError(f"{path} reads back differently from what was written")


def read_seal(folder: epath.Path) -> Seal | None:
    """The seal of `folder`; None if it has none, because its save was interrupted after the checkpoint itself.

    Raises:
      DamagedError: it is damaged, or names files outside the checkpoint.
      OSError: storage does not give it.
    """
    path = seal_path(folder)
    try:
        text = retried(path.read_text)
        content = json.loads(text)
        if zlib.crc32(content["body"].encode()) != content["crc32"]:
            raise ValueError("its own checksum does not match")
        body = json.loads(content["body"])
        outside = [name for name in body["files"] if name.startswith("/") or {"", ".", ".."} & set(name.split("/"))]
        if outside:
            raise ValueError(f"{outside[0]!r} is no file of a checkpoint")
        return Seal(body["loss"], {name: Checksum(*checksum) for name, checksum in body["files"].items()})
    except FileNotFoundError:
        return None
    except (IsADirectoryError, ValueError, TypeError, KeyError, AttributeError) as error:
        raise DamagedError(f"{path.name} cannot be read: {root_cause(error)}") from error


def check_files(folder: epath.Path, seal: Seal, share: slice = slice(None)) -> None:
    """Compares the files of `folder` with its seal; `share` picks some of them.

    Raises:
      DamagedError: names the first file that is missing or changed. Files that the seal does not name are none of its
        business.
      OSError: storage does not give a file.
    """
    expected = dict(sorted(seal.files.items())[share])
    try:
        found = checksums(folder, expected)
    except FileNotFoundError as error:
        raise DamagedError(f"{error.filename} is missing") from error
    except (IsADirectoryError, NotADirectoryError) as error:
        raise DamagedError(f"{error.filename} is no file: {error.strerror}") from error
    for name, checksum in expected.items():
        if found[name].size != checksum.size:
            raise DamagedError(f"{folder / name} has {found[name].size} bytes instead of {checksum.size}")
        if found[name] != checksum:
            raise DamagedError(f"{folder / name} was changed: its CRC-32 is not {checksum.crc32:08x}")


def _checksum(path: epath.Path) -> Checksum:
    size, crc = 0, 0
    with path.open("rb") as stream:
        while chunk := stream.read(_CHUNK_BYTES):
            size, crc = size + len(chunk), zlib.crc32(chunk, crc)
    return Checksum(size, crc)
