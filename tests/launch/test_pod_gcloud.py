"""What errors of gcloud are taken for."""

import time
from pathlib import Path

import pytest

from launch.pod.gcloud import Kind, Processes, classify
from launch.pod.history import Event, billed

REFRESH = "There was a problem refreshing your current auth tokens: "
TEXTS = {
    REFRESH + "HTTPSConnectionPool(host='oauth2.googleapis.com', port=443): Max retries exceeded with url: /token "
    "(Caused by NameResolutionError(Failed to resolve 'oauth2.googleapis.com'))": Kind.NETWORK,
    REFRESH + "('invalid_grant: Bad Request')": Kind.AUTH,
    "Failed to load credential file: [/tmp/key.json]. The file was not found.": Kind.AUTH,
    "(gcloud.compute.tpus) Invalid choice: 'queued-resources'. Maybe you meant:": Kind.INVALID,
    "NOT_FOUND: Resource 'projects/p/locations/z/queuedResources/run' was not found": Kind.ABSENT,
    "Read access to project 'p' was denied": Kind.PERMISSION,
    "HttpError accessing <x>: response: <{'status': 429}>, content <Quota limit 'TPUV4' has been exceeded. Limit: 32 "
    "in region r.>\nThis may be due to network connectivity issues.": Kind.QUOTA,
    "Quota limit 'TPUV4' has been exceeded. Limit: 0 in region r.": Kind.NO_QUOTA,
    "There is no more capacity in the zone": Kind.CAPACITY,
    "gcloud crashed (SomethingNew): nobody knows": Kind.NETWORK,
}


@pytest.mark.parametrize("text", TEXTS)
def test_text_is_taken_for_what_it_means(text):
    assert classify(f"ERROR: (gcloud) {text}") is TEXTS[text]


def test_clock_that_was_put_back_takes_no_hours_away():
    events = [Event(1_000_000, "ready"), Event(100_000, "gone"), Event(200_000, "ready"), Event(203_600, "gone")]
    assert billed(events, 50_000) == 3600
    assert billed([Event(1_000_000, "ready")], 50_000) == 0


def test_what_a_call_leaves_behind_ends_with_its_time(tmp_path):
    command = f"sleep 600 & echo $! >{tmp_path}/pid"  # and the shell ends, but its output stays open
    assert Processes().run(["bash", "-c", command], limit=1) == (-1, "", "gcloud did not answer within 1 s")
    pid = int((tmp_path / "pid").read_text())
    state = Path(f"/proc/{pid}/stat")
    while state.exists() and state.read_text().split()[2] not in "ZX":
        time.sleep(0.1)  # for ever, if it was not ended
