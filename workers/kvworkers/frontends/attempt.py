"""One call of `Worker.Run`: its messages, or a typed reason why they stopped."""

import asyncio
from collections.abc import AsyncGenerator, Callable
from contextlib import suppress
from typing import Final

import grpc.aio

from kvstore.core.errors import Unreachable
from kvstore.observe.tracing import to_metadata
from kvstore.rpc.errors import error_from
from kvstore.rpc.v1 import worker_pb2, worker_pb2_grpc

LOOK_SECONDS: Final = 0.5
"""How often a silent call is held against its worker's heartbeat."""
_ABORTED: Final = "abort"
"""What a worker that stops says of requests it had no time to finish: no end that a user gets."""


async def attempt(
    stub: worker_pb2_grpc.WorkerStub,
    request: worker_pb2.RunRequest,
    *,
    timeout_s: float,
    silence_ms: Callable[[], float],
    lost_after_ms: float,
    traceparent: str = "",
) -> AsyncGenerator[worker_pb2.RunReply, None]:
    """Yield the worker's messages up to and with the one that has a `finish_reason`.

    Raises the worker's own error; `Unreachable` when the call broke, ended early, or says nothing
    while the worker's heartbeat (`silence_ms`) is silent too. A worker that is merely slow
    still beats. Closing the generator cancels the call. `traceparent` goes with it.
    """
    call = stub.Run(request, timeout=timeout_s, metadata=to_metadata(traceparent))
    reading: asyncio.Future[worker_pb2.RunReply | None] | None = None
    try:
        while True:
            reading = asyncio.ensure_future(_read(call))
            while not (await asyncio.wait({reading}, timeout=LOOK_SECONDS))[0]:
                if silence_ms() > lost_after_ms:
                    raise Unreachable(f"the worker was silent for {silence_ms():.0f} ms")
            reply = reading.result()
            if reply is None:
                raise Unreachable("the worker's stream ended before its reply did")
            if reply.finish_reason == _ABORTED:
                raise Unreachable("the worker ended the request before its reply was done")
            yield reply
            if reply.finish_reason:
                return
    finally:
        call.cancel()
        if reading is not None and not reading.done():
            reading.cancel()
            with suppress(asyncio.CancelledError, Unreachable):
                await reading


async def _read(
    call: "grpc.aio.UnaryStreamCall[worker_pb2.RunRequest, worker_pb2.RunReply]",
) -> worker_pb2.RunReply | None:
    """Return the next message, None at the end of the stream; raises our errors."""
    try:
        reply = await call.read()
    except grpc.aio.AioRpcError as failure:
        raise error_from(failure) from failure
    except asyncio.CancelledError:
        task = asyncio.current_task()
        if task is not None and task.cancelling():
            raise
        # Nobody cancelled us: the channel was closed under the call, because its worker left.
        raise Unreachable("the worker left before its reply ended") from None
    return reply if isinstance(reply, worker_pb2.RunReply) else None
