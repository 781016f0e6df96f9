"""The worker alone on a host: what it restarts, what it does not and how it says so, and which signals it passes on."""

import os
import signal
import subprocess

import pytest

from tests.support import ROOT
from tests.support.cloud import FAKE

RUN = "NAME=run\nRUN_ID=0123456789abcdef\nPROJECT=my-project\nZONE=us-central2-b\nDATA=gs://bucket/data/demo\nWORKDIR=gs://bucket/runs/run/workdir\n"


class Worker:
    """The worker of host 0 as a process, with the stand-in for the trainer."""

    def __init__(self, cloud, **environment) -> None:
        self.cloud, self.home = cloud, cloud.folder / "hosts/run-0/runs/run"
        python = self.home / "venv/bin/python"
        python.parent.mkdir(parents=True)
        python.symlink_to(FAKE / "trainer")
        (cloud.folder / "hosts/run-0/metadata").mkdir()
        for name, content in {"host": "0", "attempt": "1", "url": "gs://bucket/runs/run", "run": RUN}.items():
            (self.home / name).write_text(content + "\n")
        (self.home / "trainer.args").write_text("--config=configs/demo.py\n--config.note=$(id) 'a' \\b\n")
        self.environment = {
            **cloud.environment,
            "HOME": str(cloud.folder / "hosts/run-0"),
            "FAKE_HOST": str(cloud.folder / "hosts/run-0"),
            "PROCESS_ID": "0",
            "PATH": f"{FAKE}/host_bin:{FAKE}:{os.environ['PATH']}",
            "WORKER_BACKOFF_SECONDS": "0",
            "WORKER_BEAT_SECONDS": "30",
            "WORKER_IDLE_SECONDS": "600",
            **environment,
        }

    def start(self) -> subprocess.Popen:
        command = ["bash", ROOT / "launch/worker.sh", self.home]
        return subprocess.Popen(command, env=self.environment, stdin=subprocess.DEVNULL, start_new_session=True)

    def run_to(self, words: str) -> str:
        """Starts the worker, and its log when the words are in it."""
        self.start()
        self.cloud.wait_for(lambda: words in self.log())
        return self.log()

    def log(self) -> str:
        return (self.home / "log").read_text() if (self.home / "log").exists() else ""

    def starts(self) -> list[str]:
        path = self.cloud.folder / "starts-0"
        return path.read_text().splitlines() if path.exists() else []

    def reported(self) -> str:
        """What the bucket knows of the worker."""
        return self.cloud.object("attempts/1/host-0.status")


FOR_GOOD = {
    "0": "finished",
    "2 error: batch_size=3 must be a multiple of 8": "mistake",
    "3 error: the step does not fit the devices' memory": "out_of_memory",
    "1 jax.errors.JaxRuntimeError: RESOURCE_EXHAUSTED: Out of memory while trying to allocate": "out_of_memory",
    "4 error: loss is nan at step 7, again after a rollback": "diverged",
    "5 error: after step 7 the replicas of x are not equal": "corrupt",
}


@pytest.mark.parametrize("end", FOR_GOOD)
def test_what_no_retry_cures_is_named_and_not_restarted(cloud, end):
    cloud.trainer(end, "0")
    worker, state = Worker(cloud), FOR_GOOD[end]
    code, _, words = end.partition(" ")
    line = f"worker: {state}{': ' + words if words else ''} (exit code {code})\n"
    worker.run_to(line)
    cloud.wait_for(lambda: worker.reported().startswith(f"0 {state} {code} 0 "))
    assert worker.reported().endswith(f" {words}\n")
    assert len(worker.starts()) == 1


AGAIN = {
    "75": "interrupted (exit code 75)",
    "70 host 1 has left": "lost (exit code 70)",
    "134": "lost: ended by SIGABRT (exit code 134)",
    "137": "crashed: ended by SIGKILL (exit code 137)",
    "1 ValueError: broken": "crashed: ValueError: broken (exit code 1)",
    "1 OSError: RESOURCE_EXHAUSTED: No space left on device": "crashed: OSError: RESOURCE_EXHAUSTED: No space left",
}


@pytest.mark.parametrize("end", AGAIN)
def test_what_a_restart_may_cure_is_restarted(cloud, end):
    cloud.trainer(end, "0")
    worker = Worker(cloud)
    log = worker.run_to("worker: finished")
    assert f"worker: {AGAIN[end]}" in log and "starting again in 0 s" in log
    assert len(worker.starts()) == 2


def test_crashes_in_a_row_have_a_limit_and_longer_and_longer_pauses(cloud):
    cloud.trainer("1 ValueError: broken", "1 ValueError: broken", "2 error: enough")
    log = Worker(cloud, WORKER_BACKOFF_SECONDS="1").run_to("worker: mistake")
    assert "starting again in 1 s" in log and "starting again in 2 s" in log


def test_crashes_far_apart_are_forgotten(cloud):
    cloud.trainer(*["1 ValueError: broken"] * 7, "0")
    worker = Worker(cloud, WORKER_HEALTHY_SECONDS="0")
    worker.run_to("worker: finished")
    assert len(worker.starts()) == 8


