"""Who may record, and how many at once, over gRPC (`kvstore.service.recorder`)."""

import asyncio
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import asynccontextmanager

import grpc
import pytest
from prometheus_client import CollectorRegistry

from kvstore.core.errors import BadInput, Forbidden, KvStoreError, Refused
from kvstore.core.limits import BLOCK_TOKENS, MAX_ID_BYTES
from kvstore.observe.metrics import NodeMetrics
from kvstore.rpc.channel import listen, make_server, open_channel
from kvstore.rpc.errors import error_from
from kvstore.rpc.identity import Identity, LocalIdentity, Principal, Role
from kvstore.rpc.v1 import record_pb2, record_pb2_grpc
from kvstore.service.recorder import MAX_RECORDINGS, Recorders, RecorderService
from tests.patience import PATIENCE_S


class WatcherIdentity:
    """Everyone may watch and nothing else."""

    def identify(
        self, metadata: Mapping[str, str | bytes], peer: str, certificate: Sequence[str] = ()
    ) -> Principal:
        return Principal("router", "default", frozenset({Role.WATCH}))


@asynccontextmanager
async def serving(
    identity: Identity,
) -> AsyncIterator[tuple[Recorders, record_pb2_grpc.RecorderStub]]:
    recorders = Recorders(NodeMetrics(CollectorRegistry()))
    server, _ = make_server()
    record_pb2_grpc.add_RecorderServicer_to_server(RecorderService(recorders, identity), server)
    address = listen(server, "127.0.0.1:0")
    await server.start()
    try:
        async with open_channel(address) as channel:
            yield recorders, record_pb2_grpc.RecorderStub(channel)
    finally:
        await server.stop(0)


async def _refusal(stub: record_pb2_grpc.RecorderStub, subscriber: str = "") -> KvStoreError:
    with pytest.raises(grpc.RpcError) as caught:
        await stub.Record(record_pb2.RecordRequest(subscriber=subscriber)).read()
    return error_from(caught.value)


async def test_recording_needs_the_admin_role() -> None:
    async with serving(WatcherIdentity()) as (recorders, stub):
        assert isinstance(await _refusal(stub), Forbidden)
        assert not len(recorders)


async def test_a_senseless_subscriber_is_refused() -> None:
    async with serving(LocalIdentity()) as (recorders, stub):
        assert isinstance(await _refusal(stub, "x" * (MAX_ID_BYTES + 1)), BadInput)
        assert not len(recorders)


async def test_recordings_at_once_are_bounded_and_end_with_their_callers() -> None:
    async with serving(LocalIdentity()) as (recorders, stub):
        calls = [stub.Record(record_pb2.RecordRequest()) for _ in range(MAX_RECORDINGS)]
        for call in calls:
            assert (await call.read()).block_tokens == BLOCK_TOKENS
        assert isinstance(await _refusal(stub), Refused)
        recorders.note(2, bytes(64))
        for call in calls:
            (access,) = (await call.read()).accesses
            assert (access.first_block, len(access.blocks)) == (2, 2)
            call.cancel()
        async with asyncio.timeout(PATIENCE_S):
            while len(recorders):  # noqa: ASYNC110 (the node tells nobody when one ends)
                await asyncio.sleep(0.01)


async def test_a_slow_caller_is_told_what_it_missed() -> None:
    async with serving(LocalIdentity()) as (recorders, stub):
        call = stub.Record(record_pb2.RecordRequest())
        await call.read()
        recorders._running[0].max_names = 1
        for _ in range(3):
            recorders.note(0, bytes(32))
        reply = await call.read()
        assert (len(reply.accesses), reply.dropped) == (1, 2)
        call.cancel()
