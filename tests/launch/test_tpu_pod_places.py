"""One slice of a run, also in several zones, and where a request was on its way when another watcher took over."""

from tests.support.cloud import TRAINER, replaced

from .test_tpu_pod_life import created

ZONES = ["--zones", "us-central2-b,europe-west4-a"]
OPTIONS = [option for option in replaced("--type", "v4-8") if option not in ("--zone", "us-central2-b")]


def arrives_late(cloud) -> None:
    """What another watcher asked for in us-central2-b comes into being there."""

    def arrive(state) -> None:
        late = state["requests"]["run"] | {"zone": "us-central2-b", "nodes": {"late": "READY"}}
        state["requests"]["run@us-central2-b"] = late

    cloud.change(arrive)


def test_slice_that_comes_late_in_another_zone_is_deleted_and_the_one_at_work_stays(cloud):
    cloud.attempts(["FAILED 8 There is no more capacity in the zone"], ["ACTIVE"])
    cloud.trainer("-")
    cloud.environment["TPU_POD_SWEEP_SECONDS"] = "1"
    process = cloud.start("submit", "--watch", *OPTIONS, *ZONES, *TRAINER)
    cloud.wait_for(lambda: "started" in cloud.object("events"))
    arrives_late(cloud)
    cloud.wait_for(lambda: "run@us-central2-b" not in cloud.state()["requests"])
    assert list(cloud.state()["requests"]) == ["run"] and created(cloud) == 2
    process.kill()
    output, _ = process.communicate()
    assert "this run has a slice in us-central2-b too" in output
    arrives_late(cloud)
    code, output = cloud.run("delete", "--yes")
    assert code == 0 and cloud.state()["requests"] == {}, output


def test_watcher_that_lost_the_run_while_it_asked_takes_back_what_it_got_if_the_run_is_elsewhere(cloud):
    cloud.hold("queued-resources create")
    cloud.attempts(["WAITING_FOR_RESOURCES"])
    process = cloud.start("submit", "--watch", *OPTIONS, *ZONES, *TRAINER)
    cloud.wait_for(cloud.held)
    cloud.put("run", cloud.object("run").replace("ZONE=us-central2-b", "ZONE=europe-west4-a"))
    cloud.put("watch", "watched office 4711 1700000000 01234567\n")
    cloud.release()
    output, _ = process.communicate(timeout=120)
    assert process.returncode == 0 and "this watcher ends: watched office 4711" in output
    assert cloud.state() == {"requests": {}, "created": 1}
