"""The slice's own watchdog, which every host starts at boot: nothing bills for long when nobody watches."""

import contextlib
import dataclasses
import json
import os
import signal
import subprocess
import time

import pytest

from launch.pod import checks, record
from launch.pod.gcloud import Answer, Kind
from tests.support.cloud import FAKE, SUBMIT, TRAINER

from .test_tpu_pod_life import created


@pytest.fixture
def granted(cloud):
    """A run whose slice was granted after its watcher died: no host was ever set up."""
    cloud.attempts(["WAITING_FOR_RESOURCES"], ["ACTIVE"])
    process = cloud.start("submit", "--watch", *SUBMIT, *TRAINER)
    cloud.wait_for(lambda: created(cloud) == 1)
    os.killpg(process.pid, signal.SIGKILL)
    process.communicate()
    cloud.change(lambda state: state["requests"]["run"].update(states=["ACTIVE"]))
    return cloud


def boot(cloud, **environment) -> None:
    """Host 0 runs its startup script, as at every boot."""
    home = cloud.folder / "hosts/run-0"
    home.mkdir(exist_ok=True)
    script = home / "startup-script"
    script.write_text(cloud.state()["requests"]["run"]["startup"])
    variables = cloud.environment | {
        "HOME": str(home),
        "FAKE_HOST": str(home),
        "PATH": f"{FAKE}/host_bin:{FAKE}:{os.environ['PATH']}",
        "WATCHDOG_STATE": str(home / "state"),
        "WATCHDOG_HOMES": str(home / "homes"),
        "WATCHDOG_LOOK_SECONDS": "0.2",
        "WATCHDOG_IDLE_SECONDS": "3",
    }
    variables |= {name: str(value) for name, value in environment.items()}
    subprocess.run(["bash", script], env=variables, check=False)


def log(cloud) -> str:
    path = cloud.folder / "hosts/run-0/tpu-pod-watchdog.log"
    return path.read_text() if path.exists() else ""


def test_slice_that_was_granted_when_nobody_looked_deletes_itself(granted):
    boot(granted)
    granted.wait_for(lambda: granted.state()["requests"] == {}, 20)
    delete = granted.calls("queued-resources delete run ")[0]
    assert delete[4:] == ["run", "--project=my-project", "--zone=us-central2-b", "--force", "--quiet", "--async"]


def test_slice_on_which_a_trainer_is_at_work_stays_until_its_hours_are_used_up(granted):
    run = granted.folder / "hosts/run-0/homes/me/runs/run"
    run.mkdir(parents=True)
    (run / "run").write_text("MAX_HOURS=720\n")
    boot(granted, WATCHDOG_IDLE_SECONDS=2)
    for _ in range(20):
        (run / "beat").touch()
        time.sleep(0.2)
    assert "run" in granted.state()["requests"]
    (run / "run").write_text("MAX_HOURS=0\n")  # no submit writes this
    for _ in range(4):
        (run / "beat").touch()
        time.sleep(0.2)
    assert "run" in granted.state()["requests"]
    up = granted.folder / "hosts/run-0/state/up"

    def gone() -> bool:
        with contextlib.suppress(FileNotFoundError):  # the host is gone
            up.write_text(str(720 * 3600))  # again and again: it counts on, and writes that down
        return granted.state()["requests"] == {}

    granted.wait_for(gone, 20)


def test_clock_of_the_machine_says_nothing_about_a_trainer_at_work(granted, tmp_path):
    (tmp_path / "date").write_text("#!/bin/bash\necho $((1000000000 + RANDOM * 3600))\n")
    (tmp_path / "date").chmod(0o700)
    run = granted.folder / "hosts/run-0/homes/me/runs/run"
    run.mkdir(parents=True)
    boot(granted, WATCHDOG_IDLE_SECONDS=2, PATH=f"{tmp_path}:{FAKE}/host_bin:{FAKE}:{os.environ['PATH']}")
    for second in range(15):
        (run / "beat").touch()
        os.utime(run / "beat", (second, second))  # 1970
        time.sleep(0.2)
    assert "run" in granted.state()["requests"]
    granted.wait_for(lambda: granted.state()["requests"] == {}, 20)  # it has stopped


