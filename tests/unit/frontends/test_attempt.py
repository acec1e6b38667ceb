"""How one call of a worker ends, as the frontend sees it."""

from typing import Any, cast

import pytest
from kvworkers.frontends.attempt import attempt

from kvstore.core.errors import Unreachable
from kvstore.rpc.v1 import worker_pb2, worker_pb2_grpc
from tests.patience import PATIENCE_S


class _Call:
    """A stream of messages that were written before."""

    def __init__(self, replies: list[worker_pb2.RunReply]) -> None:
        self._replies = replies

    async def read(self) -> worker_pb2.RunReply | None:
        return self._replies.pop(0) if self._replies else None

    def cancel(self) -> None:
        self._replies.clear()


class _Stub:
    def __init__(self, *replies: worker_pb2.RunReply) -> None:
        self._replies = list(replies)

    def Run(self, request: worker_pb2.RunRequest, **options: Any) -> _Call:
        return _Call(self._replies)


async def _reasons(*replies: worker_pb2.RunReply) -> list[str]:
    stub = cast("worker_pb2_grpc.WorkerStub", _Stub(*replies))
    request = worker_pb2.RunRequest()
    messages = attempt(
        stub, request, timeout_s=PATIENCE_S, silence_ms=lambda: 0.0, lost_after_ms=1_000.0
    )
    return [reply.finish_reason async for reply in messages]


async def test_a_reply_ends_with_its_reason() -> None:
    token = worker_pb2.RunReply(tokens=bytes(4))
    assert await _reasons(token, worker_pb2.RunReply(finish_reason="length")) == ["", "length"]


async def test_what_a_stopping_worker_breaks_off_goes_elsewhere() -> None:
    token = worker_pb2.RunReply(tokens=bytes(4))
    with pytest.raises(Unreachable, match="before its reply was done"):
        await _reasons(token, worker_pb2.RunReply(finish_reason="abort"))
