"""Opening a prepared dataset: the manifest is checked against the shards before anything is trained on them."""

import bisect
import itertools
import resource
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
from array_record.python import array_record_module

from data.errors import DataError, UnreachableError
from data.files import file_size, read_file, retried
from data.manifest import MANIFEST_FILE, Manifest, Shard, file_crc32
from data.tokenizer import Tokenizer
from data.tokenizer_files import load_tokenizer

# Random access: no read-ahead inside a shard, and no threads but our own.
_READER_OPTIONS = "readahead_buffer_size:0,max_parallelism:0"
# A network mount answers many requests at once much faster than one after the other.
_THREADS = 32
_SPARE_FILES = 256
_VERIFIED_BYTES = 256 << 20


class Dataset:
    """A prepared dataset in a local (or mounted) folder; made by `open_dataset`. Safe to read from several threads."""

    def __init__(self, path: Path, manifest: Manifest, retry_seconds: float):
        self.path = path
        self.manifest = manifest
        self._retry_seconds = retry_seconds
        self._tokenizer: Tokenizer | None = None
        self._splits = {
            name: _SplitReader(path, split.shards, manifest.record_length, manifest.record_dtype)
            for name, split in manifest.splits.items()
        }

    def tokenizer(self) -> Tokenizer:
        if self._tokenizer is None:
            self._tokenizer = load_tokenizer(self.path / self.manifest.tokenizer.file)
        return self._tokenizer

    def read_records(self, split: str, records: Sequence[int]) -> np.ndarray:
        """Token ids `[len(records), record_length]`, in the manifest's `record_dtype`.

        Raises:
          UnreachableError: storage did not give a shard for as long as `open_dataset` was told.
          DataError: the split is unknown; a shard is damaged, or a record has another length.
        """
        reader = self._splits[self.check_split(split)]
        return retried(lambda: reader.read(records), self._retry_seconds)

    def check_shards(self) -> None:
        """Checks that each shard is what the manifest says, as far as its size and its last record tell.

        Raises:
          DataError: a shard is not.
        """
        with ThreadPoolExecutor(_THREADS) as pool:
            for reader in self._splits.values():
                list(pool.map(reader.check, range(len(reader.shards))))

    def verify(self, shard: Shard, progress: Callable[[int], object] = lambda count: None) -> None:
        """Reads all of a shard, telling `progress` the bytes of each read.

        Raises:
          DataError: its checksum is wrong, or it cannot be read.
        """
        try:
            crc32 = file_crc32(self.path / shard.file, progress)
        except OSError as error:
            raise UnreachableError(f"shard {self.path / shard.file} cannot be read: {error.strerror}") from None
        if crc32 != shard.crc32:
            raise DataError(
                f"shard {self.path / shard.file} does not have the checksum that the manifest says: it is damaged; "
                "prepare again or copy it anew"
            )

    def check_split(self, split: str) -> str:
        """`split` itself, or a DataError that names those there are."""
        if split not in self.manifest.splits:
            raise DataError(f"{self.path} has no split {split!r}; it has {', '.join(self.manifest.splits)}")
        return split


def open_dataset(path: str | Path, retry_seconds: float = 0.0) -> Dataset:
    """Opens the dataset in the folder `path`, after checking the manifest against what is there.

    While storage does not give a file it is tried again for `retry_seconds`, here and whenever records are read.

    Checked: every shard's existence, size in bytes, number of records and the length of its last record; the vocabulary
    against the record type; the tokenizer's hash; and the checksums, if the shards have no more than 256 MiB together.
    For larger ones that means reading for long: `python -m data.inspect --verify` does it, and a damaged record is an
    error when it is read.

    Raises:
      UnreachableError: a file cannot be read, or is not there.
      DataError: something is not what the manifest says, or `path` is no folder on this machine.
    """
    if "://" in str(path):
        raise DataError(f"{path} is not a folder on this machine; mount the bucket, see docs/data.md")
    return retried(lambda: _open(Path(path), retry_seconds), retry_seconds)


def _open(path: Path, retry_seconds: float) -> Dataset:
    try:
        text = read_file(path / MANIFEST_FILE).decode(errors="replace")
    except UnreachableError as error:
        raise UnreachableError(
            f"no dataset in {path} ({error}); mount it, or make one with `python -m data.prepare`"
        ) from None
    try:
        manifest = Manifest.from_json(text)
    except DataError as error:
        raise DataError(f"{path / MANIFEST_FILE}: {error}") from None
    dataset = Dataset(path, manifest, retry_seconds)
    tokenizer = dataset.tokenizer()
    if tokenizer.identity != manifest.tokenizer or tokenizer.vocab_size != manifest.vocab_size:
        raise DataError(
            f"{path / manifest.tokenizer.file} is not the tokenizer that {MANIFEST_FILE} describes; prepare again"
        )
    _allow_open_files(len(manifest.shards))
    dataset.check_shards()
    if sum(shard.bytes for shard in manifest.shards) <= _VERIFIED_BYTES:
        for shard in manifest.shards:
            dataset.verify(shard)
    return dataset


