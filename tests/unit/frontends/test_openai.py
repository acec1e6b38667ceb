"""The HTTP application as a server calls it, with clients that leave or read nothing."""

import asyncio
from collections.abc import AsyncGenerator
from typing import Any

import pytest
from kvworkers.frontends.door import Door
from kvworkers.frontends.generation import Chunk
from kvworkers.frontends.openai import events as module
from kvworkers.frontends.openai.app import make_app
from kvworkers.frontends.openai.events import EventStream
from kvworkers.frontends.replies import Started, begin
from prometheus_client import CollectorRegistry

from kvstore.observe.metrics import RouterMetrics
from kvstore.rpc.gate import gate_of
from kvstore.rpc.security import SecurityConfig
from tests.patience import PATIENCE_S


async def test_a_client_that_leaves_in_its_own_body_is_no_failure() -> None:
    nothing: Any = None  # the body never gets as far as the pipeline
    app = make_app(
        nothing, metrics=bytes, ready=lambda: True, max_body_bytes=64, created=0,
        gate=gate_of(SecurityConfig(), CollectorRegistry()), apart=False,
        door=Door(RouterMetrics(CollectorRegistry())),
    )  # fmt: skip
    sent: list[Any] = []

    async def receive() -> dict[str, Any]:
        return {"type": "http.disconnect"}

    async def send(message: Any) -> None:
        sent.append(message)

    scope = {
        "type": "http", "asgi": {"version": "3.0"}, "http_version": "1.1", "method": "POST",
        "scheme": "http", "path": "/v1/chat/completions", "raw_path": b"", "root_path": "",
        "query_string": b"", "headers": [],
    }  # fmt: skip
    await app(scope, receive, send)
    assert sent[0]["status"] == 499


async def test_a_client_that_reads_nothing_does_not_hold_its_request_for_ever() -> None:
    closed = asyncio.Event()

    async def chunks() -> AsyncGenerator[Chunk, None]:
        try:
            while True:
                yield Chunk(text="a")
        finally:
            closed.set()

    async def events(started: Started[Chunk]) -> AsyncGenerator[bytes, None]:
        async for chunk in started.chunks():
            yield chunk.text.encode()

    async def receive() -> dict[str, Any]:
        await asyncio.Event().wait()
        return {}

    async def send(message: Any) -> None:
        if message["type"] == "http.response.body":
            await asyncio.Event().wait()  # its window is full, and stays so

    started = await begin(chunks())
    response = EventStream(events(started), close=started.close, seconds=0.05)
    await response({"type": "http", "asgi": {"spec_version": "2.3"}}, receive, send)
    assert closed.is_set()


async def test_a_body_that_does_not_come_is_not_waited_for(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(module, "BODY_S", 0.05)
    nothing: Any = None  # the body never gets as far as the pipeline
    app = make_app(
        nothing, metrics=bytes, ready=lambda: True, max_body_bytes=64, created=0,
        gate=gate_of(SecurityConfig(), CollectorRegistry()), apart=False,
        door=Door(RouterMetrics(CollectorRegistry())),
    )  # fmt: skip
    parts = [{"type": "http.request", "body": b"{", "more_body": True}]
    sent: list[Any] = []

    async def receive() -> dict[str, Any]:
        if not parts:
            await asyncio.Event().wait()
        return parts.pop()

    async def send(message: Any) -> None:
        sent.append(message)

    scope: dict[str, Any] = {
        "type": "http", "asgi": {"version": "3.0"}, "http_version": "1.1", "method": "POST",
        "scheme": "http", "path": "/v1/chat/completions", "raw_path": b"", "root_path": "",
        "query_string": b"", "headers": [], "client": ("127.0.0.1", 1), "server": None,
        "state": {},
    }  # fmt: skip
    async with asyncio.timeout(PATIENCE_S):
        await app(scope, receive, send)
    assert sent[0]["status"] == 400
    assert b"did not arrive" in sent[1]["body"]
