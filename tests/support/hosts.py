"""The processes of an emulated pod."""

import subprocess
from pathlib import Path


def hosts_of(pod: subprocess.Popen) -> dict[int, int]:
    """Process ids by host, of those that run."""
    found = {}
    for child in Path(f"/proc/{pod.pid}/task/{pod.pid}/children").read_text().split():
        try:
            environment = Path(f"/proc/{child}/environ").read_bytes().split(b"\0")
        except OSError:  # it is just ending
            continue
        found |= {int(v[11:]): int(child) for v in environment if v.startswith(b"PROCESS_ID=")}
    return found
