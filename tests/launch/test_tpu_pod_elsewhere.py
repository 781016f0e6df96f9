"""What reaches a watcher in the background and a person on another machine."""

import dataclasses
import os
import pty
import re
import shutil
import signal
import subprocess

import pytest

from launch import slices
from launch.pod import record, submit
from launch.pod.options import Options
from launch.pod.terminal import UsageError
from tests.support.cloud import SUBMIT, TRAINER

from .test_tpu_pod_life import created


@pytest.fixture
def detached(cloud, tmp_path):
    """The cloud, where --detach uses a tmux server of this test alone."""
    if not shutil.which("tmux"):
        pytest.skip("no tmux")
    server = tmp_path / "tmux"
    server.mkdir()
    cloud.environment |= {"TMUX_TMPDIR": str(server), "DBUS_SESSION_BUS_ADDRESS": "unix:path=/nowhere"}
    cloud.environment.pop("XDG_RUNTIME_DIR", None)
    # A server that runs already has an environment of its own.
    bare = {"PATH": os.environ["PATH"], "TMUX_TMPDIR": str(server)}
    subprocess.run(["tmux", "new-session", "-d", "-s", "other", "sleep 600"], env=bare, check=True)
    yield cloud
    subprocess.run(["tmux", "kill-server"], env=cloud.environment, capture_output=True)


def test_detached_watcher_has_the_settings_of_gcloud_and_the_run_when_that_is_said(detached):
    detached.trainer("-")
    code, output = detached.run("submit", "--detach", *SUBMIT, *TRAINER, CLOUDSDK_ACTIVE_CONFIG_NAME="work")
    assert code == 0 and "watching in the tmux session tpu-pod-run" in output, output
    assert detached.object("watch").startswith("watched ")
    pid = detached.object("watch").split()[2]
    with open(f"/proc/{pid}/environ") as file:
        environment = file.read().split("\0")
    assert "CLOUDSDK_ACTIVE_CONFIG_NAME=work" in environment
    assert f"XDG_STATE_HOME={detached.folder}/local" in environment
    os.kill(int(pid), signal.SIGTERM)


def test_detached_watcher_that_cannot_begin_is_no_success(detached):
    detached.put("watch", "watched office 4711 1700000000\n")
    code, output = detached.run("submit", "--detach", *SUBMIT, *TRAINER)
    assert code == 1 and "the watcher did not begin" in output and "process 4711 on office" in output


SYSTEMD = {
    "systemctl": "exit 0",
    # The words are seen by everybody, and what looks like a variable in them is the manager's, which has not got it.
    "systemd-run": """printf '%s\\n' "$@" >"$FAKE_CLOUD/words"
while [ "$1" != -- ]; do shift; done
words=()
for word in "${@:2}"; do words+=("$(sed 's/[$]{[^}]*}//g' <<<"$word")"); done
env -i PATH=/usr/bin:/bin setsid "${words[@]}" </dev/null >/dev/null 2>&1 &
""",
}


def test_words_of_a_detached_watcher_are_nobody_elses_and_stay_what_they_are(cloud, tmp_path):
    cloud.trainer("-")
    for name, text in SYSTEMD.items():
        (tmp_path / "bin").mkdir(exist_ok=True)
        (tmp_path / f"bin/{name}").write_text(f"#!/bin/bash\n{text}\n")
        (tmp_path / f"bin/{name}").chmod(0o700)
    cloud.environment["PATH"] = f"{tmp_path}/bin:{cloud.environment['PATH']}"
    note = "--config.note=${HOME} 'a' & $(id) $HOME"
    code, output = cloud.run("submit", "--detach", *SUBMIT, *TRAINER, note, https_proxy="http://me:secret@proxy:1")
    assert code == 0 and "watching as the user unit tpu-pod-run" in output, output
    cloud.wait_for(lambda: created(cloud) == 1)
    assert note in cloud.object("trainer.args").splitlines()
    assert "secret" not in (cloud.folder / "words").read_text()
    pid = cloud.object("watch").split()[2]
    with open(f"/proc/{pid}/environ") as file:
        assert "https_proxy=http://me:secret@proxy:1" in file.read().split("\0")
    os.kill(int(pid), signal.SIGTERM)


@pytest.mark.slow
def test_network_options_of_a_run_are_known_on_another_machine(cloud):
    cloud.trainer("-")
    process = cloud.start("submit", "--watch", *SUBMIT, "--internal-ips", "--network", "n", *TRAINER)
    cloud.wait_for(lambda: "started" in cloud.object("events"))
    os.killpg(process.pid, signal.SIGKILL)
    process.communicate()
    elsewhere = {"XDG_STATE_HOME": str(cloud.folder / "elsewhere"), "FAKE_USER": "bob"}
    run = ["--name", "run", "--bucket", "gs://bucket"]
    cloud.run("ssh", *run, **elsewhere)
    assert cloud.calls("tpu-vm ssh")[-1][-1] == "--internal-ip"
    assert cloud.run("stop", *run, **elsewhere)[0] == 0
    assert "--internal-ip" in cloud.calls("host.sh stop")[-1]
    assert "interrupted and saved" in cloud.host_log(0)  # of a run that somebody else has set up
    assert created(cloud) == 1


