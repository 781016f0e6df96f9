"""Every kind of damage to the newest checkpoint, on real files: what is found, what is said, what is used instead."""

import errno
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import zlib
from collections.abc import Callable
from pathlib import Path

import jax
import pytest
from orbax.checkpoint import v1 as ocp

from configs import demo
from data import files
from tests.support import ROOT
from trainer.checkpoints import manager
from trainer.checkpoints.manager import Checkpoints
from trainer.errors import ResumeError, StorageError
from trainer.export import load_model
from trainer.mesh import make_mesh
from trainer.settings import Settings, changed, read_settings
from trainer.state import abstract_state, init_state

STEPS = (10, 20, 30)


@pytest.fixture(scope="module")
def config() -> Settings:
    config = demo.get_config()
    config.update_from_flattened_dict({"context_length": 32, "model.width": 1, "model.vocab_size": 304})
    return read_settings(config)


@pytest.fixture(scope="module")
def abstract(config: Settings):
    return abstract_state(config, make_mesh(config.mesh))


@pytest.fixture(scope="module")
def saved(config: Settings, abstract, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A workdir with checkpoints of STEPS."""
    workdir = tmp_path_factory.mktemp("saved")
    shardings = jax.tree.map(lambda x: x.sharding, abstract)
    with jax.set_mesh(make_mesh(config.mesh)):
        state = jax.jit(lambda: init_state(config), out_shardings=shardings)()
    checkpoints = Checkpoints(str(workdir), config, "fingerprint")
    for step in STEPS:
        checkpoints.save(step, state._replace(step=state.step + step), {"step": step}, None)
        checkpoints.wait()
        assert checkpoints.poll() == "idle", checkpoints.failure
    checkpoints.close()
    return workdir


@pytest.fixture
def folder(saved: Path, tmp_path: Path) -> Path:
    shutil.copytree(saved, tmp_path, dirs_exist_ok=True)
    return tmp_path / "checkpoints"


def restored_step(folder: Path, config: Settings, abstract) -> int:
    checkpoints = Checkpoints(str(folder.parent), config, "fingerprint")
    try:
        restored = checkpoints.restore(abstract)
        assert restored is not None
        assert int(restored.state.step) == restored.step == restored.notes["step"] == checkpoints.saved_step
        return restored.step
    finally:
        checkpoints.close()


def data_file(checkpoint: Path) -> Path:
    """The largest file of arrays."""
    return max(checkpoint.glob("state/ocdbt.process_*/d/*"), key=lambda path: path.stat().st_size)


def flip_byte(path: Path, position: int) -> None:
    content = bytearray(path.read_bytes())
    content[position] ^= 0x10
    path.write_bytes(content)


def truncate_data(checkpoint: Path) -> None:
    path = data_file(checkpoint)
    os.truncate(path, path.stat().st_size // 2)


def flip_a_byte_of_data(checkpoint: Path) -> None:
    flip_byte(data_file(checkpoint), data_file(checkpoint).stat().st_size // 2)


def delete_data(checkpoint: Path) -> None:
    data_file(checkpoint).unlink()


def empty_data(checkpoint: Path) -> None:
    data_file(checkpoint).write_bytes(b"")


def empty_directory(checkpoint: Path) -> None:
    shutil.rmtree(checkpoint)
    checkpoint.mkdir()


def damage_metadata(checkpoint: Path) -> None:
    flip_byte(checkpoint / "state" / "_METADATA", 40)


def delete_run_metadata(checkpoint: Path) -> None:
    (checkpoint / "_CHECKPOINT_METADATA").unlink()


def damage_checksums(checkpoint: Path) -> None:
    flip_byte(checkpoint.parent / f"{checkpoint.name}.checksums.json", 60)


def seal_a_file_elsewhere(checkpoint: Path) -> None:
    """As the seal's own checksum would have it."""
    body = json.dumps({"loss": None, "files": {"../../../etc/passwd": [0, 0]}})
    seal = json.dumps({"crc32": zlib.crc32(body.encode()), "body": body})
    (checkpoint.parent / f"{checkpoint.name}.checksums.json").write_text(seal)


def replace_by_a_file(checkpoint: Path) -> None:
    shutil.rmtree(checkpoint)
    checkpoint.write_text("not a checkpoint")


def exchange_arrays_of_an_unsealed_one(checkpoint: Path) -> None:
    """Those of another step, whole and readable, under this one's metadata: only the digest tells them apart."""
    (checkpoint.parent / f"{checkpoint.name}.checksums.json").unlink()
    shutil.rmtree(checkpoint / "state")
    shutil.copytree(checkpoint.parent / "20" / "state", checkpoint / "state")


DAMAGES: list[tuple[Callable[[Path], None], str]] = [
    (truncate_data, r"30/state/ocdbt.process_0/d/\w+ has \d+ bytes instead of \d+"),
    (flip_a_byte_of_data, r"30/state/ocdbt.process_0/d/\w+ was changed: its CRC-32 is not"),
    (delete_data, r"30/state/ocdbt.process_0/d/\w+ is missing"),
    (empty_data, r"30/state/ocdbt.process_0/d/\w+ has 0 bytes instead of \d+"),
    (empty_directory, r"30/\S+ is missing"),
    (damage_metadata, r"30/state/_METADATA was changed"),
    (delete_run_metadata, r"30/_CHECKPOINT_METADATA is missing"),
    (damage_checksums, r"30.checksums.json cannot be read"),
    (seal_a_file_elsewhere, r"'../../../etc/passwd' is no file of a checkpoint"),
    (replace_by_a_file, r"checkpoints/30 is a file"),
    (exchange_arrays_of_an_unsealed_one, r"the array \.step is not the one that was saved"),
]


@pytest.mark.parametrize(("damage", "message"), DAMAGES, ids=[damage.__name__ for damage, _ in DAMAGES])
def test_damaged_checkpoint_is_named_and_set_aside_for_the_one_before(
    folder, config, abstract, caplog, damage, message
):
    damage(folder / "30")
    before = sorted(path.relative_to(folder / "30") for path in (folder / "30").rglob("*"))
    assert restored_step(folder, config, abstract) == 20
    assert re.search(rf"checkpoint 30 is damaged, set aside as 30.damaged: .*{message}", caplog.text), caplog.text
    assert not (folder / "30").exists()
    assert sorted(path.relative_to(folder / "30.damaged") for path in (folder / "30.damaged").rglob("*")) == before


def test_empty_directory_without_checksums_is_set_aside(folder, config, abstract, caplog):
    (folder / "40").mkdir()
    assert restored_step(folder, config, abstract) == 30
    assert re.search(r"40 is damaged.*checkpoints/40 is empty", caplog.text)


def foreign_file(folder: Path) -> None:
    (folder / "notes.txt").write_text("mine")
    (folder / "30" / "notes.txt").write_text("mine")
    (folder / "2.bad").mkdir()


def temporary_directory(folder: Path) -> None:
    shutil.copytree(folder / "30", folder / "40.orbax-checkpoint-tmp")
    delete_data(folder / "40.orbax-checkpoint-tmp")


def missing_checksums(folder: Path) -> None:
    (folder / "30.checksums.json").unlink()


@pytest.mark.parametrize("change", [foreign_file, temporary_directory, missing_checksums])
def test_what_does_not_touch_the_arrays_costs_no_checkpoint(folder, config, abstract, change):
    change(folder)
    assert restored_step(folder, config, abstract) == 30
    assert not list(folder.glob("*.damaged")) and not list(folder.glob("*tmp*"))
    assert (folder / "30.checksums.json").exists()
    assert change is not foreign_file or (folder / "notes.txt").exists()


def test_several_damaged_checkpoints_in_a_row_are_passed_over(folder, config, abstract):
    truncate_data(folder / "30")
    flip_a_byte_of_data(folder / "20")
    assert restored_step(folder, config, abstract) == 10


def test_without_a_whole_checkpoint_nothing_starts_from_zero_however_often_it_is_tried(folder, config, abstract):
    truncate_data(folder / "30")
    flip_a_byte_of_data(folder / "20")
    delete_data(folder / "10")
    for _ in range(2):
        with pytest.raises(ResumeError, match=r"(?s)whole \(30: .*instead of.*20: .*changed.*10: .*missing.*--workdir"):
            restored_step(folder, config, abstract)


def test_set_aside_checkpoints_alone_do_not_start_from_zero(folder, config, abstract):
    for step in STEPS:
        (folder / str(step)).rename(folder / f"{step}.damaged")
    with pytest.raises(ResumeError, match=r"whole.*10\.damaged"):
        restored_step(folder, config, abstract)


def test_a_newest_checkpoint_that_is_gone_is_named_once(folder, config, abstract, caplog):
    shutil.rmtree(folder / "30")
    for _ in range(2):
        assert restored_step(folder, config, abstract) == 20
    assert caplog.text.count("checkpoint 30, the newest there was, is gone; going back to step 20") == 1


def test_an_older_checkpoint_that_is_gone_is_not_missed(folder, config, abstract, caplog):
    shutil.rmtree(folder / "20")
    assert restored_step(folder, config, abstract) == 30
    assert not caplog.text


@pytest.mark.parametrize("lost", ["the steps", "the steps and their seals", "the folder"])
def test_a_run_whose_checkpoints_are_gone_does_not_start_from_zero(folder, config, abstract, lost):
    for path in list(folder.iterdir()):
        if path.is_dir():
            shutil.rmtree(path)
        elif lost == "the steps and their seals":
            path.unlink()
    if lost == "the folder":
        shutil.rmtree(folder)
    for _ in range(2):
        with pytest.raises(ResumeError, match=r"are gone, up to that of step 30; bring them back, or start anew"):
            restored_step(folder, config, abstract)


def test_the_step_of_a_damaged_checkpoint_can_be_saved_again(folder, config, abstract):
    flip_a_byte_of_data(folder / "30")
    checkpoints = Checkpoints(str(folder.parent), config, "fingerprint")
    state = checkpoints.restore(abstract).state
    checkpoints.save(30, state._replace(step=state.step + 10), {"step": 30}, None)
    checkpoints.close()
    assert checkpoints.failure is None
    assert restored_step(folder, config, abstract) == 30


def test_a_reader_passes_over_damage_and_changes_nothing(folder, config, caplog):
    flip_a_byte_of_data(folder / "30")
    before = sorted(folder.rglob("*"))
    assert load_model(str(folder.parent))[2] == 20
    assert "checkpoint 30 is damaged and was passed over" in caplog.text
    assert sorted(folder.rglob("*")) == before


@pytest.mark.parametrize("number", [errno.EIO, errno.EACCES])
@pytest.mark.parametrize("place", ["check_files", "read_seal", "read_metadata", "load_state", "list_steps"])
def test_storage_that_refuses_to_read_costs_no_checkpoint(folder, config, abstract, monkeypatch, number, place):
    def refuse(*_: object, **__: object) -> None:
        raise OSError(number, os.strerror(number))

    config = changed(config, {"faults.storage_retry_seconds": 0.0})
    with monkeypatch.context() as patch:
        patch.setattr(*((manager, place) if place != "load_state" else (ocp, "load")), refuse)
        with pytest.raises((StorageError, OSError), match=os.strerror(number)):
            restored_step(folder, config, abstract)
    assert restored_step(folder, config, abstract) == 30
    assert not list(folder.glob("*.damaged*"))


def test_a_checkpoint_that_storage_gives_again_is_waited_for(folder, config, abstract, monkeypatch):
    paused, read_seal = [], manager.read_seal

    def refuse(path: Path) -> object:
        if len(paused) < 2:
            raise PermissionError(errno.EACCES, "Permission denied", str(path))
        return read_seal(path)

    monkeypatch.setattr(manager, "read_seal", refuse)
    monkeypatch.setattr(files.time, "sleep", paused.append)
    assert restored_step(folder, config, abstract) == 30
    assert len(paused) == 2 and not list(folder.glob("*.damaged*"))


def test_unreadable_file_is_named_and_is_no_damage(saved):
    """As another user, for root may read everything, and in a folder that others may enter."""
    program = """
import os, sys
from etils import epath
from trainer.checkpoints.checksums import check_files, read_seal
folder = epath.Path(sys.argv[1])
check_files(folder, read_seal(folder))
os.chmod(folder / sys.argv[2], 0)
if os.getuid() == 0:
    os.setgid(65534)
    os.setuid(65534)
try:
    check_files(folder, read_seal(folder))
except OSError as error:
    print(f"{error.filename}: {error.strerror}")
"""
    with tempfile.TemporaryDirectory() as reachable:
        Path(reachable).chmod(0o755)
        shutil.copytree(saved / "checkpoints", reachable, dirs_exist_ok=True)
        Path(reachable).chmod(0o755)
        target = data_file(Path(reachable) / "30")
        arguments = [str(Path(reachable) / "30"), str(target.relative_to(Path(reachable) / "30"))]
        command = [sys.executable, "-c", program, *arguments]
        result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert result.stdout.strip() == f"{target}: Permission denied", result.stderr
