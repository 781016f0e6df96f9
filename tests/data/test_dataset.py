"""Opening a dataset: each kind of damage is one clear error."""

import dataclasses
import json
import os
import shutil
import threading
import zlib
from pathlib import Path

import pytest
from array_record.python import array_record_module

from data import DataError, Manifest, UnreachableError, files, open_dataset

SHARD = "train-00001-of-00003.arrayrecord"


@pytest.fixture
def copy(dataset_folder: Path, tmp_path: Path) -> Path:
    return shutil.copytree(dataset_folder, tmp_path / "copy")


def describe_shard(folder: Path, described: str = SHARD, **changes: object) -> None:
    """Makes a manifest, whole in itself, that says something else of a shard."""
    manifest = Manifest.from_json((folder / "manifest.json").read_text())
    train = manifest.splits["train"]
    shards = tuple(
        dataclasses.replace(shard, **changes) if shard.file == described else shard for shard in train.shards
    )
    splits = manifest.splits | {"train": dataclasses.replace(train, shards=shards)}
    (folder / "manifest.json").write_text(dataclasses.replace(manifest, splits=splits).to_json())


def rewrite_shard(folder: Path, lengths: list[int]) -> None:
    """Writes SHARD anew with records of the given lengths in bytes, and the manifest to match."""
    path = folder / SHARD
    writer = array_record_module.ArrayRecordWriter(str(path), "group_size:1,uncompressed")
    for length in lengths:
        writer.write(bytes(length))
    writer.close()
    content = path.read_bytes()
    describe_shard(folder, records=len(lengths), bytes=len(content), crc32=zlib.crc32(content))


def test_a_missing_folder(tmp_path: Path) -> None:
    with pytest.raises(
        UnreachableError, match=r"no dataset in .*nowhere \(.*manifest.json cannot be read: No such file"
    ):
        open_dataset(tmp_path / "nowhere")


def test_a_bucket_that_is_not_mounted() -> None:
    with pytest.raises(DataError, match="gs://bucket/c4 is not a folder on this machine; mount the bucket"):
        open_dataset("gs://bucket/c4")


def test_a_manifest_that_is_not_json(copy: Path) -> None:
    (copy / "manifest.json").write_text("{")
    with pytest.raises(DataError, match=r"manifest.json: not a dataset manifest"):
        open_dataset(copy)


def test_a_missing_shard(copy: Path) -> None:
    (copy / SHARD).unlink()
    with pytest.raises(UnreachableError, match=f"{SHARD} cannot be read: No such file"):
        open_dataset(copy)


def test_a_truncated_shard(copy: Path) -> None:
    content = (copy / SHARD).read_bytes()
    (copy / SHARD).write_bytes(content[:-100])
    with pytest.raises(DataError, match=f"{SHARD} has .* bytes, but the manifest says .*: it is truncated"):
        open_dataset(copy)


def test_a_shard_of_garbage(copy: Path) -> None:
    (copy / SHARD).write_bytes(bytes((copy / SHARD).stat().st_size))
    with pytest.raises(DataError, match=f"{SHARD} holds 0 readable records"):
        open_dataset(copy)


def test_a_damaged_byte(copy: Path) -> None:
    content = bytearray((copy / SHARD).read_bytes())
    content[100] ^= 1
    (copy / SHARD).write_bytes(content)
    with pytest.raises(DataError, match=f"{SHARD} does not have the checksum"):
        open_dataset(copy)


def test_a_truncated_record(copy: Path) -> None:
    rewrite_shard(copy, [128, 128, 126])
    with pytest.raises(DataError, match=f"{SHARD}, record 2 has 126 bytes, but 64 tokens of uint16 take 128"):
        open_dataset(copy)


def test_a_truncated_record_inside_a_shard_is_an_error_when_read(copy: Path) -> None:
    rewrite_shard(copy, [128, 126, 128])
    dataset = open_dataset(copy)
    first = dataset.manifest.splits["train"].shards[0].records
    with pytest.raises(DataError, match=f"{SHARD}, record 1 has 126 bytes"):
        dataset.read_records("train", [0, first + 1])