def test_arguments_reach_the_trainer_as_they_were_given(cloud):
    cloud.trainer("0")
    worker = Worker(cloud)
    worker.run_to("worker: finished")
    workdir, data = "--workdir=gs://bucket/runs/run/workdir", f"--config.data.path={worker.home}/data"
    assert worker.starts() == [f"-m trainer --config=configs/demo.py --config.note=$(id) 'a' \\b {workdir} {data}"]


@pytest.mark.parametrize(
    ("key", "value"), [("maintenance-event", "TERMINATE_ON_HOST_MAINTENANCE"), ("preempted", "TRUE")]
)
def test_announced_maintenance_and_preemption_save_at_once_and_training_goes_on(cloud, key, value):
    cloud.trainer("-", "0")
    worker = Worker(cloud)
    worker.run_to("step 1 ")
    (cloud.folder / "hosts/run-0/metadata" / key).write_text(value)
    cloud.wait_for(lambda: "worker: finished" in worker.log())
    log = worker.log()
    assert "worker: maintenance or preemption announced\n" in log
    assert "interrupted and saved\nworker: interrupted (exit code 75); starting again" in log


def test_sigterm_is_passed_on_once_and_ends_the_worker(cloud, tmp_path):
    # A preempted machine says so in its metadata and by SIGTERM; at a second one the trainer would not save.
    cloud.trainer("-", "0")
    worker = Worker(cloud, FAKE_SAVED=str(tmp_path / "saved"))
    process = worker.start()
    cloud.wait_for(lambda: "step 1 " in worker.log())
    process.send_signal(signal.SIGUSR1)
    cloud.wait_for(lambda: "SIGTERM 1" in worker.log())
    process.send_signal(signal.SIGTERM)
    cloud.wait_for(lambda: "worker: stop\n" in worker.log())
    (tmp_path / "saved").touch()
    assert process.wait(timeout=60) == 0
    assert "SIGTERM 2" not in worker.log() and "interrupted and saved" in worker.log()
    assert worker.reported().startswith("0 stopped 75 ")
    assert len(worker.starts()) == 1


def test_trainer_that_hangs_after_sigterm_is_killed(cloud):
    cloud.trainer("hang", "0")
    worker = Worker(cloud, WORKER_SAVE_SECONDS="1", WORKER_KILL_SECONDS="3")
    process = worker.start()
    cloud.wait_for(lambda: "step 1 " in worker.log())
    process.send_signal(signal.SIGTERM)
    assert process.wait(timeout=60) == 0
    assert "SIGTERM 2" in worker.log()
    assert worker.reported().startswith("0 stopped 137 ")


def test_worker_that_comes_back_after_a_reboot_knows_how_it_ended(cloud):
    cloud.trainer("4 error: loss is nan", "0")
    worker = Worker(cloud)
    process = worker.start()
    cloud.wait_for(lambda: " error: loss is nan\n" in worker.reported())
    process.kill()
    process.wait()
    worker.start()
    cloud.wait_for(lambda: worker.log().count("worker: diverged: error: loss is nan (exit code 4)") == 2)
    assert len(worker.starts()) == 1


def test_idle_slice_that_nobody_deletes_deletes_itself(cloud):
    cloud.somebody_elses(**{"run-id": "0123456789abcdef"})
    cloud.trainer("0")
    Worker(cloud, WORKER_IDLE_SECONDS="1").start()
    cloud.wait_for(lambda: cloud.state()["requests"] == {})  # its log goes with it


def test_idle_worker_does_not_delete_a_slice_that_is_not_its_runs(cloud):
    cloud.somebody_elses(**{"run-id": "fedcba9876543210"})
    cloud.trainer("0")
    Worker(cloud, WORKER_IDLE_SECONDS="1").run_to("the request run is not this run's; leaving it alone")
    assert "run" in cloud.state()["requests"]


SECRET = "projects/my-project/secrets/wandb/versions/latest"


def started_with(cloud, **secrets: str) -> Worker:
    worker = Worker(cloud)
    cloud.script["secrets"] = secrets
    cloud.host()
    with (worker.home / "trainer.args").open("a") as file:
        file.write(f"env NOTE=$(id) 'a' b\nsecret TOKEN={SECRET}\n")
    return worker


def test_trainer_finds_values_and_secrets_in_its_environment_and_nothing_keeps_the_secret(cloud):
    cloud.trainer("0")
    worker = started_with(cloud, **{SECRET: "very secret=1"})
    worker.run_to("worker: finished")
    environment = cloud.folder / "environment-0"
    assert {"NOTE=$(id) 'a' b", "TOKEN=very secret=1"} <= set(environment.read_text().splitlines())
    assert "env " not in worker.starts()[0] and "secret" not in worker.starts()[0]
    files = [path for path in cloud.folder.rglob("*") if path.is_file() and path != environment]
    assert [path.name for path in files if b"very secret" in path.read_bytes()] == ["script.json"]


