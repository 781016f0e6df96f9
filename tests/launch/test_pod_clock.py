"""The laptop's clock is wrong: what was billed is counted by the bucket's."""

import time

import pytest

from launch.pod import record, show
from launch.pod.gcloud import Gcloud
from launch.pod.history import History

RUN = record.Run("run", "my-project", "us-central2-b", "v4-16", 1, "spot", "gs://bucket", "", "", 1, 720)
DAYS = 86400.0


@pytest.fixture(params=[10, -10], ids=["ahead", "behind"])
def history(cloud, monkeypatch, request):
    """Of a run whose slice came up two hours ago, on a laptop whose clock is ten days wrong."""
    for key, value in cloud.environment.items():
        monkeypatch.setenv(key, value)
    monkeypatch.setattr(record, "STATE", cloud.folder / "state")
    right = time.time
    cloud.put("events", f"{int(right()) - 7200}\tready\t\n")
    monkeypatch.setattr(time, "time", lambda: right() + request.param * DAYS)
    history = History(Gcloud(), RUN)
    history.load()
    return history


def test_hours_of_a_slice_that_is_up_are_right(history):
    assert history.billed() == pytest.approx(7200, abs=120)
    assert "slices were up for 2.0" in show._cost(RUN, history)


def test_event_is_written_with_the_right_time(history, cloud):
    history.add("gone")
    assert history.billed() == pytest.approx(7200, abs=120)
    assert cloud.object("events").endswith("\tgone\t\n")


def test_clock_is_this_machines_where_the_bucket_does_not_say(history, cloud):
    cloud.error("cp", "ERROR: (gcloud.storage.cp) HTTPError 403: no", times=99)
    assert history.billed() in (0, pytest.approx(10 * DAYS + 7200, abs=120))
