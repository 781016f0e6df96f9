"""Compiled programs: damaged ones are never run, those that a process died with are not run again."""

import os
import random
import shutil
import signal
import subprocess
import sys
import threading
from pathlib import Path

import pytest
from etils import epath
from jax._src import compiler, distributed

from tests.support import ROOT
from trainer.hosts import compilation_cache
from trainer.hosts.compilation_cache import SealedCache

SHORT = {"steps": 3, "eval__batches": 1}
# Computes something by way of the cache, says how many programs came from there, and ends, or dies as in a first step.
PROGRAM = """
import logging, os, signal, sys
import jax
from trainer.hosts import compilation_cache
logging.basicConfig()
folder, workdir, ending = sys.argv[1:]
compilation_cache.open_cache(folder, workdir)
events = []
jax.monitoring.register_event_listener(lambda event, **_: events.append(event))
jax.jit(lambda x: x * 2)(3.0).block_until_ready()
print(jax.config.jax_compilation_cache_dir, events.count("/jax/compilation_cache/cache_hits"), flush=True)
if ending == "dies":
    os.kill(os.getpid(), signal.SIGSEGV)
compilation_cache.part()
"""


@pytest.fixture
def cache(tmp_path):
    """Opens the cache of a workdir as another process would."""
    return lambda: SealedCache(epath.Path(tmp_path / "cache"), tmp_path / "suspects")


@pytest.fixture
def run_program(tmp_path):
    """How many programs came from the cache, and what was said."""

    def run(ending: str) -> tuple[int, str]:
        command = [sys.executable, "-c", PROGRAM, str(tmp_path / "cache"), str(tmp_path), ending]
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
        assert done.returncode == (-signal.SIGSEGV if ending == "dies" else 0), done.stderr
        return int(done.stdout.split()[1]), done.stderr

    return run


@pytest.fixture(scope="module")
def trained(start_trainer, finish, loss_series, tmp_path_factory):
    """A short run's cache, and its losses."""
    folder = tmp_path_factory.mktemp("trained")
    code, output = finish(start_trainer(folder / "run", compilation_cache=folder / "cache", **SHORT))
    assert code == 0, output
    return folder / "cache", loss_series(folder / "run")


def entry_of_train_step(cache: Path) -> Path:
    (entry,) = cache.glob("jit_train_step-*.sealed")
    return entry


