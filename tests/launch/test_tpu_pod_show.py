"""What a person sees of a run: status, logs, list, TensorBoard, ssh; and stop and delete."""

import re
import shutil
import signal
import time

import pytest

from tests.support.cloud import SUBMIT, TRAINER


@pytest.fixture
def training(cloud):
    """The cloud with a run of two hosts at work, and a watcher."""
    cloud.trainer("-", "0")
    cloud.watcher = cloud.start("submit", "--watch", *SUBMIT, "--price", "1.5", *TRAINER)
    cloud.wait_for(lambda: "running" in cloud.object("attempts/1/host-1.status"))
    cloud.wait_for(lambda: "step 1" in cloud.log(0))
    return cloud


def stop_watcher(cloud) -> None:
    """As Ctrl-C does: the run and its slice stay."""
    cloud.watcher.send_signal(signal.SIGINT)
    cloud.watcher.communicate(timeout=120)


def stop_writers(cloud) -> None:
    """Nobody but the test writes to the bucket any more, and no log is in it."""
    stop_watcher(cloud)
    cloud.power_off()
    shutil.rmtree(cloud.folder / "buckets/bucket/runs/run/attempts/1/logs")


def test_status_shows_state_step_loss_goodput_cost_hosts_and_history(training):
    goodput = '{"goodput": 0.91, "highest_step": 120, "loss": 2.25, "starts": 3, "seconds": {"steps": 1.5}}'
    training.put("workdir/goodput.json", goodput)
    training.wait_for(lambda: "started" in training.object("events"))
    code, output = training.run("status")
    assert code == 0
    expected = [
        r"run       run: 1 x v4-16 \(spot\) in us-central2-b, project my-project",
        r"slice     ACTIVE",
        r"attempts  1 of 100",
        rf"watcher   watched \S+ {training.watcher.pid} \d+",
        r"progress  step 120  loss 2.25  goodput 0.91  starts 3  ",
        r"cost      slices were up for 0.\d\d h = 0.\d chip-hours = \$\d.\d\d at \$1.5 per chip-hour, and one is up",
        r"host 0    running, exit code -, 0 restarts",
        r"host 1    running, exit code -, 0 restarts",
        r"history",
        r"  [-\d]+ [:\d]+  submitted commit \w{12}, code \w{12}",
        r"  [-\d]+ [:\d]+  attempt 1",
        r"  [-\d]+ [:\d]+  ready ",
        r"  [-\d]+ [:\d]+  started attempt 1",
    ]
    assert re.fullmatch("\n".join(expected) + "\n", output), output
    # What it costs is counted from the history, which is in the bucket.
    stop_watcher(training)
    started = int(time.time()) - 7200
    training.put("events", f"{started}\tready\t\n{started + 5400}\tgone\t\n")
    _, output = training.run("status")
    assert "slices were up for 1.50 h = 12.0 chip-hours = $18.00 at $1.5 per chip-hour, and none is up now" in output


@pytest.mark.slow
def test_logs_are_of_the_host_that_is_asked_for_without_terminal_controls(training):
    stop_writers(training)
    training.put_log(0, "of host 0\n")
    training.put_log(1, "of host 1 \x1b]0;owned\x07\n")
    assert training.run("logs") == (0, "of host 0\n")
    assert training.run("logs", "--host", "1") == (0, "of host 1 ]0;owned\n")
    code, output = training.run("logs", "--host", "2")
    assert (code, output) == (2, "error: --host='2' is not a host of 1 x v4-16; choose one from 0 to 1\n")


def test_followed_log_prints_what_comes_once_and_goes_on_with_the_next_slice(training):
    stop_writers(training)
    training.put_log(0, "one\n")
    training.put("attempts/1/host-0.status", "0 running - 0 4 1\n")
    process = training.start("logs", "-f")
    training.wait_for(lambda: training.calls("host-0/000000000000000 "))
    training.put_log(0, "two\n", at=4)
    training.put("attempts/1/host-0.status", "0 running - 0 8 2\n")
    training.wait_for(lambda: training.calls("host-0/000000000000004 "))
    training.put_log(0, "three\n", attempt=2)
    training.put("attempts/2/host-0.status", "0 running - 0 6 3\n")
    training.put("events", training.object("events") + "9\tattempt\t2\n")
    training.wait_for(lambda: training.calls("attempts/2/logs/host-0/000000000000000 "))
    time.sleep(0.5)
    process.send_signal(signal.SIGINT)
    output, _ = process.communicate(timeout=120)
    assert output == "one\ntwo\nthree\n"


