"""What is wrong again and again, or only seems so: no slices are burnt for it, and no good one is given up."""

import base64
import os
import random
import re
import shutil
import signal
import string
from collections.abc import Callable

import pytest

from launch.pod.options import SECRET
from tests.support.cloud import SUBMIT, TRAINER, git, replaced

from .test_tpu_pod_life import QUOTA, created

DENIED = "ERROR: (gcloud.compute.tpus.queued-resources.create) PERMISSION_DENIED: Permission 'tpu.nodes.create' denied"
INVALID = "ERROR: (gcloud.compute.tpus.queued-resources.create) INVALID_ARGUMENT: the operation failed: code 3"
STOCK_OUT = 'FAILED 8 There is no more capacity in the zone "us-central2-b"'


def killed(cloud, condition: Callable[[], object]) -> None:
    """Submits, and kills the watcher when `condition` holds."""
    process = cloud.start("submit", "--watch", *SUBMIT, *TRAINER)
    cloud.wait_for(condition)
    os.killpg(process.pid, signal.SIGKILL)
    process.communicate()


@pytest.mark.slow
def test_hosts_that_cannot_write_to_the_bucket_end_the_run_after_two_slices(cloud):
    cloud.host(FAKE_READ_ONLY=1)
    cloud.environment["TPU_POD_POLL_SECONDS"] = "0.05"
    code, output = cloud.submit()
    assert code == 1 and "two slices in a row failed at setting up the hosts" in output, output
    assert "cannot write to gs://bucket/runs/run: its service account needs the role Storage Object Admin" in output
    assert cloud.state() == {"requests": {}, "created": 2}


@pytest.mark.slow
def test_slice_that_may_not_delete_itself_is_not_trained_on(cloud):
    cloud.host(FAKE_NO_TPU_ROLE=1)
    code, output = cloud.submit()
    assert code == 1 and "two slices in a row failed at setting up the hosts" in output, output
    assert "may not delete itself when nobody watches: its service account needs the role TPU Admin" in output
    assert cloud.state() == {"requests": {}, "created": 2} and not (cloud.folder / "starts-0").exists()


@pytest.mark.slow
def test_stock_outs_are_no_attempts(cloud):
    cloud.attempts([STOCK_OUT], [STOCK_OUT], [STOCK_OUT], ["ACTIVE"])
    cloud.trainer("0")
    code, output = cloud.submit("--max-attempts", "1")
    assert code == 0, output
    assert cloud.state() == {"requests": {}, "created": 4}


@pytest.mark.slow
def test_quota_that_somebody_took_after_a_preemption_is_waited_for(cloud):
    cloud.trainer("-", "0")
    process = cloud.start("submit", "--watch", *SUBMIT, *TRAINER)
    cloud.wait_for(lambda: "started" in cloud.object("events"))
    cloud.error("queued-resources create", QUOTA.format(32), times=2)
    cloud.preempt()
    output, _ = process.communicate(timeout=60)
    assert process.returncode == 0 and "cannot tell or not now, will look again" in output, output
    assert cloud.state() == {"requests": {}, "created": 2}


@pytest.mark.slow
@pytest.mark.parametrize("text", [DENIED, INVALID, "ERROR: (gcloud) NOT_FOUND: Resource 'operations/1' was not found"])
def test_request_that_persists_although_the_operation_failed_is_used(cloud, text):
    cloud.error("queued-resources create", text, after=True)
    cloud.trainer("0")
    code, output = cloud.submit()
    assert code == 0, output
    assert cloud.state() == {"requests": {}, "created": 1}


def test_request_that_was_refused_is_said_when_it_is_surely_not_there(cloud):
    cloud.error("queued-resources create", DENIED)
    code, output = cloud.submit()
    assert code == 1 and "you need the role TPU Admin" in output
    assert cloud.state() == {"requests": {}, "created": 0}


def test_request_that_is_not_found_at_once_is_no_second_attempt(cloud):
    cloud.script["hidden"] = 2
    cloud.trainer("0")
    code, output = cloud.submit()
    assert code == 0, output
    assert created(cloud) == 1 and cloud.object("events").count("attempt") == 3  # made, started, finished


@pytest.mark.slow
def test_lock_that_somebody_removed_does_not_end_the_watch(cloud):
    cloud.trainer("-", "0")
    process = cloud.start("submit", "--watch", *SUBMIT, *TRAINER)
    cloud.wait_for(lambda: "started" in cloud.object("events"))
    (cloud.folder / "buckets/bucket/runs/run/watch").unlink()
    cloud.wait_for(lambda: cloud.object("watch"))
    for host in (0, 1):
        cloud.host_signal(host, signal.SIGTERM)
    output, _ = process.communicate(timeout=60)
    assert process.returncode == 0, output
    assert cloud.state() == {"requests": {}, "created": 1}


def test_slice_can_be_deleted_when_the_bucket_is_gone(cloud):
    cloud.attempts(["WAITING_FOR_RESOURCES"])
    killed(cloud, lambda: created(cloud) == 1)
    shutil.rmtree(cloud.folder / "buckets/bucket")
    code, output = cloud.run("delete", "--yes")
    assert code == 0 and "Deleting all the same" in output and "nothing bills" in output, output
    assert cloud.state()["requests"] == {}


