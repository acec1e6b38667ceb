"""A client that does not map the arena: bytes through the bulk port, sessions by call."""

import asyncio
import signal
from collections.abc import Iterator

import grpc
import grpc.aio
import pytest

from kvstore.client import Client, ClientConfig
from kvstore.client.remote import AsyncRemoteClient
from kvstore.core.errors import BadInput, Refused, Unreachable
from kvstore.core.names import BlockName, chain, pack_tokens
from kvstore.core.outcomes import SettleOutcome
from kvstore.rpc.channel import open_channel
from kvstore.rpc.convert import namespace_to_proto
from kvstore.rpc.v1 import cache_pb2, cache_pb2_grpc
from kvstore.service.bulk_calls import PIECE_BYTES
from kvstore.service.calls import SESSION_KEY
from kvstore.testing.node import RunningNode, start_node
from tests.patience import PATIENCE_MS, PATIENCE_S, PATIENT
from tests.session_process import PAYLOAD, SHARES, connect, names_of, namespace

DONE = SettleOutcome.DONE


@pytest.fixture(scope="module")
def node() -> Iterator[RunningNode]:
    with start_node(arena_bytes=64 << 20) as running:
        yield running


async def remote(node: RunningNode, label: str) -> AsyncRemoteClient:
    return await AsyncRemoteClient.connect(
        node.listen,
        namespace=namespace(label),
        payload_bytes=PAYLOAD,
        shares=SHARES,
        config=PATIENT,
    )


def named(client: AsyncRemoteClient, prompt: int, count: int) -> list[BlockName]:
    return list(chain(client.root, pack_tokens([prompt] * 16 * count)))


