"""The server's answers: /v1/completions, /v1/models, /health and /metrics."""

import asyncio
import json
import time
from collections.abc import AsyncIterator, Coroutine
from typing import Any

from starlette.applications import Starlette
from starlette.concurrency import run_in_threadpool
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route
from starlette.types import Message, Receive, Scope, Send

from ..requests import GenerationRequest
from .answers import Reply
from .completions import CompletionRequest, Served, parse
from .errors import ApiError
from .keys import Keys
from .metrics import Metrics
from .worker import Answers, Worker

PARSERS = 4  # bodies that are looked at together
BODIES = 32  # times the limit of one: bytes of all that have not been looked at, at most
LEFT = 499  # the status under which a request is counted whose client went away
EVENTS: Message = {
    "type": "http.response.start",
    "status": 200,
    "headers": [(b"content-type", b"text/event-stream; charset=utf-8"), (b"cache-control", b"no-cache")],
}


def make_app(
    served: Served, worker: Worker, metrics: Metrics, *, max_body: int, body_seconds: float, keys: Keys | None = None
) -> Starlette:
    """The server as an ASGI application.

    Args:
      served: what there is to ask for.
      worker: what generates; whoever runs the application runs it, too.
      metrics: what is told under /metrics.
      max_body: bytes of a request, at most.
      body_seconds: in which a request's body has to arrive.
      keys: of which everything under /v1 asks for one; without them it asks for none.
    """
    made = int(time.time())
    models = {
        name: {"id": name, "object": "model", "created": made, "owned_by": "inference_budget"} for name in served.names
    }

    async def list_models(request: Request) -> Response:
        _check_key(keys, request)
        return JSONResponse({"object": "list", "data": list(models.values())})

    async def find_model(request: Request) -> Response:
        _check_key(keys, request)
        name = request.path_params["name"]
        if name not in models:
            what = f"there is no model {name[:80]!r}; this server has {', '.join(models)}"
            raise ApiError(404, what, param="model", code="model_not_found")
        return JSONResponse(models[name])

    async def health(request: Request) -> Response:
        if worker.failed:
            raise ApiError(503, "the engine has failed, and this server stops")
        return JSONResponse({"status": "ok"})

    async def show_metrics(request: Request) -> Response:
        return Response(metrics.text(), media_type="text/plain; version=0.0.4")

    completions = Completions(served, worker, metrics, max_body, body_seconds, keys)
    return Starlette(
        routes=[
            Route("/v1/completions", completions, methods=["POST"]),
            Route("/v1/models", list_models),
            Route("/v1/models/{name:path}", find_model),
            Route("/health", health),
            Route("/metrics", show_metrics),
        ],
        exception_handlers={ApiError: _api_error, HTTPException: _http_error, Exception: _unforeseen},
    )


class Completions:
    """/v1/completions, as an ASGI application."""

    def __init__(
        self, served: Served, worker: Worker, metrics: Metrics, max_body: int, body_seconds: float, keys: Keys | None
    ) -> None:
        self._served, self._worker, self._metrics = served, worker, metrics
        self._max_body, self._body_seconds, self._keys = max_body, body_seconds, keys
        self._parsers, self._unparsed = asyncio.Semaphore(PARSERS), 0

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        status = 500
        request = Request(scope, receive)
        try:
            _check_key(self._keys, request)
            asked = await self._parsed(request)
            started = time.monotonic()
            with self._worker.submitted(_generations(asked)) as answers:
                await _unless_gone(receive, self._answer(asked, answers, started, request, send))
            self._metrics.seconds.observe(time.monotonic() - started)
            status = 200
        except ApiError as error:
            status = error.status
            raise
        except ClientDisconnect:
            status = LEFT
        finally:
            self._metrics.requests.labels(str(status)).inc()

    async def _parsed(self, request: Request) -> CompletionRequest:
        if request.headers.get("content-type", "").partition(";")[0].strip().lower() != "application/json":
            raise ApiError(415, "the body must be JSON; send Content-Type: application/json")
        body = bytearray()
        try:
            self._check_room(int(request.headers.get("content-length", 0)))  # which is checked to be a number
            async with asyncio.timeout(self._body_seconds):
                async for part in request.stream():
                    body += part
                    self._unparsed += len(part)
                    self._check_room(len(body))
            async with self._parsers:
                return await run_in_threadpool(parse, bytes(body), self._served)
        except TimeoutError:
            raise ApiError(408, f"the body did not arrive within {self._body_seconds:g} seconds") from None
        finally:
            self._unparsed -= len(body)

    def _check_room(self, size: int) -> None:
        if size > self._max_body:
            raise ApiError(413, f"the body is larger than {self._max_body} bytes, the most that is taken")
        if self._unparsed > BODIES * self._max_body:
            raise ApiError(503, "too many requests arrive at once; try again later", headers={"Retry-After": "1"})

    async def _answer(
        self, asked: CompletionRequest, answers: Answers, started: float, request: Request, send: Send
    ) -> None:
        reply = Reply(asked, self._served.pieces)
        choices = self._choices(reply, answers, started)
        try:
            if asked.stream:
                await _send_events(asked, reply, choices, send)
            else:
                parts: list[list[dict[str, Any]]] = [[] for _ in reply.choices]
                async for choice in choices:
                    parts[choice["index"]].append(choice)
                await JSONResponse(reply.whole(parts))(request.scope, request.receive, send)
        finally:
            self._metrics.prompt_tokens.inc(reply.prompt_tokens)
            self._metrics.generated_tokens.inc(reply.tokens)

    async def _choices(self, reply: Reply, answers: Answers, started: float) -> AsyncIterator[dict[str, Any]]:
        """What there is to tell of each choice, as it comes."""
        while not reply.ended:
            try:
                index, progress = await answers.get()
            except asyncio.CancelledError:
                raise _cut_off() from None
            if progress.tokens and not reply.tokens:
                self._metrics.first_token.observe(time.monotonic() - started)
            choice = reply.choices[index]
            told = choice.take(progress)
            if told is None:
                continue
            if choice.finish_reason is not None:
                self._metrics.finished.labels(choice.finish_reason).inc()
                answers.cancel(index)  # a stop string ends it here, and not in the engine
            yield told


