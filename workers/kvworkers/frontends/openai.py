"""The HTTP server that OpenAI's clients talk to."""

import asyncio
import json
import time
import uuid
from collections.abc import AsyncGenerator, Awaitable, Callable
from dataclasses import replace
from typing import Any, Final, TypeVar

from fastapi import FastAPI, Request, Response
from fastapi.responses import JSONResponse, StreamingResponse
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect
from starlette.types import Receive, Scope, Send

from kvstore.core.errors import BadInput, KvStoreError, TooLarge
from kvstore.observe.tracing import HEADER, checked
from kvstore.rpc.gate import Gate
from kvworkers.frontends.access import Access, caller_of
from kvworkers.frontends.door import Door
from kvworkers.frontends.openai_wire import ChatBody, ChatReply, failure, parse
from kvworkers.frontends.pipeline import Pipeline
from kvworkers.frontends.replies import Started, begin, whole
from kvworkers.frontends.running import Running
from kvworkers.frontends.tenancy import for_tenant

BODY_S: Final = 30.0
"""How long a body may take: 8 MiB come in that over 2.3 Mbit/s."""
CLIENT_CLOSED: Final = 499
"""What a log shows for a request whose client went away; nobody receives it."""

LAST_WORDS_SECONDS: Final = 5.0
"""Beyond a request's deadline: to send what says that it has passed."""

T = TypeVar("T")


def make_app(
    pipeline: Pipeline,
    *,
    metrics: Callable[[], bytes],
    ready: Callable[[], bool],
    max_body_bytes: int,
    created: int,
    gate: Gate,
    apart: bool,
    door: Door,
) -> FastAPI:
    """Return the application. `ready` says whether any worker could take a request now.

    `gate` admits callers, and `apart` says that it knows them: tenants then share nothing. Once
    `door` is closed, what clients ask for is refused.
    """
    app = FastAPI(title="kvstore", docs_url=None, redoc_url=None, openapi_url=None)
    app.add_middleware(Access, gate=gate, door=door)
    app.add_exception_handler(KvStoreError, _explain)
    app.add_exception_handler(HTTPException, _explain_http)

    @app.post("/v1/chat/completions")
    async def chat(request: Request) -> Response:
        """Answer a conversation, in one piece or as server-sent events."""
        try:
            raw = await _read_body(request, max_body_bytes)
        except ClientDisconnect:
            return Response(status_code=CLIENT_CLOSED)
        body = parse(raw)
        request_id = uuid.uuid4().hex
        generation = for_tenant(body.generation(request_id), caller_of(request.scope), apart=apart)
        traceparent = checked(request.headers.get(HEADER))
        running = await pipeline.prepare(replace(generation, traceparent=traceparent))
        reply = ChatReply(
            model=running.offer.model,
            request_id=request_id,
            created=int(time.time()),
            prompt_tokens=len(running.prompt),
            top_logprobs=body.top_logprobs or 0,
        )
        return await _answer(request, pipeline, running, body, reply)

    _add_reports(app, pipeline, metrics=metrics, ready=ready, door=door, created=created)
    return app


def _add_reports(
    app: FastAPI,
    pipeline: Pipeline,
    *,
    metrics: Callable[[], bytes],
    ready: Callable[[], bool],
    door: Door,
    created: int,
) -> None:
    """Add what tells about the server itself."""

    @app.get("/v1/models")
    async def models() -> dict[str, Any]:
        """List what the live workers serve."""
        return {
            "object": "list",
            "data": [
                {
                    "id": offer.model,
                    "object": "model",
                    "created": created,
                    "owned_by": "kvstore",
                    "max_model_len": offer.max_model_tokens,
                }
                for offer in pipeline.fleet.offers().values()
            ],
        }

    @app.get("/health")
    async def health() -> Response:
        """Say whether a request could be served now."""
        if door.closed:
            return JSONResponse({"status": "draining"}, status_code=503)
        if ready():
            return JSONResponse({"status": "ok"})
        return JSONResponse({"status": "no worker is ready"}, status_code=503)

    @app.get("/metrics")
    async def exposition() -> Response:
        """Return what Prometheus scrapes."""
        return Response(metrics(), media_type="text/plain; version=0.0.4; charset=utf-8")


