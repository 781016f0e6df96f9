"""A real browser without a window: Chromium, over the pipe of its DevTools protocol."""

import base64
import contextlib
import itertools
import json
import os
import select
import shutil
import subprocess
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

# All text of a page, that of its shadow trees and frames as well.
TEXT = """
(() => {
  const parts = [];
  const visit = (node) => {
    if (node.nodeType === 3) parts.push(node.nodeValue);
    if (node.nodeType === 1 && ['SCRIPT', 'STYLE'].includes(node.tagName)) return;
    if (node.shadowRoot) visit(node.shadowRoot);
    if (node.tagName === 'IFRAME' && node.contentDocument) visit(node.contentDocument);
    node.childNodes.forEach(visit);
  };
  visit(document);
  return parts.join(' ').replace(/\\s+/g, ' ');
})()
"""


class NavigatedError(RuntimeError):
    """The page that was asked is not there any more."""


class Page:
    """One page.

    Attributes:
      errors: What its console said was wrong, and scripts that failed.
    """

    def __init__(self, to_browser: int, from_browser: int) -> None:
        self.errors: list[str] = []
        self._to, self._from, self._buffer = to_browser, from_browser, b""
        self._numbers, self._session = itertools.count(1), None
        target = self._call("Target.createTarget", url="about:blank")["targetId"]
        self._session = self._call("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        for domain in ("Page", "Runtime", "Log"):
            self._call(f"{domain}.enable")

    def open(self, url: str, width: int = 1400, height: int = 1000, dark: bool = False) -> None:
        """Goes to an address, in a window of this size in pixels, for a reader who likes it light or dark."""
        scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
        self._call("Emulation.setEmulatedMedia", features=[scheme])
        metrics = {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": False}
        self._call("Emulation.setDeviceMetricsOverride", **metrics)
        self._call("Page.navigate", url=url)

    def wait_for(self, *texts: str, seconds: float = 120) -> str:
        """The page's text, once it has all of these."""
        deadline = time.monotonic() + seconds
        while missing := [text for text in texts if text not in (shown := self.evaluate(TEXT) or "")]:
            if time.monotonic() > deadline:
                pytest.fail(f"{missing} never came; the page says: {shown[:2000]}")
            time.sleep(0.3)
        return shown

    def evaluate(self, expression: str) -> Any:
        """The value of a JavaScript expression; None where the page goes to another address meanwhile."""
        try:
            answer = self._call("Runtime.evaluate", expression=expression, returnByValue=True)
        except NavigatedError:
            return None
        return answer["result"].get("value")

    def screenshot(self, path: Path) -> None:
        """What the window shows, as a PNG file."""
        path.write_bytes(base64.b64decode(self._call("Page.captureScreenshot", format="png")["data"]))

    def _call(self, method: str, **parameters: Any) -> dict[str, Any]:
        number = next(self._numbers)
        message = {"id": number, "method": method, "params": parameters}
        if self._session:
            message["sessionId"] = self._session
        os.write(self._to, json.dumps(message).encode() + b"\0")
        while True:
            answer = self._receive()
            if answer.get("id") == number:
                if "navigated" in answer.get("error", {}).get("message", ""):
                    raise NavigatedError
                assert "error" not in answer, answer
                return answer["result"]
            self._notice(answer)

    def _receive(self) -> dict[str, Any]:
        while b"\0" not in self._buffer:
            assert select.select([self._from], [], [], 120)[0], "the browser does not answer"
            part = os.read(self._from, 1 << 16)
            assert part, "the browser has ended"
            self._buffer += part
        message, _, self._buffer = self._buffer.partition(b"\0")
        return json.loads(message)

    def _notice(self, event: dict[str, Any]) -> None:
        method, told = event.get("method"), event.get("params", {})
        if method == "Runtime.exceptionThrown":
            self.errors.append(json.dumps(told["exceptionDetails"]))
        elif method == "Runtime.consoleAPICalled" and told["type"] == "error":
            self.errors.append(json.dumps(told["args"]))
        elif method == "Log.entryAdded" and told["entry"]["level"] == "error":
            self.errors.append(f"{told['entry']['text']} {told['entry'].get('url', '')}")


@contextlib.contextmanager
def open_browser() -> Iterator[Page]:
    """A page of a browser of its own; skips the test where none is installed."""
    found = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
    if found is None:
        pytest.skip("there is no Chromium; on Debian: apt-get install chromium")
    to_read, to_browser = os.pipe()
    from_browser, to_write = os.pipe()
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as profile:
        # The browser reads from its file 3 and writes to its file 4.
        command = ["bash", "-c", f'exec 3<&{to_read} 4>&{to_write}; exec "$@"', "bash", found]
        command += ["--headless=new", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--hide-scrollbars"]
        command += ["--remote-debugging-pipe", f"--user-data-dir={profile}", "--no-first-run"]
        process = subprocess.Popen(command, pass_fds=(to_read, to_write), stderr=subprocess.DEVNULL)
        os.close(to_read), os.close(to_write)
        try:
            yield Page(to_browser, from_browser)
        finally:
            process.terminate()
            process.wait(30)
            os.close(to_browser), os.close(from_browser)
