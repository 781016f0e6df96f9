"""A preparation that is killed or meets bad input: what is done is kept, and nothing half-done looks complete."""

import json
import os
import resource
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from data import DataError, open_dataset
from data.folder import Folder

SHARDS = 4


@pytest.fixture(scope="module")
def command(inputs: Path) -> list[str]:
    """A run of six input files with two workers, without its --output."""
    files = [str(inputs / f"{name}.json.gz") for name in "abc"]
    copies = []
    for number, file in enumerate(files):
        copy = inputs / f"copy{number}.json.gz"
        copy.write_bytes(Path(file).read_bytes())
        copies.append(str(copy))
    options = ["--source", "jsonl", "--vocab-size", "300", "--record-length", "64", "--shards", str(SHARDS)]
    return [sys.executable, "-m", "data.prepare", *options, "--workers", "2", "--input", *files, *copies]


@pytest.fixture(scope="module")
def undisturbed(command: list[str], tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    folder = tmp_path_factory.mktemp("undisturbed")
    subprocess.run([*command, "--output", str(folder)], check=True, capture_output=True)
    return contents(folder)


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


# Python runs this as it starts, in the parent and in its workers. Whichever of them is about to put a file in place
# when there are KILL_AT in OUTPUT kills the parent, and itself: in the middle of something, and never too late.
KILLER = """
import os, signal, sys
from pathlib import Path

os.environ.setdefault("PARENT", str(os.getpid()))

def kill(event, _):
    if event == "os.rename" and len(list(Path(os.environ["OUTPUT"]).rglob("*"))) >= int(os.environ["KILL_AT"]):
        os.kill(int(os.environ["PARENT"]), signal.SIGKILL)
        os.kill(os.getpid(), signal.SIGKILL)

sys.addaudithook(kill)
"""


@pytest.mark.slow
def test_killed_ten_times_it_gives_the_same_bytes(
    command: list[str], undisturbed: dict[str, bytes], tmp_path: Path
) -> None:
    output = tmp_path / "out"
    (tmp_path / "sitecustomize.py").write_text(KILLER)
    kills = 0
    for files in range(2, 40, 4):
        variables = {"PYTHONPATH": str(tmp_path), "OUTPUT": str(output), "KILL_AT": str(files)}
        killed = subprocess.run([*command, "--output", str(output)], env=os.environ | variables, capture_output=True)
        kills += killed.returncode == -signal.SIGKILL
        assert not (output / "manifest.json").exists()
    assert kills == 10
    subprocess.run([*command, "--output", str(output)], check=True, capture_output=True)
    assert contents(output) == undisturbed


def test_a_second_run_does_only_what_is_missing(
    command: list[str], undisturbed: dict[str, bytes], tmp_path: Path
) -> None:
    output = tmp_path / "out"
    limit = (60_000, 60_000)  # Token files are smaller than that, shards larger.
    failed = subprocess.run(
        [*command, "--output", str(output)],
        capture_output=True,
        text=True,
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, limit),
    )
    assert failed.returncode == 1
    assert "error: cannot write " in failed.stderr and "is there room?" in failed.stderr
    assert [path.name for path in output.iterdir()] == [".prepare"]
    receipts = sorted((output / ".prepare" / "tokens").glob("*.json"))
    assert len(receipts) == 6
    before = {path: path.stat().st_mtime_ns for path in (output / ".prepare" / "tokens").glob("*.tokens")}
    receipts[3].unlink()
    redone = {path for path in before if path.name.startswith("00003.")}
    process = subprocess.Popen([*command, "--output", str(output)], stderr=subprocess.DEVNULL)
    while process.poll() is None and not list(output.glob("*.arrayrecord")):
        time.sleep(0.002)
    os.kill(process.pid, 9)
    process.wait()
    after = {path: path.stat().st_mtime_ns for path in before}
    assert {path for path in before if after[path] != before[path]} == redone
    subprocess.run([*command, "--output", str(output)], check=True, capture_output=True)
    assert contents(output) == undisturbed


def test_a_full_disk_while_tokenizing_is_a_clear_error(command: list[str], tmp_path: Path) -> None:
    failed = subprocess.run(
        [*command, "--output", str(tmp_path / "out")],
        capture_output=True,
        text=True,
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, 10_000)),
    )
    assert failed.returncode == 1
    assert failed.stderr.splitlines()[-1].startswith("error: ")
    assert "File too large" in failed.stderr
    assert not list((tmp_path / "out").rglob("*.arrayrecord"))