@pytest.mark.slow
def test_tunnel_and_image_are_passed_through_and_a_port_is_forwarded(cloud):
    cloud.trainer("0")
    code, output = cloud.submit("--tunnel-through-iap", "--runtime-version", "v2-alpha-new")
    assert code == 0, output
    assert "--runtime-version=v2-alpha-new" in cloud.calls("queued-resources create")[0]
    assert all(call[0] == "alpha" and "--tunnel-through-iap" in call for call in cloud.calls("tpu-vm ssh"))
    code, output = cloud.run("ssh")
    assert code == 2 and "run run has no slice in us-central2-b" in output  # a node of that name would be another's
    cloud.somebody_elses(**{"run-id": re.search("RUN_ID=(.*)\n", cloud.object("run"))[1]})
    cloud.run("ssh", "--forward", "9012")
    assert cloud.calls("tpu-vm ssh")[-1][-3:] == ["--", "-L", "9012:localhost:9012"]


@pytest.mark.slow
def test_log_of_every_host_of_an_attempt_and_only_its_end(cloud):
    cloud.trainer("0")
    assert cloud.submit()[0] == 0
    cloud.put_log(0, "one\ntwo\nthree\n", attempt=2)
    cloud.put_log(1, "eins\nzwei\n", attempt=2)
    code, output = cloud.run("logs", "--host", "all", "--attempt", "2", "--tail", "2")
    assert (code, output) == (0, "host 0: two\nhost 0: three\nhost 1: eins\nhost 1: zwei\n")
    code, output = cloud.run("logs", "--attempt", "7")
    assert code == 2 and "no log of host 0 in attempt 7 (absent)" in output


@pytest.mark.slow
def test_followed_log_of_a_run_at_its_end_ends(cloud):
    cloud.trainer("0")
    assert cloud.submit()[0] == 0
    code, output = cloud.run("logs", "-f")
    assert code == 0 and "step 1 loss 2.5" in output and "the run is at its end: finished attempt 1" in output


def test_run_is_watched_again_from_another_machine_with_its_recorded_code(cloud, tmp_path):
    cloud.trainer("-", "0")
    process = cloud.start("submit", "--watch", *SUBMIT, *TRAINER)
    cloud.wait_for(lambda: "started" in cloud.object("events"))
    cloud.wait_for(lambda: (cloud.folder / "starts-1").exists())
    os.killpg(process.pid, signal.SIGKILL)
    process.communicate()
    # There is no checkout, and no record.
    shutil.copytree(cloud.repository / "launch", tmp_path / "alone/launch")
    cloud.repository = tmp_path / "alone"
    cloud.environment |= {"XDG_STATE_HOME": str(cloud.folder / "elsewhere"), "FAKE_USER": "bob"}
    watcher = cloud.start("attach", "--name", "run", "--bucket", "gs://bucket", "--take-over")
    cloud.wait_for(lambda: cloud.object("events").count("started") == 2)
    assert len((cloud.folder / "starts-0").read_text().splitlines()) == 1  # it goes on undisturbed
    cloud.preempt()
    output, _ = watcher.communicate(timeout=60)
    assert watcher.returncode == 0, output
    assert cloud.state() == {"requests": {}, "created": 2}


@pytest.mark.slow
def test_list_of_a_bucket_shows_every_run_with_its_slice_owner_and_watcher(cloud):
    assert cloud.run("list", "--bucket", "gs://bucket") == (0, "no run is in gs://bucket\n")
    cloud.trainer("0")
    assert cloud.submit()[0] == 0
    walk = cloud.object("run").replace("NAME=run", "NAME=walk").replace("OWNER=me@example.com\n", "")
    cloud.put("../walk/run", walk)  # as an earlier version left it
    cloud.put("../walk/watch", "watched office 4711 1700000000 01234567\n")
    cloud.somebody_elses("walk")
    code, output = cloud.run("list", "--bucket", "gs://bucket")
    assert code == 0 and [" ".join(line.split()) for line in output.splitlines()] == [
        "run 1 x v4-16 us-central2-b ABSENT me@example.com finished",
        "walk 1 x v4-16 us-central2-b of somebody else owner unknown watched office 4711 1700000000",
    ]


