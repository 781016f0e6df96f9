"""`python -m data.inspect`."""

import shutil
from pathlib import Path

import pytest

from data import Dataset, inspect


def test_it_shows_the_counts_and_three_windows(dataset: Dataset, capsys: pytest.CaptureFixture) -> None:
    inspect.main([str(dataset.path)])
    shown = capsys.readouterr().out
    train = dataset.manifest.splits["train"]
    assert dataset.manifest.fingerprint[:16] in shown
    assert f"{train.documents:,}" in shown and f"{train.tokens:,}" in shown
    assert [line.split(":")[0] for line in shown.splitlines() if line.startswith("train, record")] == [
        f"train, record {record:,}" for record in (0, train.records // 2, train.records - 1)
    ]


def test_verify_accepts_whole_shards_and_names_a_damaged_one(
    dataset_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("data.dataset._VERIFIED_BYTES", 0)  # As for a large dataset.
    copy = shutil.copytree(dataset_folder, tmp_path / "copy")
    inspect.main([str(copy), "--verify"])
    assert "all 4 shards have the right checksums" in capsys.readouterr().out
    shard = copy / "train-00001-of-00003.arrayrecord"
    content = bytearray(shard.read_bytes())
    content[100] ^= 1
    shard.write_bytes(content)
    with pytest.raises(SystemExit, match=f"{shard.name} does not have the checksum"):
        inspect.main([str(copy), "--verify"])
