"""Reading the logs of hosts, which lie in the bucket in parts."""

from pathlib import Path

import pytest

from launch.pod.gcloud import Answer, Kind
from launch.pod.hosts import Worker
from launch.pod.logs import Log
from launch.pod.record import Run
from launch.pod.terminal import BlockedError, UsageError

RUN = Run("run", "p", "z", "v4-16", 1, "spot", "gs://b", "", "", 1, 10)
FOLDER = "gs://b/runs/run/attempts/1"


class Bucket:
    """A gcloud that knows these objects."""

    def __init__(self, **objects: str) -> None:
        self.objects = {f"{FOLDER}/{name}": text for name, text in objects.items()}
        self.loaded: list[str] = []
        self.trouble: Answer | None = None

    def put(self, at: int, text: str) -> None:
        self.objects[f"{FOLDER}/logs/host-0/{at:015d}"] = text

    def ask(self, *arguments: str) -> Answer:
        if self.trouble:
            return self.trouble
        if arguments[1] == "ls":
            names = sorted(name for name in self.objects if name.startswith(arguments[2]))
            return Answer(Kind.OK if names else Kind.ABSENT, "\n".join(names))
        *urls, folder = arguments[3:]
        for url in urls:
            name = url.rpartition("/")[2]
            (Path(folder) / name).write_text(self.objects[url])
            self.loaded.append(name)
        return Answer(Kind.OK)

    def cat(self, url: str, *flags: str) -> Answer:
        if url not in self.objects:
            return Answer(Kind.ABSENT)
        first, _, last = flags[0].removeprefix("--range=").partition("-") if flags else ("0", "", "999999")
        return Answer(Kind.OK, self.objects[url][int(first) : int(last) + 1].rstrip("\n"))


def sent(log_bytes: int) -> list[Worker]:
    return [Worker("", 0, "running", "-", "0", log_bytes, "")]


def test_whole_log_and_its_last_lines_are_put_together_from_parts(capsys):
    bucket = Bucket()
    for number in range(300):
        bucket.put(9 * number, f"line {number:03}\n")
    Log(bucket, RUN, 0).show(1, 0)
    assert capsys.readouterr().out == "".join(f"line {number:03}\n" for number in range(300))
    for tail in (1, 3, 16, 17, 200, 300, 301):
        bucket.loaded = []
        Log(bucket, RUN, 0, "host 0: ").show(1, tail)
        lines = [f"host 0: line {number:03}\n" for number in range(max(0, 300 - tail), 300)]
        assert capsys.readouterr().out == "".join(lines)
        assert len(bucket.loaded) == 16 or tail > 16  # not the whole of it


def test_log_is_followed_from_near_its_end_and_each_byte_is_printed_once(capsys):
    bucket = Bucket()
    bucket.put(0, "old\n" * 100)
    bucket.put(400, "one\n")
    log = Log(bucket, RUN, 0, tail=8)
    log.follow(sent(404), 1)
    assert capsys.readouterr().out == "old\none\n"
    log.follow(sent(404), 1)
    bucket.put(400, "one\ntwo\n")  # sent anew by a worker whose disk was full, with more in it
    bucket.put(408, "three \x1b]0;owned\x07\n")
    log.follow(sent(420), 1)
    assert capsys.readouterr().out == "two\nthree ]0;owned\n"
    bucket.put(500, "after what was dropped\n")
    bucket.trouble = Answer(Kind.NETWORK, error="ERROR: no network")
    log.follow(sent(523), 1)
    bucket.trouble = None
    log.follow(sent(523), 1)
    assert capsys.readouterr().out == "after what was dropped\n"


def test_log_that_an_earlier_version_wrote_whole_is_read_and_followed(capsys):
    bucket = Bucket(**{"host-0.log": "one\ntwo\n"})
    Log(bucket, RUN, 0).show(1, 1)
    log = Log(bucket, RUN, 0)
    log.follow(sent(4), 1)
    log.follow(sent(8), 1)
    assert capsys.readouterr().out == "two\none\ntwo\n"


def test_log_that_is_not_there_or_cannot_be_read_is_said():
    bucket = Bucket()
    with pytest.raises(UsageError, match="no log of host 0 in attempt 1"):
        Log(bucket, RUN, 0).show(1, 0)
    bucket.trouble = Answer(Kind.NETWORK, error="ERROR: no network")
    with pytest.raises(BlockedError, match="ERROR: no network"):
        Log(bucket, RUN, 0).show(1, 0)
