"""A cloud on this machine for launch/tpu_pod.sh: see fake_gcloud/gcloud.py."""

import contextlib
import fcntl
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.support import ROOT

FAKE = ROOT / "tests/launch/fake_gcloud"
SUBMIT = ["--name", "run", "--type", "v4-16", "--zone", "us-central2-b", "--project", "my-project", "--spot"]
SUBMIT += ["--bucket", "gs://bucket"]
TRAINER = ["--", "--config=configs/demo.py"]


def replaced(option: str, value: str) -> list[str]:
    """SUBMIT with another value for an option."""
    options = list(SUBMIT)
    options[options.index(option) + 1] = value
    return options


def git(repository: Path, *arguments: str) -> str:
    identity = ["-c", "user.name=a", "-c", "user.email=a@example.com"]
    return subprocess.run(
        ["git", "-C", repository, *identity, *arguments], check=True, capture_output=True, text=True
    ).stdout.strip()


class Cloud:
    """The cloud's folder, and the launcher run against it."""

    def __init__(self, folder: Path, repository: Path) -> None:
        self.folder, self.repository = folder, repository
        self.script: dict[str, Any] = {"environment": {}, "errors": []}
        self.environment = {
            **{k: v for k, v in os.environ.items() if k not in ("TERM", "COLUMNS", "TPU_POD_POLL_SECONDS")},
            "PATH": f"{FAKE}:{os.environ['PATH']}",
            "HOME": str(folder / "home"),
            "XDG_STATE_HOME": str(folder / "local"),
            "FAKE_CLOUD": str(folder),
            "FAKE_PYTHON": sys.executable,
            "PYTHON": str(FAKE / "laptop_python"),
            "TPU_POD_POLL_SECONDS": "0.2",
            "TPU_POD_RETRY_SECONDS": "0",
        }
        dataset = folder / "buckets/bucket/data/demo"
        dataset.mkdir(parents=True)
        (folder / "home").mkdir()
        (folder / "home/.ssh").mkdir()
        (folder / "home/.ssh/google_compute_engine").touch()
        (folder / "hosts").mkdir()
        (dataset / "manifest.json").write_text("{}")
        (folder / "preflight").write_text("mesh data=8\nbatch 16\n")
        (folder / "plan").write_text(
            "v4-16: 8 chips, mesh data=8, batch 16\n  total   4.66   fits: 85% of 30.75 left\n"
        )
        (folder / "plan.code").write_text("0")
        self.write("state.json", {"requests": {}, "created": 0})
        self.host(FAKE_TRAINER=FAKE / "trainer", WORKER_BACKOFF_SECONDS=0, WORKER_BEAT_SECONDS=2)

    def write(self, name: str, content: object) -> None:
        (self.folder / f"{name}.test").write_text(json.dumps(content))
        (self.folder / f"{name}.test").replace(self.folder / name)

    def host(self, **environment: object) -> None:
        """Adds to the environment of every host."""
        self.script["environment"] |= {k: str(v) for k, v in environment.items()}
        self.write("script.json", self.script)

    def script_now(self) -> dict[str, Any]:
        """What is left to happen."""
        return json.loads((self.folder / "script.json").read_text())

    def attempts(self, *states: list[str]) -> None:
        """What the requests go through, the first one's states first; the last stays."""
        self.script["attempts"] = list(states)
        self.write("script.json", self.script)

    def error(self, match: str, text: str, times: int = 1, after: bool = False) -> None:
        """The next calls that hold `match` fail, before or after they did what they are for."""
        self.script["errors"].append({"match": match, "text": text, "times": times, "after": after})
        self.write("script.json", self.script)

    def hang(self, match: str, times: int = 1, after: bool = False) -> None:
        """The next calls that hold `match` never end, having done what they are for or not."""
        self.script["errors"].append({"match": match, "text": "", "times": times, "after": after, "hang": True})
        self.write("script.json", self.script)

    def hold(self, match: str, skip: int = 0) -> None:
        """A later call that holds `match` does what it is for, and gives its answer when the test says `release`."""
        trouble = {"match": match, "text": "", "times": 1, "after": True, "hang": True, "hold": True, "skip": skip}
        self.script["errors"].append(trouble)
        self.write("script.json", self.script)

    def held(self) -> bool:
        return any(error.get("hold") and error["times"] == 0 for error in self.script_now()["errors"])

    def release(self) -> None:
        (self.folder / "released").touch()

    def somebody_elses(self, name: str = "run", state: str = "ACTIVE", **labels: str) -> None:
        """A colleague makes a slice under the name, with this tool or by hand."""
        request = {"states": [state], "hosts": 2, "port": 1, "nodes": {name: "READY"}, "labels": labels}
        self.change(lambda cloud: cloud["requests"].update({name: request}))

    def trainer(self, *starts: str, host: int | None = None) -> None:
        """What the stand-in for the trainer does at each start: see fake_gcloud/trainer."""
        name = "trainer" if host is None else f"trainer-{host}"
        (self.folder / name).write_text("\n".join(starts) + "\n")

    def start(self, *arguments: str, **environment: str) -> subprocess.Popen:
        return subprocess.Popen(
            [self.repository / "launch/tpu_pod.sh", *arguments],
            env=self.environment | environment,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            start_new_session=True,
        )

    def run(self, *arguments: str, **environment: str) -> tuple[int, str]:
        process = self.start(*arguments, **environment)
        try:
            output, _ = process.communicate(timeout=120)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            pytest.fail(f"still running:\n{process.communicate()[0]}\n{self.host_logs()}")
        return process.returncode, output

    def submit(self, *options: str) -> tuple[int, str]:
        return self.run("submit", *SUBMIT, "--watch", *options, *TRAINER)

    def calls(self, words: str = "") -> list[list[str]]:
        path = self.folder / "calls"
        lines = [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
        return [call for call in lines if words in " ".join(call)]

    def state(self) -> dict[str, Any]:
        return json.loads((self.folder / "state.json").read_text())

    def change(self, change: Callable[[dict[str, Any]], object]) -> None:
        """Changes the cloud's state as a call would."""
        with (self.folder / "lock").open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            state = self.state()
            change(state)
            self.write("state.json", state)

    def object(self, name: str) -> str:
        path = self.folder / "buckets/bucket/runs/run" / name
        return path.read_text() if path.exists() else ""

    def log(self, host: int, attempt: int = 1) -> str:
        """What the bucket has of the log of a host."""
        parts = (self.folder / f"buckets/bucket/runs/run/attempts/{attempt}/logs/host-{host}").glob("*[0-9]")
        return "".join(part.read_text() for part in sorted(parts))

    def put_log(self, host: int, content: str, attempt: int = 1, at: int = 0) -> None:
        """A part of the log of a host, which begins with that byte."""
        self.put(f"attempts/{attempt}/logs/host-{host}/{at:015d}", content)

    def put(self, name: str, content: str) -> None:
        """Writes an object of the run."""
        path = self.folder / "buckets/bucket/runs/run" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.with_name(f"{path.name}.generation").write_text(str(time.time_ns()))
        path.with_name(f"{path.name}.test").write_text(content)
        path.with_name(f"{path.name}.test").replace(path)

    def wait_for(self, condition: Callable[[], object], seconds: float = 120) -> None:
        end = time.monotonic() + seconds
        while not condition():
            if time.monotonic() > end:
                last = "\n".join(" ".join(call) for call in self.calls()[-12:])
                pytest.fail(f"never came true\n{self.host_logs()}\n== the last calls\n{last}")
            time.sleep(0.1)

    def preempt(self, name: str = "run") -> None:
        """The machines go away without a word, and the request follows."""

        def reclaim(state: dict[str, Any]) -> None:
            state["requests"][name]["states"] = ["SUSPENDING", "SUSPENDED"]

        self.change(reclaim)
        self.power_off()

    def host_log(self, host: int) -> str:
        path = self.folder / f"hosts/run-{host}/runs/run/log"
        return path.read_text() if path.exists() else ""

    def host_logs(self) -> str:
        logs = sorted(self.folder.glob("hosts/*/runs/run/log")) + sorted(self.folder.glob("hosts/*/unit.log"))
        return "\n".join(f"== {path}\n{path.read_text()[-3000:]}" for path in logs)

    def processes(self, on_hosts: bool) -> list[int]:
        """Those that run on the hosts, or those of the launcher; their environment marks them."""
        found, mark = [], f"FAKE_CLOUD={self.folder}".encode()
        for path in Path("/proc").glob("[0-9]*/environ"):
            try:
                variables = path.read_bytes().split(b"\0")
            except OSError:
                continue
            if mark in variables and any(v.startswith(b"FAKE_HOST=") for v in variables) == on_hosts:
                found.append(int(path.parent.name))
        return found

    def host_processes(self) -> list[int]:
        return self.processes(on_hosts=True)

    def launcher_processes(self) -> list[int]:
        return self.processes(on_hosts=False)

    def host_signal(self, host: int, number: int) -> None:
        """To the trainer of a host, wherever it is."""
        for pid in self.host_processes():
            with contextlib.suppress(OSError):  # it has just ended
                environment, command = (Path(f"/proc/{pid}/{name}").read_bytes() for name in ("environ", "cmdline"))
                if f"PROCESS_ID={host}".encode() in environment.split(b"\0") and b"-m\0trainer" in command:
                    os.kill(pid, number)

    def power_off(self) -> None:
        """Every host loses its power."""
        for _ in range(3):
            self.kill(self.host_processes())

    def kill(self, pids: list[int]) -> None:
        for pid in pids:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