def _check_key(keys: Keys | None, request: Request) -> None:
    if keys is not None:
        keys.check(request)


async def _send_events(
    asked: CompletionRequest, reply: Reply, choices: AsyncIterator[dict[str, Any]], send: Send
) -> None:
    """Begins when there is something to tell: what goes wrong before has a status of its own."""
    begun = False
    try:
        async for choice in choices:
            if not begun:
                await send(EVENTS)
                begun = True
            await _send_event(reply.event(choice), send)
            await asyncio.sleep(0)  # the turn of others, and of whoever sees that the client is gone
        if asked.include_usage:
            await _send_event(reply.last_event(), send)
    except (ApiError, asyncio.CancelledError) as error:
        told = error if isinstance(error, ApiError) else _cut_off()
        if not begun:
            raise told from None
        await _send_event(told.body, send)
    else:
        await send({"type": "http.response.body", "body": b"data: [DONE]\n\n", "more_body": True})
    await send({"type": "http.response.body", "body": b""})


def _cut_off() -> ApiError:
    return ApiError(503, "this server stops, and has no time to finish the answer")


async def _send_event(content: dict[str, Any], send: Send) -> None:
    text = json.dumps(content, ensure_ascii=False, separators=(",", ":"), allow_nan=False)
    await send({"type": "http.response.body", "body": f"data: {text}\n\n".encode(), "more_body": True})


def _generations(asked: CompletionRequest) -> list[GenerationRequest]:
    """One for each choice; those of a prompt follow each other."""
    prompts = [prompt for prompt in asked.prompts for _ in range(asked.n)]
    return [
        GenerationRequest(
            prompt=prompt,
            num_tokens=asked.max_tokens,
            temperature=asked.temperature,
            top_k=asked.top_k,
            top_p=asked.top_p,
            seed=asked.seed_of(index),
            stop_ids=asked.stop_ids,
            budget_class=asked.budget_class,
            logprobs=asked.logprobs if asked.max_tokens else asked.logprobs or 0,
            score_prompt=asked.echo and (asked.logprobs is not None or not asked.max_tokens),
        )
        for index, prompt in enumerate(prompts)
    ]


async def _unless_gone(receive: Receive, answering: Coroutine[Any, Any, None]) -> None:
    """Answers, for as long as the client is there.

    Raises:
      ClientDisconnect: it went away before it had the whole answer.
    """
    work, gone = asyncio.create_task(answering), asyncio.create_task(_gone(receive))
    try:
        await asyncio.wait((work, gone), return_when=asyncio.FIRST_COMPLETED)
        if not work.done():
            raise ClientDisconnect
        await work
    except asyncio.CancelledError:  # the server stops; so much is still said
        work.cancel()
        await work
    finally:
        gone.cancel()
        work.cancel()
        await asyncio.gather(work, gone, return_exceptions=True)


async def _gone(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


async def _api_error(request: Request, error: Exception) -> Response:
    assert isinstance(error, ApiError)
    return JSONResponse(error.body, error.status, error.headers)


async def _http_error(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    has = "this server has POST /v1/completions, and GET /v1/models, /health and /metrics"
    what = f"{request.method} {request.url.path[:80]}: {error.detail}; {has}"
    return JSONResponse(ApiError(error.status_code, what).body, error.status_code, error.headers)


async def _unforeseen(request: Request, error: Exception) -> Response:
    return JSONResponse(ApiError(500, "something went wrong here; the server's log says what").body, 500)