@pytest.mark.slow
def test_ssh_goes_to_the_slice_and_worker_of_the_host(cloud):
    cloud.trainer("-")
    options = [*SUBMIT, "--watch", "--slices", "2"]
    process = cloud.start("submit", *options, *TRAINER)
    cloud.wait_for(lambda: "started" in cloud.object("events"))
    cloud.run("ssh", "--host", "3")
    cloud.run("ssh")
    assert [call[4:] for call in cloud.calls("tpu-vm ssh") if "--command" not in " ".join(call)] == [
        ["run-1", "--project=my-project", "--zone=us-central2-b", "--worker=1"],
        ["run-0", "--project=my-project", "--zone=us-central2-b", "--worker=0"],
    ]
    process.kill()
    process.communicate()


@pytest.mark.slow
def test_tensorboard_shows_a_copy_and_leaves_no_process(training):
    stop_watcher(training)
    training.put("workdir/tensorboard/events.1", "x")
    assert training.run("tensorboard") == (0, "TensorBoard on events.1\n")
    assert training.launcher_processes() == []


def test_stop_saves_and_keeps_the_slice_for_the_next_submit(training):
    code, output = training.run("stop")
    assert code == 0 and "saved and stopped. THE SLICE IS UP AND BILLS" in output, output
    output, _ = training.watcher.communicate(timeout=120)
    assert "this watcher ends: stopped by" in output
    assert all("interrupted and saved" in training.host_log(host) for host in (0, 1))
    assert list(training.state()["requests"]) == ["run"]
    # The next one's code is the one that runs, although its packages are those of before.
    old = (training.folder / "pythonpath-0").read_text()
    changed = training.folder / "changed"
    shutil.copytree(training.repository, changed)
    (changed / "model/selective_attention/selection.py").write_text("# changed\n")
    training.repository = changed
    code, output = training.submit()
    assert code == 0, output
    assert training.state() == {"requests": {}, "created": 1}
    new = (training.folder / "pythonpath-0").read_text()
    assert new != old and new.endswith("/model\n")


def test_delete_saves_asks_first_and_says_that_nothing_bills(training):
    code, output = training.run("delete")
    assert code == 2 and "nothing was deleted; answer y, or give --yes" in output
    code, output = training.run("delete", "--yes")
    assert code == 0 and "the slice is gone, nothing bills" in output
    assert all("interrupted and saved" in training.log(host) for host in (0, 1))
    assert training.state()["requests"] == {}
    training.watcher.communicate(timeout=120)
    code, output = training.run("status")
    assert code == 0 and "slice     ABSENT" in output and "none is up now" in output


@pytest.mark.slow
def test_delete_that_cannot_be_made_sure_of_says_so_in_capitals(training):
    stop_watcher(training)
    training.error("queued-resources delete", "ERROR: (gcloud) code 13 an internal error has occurred", times=99)
    code, output = training.run("delete", "--yes", TPU_POD_DELETE_TRIES="2")
    assert code == 1 and "run IS NOT KNOWN TO BE GONE AND MAY STILL BILL" in output


def test_list_without_runs_says_so(cloud):
    assert cloud.run("list") == (0, "no run was submitted from this machine\n")


def test_list_shows_every_run_of_this_machine(training):
    stop_watcher(training)
    training.change(lambda state: state.update(requests={}))
    assert training.run("list") == (0, "run                      1 x v4-16        us-central2-b    ABSENT\n")


NO_RUN = "error: no run was submitted from this machine; give --name NAME --bucket gs://BUCKET\n"


@pytest.mark.parametrize("command", ["status", "logs", "tensorboard", "ssh", "stop", "delete"])
def test_without_a_run_each_command_says_so(cloud, command):
    assert cloud.run(command) == (2, NO_RUN)
    assert cloud.calls() == []


@pytest.mark.slow
def test_run_of_another_machine_is_found_by_its_bucket(training):
    stop_watcher(training)
    elsewhere = {"XDG_STATE_HOME": str(training.folder / "elsewhere")}
    code, output = training.run("status", "--name", "run", "--bucket", "gs://bucket", **elsewhere)
    assert code == 0 and "slice     ACTIVE" in output
    code, output = training.run("status", "--name", "walk", "--bucket", "gs://bucket", **elsewhere)
    assert code == 2 and "there is no run walk in gs://bucket" in output
