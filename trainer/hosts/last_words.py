"""What a process says when it may be about to end itself: to stderr, though perhaps nobody reads what is written there
any more, or there is no space for it.
"""

import contextlib
import faulthandler
import os
import threading

_STDERR = 2
_SECONDS = 2.0


def say(text: str, *, stacks: bool = False) -> None:
    """Writes a line, and with `stacks` what every thread is doing; gives it up after some seconds, and never raises.

    Not by `print`, whose lock the very thread may hold that hangs in writing, nor by faulthandler alone, which stops
    all other threads while it writes.
    """
    content = f"{text}\n".encode(errors="replace")
    if stacks:
        with contextlib.suppress(Exception):  # no file can be opened any more
            content += _stacks()
    with contextlib.suppress(Exception):  # no thread can be started any more
        writer = threading.Thread(target=_write, args=(content,), daemon=True)
        writer.start()
        writer.join(_SECONDS)


def _write(content: bytes) -> None:
    with contextlib.suppress(OSError):
        while content:
            content = content[os.write(_STDERR, content) :]


def _stacks() -> bytes:
    with open(os.memfd_create("stacks"), "w+b") as file:
        faulthandler.dump_traceback(file, all_threads=True)
        file.seek(0)
        return file.read()
