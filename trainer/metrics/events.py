"""TensorBoard's event files: named so that readers take them in order, and mended where a bit has flipped.

A reader takes the files of a folder by name, which begins with a time, and leaves a file at the first record whose
checksum is wrong, with all that follows it there. So a new file is named later than all others, whatever the clock
says; and what is sound behind a damage is copied to a file of its own, which comes right after the damaged one. The
record that was hit is lost.
"""

import functools
import logging
import os
import re
import socket
import struct
import time
from pathlib import Path

import numpy as np
from etils import epath
from tensorboard.compat import tf
from tensorboard.compat.proto.event_pb2 import Event
from tensorboard.compat.tensorflow_stub.pywrap_tensorflow import CRC_TABLE, masked_crc32c
from tensorboard.summary.writer.event_file_writer import _AsyncWriter
from tensorboard.summary.writer.record_writer import RecordWriter

from trainer.checkpoints.disk import write_file

logger = logging.getLogger("trainer")
MENDED = ".mended"
_NAME = re.compile(r"events\.out\.tfevents\.(\d{10})\.")
_HEADER, _FOOTER = 12, 4  # bytes: length and its checksum; checksum of the data
_TABLE = np.array(CRC_TABLE, np.uint32)
_CHUNK = 1 << 16  # records


class EventFile:
    """A new event file in `folder`, which is made if there is none; written by a thread.

    Raises, as its methods do:
      OSError: storage refuses.
    """

    def __init__(self, folder: str) -> None:
        path = epath.Path(folder)
        path.mkdir(exist_ok=True)  # not its parents: a workdir that was moved is not made anew
        found = [int(match[1]) for entry in path.iterdir() if (match := _NAME.match(entry.name))]
        seconds = max(int(time.time()), max(found, default=0) + 1)
        name = f"events.out.tfevents.{seconds:010d}.{socket.gethostname()}.{os.getpid()}"
        self._writer = _AsyncWriter(RecordWriter(tf.io.gfile.GFile(f"{folder}/{name}", "wb")), 10, 120)
        self.add(_version())
        self.flush()

    def add(self, event: Event) -> None:
        """Leaves an event to the thread."""
        self._writer.write(event.SerializeToString())

    def flush(self) -> None:
        """Returns when all events are in the file."""
        self._writer.flush()

    def close(self) -> None:
        """Flushes, and ends the thread."""
        self._writer.close()


def mend(folder: str) -> None:
    """Copies what is sound behind a damage, for each file of a local folder that was not mended yet. Object storage
    keeps checksums of its own.

    Raises:
      OSError: a file cannot be read, or its copy not written.
    """
    if "://" in folder or not os.path.isdir(folder):
        return
    for path in sorted(Path(folder).iterdir()):
        mended = path.with_name(path.name + MENDED)
        if not _NAME.match(path.name) or not path.is_file() or mended.exists():
            continue
        content = path.read_bytes()
        hidden = _hidden(content)
        if hidden:
            aside = epath.Path(folder) / "mending"  # a name that readers leave alone
            write_file(aside, b"".join([_record(_version().SerializeToString()), *(content[s] for s in hidden)]))
            aside.rename(mended)
            logger.warning("%s is damaged; what it still holds of later steps is in %s", path, mended.name)


def _hidden(content: bytes) -> list[slice]:
    """Where the sound records behind the first damage are. What a killed process has left unfinished hides nothing."""
    records, position = [], 0
    while position < len(content):
        end = _end(content, position)
        if end is not None:
            records.append((position, end))
        position = end or position + 1
    if not records:
        return []
    starts, ends = np.array(records).T
    sound = _is_sound(content, starts, ends)
    follows = starts == np.concatenate([[0], ends[:-1]])
    damages = np.flatnonzero(~(sound & follows))
    if not len(damages):
        return []
    first = damages[0]
    return [
        slice(int(s), int(e)) for s, e in zip(starts[first:][sound[first:]], ends[first:][sound[first:]], strict=True)
    ]


def _end(content: bytes, position: int) -> int | None:
    """Where the record at `position` ends; None if there is none."""
    if content[position + 4 : position + 8] != bytes(4):  # far too long, and the common case of no record
        return None
    header = content[position : position + _HEADER]
    if len(header) < _HEADER or header[8:] != _header_checksum(header[:8]):
        return None
    end = position + _HEADER + int.from_bytes(header[:8], "little") + _FOOTER
    return end if end <= len(content) else None


@functools.lru_cache(maxsize=1 << 16)
def _header_checksum(length: bytes) -> bytes:
    return struct.pack("<I", masked_crc32c(length))


def _is_sound(content: bytes, starts: np.ndarray, ends: np.ndarray) -> np.ndarray:
    """Whether each record's data has its checksum: CRC-32C of many at a time, byte by byte."""
    data = np.frombuffer(content, np.uint8)
    sound = np.zeros(len(starts), bool)
    for first in range(0, len(starts), _CHUNK):
        chunk = slice(first, first + _CHUNK)
        begin, stop = starts[chunk] + _HEADER, ends[chunk] - _FOOTER
        crc = np.full(len(begin), 0xFFFFFFFF, np.uint32)
        for offset in range(int((stop - begin).max())):
            (rows,) = np.nonzero(begin + offset < stop)
            crc[rows] = _TABLE[(crc[rows] ^ data[begin[rows] + offset]) & 0xFF] ^ (crc[rows] >> 8)
        crc = ~crc
        masked = ((crc >> 15) | (crc << 17)) + np.uint32(0xA282EAD8)
        kept = np.stack([data[stop + byte] for byte in range(_FOOTER)], axis=1).copy().view("<u4")[:, 0]
        sound[chunk] = masked == kept
    return sound


def _record(data: bytes) -> bytes:
    length = struct.pack("<Q", len(data))
    return length + _header_checksum(length) + data + struct.pack("<I", masked_crc32c(data))


def _version() -> Event:
    return Event(wall_time=time.time(), file_version="brain.Event:2")
