"""The process that serves: an engine, a socket, and what happens at a signal."""

import argparse
import asyncio
import contextlib
import logging
import resource
import signal
import socket
from collections.abc import Iterator
from pathlib import Path
from types import FrameType

import uvicorn

from ..budgets import BudgetsError
from ..engine import Engine
from ..interchange import BudgetsFile, read_budgets_file
from ..loading import Loaded, load_engine
from ..requests import MAX_LOGPROBS, GenerationRequest
from .app import make_app
from .completions import Served
from .keys import Keys, read_keys
from .metrics import Metrics
from .protocol import Protocol
from .worker import Worker

SIGNALS = signal.SIGTERM, signal.SIGINT
MAX_CONNECTIONS = 1024  # at least; more if so many requests may wait
LAST_WORDS = 1.0  # seconds
SEND_BUFFER = 1 << 16  # bytes that the system keeps of an answer that a client does not read


def serve(options: argparse.Namespace) -> bool:
    """Runs `python -m inference_budget serve` until a signal: whether the engine failed.

    Raises:
      BudgetsError: a model, budgets, a tokenizer or an address that cannot be used.
    """
    logging.basicConfig(format="%(asctime)s %(name)s %(levelname)s: %(message)s", level=logging.WARNING)
    keys = None if options.api_key_file is None else read_keys(options.api_key_file)
    with _bound(options.host, options.port) as listener:
        loaded = load_engine(options)
        served = _served(options, loaded)
        _warm_up(loaded.engine, served.tokenizer.bos_id, options.block)
        return asyncio.run(_serve(options, loaded.engine, served, listener, keys))


async def _serve(
    options: argparse.Namespace, engine: Engine, served: Served, listener: socket.socket, keys: Keys | None
) -> bool:
    worker = Worker(engine, options.rows, options.queue, lambda: server.handle_exit(signal.SIGTERM, None))
    factors = {name: budgets.memory_factor for name, (budgets, _) in engine.classes.items()}
    app = make_app(
        served,
        worker,
        Metrics(worker, factors),
        max_body=options.max_body,
        body_seconds=options.client_seconds,
        keys=keys,
    )
    Protocol.seconds = options.client_seconds
    config = uvicorn.Config(
        app,
        http=Protocol,
        ws="none",
        lifespan="off",
        log_config=None,
        log_level="error",
        access_log=False,
        proxy_headers=False,
        server_header=False,
        limit_concurrency=max(MAX_CONNECTIONS, 2 * served.max_sequences),
        timeout_keep_alive=round(options.client_seconds),
        timeout_graceful_shutdown=round(options.drain_seconds),
    )
    host, port = listener.getsockname()[:2]
    said = ", ".join(f"{name} {factor:.2f}x fewer tokens" for name, factor in factors.items())
    address = f"[{host}]" if ":" in host else host
    server = _Server(config, f"serving {served.name} ({said}) on http://{address}:{port}/v1")
    async with worker.running():
        await server.serve(sockets=[listener])
        await server.last_words()
    return worker.failed


class _Server(uvicorn.Server):
    """Says when it listens, and ends normally after a signal, which uvicorn would raise again; a second one does not
    wait.
    """

    should_exit: bool
    force_exit: bool

    def __init__(self, config: uvicorn.Config, ready: str) -> None:
        super().__init__(config)
        self._ready = ready

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        print(self._ready, flush=True)

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        before = {number: signal.signal(number, self.handle_exit) for number in SIGNALS}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    async def last_words(self) -> None:
        """Lets requests that were cut off say so."""
        tasks = set(self.server_state.tasks)
        if self.force_exit:  # uvicorn has cancelled the others already
            for task in tasks:
                task.cancel()
        if tasks:
            await asyncio.wait(tasks, timeout=LAST_WORDS)

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        self.force_exit, self.should_exit = self.should_exit, True


def _served(options: argparse.Namespace, loaded: Loaded) -> Served:
    config, tokenizer = loaded.engine.config, loaded.tokenizer
    if tokenizer is None:
        raise BudgetsError(
            "there is no tokenizer beside the model; give its tokenizer.model or dataset with --tokenizer"
        )
    if tokenizer.vocab_size > config.vocab_size:
        raise BudgetsError(
            f"the tokenizer has {tokenizer.vocab_size} tokens, the model {config.vocab_size}; give the tokenizer that "
            "the model was trained with"
        )
    return Served(
        name=options.name or _name(options),
        tokenizer=tokenizer,
        budget_classes=tuple(loaded.engine.classes),
        max_length=config.max_length,
        vocab_size=config.vocab_size,
        max_sequences=options.rows + options.queue,
        max_logprobs=min(MAX_LOGPROBS, config.vocab_size),
    )


def _name(options: argparse.Namespace) -> str:
    """Of the model's folder."""
    folder = options.checkpoint or read_budgets_file(options.budgets, BudgetsFile)["checkpoint"]["path"]
    return Path(folder).resolve().name


@contextlib.contextmanager
def _bound(host: str, port: int) -> Iterator[socket.socket]:
    """A socket that is bound to the address and does not listen yet, and room for many connections."""
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    try:
        family, kind, _, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        bound = socket.socket(family, kind)
        bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        bound.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, SEND_BUFFER)  # which connections inherit
        bound.bind(address)
    except OSError as error:
        raise BudgetsError(f"cannot listen on {host}:{port}: {error.strerror}; give --host or --port") from error
    with bound:
        yield bound


def _warm_up(engine: Engine, bos_id: int, block: int) -> None:
    """Compiles every program, so that no client waits for that."""
    length = min(block + 1, engine.config.max_length - 1)  # a chunk of a prompt that is not the first, too
    for name in engine.classes:
        engine.submit(GenerationRequest((bos_id,) * length, 1, temperature=0, budget_class=name))
    while engine.pending:
        engine.step()
