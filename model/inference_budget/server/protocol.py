"""Connections: how long the server waits for a client, and how many there may be."""

import asyncio
import json
from typing import Any

from uvicorn.protocols.http.h11_impl import H11Protocol

from .errors import ApiError

SECONDS = 30.0  # for a request to begin, or for a client to read something


class Protocol(H11Protocol):
    """uvicorn's HTTP/1.1, but it gives up clients that do nothing.

    A connection is closed when no request has begun within SECONDS, be it that nothing comes, half a header, or the
    rest of a body that was refused; and when a client that has something to read has read nothing of it for as long.
    """

    seconds = SECONDS

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        self._begin: asyncio.TimerHandle | None = None
        self._read: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        transport.set_write_buffer_limits(high=0)  # so that whatever is not read is noticed
        limit = self.config.limit_concurrency
        if limit is not None and len(self.connections) > 2 * limit:  # above the limit itself it answers 503
            transport.abort()
        else:
            self._await_request()

    def connection_lost(self, exc: Exception | None) -> None:
        for timer in (self._begin, self._read):
            if timer is not None:
                timer.cancel()
        super().connection_lost(exc)

    def on_response_complete(self) -> None:
        super().on_response_complete()
        self._await_request()

    def pause_writing(self) -> None:
        super().pause_writing()
        self._await_reader()

    def resume_writing(self) -> None:
        super().resume_writing()
        if self._read is not None:
            self._read.cancel()

    def send_400_response(self, msg: str) -> None:
        body = json.dumps(ApiError(400, msg).body).encode()
        head = "HTTP/1.1 400 Bad Request\r\ncontent-type: application/json\r\nconnection: close\r\n"
        if self.cycle is None or self.cycle.response_complete:  # else it would be read as a part of an answer
            self.transport.write(f"{head}content-length: {len(body)}\r\n\r\n".encode() + body)
        self.transport.close()

    def _await_request(self) -> None:
        if self._begin is not None:
            self._begin.cancel()
        self._begin = self.loop.call_later(self.seconds, self._give_up, self.cycle)

    def _give_up(self, cycle: Any) -> None:
        if self.cycle is cycle and (self.cycle is None or self.cycle.response_complete):
            self.transport.abort()

    def _await_reader(self) -> None:
        left = self.transport.get_write_buffer_size()

        def look() -> None:
            if self.transport.get_write_buffer_size() >= left:
                self.transport.abort()
            else:
                self._await_reader()

        self._read = self.loop.call_later(self.seconds, look)