def _allow_open_files(shards: int) -> None:
    """A shuffled order touches every shard all the time, so each stays open; many systems allow 1,024 files."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    needed = shards + _SPARE_FILES
    if soft == resource.RLIM_INFINITY or soft >= needed:
        return
    if hard != resource.RLIM_INFINITY and hard < needed:
        raise DataError(
            f"{shards} shards need {needed} open files, but the limit is {hard}; raise it with `ulimit -Hn`"
        )
    resource.setrlimit(resource.RLIMIT_NOFILE, (needed, hard))


class _SplitReader:
    """Random access to the records of one split, one reader per shard, opened when first needed."""

    def __init__(self, path: Path, shards: Sequence[Shard], record_length: int, record_dtype: str):
        self.shards = shards
        self._path = path
        self._record_length = record_length
        self._dtype = np.dtype(record_dtype)
        self._ends = list(itertools.accumulate(shard.records for shard in shards))
        self._readers: dict[int, array_record_module.ArrayRecordReader] = {}
        self._lock = threading.Lock()
        self._pool = ThreadPoolExecutor(_THREADS, thread_name_prefix="records")

    def check(self, index: int) -> None:
        shard = self.shards[index]
        path = self._path / shard.file
        try:
            size = file_size(path)
        except UnreachableError as error:
            raise UnreachableError(f"shard {error}; prepare again or copy it anew") from None
        if size != shard.bytes:
            raise DataError(
                f"shard {path} has {size:,} bytes, but the manifest says {shard.bytes:,}: it is "
                f"{'truncated' if size < shard.bytes else 'another file'}; prepare again or copy it anew"
            )
        self._read_shard(index, [shard.records - 1])

    def read(self, records: Sequence[int]) -> np.ndarray:
        rows_by_shard: dict[int, list[int]] = {}
        for row, record in enumerate(records):
            rows_by_shard.setdefault(bisect.bisect_right(self._ends, record), []).append(row)
        tokens_RL = np.empty((len(records), self._record_length), self._dtype)

        def read_shards(items: list[tuple[int, list[int]]]) -> None:
            for index, rows in items:
                first = self._ends[index] - self.shards[index].records
                found = self._read_shard(index, [int(records[row]) - first for row in rows])
                for row, record in zip(rows, found, strict=True):
                    tokens_RL[row] = np.frombuffer(record, self._dtype)

        items = list(rows_by_shard.items())
        for _ in self._pool.map(read_shards, [items[thread::_THREADS] for thread in range(min(_THREADS, len(items)))]):
            pass
        return tokens_RL

    def _read_shard(self, index: int, positions: list[int]) -> list[bytes]:
        try:
            records = self._reader(index).read(positions)
        except (RuntimeError, IndexError) as error:
            with self._lock:
                self._readers.pop(index, None)  # it may hold a file that is no more
            raise self._judged(index, f"cannot be read: {error}") from None
        size = self._record_length * self._dtype.itemsize
        for position, record in zip(positions, records, strict=True):
            if len(record) != size:
                raise DataError(
                    f"shard {self._path / self.shards[index].file}, record {position} has {len(record)} bytes, but "
                    f"{self._record_length} tokens of {self._dtype} take {size}; prepare again or copy it anew"
                )
        return records

    def _reader(self, index: int) -> array_record_module.ArrayRecordReader:
        with self._lock:
            if index in self._readers:
                return self._readers[index]
        shard = self.shards[index]
        reader = array_record_module.ArrayRecordReader(str(self._path / shard.file), options=_READER_OPTIONS)
        # A missing or foreign file is no error to ArrayRecord, only one of zero records.
        if not reader.ok() or reader.num_records() != shard.records:
            found = reader.num_records()
            message = f"holds {found:,} readable records, but the manifest says {shard.records:,}"
            raise self._judged(index, message) if not found else self._damaged(index, message)
        with self._lock:
            return self._readers.setdefault(index, reader)

    def _judged(self, index: int, message: str) -> DataError:
        """The error for a shard that could not be read: it is damaged, or storage refused what is whole."""
        path = self._path / self.shards[index].file
        try:
            file_size(path)
            if file_crc32(path) != self.shards[index].crc32:
                return self._damaged(index, message)
        except OSError as error:
            message = f"cannot be read: {error.strerror}"
        except UnreachableError as error:
            return error
        return UnreachableError(f"shard {path} {message}")

    def _damaged(self, index: int, message: str) -> DataError:
        return DataError(f"shard {self._path / self.shards[index].file} {message}; prepare again or copy it anew")