class Storage:
    """A file that is away until somebody has tried to read it so many times."""

    def __init__(self, path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.path, self.aside = path, path.with_name("aside")
        self.tries = 0
        path.rename(self.aside)
        monkeypatch.setattr(files.time, "sleep", self.comes_back)

    def comes_back(self, seconds: float) -> None:
        self.tries += 1
        if self.tries == 2:
            self.aside.rename(self.path)


@pytest.mark.parametrize("name", [SHARD, "manifest.json", "tokenizer.model"])
def test_a_file_that_comes_back_is_waited_for(copy: Path, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    storage = Storage(copy / name, monkeypatch)
    open_dataset(copy, retry_seconds=60)
    assert storage.tries == 2


def test_a_shard_that_comes_back_is_waited_for_when_records_are_read(
    copy: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    dataset = open_dataset(copy, retry_seconds=60)
    expected = dataset.read_records("train", [0])
    dataset._splits["train"]._readers.clear()
    storage = Storage(copy / "train-00000-of-00003.arrayrecord", monkeypatch)
    assert (dataset.read_records("train", [0]) == expected).all()
    assert storage.tries == 2


@pytest.mark.parametrize("name", [SHARD, "manifest.json", "tokenizer.model"])
def test_a_fifo_in_place_of_a_file_is_not_waited_for(copy: Path, name: str) -> None:
    (copy / name).unlink()
    os.mkfifo(copy / name)
    errors: list[Exception] = []

    def read() -> None:
        try:
            open_dataset(copy)
        except DataError as error:
            errors.append(error)

    reader = threading.Thread(target=read, daemon=True)
    reader.start()
    reader.join(60)
    assert errors and f"{name} is a fifo, not a file" in str(errors[0])


@pytest.mark.parametrize("name", ["../../x", "/etc/passwd", "folder/x", "..", ""])
def test_a_manifest_that_names_a_file_elsewhere(copy: Path, name: str) -> None:
    describe_shard(copy, file=name)
    with pytest.raises(DataError, match="is no plain file name"):
        open_dataset(copy)


def test_two_shards_whose_names_are_exchanged_in_the_manifest(copy: Path) -> None:
    manifest = Manifest.from_json((copy / "manifest.json").read_text())
    train = manifest.splits["train"]
    first, second, *others = train.shards
    swapped = (dataclasses.replace(first, file=second.file), dataclasses.replace(second, file=first.file), *others)
    changed = dataclasses.replace(
        manifest, splits=manifest.splits | {"train": dataclasses.replace(train, shards=swapped)}
    )
    assert changed.fingerprint == manifest.fingerprint
    (copy / "manifest.json").write_text(changed.to_json())
    with pytest.raises(DataError, match=r"train-00000\S* stands behind train-00001.*out of order"):
        open_dataset(copy)


def test_two_shards_of_one_size_that_are_exchanged_in_the_folder(copy: Path) -> None:
    rewrite_shard(copy, [128] * 3)
    other = copy / SHARD.replace("00001", "00002")
    writer = array_record_module.ArrayRecordWriter(str(other), "group_size:1,uncompressed")
    for number in range(3):
        writer.write(bytes([number]) * 128)
    writer.close()
    described = {"records": 3, "bytes": other.stat().st_size, "crc32": zlib.crc32(other.read_bytes())}
    describe_shard(copy, other.name, **described)
    assert other.stat().st_size == (copy / SHARD).stat().st_size
    open_dataset(copy)
    other.rename(copy / "aside")
    (copy / SHARD).rename(other)
    (copy / "aside").rename(copy / SHARD)
    with pytest.raises(DataError, match=f"{SHARD} does not have the checksum"):
        open_dataset(copy)


def test_a_manifest_with_other_record_counts(copy: Path) -> None:
    describe_shard(copy, records=5)
    with pytest.raises(DataError, match=f"{SHARD} holds .* readable records, but the manifest says 5"):
        open_dataset(copy)


def test_a_manifest_changed_by_hand(copy: Path) -> None:
    content = json.loads((copy / "manifest.json").read_text())
    content["record_length"] = 32
    (copy / "manifest.json").write_text(json.dumps(content))
    with pytest.raises(DataError, match="fingerprint does not match its contents"):
        open_dataset(copy)


def test_a_vocabulary_over_the_record_type(copy: Path) -> None:
    content = json.loads((copy / "manifest.json").read_text())
    content["vocab_size"] = 70_000
    (copy / "manifest.json").write_text(json.dumps(content))
    with pytest.raises(DataError, match="vocab_size 70000 needs records of <u4, but record_dtype is <u2"):
        open_dataset(copy)


def test_another_tokenizer(copy: Path) -> None:
    from data.tokenizer import train_tokenizer

    (copy / "tokenizer.model").write_bytes(train_tokenizer(["some other text than that"] * 9, 275).model)
    with pytest.raises(DataError, match=r"is not the tokenizer that manifest\.json describes"):
        open_dataset(copy)


def test_a_manifest_of_a_future_format(copy: Path) -> None:
    content = json.loads((copy / "manifest.json").read_text())
    content["format_version"] = 99
    (copy / "manifest.json").write_text(json.dumps(content))
    with pytest.raises(DataError, match="format version 99, not this release's 1"):
        open_dataset(copy)
