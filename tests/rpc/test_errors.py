"""Every error of the tree, raised in a handler, arrives at the caller as itself.

Server side kvstore.rpc.interceptors, client side kvstore.rpc.errors.
"""

from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import grpc.aio
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc

from kvstore.core import errors
from kvstore.core.errors import KvStoreError, Refused
from kvstore.core.limits import MAX_MESSAGE_BYTES
from kvstore.rpc.channel import listen, make_server, open_channel
from kvstore.rpc.errors import RETRY_AFTER_KEY, STATUS, error_from
from kvstore.rpc.v1 import cache_pb2, cache_pb2_grpc, watch_pb2
from tests.patience import PATIENCE_S


class Raising(cache_pb2_grpc.CacheNodeServicer):  # type: ignore[misc]
    """Raises what it was given, before or after a streamed message."""

    def __init__(self) -> None:
        self.error: Exception = KvStoreError("unset")
        self.first = 0

    async def Stats(self, request: Any, context: Any) -> Any:
        raise self.error

    async def Watch(self, request: Any, context: Any) -> AsyncIterator[Any]:
        for _ in range(self.first):
            yield watch_pb2.WatchReply()
        raise self.error


@pytest.fixture
async def served(tmp_path: Path) -> AsyncIterator[tuple[Raising, cache_pb2_grpc.CacheNodeStub]]:
    servicer = Raising()
    server, _ = make_server()
    cache_pb2_grpc.add_CacheNodeServicer_to_server(servicer, server)
    address = listen(server, f"unix:{tmp_path}/s")
    await server.start()
    channel = open_channel(address)
    yield servicer, cache_pb2_grpc.CacheNodeStub(channel)
    await channel.close(None)
    await server.stop(None)


def tree() -> list[type[KvStoreError]]:
    def below(cls: type[KvStoreError]) -> list[type[KvStoreError]]:
        return [cls, *(leaf for child in cls.__subclasses__() for leaf in below(child))]

    # Only the tree itself: a room may refine an error, and that class may be imported here or not.
    return [
        c for c in below(KvStoreError) if c is not KvStoreError and c.__module__ == errors.__name__
    ]


async def failure(call: Any) -> grpc.aio.AioRpcError:
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await call
    return caught.value


@pytest.mark.parametrize("cls", tree(), ids=lambda cls: cls.__name__)
async def test_a_unary_call_raises_the_very_class(
    served: tuple[Raising, cache_pb2_grpc.CacheNodeStub], cls: type[KvStoreError]
) -> None:
    servicer, stub = served
    servicer.error = Refused("später: ¼", 1500) if cls is Refused else cls("später: ¼")
    failed = await failure(stub.Stats(cache_pb2.StatsRequest(), timeout=PATIENCE_S))
    assert failed.code() is STATUS[cls]
    error = error_from(failed)
    assert type(error) is cls
    assert str(error) == "später: ¼"
    if isinstance(error, Refused):
        assert error.retry_after_ms == 1500


async def test_a_refinement_of_a_room_arrives_as_the_class_of_the_tree(
    served: tuple[Raising, cache_pb2_grpc.CacheNodeStub],
) -> None:
    class FieldAtFault(errors.BadInput):
        pass

    servicer, stub = served
    servicer.error = FieldAtFault("temperature is nan")
    error = error_from(await failure(stub.Stats(cache_pb2.StatsRequest(), timeout=PATIENCE_S)))
    assert type(error) is errors.BadInput
    assert str(error) == "temperature is nan"


@pytest.mark.parametrize("first", [0, 1])
@pytest.mark.parametrize("cls", [errors.Forbidden, errors.Refused])
async def test_a_stream_raises_it_too(
    served: tuple[Raising, cache_pb2_grpc.CacheNodeStub], cls: type[KvStoreError], first: int
) -> None:
    servicer, stub = served
    servicer.error, servicer.first = cls("no"), first
    stream = stub.Watch(watch_pb2.WatchRequest(), timeout=PATIENCE_S)
    for _ in range(first):
        assert isinstance(await stream.read(), watch_pb2.WatchReply)
    assert type(error_from(await failure(stream.read()))) is cls


async def test_a_bug_shows_nothing_of_itself(
    served: tuple[Raising, cache_pb2_grpc.CacheNodeStub], caplog: pytest.LogCaptureFixture
) -> None:
    servicer, stub = served
    servicer.error = RuntimeError("tenant A's secret")
    failed = await failure(stub.Stats(cache_pb2.StatsRequest(), timeout=PATIENCE_S))
    assert failed.code() is grpc.StatusCode.INTERNAL
    assert "secret" not in f"{failed.details()}{failed.trailing_metadata()}"
    assert "secret" in caplog.text, "the server's own log has it"
    servicer.error = errors.NotFound("still serving")
    again = await failure(stub.Stats(cache_pb2.StatsRequest(), timeout=PATIENCE_S))
    assert type(error_from(again)) is errors.NotFound


