"""How bytes come in and go out: bodies with a bound and a deadline, server-sent events."""

import asyncio
import json
from collections.abc import AsyncGenerator, Awaitable, Callable
from typing import Any, Final, TypeVar

from fastapi import Request
from fastapi.responses import StreamingResponse
from starlette.types import Receive, Scope, Send

from kvstore.core.errors import BadInput, TooLarge

BODY_S: Final = 30.0
"""How long a body may take: 8 MiB come in that over 2.3 Mbit/s."""
DONE: Final = b"data: [DONE]\n\n"

T = TypeVar("T")


class EventStream(StreamingResponse):
    """Server-sent events that end their request however the response ends, even before it began.

    A client that reads nothing holds its connection, and so the request, for `seconds` at most.
    """

    def __init__(
        self,
        events: AsyncGenerator[bytes, None],
        *,
        close: Callable[[], Awaitable[None]],
        seconds: float,
    ) -> None:
        """`close` ends the request, whether its events were ever asked for or not."""
        super().__init__(
            events, media_type="text/event-stream", headers={"Cache-Control": "no-cache"}
        )
        self._close = close
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
            await self._close()


def event(content: dict[str, Any]) -> bytes:
    """Return one server-sent event."""
    return b"data: " + json.dumps(content, ensure_ascii=False).encode() + b"\n\n"


async def unless_gone(request: Request, work: Awaitable[T]) -> T | None:
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


async def read_body(request: Request, limit: int) -> bytes:
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
