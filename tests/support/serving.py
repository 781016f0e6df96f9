"""A server in a process of its own, with a small model, and what it should say."""

import contextlib
import http.client
import json
import re
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import IO, Any

from inference_budget import POLICIES, Budgets, Decoder, save_budgets
from inference_budget.text import TextTokenizer
from selective_attention import export_safetensors
from tests.support.small_model import make_model

LENGTH = 2048
BATCH = 32  # prompts that the decoder continues together
PATIENCE = 120  # seconds that a test waits for what must come


class Served:
    """A folder with a model, budgets and a tokenizer, and what the model says."""

    def __init__(self, folder: Path, dataset: Path) -> None:
        self.folder, self.tokenizer = folder, TextTokenizer(dataset)
        self.model = make_model(vocab_size=self.tokenizer.vocab_size, max_length=LENGTH)
        policy = POLICIES["selective"]
        for name in ("small", "bare"):  # the latter without a tokenizer
            export_safetensors(self.model, folder / name)
        (folder / "small" / "tokenizer.model").symlink_to(dataset / "tokenizer.model")
        self._decoders = {}
        for name, tokens in (("budgets", (64, 32)), ("tight", (4, 3))):
            budgets = Budgets(tokens, LENGTH)
            save_budgets(folder / f"{name}.json", self.model, budgets, policy, checkpoint=folder / "small")
            self._decoders[name] = Decoder(self.model, budgets, policy)

    def continued(self, prompts: Sequence[str], num_tokens: int, budgets: str = "budgets") -> list[list[int]]:
        """The likeliest continuation of each prompt, by `Decoder` alone."""
        stop_ids = [self.tokenizer.eos_id]
        ids = [self.tokenizer.encode(prompt) for prompt in prompts]
        found: list[list[int]] = []
        for start in range(0, len(ids), BATCH):  # of one shape, whatever is asked
            some = ids[start : start + BATCH]
            padding = [some[0]] * (BATCH - len(some))
            answers = self._decoders[budgets].generate([*some, *padding], num_tokens, temperature=0, stop_ids=stop_ids)
            found += answers[: len(some)]
        return found

    def text(self, tokens: Sequence[int]) -> str:
        """What SentencePiece makes of them."""
        return self.tokenizer.decode(tokens)

    @contextlib.contextmanager
    def serve(self, *arguments: str) -> Iterator["Server"]:
        command = ["serve", "--checkpoint", "small", "--budgets", "budgets.json", "--port=0", *arguments]
        with tempfile.TemporaryFile("w+") as errors:
            process = subprocess.Popen(
                [sys.executable, "-m", "inference_budget", *command],
                cwd=self.folder,
                stdout=subprocess.PIPE,
                stderr=errors,
                text=True,
            )
            try:
                assert process.stdout is not None
                line = process.stdout.readline()
                found = re.search(r"http://127\.0\.0\.1:(\d+)/v1", line)
                errors.seek(0)
                assert found, line + errors.read()
                yield Server(process, int(found[1]), errors)
            finally:
                process.kill()
                process.wait()


class Server:
    """A process that serves."""

    def __init__(self, process: subprocess.Popen[str], port: int, errors: IO[str]) -> None:
        self.process, self.port, self.errors = process, port, errors
        self.url = f"http://127.0.0.1:{port}/v1"

    def ask(self, method: str, path: str, body: Any = None, **headers: str) -> tuple[int, dict[str, str], bytes]:
        """(status, headers, body) of one request; a body that is no bytes is sent as JSON."""
        content = body if body is None or isinstance(body, bytes) else json.dumps(body).encode()
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=PATIENCE)
        with contextlib.closing(connection):
            kind = {"Content-Type": "application/json"} if body is not None else {}
            connection.request(method, path, content, {**kind, **headers})
            answer = connection.getresponse()
            return answer.status, dict(answer.getheaders()), answer.read()

    def completion(self, prompt: Any, **fields: Any) -> dict[str, Any]:
        status, _, body = self.ask("POST", "/v1/completions", {"model": "small", "prompt": prompt, **fields})
        assert status == 200, body
        return json.loads(body)

    def connected(self, receive_buffer: int | None = None) -> socket.socket:
        connection = socket.socket()
        if receive_buffer:
            connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, receive_buffer)
        connection.settimeout(PATIENCE)
        connection.connect(("127.0.0.1", self.port))
        return connection

    def opened(self, fields: dict[str, Any], receive_buffer: int | None = None) -> socket.socket:
        """A connection on which a request was sent, and nothing of the answer read."""
        body = json.dumps({"model": "small", **fields}).encode()
        connection = self.connected(receive_buffer)
        head = f"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Length: {len(body)}\r\n"
        connection.sendall(f"{head}Content-Type: application/json\r\n\r\n".encode() + body)
        return connection

    def metric(self, name: str) -> float:
        """The value of a line of /metrics."""
        _, _, body = self.ask("GET", "/metrics")
        values = dict(line.rsplit(" ", 1) for line in body.decode().splitlines() if not line.startswith("#"))
        return float(values.get(f"inference_budget_{name}", 0))

    def wait_for(self, reached: Callable[[], bool]) -> None:
        deadline = time.monotonic() + PATIENCE
        while not reached():
            assert time.monotonic() < deadline and self.process.poll() is None
            time.sleep(0.05)

    @property
    def memory(self) -> int:
        """Bytes of memory that it has."""
        status = Path(f"/proc/{self.process.pid}/status").read_text()
        (kilobytes,) = re.findall(r"^VmRSS:\s+(\d+) kB$", status, re.MULTILINE)
        return int(kilobytes) << 10