def flip(content: bytes, bit: int) -> bytes:
    return content[: bit // 8] + bytes([content[bit // 8] ^ 1 << bit % 8]) + content[bit // 8 + 1 :]


@pytest.mark.slow
def test_no_flipped_bit_of_a_train_step_is_ever_run(trained, cache, tmp_path):
    entry = entry_of_train_step(trained[0])
    content = entry.read_bytes()
    (tmp_path / "cache").mkdir()
    damaged = tmp_path / "cache" / entry.name
    thousandths = range(random.Random(0).randrange(1000), 8 * len(content), 1000)
    for bit in [*range(300), *thousandths]:  # the seal's own, too
        damaged.write_bytes(flip(content, bit))
        assert cache().get(entry.stem) is None, f"bit {bit} of {8 * len(content)}"
        assert not damaged.exists()
    damaged.write_bytes(content)
    assert cache().get(entry.stem) == content[32:]


@pytest.mark.parametrize(
    "damage",
    [
        lambda content: b"",
        lambda content: content[:20],
        lambda content: content[:-1],
        lambda content: content[32:],
    ],
    ids=["emptied", "cut in the seal", "cut at the end", "unsealed"],
)
def test_a_damaged_program_is_removed_and_can_be_written_again(cache, tmp_path, caplog, damage):
    cache().put("key", b"program")
    entry = tmp_path / "cache" / "key.sealed"
    entry.write_bytes(damage(entry.read_bytes()))
    assert cache().get("key") is None
    assert not entry.exists()
    (message,) = caplog.messages
    assert f"{entry} is damaged" in message
    cache().put("key", b"program")
    assert cache().get("key") == b"program"


def test_a_program_under_the_key_of_another_is_damaged(cache, tmp_path):
    cache().put("key", b"program")
    shutil.copy(tmp_path / "cache" / "key.sealed", tmp_path / "cache" / "other.sealed")
    assert cache().get("other") is None


@pytest.mark.slow
@pytest.mark.parametrize("seed", [0, 1, 2])
def test_a_run_that_finds_a_flipped_bit_computes_the_same_and_repairs_it(
    trained, start_trainer, finish, loss_series, tmp_path, seed
):
    cache, losses = tmp_path / "cache", trained[1]
    shutil.copytree(trained[0], cache)
    entry = entry_of_train_step(cache)
    content = entry.read_bytes()
    entry.write_bytes(flip(content, random.Random(seed).randrange(8 * len(content))))
    code, output = finish(start_trainer(tmp_path / "damaged", compilation_cache=cache, **SHORT))
    assert code == 0 and output.count("is damaged") == 1, output
    assert loss_series(tmp_path / "damaged") == losses
    repaired = entry.stat().st_mtime_ns
    code, output = finish(start_trainer(tmp_path / "repaired", compilation_cache=cache, **SHORT))
    assert code == 0 and "is damaged" not in output, output
    assert entry.stat().st_mtime_ns == repaired, "compiled again"


@pytest.mark.slow
def test_a_cache_that_was_moved_holds_every_program(trained, start_trainer, finish, tmp_path):
    cache = tmp_path / "moved"
    shutil.copytree(trained[0], cache)
    before = {path.name: path.stat().st_mtime_ns for path in cache.iterdir()}
    code, output = finish(start_trainer(tmp_path / "run", compilation_cache=cache, **SHORT))
    assert code == 0, output
    assert {path.name: path.stat().st_mtime_ns for path in cache.iterdir()} == before


def test_a_start_that_died_with_programs_from_the_cache_is_followed_by_one_without_them(run_program):
    assert run_program("ends")[0] == 0  # there are none yet
    assert run_program("dies")[0] > 0
    hits, said = run_program("ends")
    assert hits == 0 and said.count("\n") == 1 and "the last start died" in said, said
    hits, said = run_program("ends")
    assert hits > 0 and not said, said


def test_a_start_that_died_while_compiling_leaves_what_it_compiled(run_program):
    assert run_program("dies")[0] == 0
    hits, said = run_program("ends")
    assert hits > 0 and not said, said


def test_programs_that_have_run_are_trusted_whatever_becomes_of_the_process(cache):
    cache().put("key", b"program")
    process = cache()
    process.get("key")
    process.prove()
    assert cache().get("key") == b"program"


@pytest.mark.slow
def test_a_run_that_is_killed_behind_its_first_steps_has_proven_its_programs(
    trained, start_trainer, run_until, finish, tmp_path
):
    endless = dict.fromkeys(("steps", "eval__every_steps", "checkpoint__every_steps"), 1_000_000)
    process = start_trainer(tmp_path, compilation_cache=trained[0], **endless)
    run_until(process, "step 2 ")
    process.kill()
    finish(process)
    assert not list(tmp_path.glob(".unproven*"))


def test_a_name_outside_the_cache_is_not_removed(cache, tmp_path):
    (tmp_path / "precious.sealed").write_text("data")
    (tmp_path / "suspects").write_text("../precious")
    cache().get("key")
    assert (tmp_path / "precious.sealed").exists()


def test_a_cache_that_is_only_opened_judges_no_process_before(cache, tmp_path):
    cache().put("key", b"program")
    (tmp_path / "suspects").write_text("key")
    cache()
    assert (tmp_path / "suspects").read_text() == "key" and (tmp_path / "cache" / "key.sealed").exists()


def test_programs_written_in_two_threads_leave_the_process_its_number(monkeypatch):
    first, second = threading.Event(), threading.Event()

    def write(name: str) -> None:
        if name == "first":
            first.set()
            second.wait(1)  # for ever, where one waits for the other
        else:
            second.set()
            threads[0].join(1)

    monkeypatch.setattr(compiler, "_cache_write", write)
    monkeypatch.setattr(distributed.global_state, "process_id", 3)
    compilation_cache._let_every_process_write()
    threads = [threading.Thread(target=compiler._cache_write, args=(name,)) for name in ("first", "second")]
    threads[0].start()
    first.wait()
    threads[1].start()
    for thread in threads:
        thread.join()
    assert distributed.global_state.process_id == 3


def test_a_cache_that_cannot_be_written_is_said_once(tmp_path, caplog):
    (tmp_path / "file").touch()
    cache = SealedCache(epath.Path(tmp_path / "file" / "cache"), tmp_path / "suspects")
    for key in ("one", "two"):
        assert cache.get(key) is None
        cache.put(key, b"program")
    (message,) = caplog.messages
    assert "cannot be kept" in message


def test_programs_of_a_run_in_a_bucket_stay_on_the_host(tmp_path):
    environment = {name: value for name, value in os.environ.items() if name != "JAX_COMPILATION_CACHE_DIR"}
    command = [sys.executable, "-c", PROGRAM, "", "gs://bucket/run", "ends"]
    environment["XDG_CACHE_HOME"] = str(tmp_path)
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert Path(done.stdout.split()[0]).is_relative_to(tmp_path)
    assert list(tmp_path.rglob("*.sealed"))


def test_commands_that_run_at_once_share_sealed_programs_and_blame_none_another(tmp_path):
    program = PROGRAM.replace("compilation_cache.open_cache(folder, workdir)", "compilation_cache.open_shared_cache()")
    command = [sys.executable, "-c", program, "", "", ""]
    environment = os.environ | {"XDG_CACHE_HOME": str(tmp_path)}
    environment.pop("JAX_COMPILATION_CACHE_DIR", None)

    def run() -> tuple[int, str]:
        done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=True)
        return int(done.stdout.split()[1]), done.stderr

    assert run() == (0, "")
    (entry,) = (tmp_path / "selective-attention-trainer" / "compiled").iterdir()  # and no list of suspects
    assert run() == (1, "")
    content = bytearray(entry.read_bytes())
    content[-1] ^= 1
    entry.write_bytes(content)
    hits, said = run()
    assert hits == 0 and "is damaged" in said
