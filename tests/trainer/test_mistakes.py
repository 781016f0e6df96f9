"""Each mistake is one clear error before any training step, and nothing is overwritten."""

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from data import DataError, prepare
from tests.support import ROOT
from trainer.errors import EXIT_PREEMPTED, ConfigError, ResumeError
from trainer.hosts.interrupt import Interrupt
from trainer.loop import train
from trainer.settings import read_settings


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("batch_size", 12, "batch_size=12 cannot be divided.*multiple of 8"),
        ("accumulation", 4, "accumulation=4 = 32 parts"),
        ("context_length", 48, "context_length=48 does not divide.*64"),
        ("model.vocab_size", 256, "300 token ids.*vocab_size=300"),
        ("mesh.data", 3, "data=3.*does not fit the 8 devices"),
        ("mesh.tensor", 2, "data=4, fsdp=2, context=1, tensor=2 does not fit the 8 devices"),
        ("mesh", {"data": 1, "fsdp": 1, "context": 8}, "8 splits the sequence into 16 chunks.*context_length=8"),
        ("mesh", {"data": 1, "tensor": 4}, "tensor=4 neither divides num_kv_heads=6 nor"),
        ("data.path", "nowhere", "no dataset in nowhere"),
    ],
)
def test_config_that_does_not_fit_is_refused(tiny_config, tmp_path, field, value, message):
    if field == "mesh":
        tiny_config.update_from_flattened_dict({"context_length": 8, "model.num_heads": 12, "model.num_kv_heads": 6})
        tiny_config.mesh.update(value)
    else:
        tiny_config.update_from_flattened_dict({field: value})
    tiny_config.faults.storage_retry_seconds = 0.0
    with pytest.raises((ConfigError, DataError), match=f"(?s){message}"):
        train(read_settings(tiny_config), str(tmp_path / "run"))
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("steps", 0, "steps must be positive"),
        ("model.remat", "some", "remat must be one of none, dots, block"),
        ("model.selection", "best", "'best' is not a valid Selection; choose one of paper, "),
        ("model.attention", "flash", "'flash' is unknown; choose 'reference', 'xla', 'pallas'"),
        ("model.num_kv_heads", 2, "num_kv_heads=2 must divide num_heads=1"),
    ],
)
def test_impossible_value_is_refused(tiny_config, field, value, message):
    tiny_config.update_from_flattened_dict({field: value})
    with pytest.raises(ConfigError, match=message):
        read_settings(tiny_config)


def _damaged(dataset_path: Path, folder: Path, damage: str) -> Path:
    copy = folder / "data"
    shutil.copytree(dataset_path, copy)
    shard = next(copy.glob("train-*.arrayrecord"))
    manifest = copy / "manifest.json"
    if damage == "missing shard":
        shard.unlink()
    elif damage == "truncated shard":
        shard.write_bytes(shard.read_bytes()[:-1000])
    elif damage == "manifest of other records":
        content = json.loads(manifest.read_text())
        content["splits"]["train"]["shards"][0]["records"] += 1
        manifest.write_text(json.dumps(content))
    elif damage == "vocabulary over the record type":
        content = json.loads(manifest.read_text())
        content["vocab_size"] = 70_000
        manifest.write_text(json.dumps(content))
    return copy


@pytest.mark.parametrize(
    "damage", ["missing shard", "truncated shard", "manifest of other records", "vocabulary over the record type"]
)
def test_damaged_dataset_is_refused(tiny_config, dataset_path, tmp_path, damage):
    tiny_config.data.path = str(_damaged(dataset_path, tmp_path, damage))
    tiny_config.faults.storage_retry_seconds = 0.0
    with pytest.raises(DataError):
        train(read_settings(tiny_config), str(tmp_path / "run"))
    assert not (tmp_path / "run").exists()


def test_workdir_that_cannot_be_made_is_refused(tiny_config, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(ResumeError, match="cannot be written to"):
        train(read_settings(tiny_config), str(tmp_path / "file" / "run"))


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--config=configs/demo.py", "--workdir=x", "--profile_steps=9:5"], "--profile_steps=9:5 must be"),
        (["--config=configs/demo.py"], "--workdir"),
        (["--config=configs/none.py", "--workdir=x"], "there is no file configs/none.py"),
        (["--config=configs/c4.py:d13", "--workdir=x"], "'d13' is not a size; choose one of d8"),
        (["--config=configs/demo.py", "--workdir=x", "--config.optimizer.pek_lr=1"], "did you mean peak_lr?"),
        (["--config=configs/demo.py", "--workdir=x", "--config.steps=many"], "--config.steps=many"),
        (["--config=configs/demo.py", "--workdir=x", "--wrokdir=y"], "wrokdir"),
    ],
)
def test_mistake_in_the_command_is_one_line_and_exit_code_2(flags, message):
    command = [sys.executable, "-m", "trainer", *flags]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert result.returncode == 2
    assert message in result.stderr
    assert result.stderr.startswith("error: ") and result.stderr.count("\n") == 1


@pytest.mark.slow
def test_a_run_goes_on_with_what_the_advice_after_running_out_of_memory_names(tiny_config, tmp_path, caplog):
    class InterruptedAtOnce(Interrupt):
        def can_save(self, within_seconds):
            self.requested = True

    tiny_config.steps = 4
    assert train(read_settings(tiny_config), str(tmp_path), InterruptedAtOnce()) == EXIT_PREEMPTED
    tiny_config.update_from_flattened_dict({"model.remat": "block", "accumulation": 2, "mesh.data": 2, "mesh.fsdp": 4})
    tiny_config.update_from_flattened_dict({"model.scan_layers": False, "model.attention": "reference"})
    caplog.set_level("INFO", "trainer")
    assert train(read_settings(tiny_config), str(tmp_path)) == 0
    assert re.search("starting at step [123] of 4", caplog.text)


def test_resuming_with_another_config_or_dataset_is_refused_by_name(tiny_config, dataset_path, tmp_path, monkeypatch):
    tiny_config.steps = 2
    monkeypatch.chdir(tmp_path)
    workdir = "run"
    assert train(read_settings(tiny_config), workdir) == 0
    tiny_config.optimizer.peak_lr = 0.1
    with pytest.raises(ResumeError, match=r"optimizer\.peak_lr: 0\.005 -> 0\.1"):
        train(read_settings(tiny_config), workdir)
    tiny_config.optimizer.peak_lr = 0.005
    tiny_config.log_every_steps = 7  # free to change
    assert train(read_settings(tiny_config), workdir) == 0
    other = tmp_path / "other"
    for name in ("train", "validation"):
        (tmp_path / f"{name}.txt").write_text("to be, or not to be, that is the question. " * 200)
    arguments = ["--source=text", "--input", str(tmp_path / "*.txt"), f"--output={other}", "--record-length=64"]
    prepare.main([*arguments, f"--tokenizer={dataset_path}/tokenizer.model", "--workers=1"])
    tiny_config.data.path = str(other)
    with pytest.raises(ResumeError, match=r"was trained on dataset .* give the same dataset"):
        train(read_settings(tiny_config), workdir)
