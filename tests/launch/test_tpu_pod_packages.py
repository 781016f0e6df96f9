"""What the hosts install: pinned with hashes, and from the bucket once one host has put it there."""

import re
import subprocess
import tomllib

import pytest

from tests.support import ROOT
from tests.support.cloud import TRAINER, replaced

SUBMIT = replaced("--type", "v4-8")  # of one host


def test_slice_that_replaces_another_needs_no_package_index(cloud):
    cloud.trainer("-", "0")
    cloud.host(FAKE_GCSFUSE="2.0.0")  # of the image
    process = cloud.start("submit", "--watch", *SUBMIT, *TRAINER)
    cloud.wait_for(lambda: "started" in cloud.object("events"))
    (cloud.folder / "index-is-down").touch()
    cloud.preempt()
    output, _ = process.communicate(timeout=120)
    assert process.returncode == 0 and cloud.state() == {"requests": {}, "created": 2}, output
    assert "going on with gcsfuse version 2.0.0" in (cloud.folder / "local/tpu_pod/runs/run/setup-0.log").read_text()


@pytest.mark.slow
def test_packages_that_somebody_else_put_into_the_bucket_are_not_installed(cloud, tmp_path):
    cloud.trainer("0")
    locked = (cloud.repository / "launch/packages.txt").read_bytes()
    checksum = subprocess.run(["cksum"], input=locked, capture_output=True, check=True).stdout.decode().split()
    (tmp_path / "wheels").mkdir()
    (tmp_path / "wheels/wheel").write_text("another one\n")
    kept = cloud.folder / f"buckets/bucket/packages/{'-'.join(checksum)}.tar"
    kept.parent.mkdir()
    subprocess.run(["tar", "-cf", kept, "-C", tmp_path, "wheels"], check=True)
    code, output = cloud.run("submit", "--watch", *SUBMIT, *TRAINER)
    assert code == 0, output
    assert b"another one" not in kept.read_bytes() and " ".join(checksum).encode() in kept.read_bytes()


def test_every_package_of_a_host_has_the_pinned_version_and_a_hash():
    pinned = {}
    for line in (ROOT / "constraints.txt").read_text().splitlines():
        if not line.startswith("#"):
            name, _, version = line.partition("==")
            pinned[re.sub("[-_.]+", "-", name).lower()] = version
    locked = {}
    for line in (ROOT / "launch/packages.txt").read_text().splitlines()[1:]:
        found = re.fullmatch(r"(\S+)==(\S+)((?: --hash=sha256:[0-9a-f]{64})+)", line)
        assert found, line
        locked[found[1]] = found[2]
    assert {name: pinned[name] for name in locked} == locked, "run make lock"
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    wanted = {*project["dependencies"], *project["optional-dependencies"]["gcs"], "libtpu", "setuptools", "uv"}
    assert wanted - {"selective-attention", "inference-budget"} <= set(locked), "run make lock"
