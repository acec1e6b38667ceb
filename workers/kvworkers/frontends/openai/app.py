"""The application: which path does what, and how an answer becomes a response."""

import asyncio
import time
import uuid
from collections.abc import AsyncGenerator, Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, Final, Protocol

from fastapi import FastAPI, Request, Response
from fastapi.responses import JSONResponse
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect

from kvstore.core.errors import KvStoreError
from kvstore.observe.tracing import HEADER, checked
from kvstore.rpc.gate import Gate
from kvworkers.frontends.access import Access, caller_of
from kvworkers.frontends.choices import Numbered, side_by_side
from kvworkers.frontends.door import Door
from kvworkers.frontends.generation import Chunk, Generation
from kvworkers.frontends.openai.chat import ChatBody
from kvworkers.frontends.openai.completions import CompletionBody
from kvworkers.frontends.openai.errors import failure
from kvworkers.frontends.openai.events import DONE, EventStream, event, read_body, unless_gone
from kvworkers.frontends.openai.fields import parse
from kvworkers.frontends.openai.tokens import DetokenizeBody, TokenizeBody
from kvworkers.frontends.pipeline import Pipeline
from kvworkers.frontends.replies import Started, begin, whole
from kvworkers.frontends.running import Running
from kvworkers.frontends.tenancy import for_tenant
from kvworkers.frontends.tokenizer import ChatTokenizer

CLIENT_CLOSED: Final = 499
"""What a log shows for a request whose client went away; nobody receives it."""

LAST_WORDS_SECONDS: Final = 5.0
"""Beyond a request's deadline: to send what says that it has passed."""


class Reply(Protocol):
    """Builds what goes out for one request, whichever endpoint was asked."""

    def opening(self) -> list[dict[str, Any]]: ...
    def pieces(self, number: int, chunk: Chunk) -> list[dict[str, Any]]: ...
    def usage_piece(self) -> dict[str, Any]: ...
    def whole(self, chunks: Sequence[Numbered]) -> dict[str, Any]: ...


class Body(Protocol):
    """What came in for one request."""

    stream: bool

    @property
    def choices(self) -> int: ...
    @property
    def wants_usage(self) -> bool: ...
    def generations(self, request_id: str) -> list[Generation]: ...
    def reply(
        self, groups: Sequence[Sequence[Running]], tokenizer: ChatTokenizer, *, created: int
    ) -> Reply: ...


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
    serving = _Serving(pipeline, max_body_bytes, apart)

    @app.post("/v1/chat/completions")
    async def chat(request: Request) -> Response:
        """Answer a conversation, in one piece or as server-sent events."""
        return await serving.answer(request, lambda raw: parse(raw, ChatBody))

    @app.post("/v1/completions")
    async def completions(request: Request) -> Response:
        """Continue texts, in one piece or as server-sent events."""
        return await serving.answer(request, lambda raw: parse(raw, CompletionBody))

    @app.post("/tokenize")
    async def tokenize(request: Request) -> Response:
        """Say which tokens a text or a conversation is."""
        return await serving.tell(request, TokenizeBody)

    @app.post("/detokenize")
    async def detokenize(request: Request) -> Response:
        """Say what tokens mean."""
        return await serving.tell(request, DetokenizeBody)

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


@dataclass(frozen=True, slots=True)
class _Serving:
    """How requests of both endpoints are answered."""

    pipeline: Pipeline
    max_body_bytes: int
    apart: bool

    async def answer(self, request: Request, read: Callable[[bytes], Body]) -> Response:
        """Run a request and return its reply; a client that leaves cancels it."""
        try:
            raw = await read_body(request, self.max_body_bytes)
        except ClientDisconnect:
            return Response(status_code=CLIENT_CLOSED)
        body = read(raw)
        groups = await self._prepare(request, body)
        reply = body.reply(groups, self.pipeline.tokenizer, created=int(time.time()))
        chunks = side_by_side(self.pipeline, groups)
        if not body.stream:
            every = await unless_gone(request, whole(chunks))
            if every is None:
                return Response(status_code=CLIENT_CLOSED)
            return JSONResponse(reply.whole(every))
        # The first chunk decides: before it, a failure is still a status code, no broken stream.
        started = await unless_gone(request, begin(chunks))
        if started is None:
            return Response(status_code=CLIENT_CLOSED)
        return EventStream(
            _events(started, reply, usage=body.wants_usage),
            close=started.close,
            seconds=groups[0][0].left_s + LAST_WORDS_SECONDS,
        )

    async def tell(
        self, request: Request, kind: type[TokenizeBody] | type[DetokenizeBody]
    ) -> Response:
        """Return what needs no worker: the tokenizer is here."""
        try:
            raw = await read_body(request, self.max_body_bytes)
        except ClientDisconnect:
            return Response(status_code=CLIENT_CLOSED)
        told = await parse(raw, kind).answer(self.pipeline)
        # Written off the loop: it may have a million tokens, and each one's text.
        return await asyncio.to_thread(JSONResponse, told)

    async def _prepare(self, request: Request, body: Body) -> list[list[Running]]:
        """Return the choices of each prompt, checked and ready to run."""
        caller = caller_of(request.scope)
        traceparent = checked(request.headers.get(HEADER))
        groups = []
        for asked in body.generations(uuid.uuid4().hex):
            generation = for_tenant(asked, caller, apart=self.apart)
            running = await self.pipeline.prepare(replace(generation, traceparent=traceparent))
            groups.append(running.siblings(body.choices, self.pipeline.tokenizer.decode))
        return groups


async def _events(
    started: Started[Numbered], reply: Reply, *, usage: bool
) -> AsyncGenerator[bytes, None]:
    """Yield server-sent events until `[DONE]`, or an error where the stream breaks."""
    try:
        for piece in reply.opening():
            yield event(piece)
        async for number, chunk in started.chunks():
            for piece in reply.pieces(number, chunk):
                yield event(piece)
        if usage:
            yield event(reply.usage_piece())
        yield DONE
    except KvStoreError as error:
        yield event(failure(error)[1])


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