def test_a_finished_dataset_is_left_alone(dataset_folder: Path, inputs: Path, run_prepare, tmp_path: Path) -> None:
    before = {path: path.stat().st_mtime_ns for path in dataset_folder.iterdir()}
    options = {"validation_input": inputs / "c.json.gz", "shards": 3}
    run_prepare(dataset_folder, input=[inputs / "a.json.gz", inputs / "b.json.gz"], **options)
    with pytest.raises(SystemExit, match="holds a dataset of other options or inputs"):
        run_prepare(dataset_folder, input=[inputs / "a.json.gz"], **options)
    assert {path: path.stat().st_mtime_ns for path in dataset_folder.iterdir()} == before


def test_a_finished_dataset_that_lost_a_shard_is_an_error(
    dataset_folder: Path, inputs: Path, run_prepare, tmp_path: Path
) -> None:
    copy = shutil.copytree(dataset_folder, tmp_path / "copy")
    (copy / "train-00002-of-00003.arrayrecord").unlink()
    files = {"input": [inputs / "a.json.gz", inputs / "b.json.gz"], "validation_input": inputs / "c.json.gz"}
    with pytest.raises(SystemExit, match=r"train-00002-of-00003\.arrayrecord in .* is missing or not whole"):
        run_prepare(copy, **files, shards=3)


def test_an_unfinished_one_is_not_continued_with_other_options(inputs: Path, run_prepare, tmp_path: Path) -> None:
    broken = tmp_path / "broken.json.gz"
    broken.write_bytes((inputs / "a.json.gz").read_bytes()[:-100])
    with pytest.raises(SystemExit, match=r"broken\.json\.gz:\d+: reading stopped here"):
        run_prepare(tmp_path / "out", input=[inputs / "b.json.gz", broken], sample_bytes=6000)
    with pytest.raises(SystemExit, match="holds an unfinished preparation of other options"):
        run_prepare(tmp_path / "out", input=[inputs / "b.json.gz", broken], sample_bytes=6000, record_length=128)


def test_a_second_run_at_the_same_time_is_kept_out(inputs: Path, run_prepare, tmp_path: Path) -> None:
    with (
        Folder(str(tmp_path / "out" / ".prepare")).lock(),
        pytest.raises(SystemExit, match="another process is at work"),
    ):
        run_prepare(tmp_path / "out", input=inputs / "a.json.gz")


def test_bad_lines_are_skipped_up_to_a_fraction_and_reported(run_prepare, tmp_path: Path, capsys) -> None:
    lines = [json.dumps({"text": f"a document of some words, number {number}"}) for number in range(99)]
    lines.insert(41, '{"no": "text"}')
    (tmp_path / "a.jsonl").write_text("\n".join(lines))
    options = {"input": tmp_path / "a.jsonl", "vocab_size": 290}
    with pytest.raises(SystemExit, match=r"1 of 100 documents are bad, more than --max-bad-fraction 0\.0001 allows"):
        run_prepare(tmp_path / "out", **options)
    assert "a.jsonl:42: skipped: no `text`" in capsys.readouterr().err
    dataset = open_dataset(run_prepare(tmp_path / "out", **options, max_bad_fraction=0.02))
    assert sum(split.documents for split in dataset.manifest.splits.values()) == 99
    assert dataset.manifest.source["bad_documents"] == 1


def test_documents_with_the_space_symbol_are_counted(run_prepare, tmp_path: Path) -> None:
    texts = ["a document of some words", "one with \u2581 in it"] * 20
    (tmp_path / "a.jsonl").write_text("\n".join(json.dumps({"text": text}) for text in texts))
    dataset = open_dataset(run_prepare(tmp_path / "out", input=tmp_path / "a.jsonl", vocab_size=280))
    assert dataset.manifest.source["changed_documents"] == 20


def test_a_given_tokenizer_is_used_as_it_is(dataset_folder: Path, inputs: Path, run_prepare, tmp_path: Path) -> None:
    model = dataset_folder / "tokenizer.model"
    folder = run_prepare(tmp_path / "out", input=inputs / "b.json.gz", tokenizer=model)
    assert (folder / "tokenizer.model").read_bytes() == model.read_bytes()
    assert open_dataset(folder).manifest.vocab_size == 300


def test_inputs_without_a_document_are_an_error(dataset_folder: Path, run_prepare, tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text("\n")
    with pytest.raises(SystemExit, match="the inputs hold no document"):
        run_prepare(tmp_path / "out", input=tmp_path / "a.jsonl", tokenizer=dataset_folder / "tokenizer.model")


def test_a_killed_writer_leaves_no_file(tmp_path: Path) -> None:
    folder = Folder(str(tmp_path / "x"))
    with pytest.raises(DataError), folder.writing("a") as path:
        path.write_bytes(b"half")
        raise DataError
    assert list((tmp_path / "x").iterdir()) == []
    folder.write("a", b"whole")
    assert folder.read("a") == b"whole"