def test_secret_that_is_denied_is_said_and_not_tried_again(cloud):
    worker = started_with(cloud)
    log = worker.run_to("worker: mistake")
    assert "error: secret TOKEN is denied: give the slice's service account the role Secret Manager Secret" in log
    assert worker.starts() == []
    cloud.wait_for(lambda: worker.reported().startswith("0 mistake 2 0 "))


def test_secret_that_the_network_keeps_back_is_asked_for_again(cloud):
    cloud.trainer("0")
    worker = started_with(cloud, **{SECRET: "very secret"})
    cloud.error("secrets versions access", "ERROR: (gcloud) Max retries exceeded")
    log = worker.run_to("worker: finished")
    assert "crashed: error: secret TOKEN could not be fetched: ERROR: (gcloud) Max retries exceeded" in log
    assert len(worker.starts()) == 1


def parts(cloud) -> dict[int, str]:
    """The parts of the log in the bucket by their first byte."""
    folder = cloud.folder / "buckets/bucket/runs/run/attempts/1/logs/host-0"
    return {int(path.name): path.read_text() for path in sorted(folder.glob("*[0-9]"))}


def test_long_log_costs_no_more_than_what_it_gains_and_its_past_leaves_the_disk(cloud):
    cloud.trainer("-")
    worker, gigabyte = Worker(cloud, WORKER_BEAT_SECONDS="0.2"), 1 << 30
    with (worker.home / "log").open("wb") as log:
        log.write(b"x" * (1 << 20))
        log.truncate(gigabyte)
    (worker.home / "sent").write_text(f"{gigabyte} {gigabyte}\n")
    worker.start()
    cloud.wait_for(lambda: "step 1 " in cloud.log(0))
    with (worker.home / "log").open("a") as log:
        log.write("step 2\n")
    cloud.wait_for(lambda: "step 2\n" in cloud.log(0))
    assert len(cloud.log(0)) == (worker.home / "log").stat().st_size - gigabyte
    assert len(cloud.calls("logs/host-0")) == len(parts(cloud))  # nothing was sent twice
    assert (worker.home / "log").stat().st_blocks * 512 < 1 << 17


def test_log_is_sent_in_whole_lines_and_parts_whose_names_say_where_they_begin(cloud):
    cloud.trainer("0")
    worker = Worker(cloud, WORKER_PART_BYTES="100")
    (worker.home / "log").write_text("".join(f"line {i} äöü\n" for i in range(40)) + "x" * 250 + "\n")
    worker.run_to("worker: finished")
    cloud.wait_for(lambda: cloud.log(0) == worker.log())
    at = 0
    for first, text in parts(cloud).items():
        assert first == at and len(text.encode()) <= 100 and (text.endswith("\n") or "x" * 50 in text)
        at += len(text.encode())


def test_part_that_may_have_arrived_is_sent_again_as_it_was(cloud):
    cloud.trainer("-")
    cloud.error("logs/host-0/000000000000000", "ERROR: (gcloud) Max retries exceeded", times=2, after=True)
    worker = Worker(cloud, WORKER_BEAT_SECONDS="0.2")
    worker.start()
    cloud.wait_for(lambda: 0 in parts(cloud))
    first = parts(cloud)[0]
    with (worker.home / "log").open("a") as log:
        log.write("step 2\n")
    cloud.wait_for(lambda: "step 2\n" in cloud.log(0))
    assert parts(cloud)[0] == first and cloud.log(0) == worker.log()


def test_end_of_a_log_that_poured_does_not_keep_the_workers_last_line_back(cloud):
    cloud.trainer("4 error: loss is nan")
    worker = Worker(cloud, WORKER_PART_BYTES="100")
    cloud.error("logs/host-0", "ERROR: (gcloud) Max retries exceeded", times=1)
    (worker.home / "log").write_text("step\n" * 2000)
    worker.run_to("worker: diverged")
    cloud.wait_for(lambda: worker.reported().startswith("0 diverged 4 "))
    assert "bytes of the log are dropped" in cloud.log(0) and "loss is nan" in cloud.log(0)


def test_log_that_a_power_cut_has_shortened_goes_on_where_the_bucket_ends(cloud):
    cloud.trainer("0")
    worker = Worker(cloud)
    (worker.home / "log").write_text("step 1\n")
    (worker.home / "sent").write_text("700 700\n")
    worker.start()
    cloud.wait_for(lambda: "worker: finished" in cloud.log(0))
    assert min(parts(cloud)) == 700 and parts(cloud)[700].startswith("worker: start 1")


def test_log_that_the_bucket_does_not_take_is_bounded_and_says_so(cloud):
    cloud.trainer("0")
    worker = Worker(cloud, WORKER_UNSENT_BYTES="1000")
    (worker.home / "log").write_text("old\n" * 1000)
    worker.run_to("worker: finished")
    cloud.wait_for(lambda: "worker: finished" in cloud.log(0))
    assert len(cloud.log(0)) < 1300 and "bytes of the log are dropped, since the bucket took nothing" in cloud.log(0)