async def _answer(
    request: Request, pipeline: Pipeline, running: Running, body: ChatBody, reply: ChatReply
) -> Response:
    """Run a prepared request and return its reply; a client that leaves cancels it."""
    chunks = pipeline.run(running)
    if not body.stream:
        every = await _unless_gone(request, whole(chunks))
        if every is None:
            return Response(status_code=CLIENT_CLOSED)
        return JSONResponse(reply.whole(every, pipeline.tokenizer))
    # The first chunk decides: before it, a failure is still a status code and not a broken stream.
    started = await _unless_gone(request, begin(chunks))
    if started is None:
        return Response(status_code=CLIENT_CLOSED)
    usage = body.stream_options is not None and body.stream_options.include_usage
    events = _events(started, pipeline, reply, usage=usage)
    return EventStream(started, events, seconds=running.left_s + LAST_WORDS_SECONDS)


class EventStream(StreamingResponse):
    """Server-sent events that end their request however the response ends, even before it began.

    A client that reads nothing holds its connection, and so the request, for `seconds` at most.
    """

    def __init__(
        self, started: Started, events: AsyncGenerator[bytes, None], *, seconds: float
    ) -> None:
        super().__init__(
            events, media_type="text/event-stream", headers={"Cache-Control": "no-cache"}
        )
        self._started = started
        self._events = events
        self._seconds = seconds

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Send the events; see the class."""
        try:
            async with asyncio.timeout(self._seconds):
                await super().__call__(scope, receive, send)
        except TimeoutError:
            return  # uvicorn closes a connection whose response was not finished
        finally:
            await self._events.aclose()
            await self._started.close()


async def _events(
    started: Started, pipeline: Pipeline, reply: ChatReply, *, usage: bool
) -> AsyncGenerator[bytes, None]:
    """Yield server-sent events until `[DONE]`, or an error where the stream breaks."""
    try:
        yield _event(reply.opening())
        output_tokens = 0
        async for chunk in started.chunks():
            output_tokens = chunk.output_tokens
            # Half a character is no text yet; clients need no empty piece for it.
            if chunk.text or chunk.finish_reason or chunk.chances:
                yield _event(reply.piece(chunk, pipeline.tokenizer))
        if usage:
            yield _event(reply.usage_piece(output_tokens))
        yield b"data: [DONE]\n\n"
    except KvStoreError as error:
        yield _event(failure(error)[1])


def _event(content: dict[str, Any]) -> bytes:
    return b"data: " + json.dumps(content, ensure_ascii=False).encode() + b"\n\n"


async def _unless_gone(request: Request, work: Awaitable[T]) -> T | None:
    """Return what `work` gives, or cancel it and return None when the client goes away first."""
    working = asyncio.ensure_future(work)
    leaving = asyncio.ensure_future(_gone(request))
    try:
        await asyncio.wait({working, leaving}, return_when=asyncio.FIRST_COMPLETED)
        return working.result() if working.done() else None
    finally:
        for task in (working, leaving):
            task.cancel()
        await asyncio.gather(working, leaving, return_exceptions=True)


async def _gone(request: Request) -> None:
    """Return when the client has closed the connection."""
    while (await request.receive())["type"] != "http.disconnect":
        continue


async def _read_body(request: Request, limit: int) -> bytes:
    """Return the body; raises `TooLarge` over the limit, `BadInput` where it does not arrive."""
    body = bytearray()
    try:
        async with asyncio.timeout(BODY_S):
            async for part in request.stream():
                body += part
                if len(body) > limit:
                    raise TooLarge(f"the body is over {limit} bytes")
    except TimeoutError as error:
        raise BadInput(f"the body did not arrive within {BODY_S:g} s") from error
    return bytes(body)


async def _explain(request: Request, error: Exception) -> JSONResponse:
    assert isinstance(error, KvStoreError), "registered for our errors only"
    status, body, headers = failure(error)
    return JSONResponse(body, status_code=status, headers=headers)


async def _explain_http(request: Request, error: Exception) -> JSONResponse:
    """Give unknown paths and methods the same shape."""
    assert isinstance(error, HTTPException), "registered for HTTP errors only"
    kind = "invalid_request_error" if error.status_code < 500 else "server_error"
    body = {"error": {"message": error.detail, "type": kind, "param": None, "code": None}}
    return JSONResponse(body, status_code=error.status_code, headers=error.headers)
