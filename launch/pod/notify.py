"""Tells somebody of what happened to a run: by a command, or by a message to an address."""

import json
import os
import subprocess
import urllib.request

from .terminal import say


def notify(target: str, run: str, event: str, detail: str) -> None:
    """Never fails, and never takes long.

    Args:
      target: a URL, to which a JSON object is posted, or a command, which finds the same in its environment as
        TPU_POD_RUN, TPU_POD_EVENT and TPU_POD_DETAIL; nothing is told if it is empty.
      event: preempted (a new slice is made), failed, finished or "still billing".
    """
    if not target:
        return
    try:
        if target.startswith(("https://", "http://")):
            text = f"run {run}: {event} {detail}".strip()
            body = json.dumps({"run": run, "event": event, "detail": detail, "text": text}).encode()
            request = urllib.request.Request(target, body, {"Content-Type": "application/json"})
            urllib.request.urlopen(request, timeout=10).close()
        else:
            said = {"TPU_POD_RUN": run, "TPU_POD_EVENT": event, "TPU_POD_DETAIL": detail}
            subprocess.run(
                ["bash", "-c", target], env=os.environ | said, stdin=subprocess.DEVNULL, timeout=30, check=True
            )
    except Exception as error:  # a notice that is lost must not end the watch
        say(f"could not notify: {type(error).__name__}: {error}"[:300])