SLOW = pytest.mark.slow


@pytest.mark.parametrize("kept", ["a b", *(pytest.param(text, marks=SLOW) for text in ("", "-1", 20 * "9"))])
def test_damaged_count_of_hours_does_not_end_the_watchdog(granted, kept):
    state = granted.folder / "hosts/run-0/state"
    state.mkdir(parents=True)
    for name in ("up", "born"):
        (state / name).write_text(kept)
    boot(granted, WATCHDOG_IDLE_SECONDS=1)
    granted.wait_for(lambda: granted.state()["requests"] == {}, 20)


def test_slice_of_the_same_name_that_is_not_the_runs_is_left_alone(granted):
    granted.change(lambda state: state["requests"]["run"].update(labels={"run": "run", "run-id": "0123456789abcdef"}))
    boot(granted, WATCHDOG_IDLE_SECONDS=0)
    granted.wait_for(lambda: log(granted).count("the request run is not this run's; leaving it alone") > 1, 20)
    assert "TPU Admin" not in log(granted)
    assert "run" in granted.state()["requests"]


def test_delete_that_fails_is_tried_again(granted):
    denied = (
        "ERROR: (gcloud.compute.tpus.queued-resources.delete) PERMISSION_DENIED: Permission 'tpu.nodes.delete' denied"
    )
    granted.error("queued-resources delete", denied, times=2)
    boot(granted, WATCHDOG_IDLE_SECONDS=0)
    granted.wait_for(lambda: granted.state()["requests"] == {}, 20)


def test_request_in_the_queue_expires_unless_told_otherwise(granted):
    assert "--valid-until-duration=24h" in granted.calls("queued-resources create")[0]


def test_slice_that_may_not_delete_itself_says_so_at_boot_and_status_shows_it(granted):
    boot(granted, WATCHDOG_IDLE_SECONDS=600, FAKE_NO_TPU_ROLE=1)
    granted.wait_for(lambda: granted.object("attempts/1/cannot-delete-itself"), 20)
    code, output = granted.run("status")
    assert (
        code == 0 and "WARNING   THIS SLICE CANNOT DELETE ITSELF: its service account needs the role TPU Ad" in output
    )


def test_account_that_lacks_the_role_is_named_before_a_slice_is_asked_for(tmp_path, capsys):
    run = record.Run("run", "my-project", "z", "v4-16", 1, "spot", "gs://bucket", "", "", 1, 10)
    mine = dataclasses.replace(run, service_account="t@my-project.iam.gserviceaccount.com")
    other = {"role": "roles/tpu.admin", "members": ["serviceAccount:x@y.iam.gserviceaccount.com"]}
    compute = "serviceAccount:7-compute@developer.gserviceaccount.com"
    editor = {"role": "roles/editor", "members": ["user:a@b.c", compute]}
    admin = {"role": "roles/tpu.admin", "members": [f"serviceAccount:{mine.service_account}"]}
    for one, bindings, lacks in (
        (run, [other, editor], 0),
        (mine, [other, editor], 1),
        (mine, [admin], 0),
        (run, [admin], 1),
    ):
        checks.check_slices_account(Says(Answer(Kind.OK, json.dumps({"bindings": bindings}))), one)
        assert ("COULD NOT DELETE ITSELF AND WOULD BILL" in capsys.readouterr().out) == lacks
    for answer in (
        Answer(Kind.PERMISSION, error="ERROR: denied"),
        Answer(Kind.OK, "[]"),
        Answer(Kind.OK, '{"bindings": [1]}'),
    ):
        checks.check_slices_account(Says(answer), mine)
        assert (
            "cannot see whether t@my-project.iam.gserviceaccount.com has the role TPU Admin" in capsys.readouterr().out
        )


class Says:
    """A gcloud that always gives one answer."""

    def __init__(self, answer: Answer) -> None:
        self.answer = answer

    def ask(self, *arguments: str) -> Answer:
        return self.answer
