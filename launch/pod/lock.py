"""Who is watching a run: the object `watch` in its folder of the bucket, whose text is different at each taking."""

import os
import re
import secrets
import subprocess
import tempfile
import time
from pathlib import Path

from .gcloud import Answer, Gcloud, Kind
from .terminal import BlockedError, UsageError, one_line, printable

OURS, LOST, UNKNOWN = "ours", "lost", "unknown"


class Lock:
    def __init__(self, gcloud: Gcloud, url: str, name: str) -> None:
        self._gcloud, self._url, self._name = gcloud, f"{url}/watch", name
        self._text = ""  # what we last wrote
        self.trouble = Answer(Kind.OK)  # why the lock is unknown
        self.holder = ""  # what is there instead of ours

    def take(self, take_over: bool) -> None:
        """Raises UsageError while somebody else may be watching, BlockedError where the bucket cannot be read."""
        # The generation before the text: what is written in between makes the write below fail.
        generation = self._generation()
        if generation != "0":
            answer = self._gcloud.cat(self._url)
            if not answer.ok and answer.kind is not Kind.ABSENT:
                raise BlockedError(f"cannot read {self._url}: {answer.reason}")
            state, host, pid, *_ = [*one_line(answer.out).split(" "), "", "", ""]
            ours_once = host == os.uname().nodename and pid != "" and not _is_watcher(pid)
            if state == "watched" and not ours_once and not take_over:
                raise UsageError(
                    f"run {self._name} is being watched by process {pid} on {host}; if that is gone, add --take-over"
                )
        if not self._write(f"watched {os.uname().nodename} {os.getpid()} {int(time.time())}", generation):
            raise UsageError(
                f"another submit of {self._name} was quicker; see launch/tpu_pod.sh status --name {self._name}"
            )

    def seize(self, text: str) -> None:
        """Takes the lock from whoever has it. Raises BlockedError where that cannot be done."""
        if not self._write(text, self._generation()):
            raise BlockedError("somebody else changed the run at the same time; try again")

    def leave(self, text: str) -> bool:
        """Writes how the watching ended, if the lock is ours still."""
        try:
            generation = self._generation()
        except BlockedError:
            return False
        return self.look() == OURS and self._write(text, generation)

    def look(self) -> str:
        """OURS, LOST or UNKNOWN. A lock that is gone is written anew: nobody took it."""
        answer = self._gcloud.cat(self._url)
        if answer.kind is Kind.ABSENT:
            answer = self._put(self._text, "0")
            if answer.ok:
                return OURS
            if answer.kind in (Kind.CONFLICT, Kind.EXISTS):
                return UNKNOWN
        if not answer.ok:
            self.trouble = answer
            return UNKNOWN
        self.holder = printable(answer.out)
        return OURS if answer.out == self._text else LOST

    def _generation(self) -> str:
        answer = self._gcloud.ask("storage", "objects", "describe", self._url, "--format=value(generation)")
        if answer.kind is Kind.ABSENT:
            return "0"
        if not answer.ok or not answer.out.isdigit():
            raise BlockedError(f"cannot read {self._url}: {answer.reason}")
        return answer.out

    def _write(self, text: str, generation: str) -> bool:
        text = f"{text} {secrets.token_hex(4)}"
        # An error may come after the write, so look.
        if not self._put(text, generation).ok:
            answer = self._gcloud.cat(self._url)
            if not answer.ok or answer.out != text:
                return False
        self._text = text
        return True

    def _put(self, text: str, generation: str) -> Answer:
        with tempfile.TemporaryDirectory(prefix="tpu_pod.") as folder:
            file = Path(folder) / "watch"
            file.write_text(text + "\n")
            return self._gcloud.put(file, self._url, f"--if-generation-match={generation}")


def shown(text: str) -> str:
    """Without what makes each text different."""
    return re.sub(r" [0-9a-f]{8}$", "", one_line(text))


def _is_watcher(pid: str) -> bool:
    if not pid.isdigit() or int(pid) == os.getpid():
        return False
    done = subprocess.run(["ps", "-o", "args=", "-p", pid], capture_output=True, text=True)
    return "launch.pod" in done.stdout or "tpu_pod" in done.stdout