def payloads(prompt: int, count: int) -> list[bytes]:
    return [bytes([prompt, i]) * (PAYLOAD // 2) for i in range(count)]


async def test_what_was_put_remotely_is_got_by_everyone(node: RunningNode) -> None:
    async with await remote(node, "both") as client:
        names = named(client, 1, 20)
        assert await client.put(names, payloads(1, 20)) == [DONE] * 20
        assert [bytes(block) for block in await client.get(names)] == payloads(1, 20)
        assert (await client.lookup(names)).prefix == 20
        with connect(node.run_dir, "both") as local:
            assert local.root == client.root
            assert local.get(names) == payloads(1, 20)
            more = names_of(local, 2, 3)
            assert local.put(more, payloads(2, 3)) == [DONE] * 3
            # Not hashed yet, perhaps: the ticket waits for the sums.
            assert [bytes(block) for block in await client.get(more)] == payloads(2, 3)
        assert await client.get(named(client, 3, 2)) == []
        again = await client.put(names[:2], payloads(9, 2))
        assert again == [None, None], "what is there is not written again"
        assert [bytes(block) for block in await client.get(names[:2])] == payloads(1, 2)
        stats = await client.stats()
        assert stats.leases == 0
        assert stats.reserved_bytes == 0


async def test_bad_input_names_itself(node: RunningNode) -> None:
    async with await remote(node, "bad") as client:
        names = named(client, 1, 2)
        with pytest.raises(BadInput, match="payloads for 2 names"):
            await client.put(names, payloads(1, 1))
        with pytest.raises(BadInput, match="payload is not"):
            await client.put(names, [b"x", b"y"])
        with pytest.raises(BadInput, match="buffer is not"):
            await client.get_into(names, [memoryview(bytearray(1))] * 2)
        with pytest.raises(BadInput, match="buffers for 2 names"):
            await client.get_into(names, [memoryview(bytearray(PAYLOAD))])
    with pytest.raises(Unreachable):
        await AsyncRemoteClient.connect(
            "127.0.0.1:1", namespace=namespace("bad"), payload_bytes=PAYLOAD, shares=SHARES,
            config=ClientConfig(connect_ms=300),
        )  # fmt: skip


async def test_nobody_commits_what_did_not_come(node: RunningNode) -> None:
    """Raw calls, as a faulty client would make them."""
    async with await remote(node, "raw") as client:
        call, root = client._call, client.root
        names = b"".join(named(client, 1, 2))

        def acquire(root: bytes) -> cache_pb2.AcquireRequest:
            return cache_pb2.AcquireRequest(root=root, names=names, reserve=2, deadline_ms=100)

        reply = await call("Acquire", acquire, 5_000)
        refs = cache_pb2.SlotRefs(
            slots=reply.reserved_slots, generations=reply.reserved_generations
        )
        settle = cache_pb2.SettleRequest(root=root, commit=refs)
        early = await client._once("Settle", settle, 5_000)
        assert list(early.commit) == [cache_pb2.SETTLE_OUTCOME_NOT_YOURS] * 2
        ticket = cache_pb2.TicketRequest(root=root, write=refs)
        await client._once("Ticket", ticket, 5_000)
        with pytest.raises(Refused, match="ticket already"):
            await client._once("Ticket", ticket, 5_000)
        with pytest.raises(BadInput, match="one of them"):
            await client._once("Ticket", cache_pb2.TicketRequest(root=root), 5_000)
        read = cache_pb2.TicketRequest(root=root, read=refs, lease=1)
        with pytest.raises(Refused, match="not held"):
            await client._once("Ticket", read, 5_000)
        # Given back although a ticket is out: the slots drain until it has ended.
        abort = cache_pb2.SettleRequest(root=root, abort=refs)
        given = await client._once("Settle", abort, 5_000)
        assert list(given.abort) == [cache_pb2.SETTLE_OUTCOME_DONE] * 2
        stats = await client.stats()
        assert stats.reserved_bytes == 0
        assert stats.slots["draining"] == 2


async def test_a_session_outlives_its_node(node: RunningNode) -> None:
    async with await remote(node, "restart") as client:
        names = named(client, 1, 8)
        assert await client.put(names, payloads(1, 8)) == [DONE] * 8
        assert [bytes(block) for block in await client.get(names)] == payloads(1, 8)
        incarnation = await asyncio.to_thread(node.kill_node)
        await asyncio.to_thread(node.wait_restarted, incarnation)
        async with asyncio.timeout(PATIENCE_S):
            while True:
                try:
                    found = await client.get(names)
                    break
                except Unreachable:  # its port is not there again yet
                    await asyncio.sleep(0.05)
        assert [bytes(block) for block in found] == payloads(1, 8)


async def test_a_stopped_node_costs_one_deadline(node: RunningNode) -> None:
    async with await remote(node, "hung") as client:
        names = named(client, 1, 2)
        assert await client.put(names, payloads(1, 2)) == [DONE] * 2
        node.signal_node(signal.SIGSTOP)
        try:
            with pytest.raises(Unreachable):
                await client.get(names, deadline_ms=200)
        finally:
            node.signal_node(signal.SIGCONT)
        assert len(await client.get(names)) == 2


def test_get_and_put_through_grpc_alone(node: RunningNode) -> None:
    """The streaming calls, as a client in a language with nothing but gRPC would use them."""
    with connect(node.run_dir, "stream") as local, grpc.insecure_channel(node.listen) as channel:
        stub = cache_pb2_grpc.CacheNodeStub(channel)
        request = cache_pb2.OpenSessionRequest(
            namespace=namespace_to_proto(namespace("stream")),
            block_bytes=PAYLOAD,
            payload_bytes=PAYLOAD,
            shares=SHARES,
        )
        opened = stub.OpenSession(request, timeout=PATIENCE_S)
        metadata = ((SESSION_KEY, opened.session_token),)
        names, blocks = names_of(local, 1, 3), payloads(1, 3)
        pieces = [
            cache_pb2.PutRequest(root=opened.root, name=name, data=part, position=at)
            for at, (name, block) in enumerate(zip(names, blocks, strict=True))
            for part in (block[:1_000], block[1_000:])
        ]
        put = stub.Put(iter(pieces), timeout=PATIENCE_S, metadata=metadata)
        assert [int(outcome) for outcome in put.outcomes] == [1, 1, 1]
        assert local.get(names) == blocks
        wanted = cache_pb2.GetRequest(
            root=opened.root, names=b"".join([*names, bytes(32)]), deadline_ms=1_000
        )
        assert PAYLOAD <= PIECE_BYTES, "one reply for each block here"
        got = list(stub.Get(wanted, timeout=PATIENCE_S, metadata=metadata))
        found = [b"".join(reply.data for reply in got if reply.index == at) for at in range(3)]
        assert found == blocks
        assert (got[-1].index, got[-1].outcome, got[-1].data) == (3, 2, b"")
        for bad, says in (
            ([pieces[0], pieces[2]], "middle of a block"),
            ([pieces[0]], "ends after 1000"),
            ([cache_pb2.PutRequest(root=opened.root, name=names[0], data=bytes(PAYLOAD + 1))],
             "more than"),
        ):  # fmt: skip
            with pytest.raises(grpc.RpcError, match=says):
                stub.Put(iter(bad), timeout=PATIENCE_S, metadata=metadata)
        assert local.stats().leases == 0


async def test_a_silent_session_ends(node: RunningNode) -> None:
    """Not waited for here (30 s): the unit test has the clock; this sees what the call promises."""
    async with open_channel(node.listen) as channel:
        stub = cache_pb2_grpc.CacheNodeStub(channel)
        request = cache_pb2.OpenSessionRequest(
            namespace=namespace_to_proto(namespace("silent")),
            block_bytes=PAYLOAD,
            payload_bytes=PAYLOAD,
            shares=SHARES,
        )
        reply = await stub.OpenSession(request, timeout=PATIENCE_S)
        assert reply.session_ms > 1_000
        metadata = ((SESSION_KEY, reply.session_token),)
        await stub.CloseSession(
            cache_pb2.CloseSessionRequest(), timeout=PATIENCE_S, metadata=metadata
        )
        with pytest.raises(grpc.aio.AioRpcError, match="no such session"):
            await stub.Settle(
                cache_pb2.SettleRequest(root=reply.root), timeout=PATIENCE_S, metadata=metadata
            )


def test_local_sessions_get_no_tickets_to_write(node: RunningNode) -> None:
    with connect(node.run_dir, "local") as local:
        assert isinstance(local, Client)
        acquired = local.acquire(names_of(local, 1, 1), reserve=1)
        slot = acquired.reserved[0].slot
        link = local._inner._link
        refs = cache_pb2.SlotRefs(slots=[slot.slot], generations=[slot.generation])
        request = cache_pb2.TicketRequest(root=local.root, write=refs)
        with pytest.raises(BadInput, match="writes in place"):
            local._thread.run(
                link.call(link.session, "Ticket", request, 5_000), deadline_ms=PATIENCE_MS
            )
        local.settle(abort=[slot])