@pytest.mark.slow
def test_slice_whose_trainer_had_ended_is_used_for_what_was_mended(cloud):
    cloud.trainer("2 error: batch_size=3 must be a multiple of 8", "0")
    killed(cloud, lambda: "started" in cloud.object("events"))
    cloud.wait_for(lambda: "mistake" in cloud.object("attempts/1/host-0.status"))
    cloud.wait_for(lambda: "mistake" in cloud.object("attempts/1/host-1.status"))
    code, output = cloud.run("submit", "--watch", *SUBMIT, *TRAINER, "--config.batch_size=8")
    assert code == 0, output
    assert cloud.state() == {"requests": {}, "created": 1}


@pytest.mark.slow
def test_trainer_at_work_is_restarted_on_other_code_only_when_that_was_meant(cloud, tmp_path):
    cloud.repository = shutil.copytree(cloud.repository, tmp_path / "checkout")
    cloud.trainer("-", "0")
    killed(cloud, lambda: "started" in cloud.object("events"))
    cloud.wait_for(lambda: "running" in cloud.object("attempts/1/host-1.status"))
    with (cloud.repository / "trainer/loop.py").open("a") as file:
        file.write("# changed\n")
    code, output = cloud.submit()
    assert code == 2 and "run run is training with other code" in output
    assert len((cloud.folder / "starts-0").read_text().splitlines()) == 1
    code, output = cloud.submit("--yes")
    assert code == 0, output
    assert cloud.state() == {"requests": {}, "created": 1}


def test_config_that_git_does_not_track_is_refused_before_anything_is_rented(cloud, tmp_path):
    cloud.repository = shutil.copytree(cloud.repository, tmp_path / "checkout")
    (cloud.repository / "configs/mine.py").write_text("")
    code, output = cloud.run("submit", *SUBMIT, "--", "--config=configs/mine.py")
    assert code == 2 and "configs/mine.py is not tracked by git, so it would not be part of the run" in output
    assert created(cloud) == 0


@pytest.mark.slow
def test_code_that_is_too_large_for_every_host_to_load_is_refused(cloud, tmp_path):
    cloud.repository = shutil.copytree(cloud.repository, tmp_path / "checkout")
    (cloud.repository / "configs/weights.bin").write_bytes(os.urandom(101 << 20))
    git(cloud.repository, "add", "-A")
    code, output = cloud.submit()
    assert code == 2 and "the largest file is configs/weights.bin with 101 MB, take it out of git" in output


def test_binary_file_that_looks_like_a_token_in_the_patch_is_no_secret(cloud, tmp_path):
    cloud.repository = shutil.copytree(cloud.repository, tmp_path / "checkout")
    source, letters = random.Random(0), string.ascii_letters + string.digits
    texts = [
        "++sk-" + "".join(source.choices(letters, k=35)) + "".join(source.choices("!#$%", k=25)) for _ in range(4000)
    ]
    content = b"".join(base64.b85decode(text) + source.randbytes(source.randrange(4)) for text in texts)
    (cloud.repository / "configs/picture.bin").write_bytes(content)
    git(cloud.repository, "config", "core.compression", "0")  # as for what cannot be made smaller
    git(cloud.repository, "add", "-A")
    patch = git(cloud.repository, "diff", "--binary", "HEAD")
    assert re.search(SECRET, patch, re.MULTILINE)
    code, output = cloud.run("submit", *SUBMIT, "--dry-run", *TRAINER)
    assert code == 0, output


CHANGED = {
    "code/*.tar.gz": "1 computed checksum did NOT match",
    "trainer.args": "trainer.args is not what was submitted",
}


@pytest.mark.parametrize("changed", [pytest.param("code/*.tar.gz", marks=pytest.mark.slow), "trainer.args"])
def test_code_and_flags_that_were_changed_in_the_bucket_are_not_run(cloud, changed):
    cloud.attempts(["WAITING_FOR_RESOURCES"], ["ACTIVE"])
    cloud.trainer("0")
    cloud.environment["TPU_POD_POLL_SECONDS"] = "0.5"
    process = cloud.start("submit", "--watch", *replaced("--type", "v4-8"), *TRAINER)
    cloud.wait_for(lambda: created(cloud) == 1)
    (file,) = (cloud.folder / "buckets/bucket/runs/run").glob(changed)
    file.write_bytes(b"env LD_PRELOAD=/home/me/runs/run/data/theirs.so\n")
    cloud.change(lambda state: state["requests"]["run"].update(states=["ACTIVE"]))
    output, _ = process.communicate(timeout=60)
    assert process.returncode == 1 and "two slices in a row failed at" in output, output
    assert CHANGED[changed] in output
    assert not (cloud.folder / "starts-0").exists()


def test_gcloud_that_is_too_old_is_said_before_anything_is_created(cloud):
    cloud.error("queued-resources", "ERROR: (gcloud.compute.tpus) Invalid choice: 'queued-resources'.", times=9)
    code, output = cloud.submit()
    assert code == 2 and "this gcloud is too old: 467.0.0 or newer is needed" in output
    assert not cloud.calls("queued-resources create")


def test_name_that_cannot_be_resolved_is_no_expired_login(cloud):
    trouble = "ERROR: (gcloud) There was a problem refreshing your current auth tokens: Max retries exceeded"
    cloud.error("accelerator-types describe", trouble)
    cloud.error("queued-resources describe", trouble, times=2)
    cloud.trainer("0")
    code, output = cloud.submit()
    assert code == 0 and "login has expired" not in output, output
