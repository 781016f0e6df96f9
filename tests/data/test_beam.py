"""Apache Beam gives the bytes that the local runner gives, on a local folder and on a remote filesystem."""

from pathlib import Path

import fsspec
import pytest

pytest.importorskip("apache_beam")

from data.prepare import main


def arguments(inputs: Path, output: str, beam: list[str]) -> list[str]:
    files = [str(inputs / "a.json.gz"), str(inputs / "b.json.gz")]
    options = ["--source", "jsonl", "--vocab-size", "300", "--record-length", "64", "--shards", "3"]
    validation = ["--validation-input", str(inputs / "c.json.gz")]
    return [*options, *validation, "--input", *files, "--output", output, "--runner", "beam", "--", *beam]


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.mark.slow
@pytest.mark.parametrize(
    "beam",
    [
        ["--runner=FnApiRunner"],
        ["--runner=DirectRunner", "--direct_num_workers=2", "--direct_running_mode=multi_processing"],
    ],
    ids=["in process", "two processes"],
)
def test_it_gives_the_bytes_of_the_local_runner(
    inputs: Path, dataset_folder: Path, tmp_path: Path, beam: list[str]
) -> None:
    main(arguments(inputs, str(tmp_path / "out"), beam))
    assert contents(tmp_path / "out") == contents(dataset_folder)


def test_a_remote_folder_gets_the_same_bytes(inputs: Path, dataset_folder: Path, tmp_path: Path) -> None:
    url = f"memory://{tmp_path.name}"
    main(arguments(inputs, url, ["--runner=FnApiRunner"]))
    remote = fsspec.filesystem("memory")
    assert {Path(name).name: remote.cat(name) for name in remote.find(tmp_path.name)} == contents(dataset_folder)


def test_a_failed_pipeline_is_an_error_that_names_the_file(inputs: Path, tmp_path: Path) -> None:
    broken = tmp_path / "a.json.gz"
    broken.write_bytes((inputs / "a.json.gz").read_bytes()[:-100])
    (tmp_path / "b.json.gz").write_bytes((inputs / "b.json.gz").read_bytes())
    (tmp_path / "c.json.gz").write_bytes((inputs / "c.json.gz").read_bytes())
    sample = ["--sample-bytes", "8000"]
    with pytest.raises(SystemExit, match=r"a\.json\.gz:\d+: reading stopped here"):
        main([*sample, *arguments(tmp_path, str(tmp_path / "out"), ["--runner=FnApiRunner"])])