async def test_an_oversized_message_is_too_large_on_either_side(
    served: tuple[Raising, cache_pb2_grpc.CacheNodeStub],
) -> None:
    _, stub = served
    names = bytes(MAX_MESSAGE_BYTES + 32)
    failed = await failure(stub.Lookup(cache_pb2.LookupRequest(names=names), timeout=PATIENCE_S))
    assert type(error_from(failed)) is errors.TooLarge


async def test_a_call_that_nobody_serves_is_unsupported(
    served: tuple[Raising, cache_pb2_grpc.CacheNodeStub],
) -> None:
    _, stub = served
    failed = await failure(stub.Pin(cache_pb2.PinRequest(), timeout=PATIENCE_S))
    assert type(error_from(failed)) is errors.Unsupported
    failed = await failure(stub.Get(cache_pb2.GetRequest(), timeout=PATIENCE_S).read())
    assert type(error_from(failed)) is errors.Unsupported
    failed = await failure(stub.Put(iter([cache_pb2.PutRequest()]), timeout=PATIENCE_S))
    assert type(error_from(failed)) is errors.Unsupported


async def test_an_oversized_message_from_a_careless_peer_is_refused_by_the_server(
    served: tuple[Raising, cache_pb2_grpc.CacheNodeStub], tmp_path: Path
) -> None:
    async with grpc.aio.insecure_channel(f"unix:{tmp_path}/s") as careless:
        stub = cache_pb2_grpc.CacheNodeStub(careless)
        request = cache_pb2.LookupRequest(names=bytes(MAX_MESSAGE_BYTES + 32))
        failed = await failure(stub.Lookup(request, timeout=PATIENCE_S))
        assert type(error_from(failed)) is errors.TooLarge


async def test_health_is_served_both_ways(tmp_path: Path) -> None:
    server, health = make_server()
    await health.set("", health_pb2.HealthCheckResponse.SERVING)
    address = listen(server, f"unix:{tmp_path}/h")
    await server.start()
    channel = open_channel(address)
    stub = health_pb2_grpc.HealthStub(channel)
    reply = await stub.Check(health_pb2.HealthCheckRequest(), timeout=PATIENCE_S)
    assert reply.status == health_pb2.HealthCheckResponse.SERVING
    watching = stub.Watch(health_pb2.HealthCheckRequest(), timeout=PATIENCE_S)
    reply = await watching.read()
    assert reply.status == health_pb2.HealthCheckResponse.SERVING
    watching.cancel()
    await channel.close(None)
    await server.stop(None)


async def test_nobody_there_is_unreachable(tmp_path: Path) -> None:
    channel = open_channel(f"unix:{tmp_path}/nobody")
    stub = cache_pb2_grpc.CacheNodeStub(channel)
    failed = await failure(stub.Stats(cache_pb2.StatsRequest(), timeout=PATIENCE_S))
    assert type(error_from(failed)) is errors.Unreachable
    await channel.close(None)


def odd(code: grpc.StatusCode, *trailing: tuple[str, str | bytes]) -> grpc.aio.AioRpcError:
    """A failure as a peer of another version could send it."""
    return grpc.aio.AioRpcError(
        code, grpc.aio.Metadata(), grpc.aio.Metadata(*trailing), "odd", None
    )


def test_unknown_classes_fall_back_to_the_status() -> None:
    future = odd(grpc.StatusCode.DATA_LOSS, ("kvstore-error", "FromTheFuture"))
    assert type(error_from(future)) is errors.Corrupt
    assert type(error_from(grpc.RpcError("bare"))) is errors.Unreachable
    assert type(error_from(odd(grpc.StatusCode.UNKNOWN))) is errors.Unreachable


@pytest.mark.parametrize(("sent", "meant"), [(b"12", 12), ("12", 12), ("soon", 0), ("-1", 0)])
def test_a_strange_retry_after_is_no_reason_to_fail(sent: str | bytes, meant: int) -> None:
    refused = error_from(odd(grpc.StatusCode.RESOURCE_EXHAUSTED, (RETRY_AFTER_KEY, sent)))
    assert isinstance(refused, Refused)
    assert refused.retry_after_ms == meant
