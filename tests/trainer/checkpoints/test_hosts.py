"""Checkpoints of several hosts: real processes, joined on loopback."""

import json
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from tests.support import ROOT

pytestmark = pytest.mark.slow


def pod(workdir: Path, hosts: int, failing_host: int = -1) -> list[dict]:
    """What each host of restore_and_save.py printed."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port = listener.getsockname()[1]
    command = [sys.executable, "-m", "tests.support.restore_and_save"]
    arguments = [str(hosts), str(port), str(workdir), str(failing_host)]
    processes = [
        subprocess.Popen([*command, str(host), *arguments], cwd=ROOT, stdout=subprocess.PIPE, text=True)
        for host in range(hosts)
    ]
    outputs = [process.communicate(timeout=240)[0] for process in processes]
    assert [process.returncode for process in processes] == [0] * hosts, outputs
    return [json.loads(next(line for line in output.splitlines() if line.startswith("{"))) for output in outputs]


def test_hosts_agree_on_the_checkpoint_that_is_whole_though_each_reads_its_share(tmp_path):
    pod(tmp_path, 2)
    first = pod(tmp_path, 2)
    for host in (0, 1):  # of the newest, what each host wrote, in turn
        data = max((tmp_path / "checkpoints/2").glob(f"state/ocdbt.process_{host}/d/*"), key=lambda p: p.stat().st_size)
        content = bytearray(data.read_bytes())
        content[len(content) // 2] ^= 1
        data.write_bytes(content)
        results = pod(tmp_path, 2)
        assert [(r["restored"], r["poll"], r["saved"]) for r in results] == [(1, "idle", 2)] * 2
        assert results[0]["digest"] == first[0]["digest"] | {".step": results[0]["digest"][".step"]}
    aside = {path.name for path in (tmp_path / "checkpoints").glob("2.damaged*") if path.is_dir()}
    assert aside == {"2.damaged", "2.damaged.2"}


def test_another_number_of_hosts_restores_the_same_bits(tmp_path):
    pod(tmp_path, 2)
    digests = [pod(tmp_path, hosts)[0]["digest"] for hosts in (1, 4)]
    for found in digests:
        found.pop(".step")
    assert digests[0] == digests[1]


def test_a_save_that_host_0_cannot_read_back_has_failed_on_all(tmp_path):
    pod(tmp_path, 2)
    results = pod(tmp_path, 2, failing_host=0)
    assert [(r["poll"], r["saved"]) for r in results] == [("failed", 1)] * 2
    assert results[0]["failure"] == results[1]["failure"]
    assert {r["restored"] for r in pod(tmp_path, 2)} <= {1, 2}