@pytest.mark.slow
def test_zones_are_tried_in_turn_while_there_are_no_machines(cloud):
    stock_out = "FAILED 8 There is no more capacity in the zone"
    cloud.attempts([stock_out], ["WAITING_FOR_RESOURCES", stock_out], ["ACTIVE"])
    cloud.trainer("0")
    options = [option for option in SUBMIT if option not in ("--zone", "us-central2-b")]
    zones = ["--zones", "us-central2-b,europe-west4-a,asia-east1-c"]
    code, output = cloud.run("submit", "--watch", *options, *zones, *TRAINER)
    assert code == 0, output
    asked = [next(a for a in call if a.startswith("--zone=")) for call in cloud.calls("queued-resources create")]
    assert asked == ["--zone=us-central2-b", "--zone=europe-west4-a", "--zone=asia-east1-c"]
    assert cloud.state() == {"requests": {}, "created": 3}
    assert "ZONE=asia-east1-c\n" in cloud.object("run")


@pytest.mark.slow
def test_types_are_tried_in_turn_and_each_is_checked_before(cloud):
    cloud.attempts(["FAILED 8 There is no more capacity in the zone"], ["ACTIVE"])
    cloud.trainer("0")
    options = [option for option in SUBMIT if option not in ("--type", "v4-16")]
    code, output = cloud.run("submit", "--watch", *options, "--types", "v4-16,v4-8", *TRAINER)
    assert code == 0, output
    create = cloud.calls("queued-resources create")
    assert "--accelerator-type=v4-16" in create[0] and "--accelerator-type=v4-8" in create[1]
    assert len(cloud.calls("host.sh start")) == 1  # v4-8 has one host


@pytest.mark.slow
def test_somebody_is_told_of_preemption_and_end(cloud, tmp_path):
    cloud.attempts(["PROVISIONING", "SUSPENDED"], ["ACTIVE"])
    cloud.trainer("0")
    command = f'echo "$TPU_POD_RUN $TPU_POD_EVENT" >>{tmp_path}/told; exit 1'
    code, output = cloud.submit("--notify", command)
    assert code == 0 and "could not notify: CalledProcessError" in output, output
    assert (tmp_path / "told").read_text() == "run preempted\nrun finished\n"


def test_cost_is_said_before_and_limited(cloud):
    cloud.trainer("0")
    code, output = cloud.submit("--max-cost", "100", "--price", "1.25")
    assert code == 0 and "at most 10 h of 8 chips = 80 chip-hours: $10.00 an hour, at most $100.00" in output
    assert "MAX_HOURS=10\n" in cloud.object("run")
    code, output = cloud.submit("--max-cost", "9", "--price", "1.25")
    assert code == 2 and "--max-cost=9 is less than an hour of 8 chips at $1.25" in output


@pytest.mark.slow
def test_cost_without_a_price_is_by_the_list_and_says_of_when(cloud):
    cloud.trainer("0")
    code, output = cloud.submit("--max-hours", "10")
    assert code == 0, output
    assert "80 chip-hours: $25.76 an hour, at most $257.60, by the list price of 2025-01, $3.22 per chip" in output
    assert "on demand (spot costs less); --price gives another" in output
    assert re.search(r"chip-hours = \$\d+\.\d\d at the list price of 2025-01, \$3.22", cloud.run("status")[1])


def test_limit_of_cost_is_by_the_list_price_without_another(capsys):
    given = Options("submit", [], name="run", type="v4-16", tier="spot", max_cost="60", yes=True)
    run = record.from_options(given)
    assert run.max_hours == 2  # of $25.76
    submit._confirm_cost(run, given)
    said = capsys.readouterr().out
    assert "by the list price of 2025-01" in said and "--max-cost=60 is 2 h at that price" in said
    with pytest.raises(UsageError, match=r"less than an hour of 16 chips at \$3.22"):
        record.from_options(dataclasses.replace(given, types="v4-16,v4-32", max_cost="40"))


def test_cost_is_not_guessed_where_no_price_is_known(monkeypatch, capsys):
    monkeypatch.delitem(slices.LIST_PRICES, "v4")
    run = record.Run("run", "p", "z", "v4-16", 1, "spot", "gs://bucket", "", "", 1, 10)
    submit._confirm_cost(run, Options("submit", [], yes=True))
    assert "80 chip-hours (no price known; give --price." in capsys.readouterr().out
    with pytest.raises(UsageError, match="--max-cost needs --price: no list price of v4 is known"):
        record.from_options(Options("submit", [], name="run", type="v4-16", max_cost="100"))


def test_person_at_a_terminal_is_asked_before_it_costs(cloud):
    ours, theirs = pty.openpty()
    os.write(ours, b"n\n")
    command = [cloud.repository / "launch/tpu_pod.sh", "submit", *SUBMIT, *TRAINER]
    done = subprocess.run(command, env=cloud.environment, stdin=theirs, capture_output=True, text=True, timeout=60)
    os.close(ours)
    os.close(theirs)
    assert done.returncode == 2 and "nothing was created; answer y, or give --yes" in done.stderr
    assert "Go on? [y/N]" in done.stdout and created(cloud) == 0
