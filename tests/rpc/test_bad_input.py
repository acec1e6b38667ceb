"""Nonsense sent to a real node: each gets its typed answer, and the node goes on as if nothing was.

Here raw stubs send what our client would not.
"""

import contextlib
import os
import secrets
import time
from collections.abc import AsyncIterator, Iterator
from contextlib import AsyncExitStack
from typing import Any

import grpc.aio
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from kvstore.core.errors import (
    BadInput,
    Forbidden,
    KvStoreError,
    SessionLost,
    TooLarge,
    Unsupported,
    WrongRoot,
)
from kvstore.core.limits import MAX_MESSAGE_BYTES, MAX_NAMES_PER_CALL
from kvstore.rpc.channel import open_channel
from kvstore.rpc.convert import namespace_to_proto
from kvstore.rpc.errors import error_from
from kvstore.rpc.v1 import cache_pb2, cache_pb2_grpc, types_pb2
from kvstore.testing.node import RunningNode, start_node
from kvstore.transport.session_socket import Hello, connect_session
from tests.patience import PATIENCE_S
from tests.session_process import PAYLOAD, SHARES, connect, names_of, namespace

NAME = b"n" * 32
_ALL: Any = list(HealthCheck)


@pytest.fixture(scope="module")
def node() -> Iterator[RunningNode]:
    with start_node(arena_bytes=16 << 20) as running:
        yield running


@pytest.fixture(autouse=True)
def _unharmed(node: RunningNode) -> Iterator[None]:
    """After every test: the same process, nothing held, no failure that nobody foresaw."""
    pid = node.node_pid
    yield
    assert node.node_pid == pid
    assert "Traceback" not in node.log_tail()
    assert "unexpected" not in node.log_tail()
    with connect(node.run_dir, "unharmed") as client:
        names = names_of(client, 1, 2)
        client.put(names, [bytes(PAYLOAD)] * 2)
        assert client.get(names) == [bytes(PAYLOAD)] * 2
        deadline = time.monotonic() + PATIENCE_S
        while client.stats().reserved_bytes or client.stats().leases:
            assert time.monotonic() < deadline, client.stats()


class Raw:
    """A session without a client: a token and a stub."""

    def __init__(self, stub: cache_pb2_grpc.CacheNodeStub, token: bytes) -> None:
        self.stub = stub
        self.token = token
        self.root = b""

    async def call(self, method: str, request: Any, *, token: bytes | None = None) -> Any:
        token = self.token if token is None else token
        metadata = (("kvstore-session-bin", token),) if token else ()
        try:
            return await getattr(self.stub, method)(request, timeout=PATIENCE_S, metadata=metadata)
        except grpc.aio.AioRpcError as failure:
            raise error_from(failure) from failure

    async def close(self) -> None:
        with contextlib.suppress(SessionLost):
            await self.call("CloseSession", cache_pb2.CloseSessionRequest())

    async def open(self, **changes: Any) -> cache_pb2.OpenSessionReply:
        fields: dict[str, Any] = {
            "namespace": namespace_to_proto(namespace("raw")),
            "block_bytes": PAYLOAD,
            "payload_bytes": PAYLOAD,
            "shares": SHARES,
        }
        request = cache_pb2.OpenSessionRequest(**(fields | changes))
        reply: cache_pb2.OpenSessionReply = await self.call("OpenSession", request)
        return reply

    async def acquire(self, names: bytes = NAME, **fields: Any) -> cache_pb2.AcquireReply:
        given: dict[str, Any] = {"root": self.root, "names": names, **fields}
        request = cache_pb2.AcquireRequest(**given)
        reply: cache_pb2.AcquireReply = await self.call("Acquire", request)
        return reply

    async def settle(self, **fields: Any) -> cache_pb2.SettleReply:
        given: dict[str, Any] = {"root": self.root, **fields}
        request = cache_pb2.SettleRequest(**given)
        reply: cache_pb2.SettleReply = await self.call("Settle", request)
        return reply


async def raw_session(node: RunningNode, stack: AsyncExitStack) -> Raw:
    path = str(node.run_dir / "keeper.sock")
    grant, arena_fd, sock = connect_session(path, Hello("raw", (os.getpid(),)), deadline_ms=2000)
    os.close(arena_fd)
    stack.callback(sock.close)
    channel = await stack.enter_async_context(open_channel(grant.rpc))
    raw = Raw(cache_pb2_grpc.CacheNodeStub(channel), grant.token)
    raw.root = (await raw.open()).root
    stack.push_async_callback(raw.close)
    return raw


@pytest.fixture
async def raw(node: RunningNode) -> AsyncIterator[Raw]:
    async with AsyncExitStack() as stack:
        yield await raw_session(node, stack)


@pytest.fixture
async def other(node: RunningNode) -> AsyncIterator[Raw]:
    async with AsyncExitStack() as stack:
        yield await raw_session(node, stack)


def refs(*pairs: tuple[int, int]) -> cache_pb2.SlotRefs:
    return cache_pb2.SlotRefs(slots=[s for s, _ in pairs], generations=[g for _, g in pairs])


@pytest.mark.parametrize(
    ("fields", "error"),
    [
        ({"root": bytes(range(32))}, WrongRoot),
        ({"root": b""}, BadInput),
        ({"root": bytes(31)}, BadInput),
        ({"names": NAME[:-1]}, BadInput),
        ({"names": NAME + b"x"}, BadInput),
        ({"names": NAME * (MAX_NAMES_PER_CALL + 1)}, TooLarge),
        ({"reserve": 2}, BadInput),
        ({"reserve": 2**32 - 1}, BadInput),
        ({"deadline_ms": 2**32 - 1}, BadInput),
        ({"first_block": 2**32 - 1}, TooLarge),
        ({"depth_cost": -0.5}, BadInput),
        ({"depth_cost": 1e9}, BadInput),
        ({"depth_cost": float("nan")}, BadInput),
        ({"kind": "k" * 4_096}, TooLarge),
        ({"kind": "bad\nkind"}, BadInput),
    ],
    ids=lambda value: str(value)[:40],
)
async def test_acquire_refuses(raw: Raw, fields: dict[str, Any], error: type[KvStoreError]) -> None:
    with pytest.raises(error) as caught:
        await raw.acquire(**fields)
    assert type(caught.value) is error


@pytest.mark.parametrize("method", ["Wait", "Lookup"])
async def test_other_calls_check_names_too(raw: Raw, method: str) -> None:
    request = getattr(cache_pb2, f"{method}Request")
    for fields, error in (
        ({"root": bytes(32), "names": NAME}, WrongRoot),
        ({"root": raw.root, "names": NAME[:5]}, BadInput),
        ({"root": raw.root, "names": NAME * (MAX_NAMES_PER_CALL + 1)}, TooLarge),
    ):
        with pytest.raises(error):
            await raw.call(method, request(**fields))
    with pytest.raises(BadInput):
        await raw.call("Wait", cache_pb2.WaitRequest(root=raw.root, deadline_ms=2**32 - 1))


@pytest.mark.parametrize("size", [MAX_MESSAGE_BYTES + 32, 4 * MAX_MESSAGE_BYTES])
async def test_an_oversized_message_is_refused_unread(
    node: RunningNode, raw: Raw, size: int
) -> None:
    async with grpc.aio.insecure_channel(
        node.rpc, options=[("grpc.max_send_message_length", -1)]
    ) as channel:
        careless = Raw(cache_pb2_grpc.CacheNodeStub(channel), raw.token)
        careless.root = raw.root
        with pytest.raises(TooLarge):
            await careless.acquire(bytes(size))
    assert (await raw.acquire()).reason == types_pb2.MISS_REASON_ABSENT


@pytest.mark.parametrize(
    ("changes", "error"),
    [
        ({"share_domain": "another-tenant"}, Forbidden),
        ({"block_bytes": 0}, BadInput),
        ({"block_bytes": PAYLOAD + 4096}, BadInput),
        ({"block_bytes": PAYLOAD - 4096}, BadInput),
        ({"payload_bytes": 0}, BadInput),
        ({"payload_bytes": PAYLOAD - 2}, BadInput),
        ({"payload_bytes": 2**32 - 1, "block_bytes": 2**32 - 4096}, BadInput),
        ({"shares": 0}, BadInput),
        ({"shares": 3}, BadInput),
        ({"shares": 2**32 - 1}, BadInput),
        ({"shares": 4}, BadInput),
        ({"namespace": types_pb2.Namespace()}, BadInput),
        ({"client": "x" * 10_000}, TooLarge),
        ({"client": "two\nlines"}, BadInput),
    ],
    ids=lambda value: str(value)[:50],
)
async def test_open_session_refuses(
    raw: Raw, changes: dict[str, Any], error: type[KvStoreError]
) -> None:
    with pytest.raises(error):
        await raw.open(**changes)
    assert (await raw.open()).root == raw.root, "and serves the next one"


@pytest.mark.parametrize(
    "field",
    ["kind", "fidelity", "weights_digest", "layers", "kv_heads", "head_dim", "block_tokens"],
)
async def test_a_namespace_with_a_field_unset_is_refused(raw: Raw, field: str) -> None:
    broken = namespace_to_proto(namespace("raw"))
    broken.ClearField(field)
    with pytest.raises(BadInput):
        await raw.open(namespace=broken)


async def test_a_token_that_nobody_has_is_no_session(raw: Raw) -> None:
    acquire = cache_pb2.AcquireRequest(root=raw.root, names=NAME)
    for token in (secrets.token_bytes(16), b"short", bytes(16), bytes(4000)):
        with pytest.raises(SessionLost):
            await raw.call("Acquire", acquire, token=token)
    with pytest.raises(SessionLost):
        await raw.call("Acquire", acquire, token=b"")
    with pytest.raises(BadInput):
        await raw.call("OpenSession", cache_pb2.OpenSessionRequest(), token=b"")


async def test_a_root_belongs_to_the_session_that_opened_it(raw: Raw, other: Raw) -> None:
    theirs = await other.open(namespace=namespace_to_proto(namespace("theirs")))
    raw.root = theirs.root
    with pytest.raises(WrongRoot):
        await raw.acquire()


async def test_settling_twice_changes_nothing(raw: Raw) -> None:
    names = secrets.token_bytes(64)
    reply = await raw.acquire(names, reserve=2)
    first, second = zip(reply.reserved_slots, reply.reserved_generations, strict=True)
    done = await raw.settle(commit=refs(first), abort=refs(second))
    assert (list(done.commit), list(done.abort)) == ([cache_pb2.SETTLE_OUTCOME_DONE],) * 2
    again = await raw.settle(commit=refs(first, first), abort=refs(second))
    assert list(again.commit) == [cache_pb2.SETTLE_OUTCOME_ALREADY] * 2
    assert again.abort[0] != cache_pb2.SETTLE_OUTCOME_DONE
    reading = await raw.acquire(names)
    assert reading.ready == 1
    released = await raw.settle(release=[reading.lease, reading.lease, 2**64 - 1])
    assert released.release[0] == cache_pb2.SETTLE_OUTCOME_DONE
    assert cache_pb2.SETTLE_OUTCOME_DONE not in released.release[1:]
    assert (await raw.acquire(names)).ready == 1


async def test_nobody_settles_anothers_slot(raw: Raw, other: Raw) -> None:
    reply = await raw.acquire(secrets.token_bytes(32), reserve=1)
    mine = (reply.reserved_slots[0], reply.reserved_generations[0])
    theirs = await other.settle(commit=refs(mine), abort=refs(mine))
    assert list(theirs.commit) == [cache_pb2.SETTLE_OUTCOME_NOT_YOURS]
    assert list(theirs.abort) == [cache_pb2.SETTLE_OUTCOME_NOT_YOURS]
    assert list((await raw.settle(commit=refs(mine))).commit) == [cache_pb2.SETTLE_OUTCOME_DONE]
    lease = (await raw.acquire(secrets.token_bytes(0))).lease
    assert lease == 0


async def test_nobody_releases_anothers_lease(raw: Raw, other: Raw) -> None:
    name = secrets.token_bytes(32)
    reply = await raw.acquire(name, reserve=1)
    await raw.settle(commit=refs((reply.reserved_slots[0], reply.reserved_generations[0])))
    lease = (await raw.acquire(name)).lease
    assert (await other.settle(release=[lease])).release[0] != cache_pb2.SETTLE_OUTCOME_DONE
    assert (await raw.settle(release=[lease])).release[0] == cache_pb2.SETTLE_OUTCOME_DONE


async def test_slots_that_do_not_exist_are_nobodys(raw: Raw) -> None:
    absurd = [(2**32 - 1, 1), (0, 2**64 - 1), (0, 2**40), (1, 0)]
    settled = await raw.settle(commit=refs(*absurd), abort=refs(*absurd))
    refused = {cache_pb2.SETTLE_OUTCOME_NOT_YOURS, cache_pb2.SETTLE_OUTCOME_STALE}
    assert set(settled.commit) | set(settled.abort) <= refused
    with pytest.raises(BadInput):
        await raw.settle(commit=cache_pb2.SlotRefs(slots=[1, 2], generations=[1]))
    many = [(0, 0)] * (MAX_NAMES_PER_CALL + 1)
    with pytest.raises(TooLarge):
        await raw.settle(abort=refs(*many))


async def test_a_closed_session_is_closed(raw: Raw) -> None:
    await raw.acquire(secrets.token_bytes(64), reserve=2)
    reply = await raw.call("CloseSession", cache_pb2.CloseSessionRequest())
    assert reply.reservations_aborted == 2
    with pytest.raises(SessionLost):
        await raw.acquire()


LEND: dict[str, Any] = {
    "root": bytes(32),
    "block_bytes": 4_096,
    "payload_bytes": 4_096,
    "shares": 1,
}


@pytest.mark.parametrize(
    ("method", "request_of", "error"),
    [
        ("Ticket", cache_pb2.TicketRequest(), BadInput),
        ("Lend", cache_pb2.LendRequest(**LEND, names=bytes(33)), BadInput),
        ("Lend", cache_pb2.LendRequest(**LEND, names=bytes(32 * 1_025)), TooLarge),
        ("Lend", cache_pb2.LendRequest(**LEND, names=NAME, deadline_ms=2**31), BadInput),
        ("Lend", cache_pb2.LendRequest(**{**LEND, "shares": 0}, names=NAME), BadInput),
        ("Lend", cache_pb2.LendRequest(**{**LEND, "root": b"r"}, names=NAME), BadInput),
    ],
)
async def test_tickets_and_loans_name_bad_input(
    raw: Raw, method: str, request_of: Any, error: type[Exception]
) -> None:
    with pytest.raises(error):
        await raw.call(method, request_of)


async def test_a_root_that_nobody_opened_is_lent_nothing_of(raw: Raw) -> None:
    reply = await raw.call("Lend", cache_pb2.LendRequest(**LEND, names=NAME, deadline_ms=50))
    assert list(reply.outcomes) == [types_pb2.OUTCOME_MISS]
    assert not reply.ticket


async def test_streams_name_bad_input(raw: Raw) -> None:
    metadata = (("kvstore-session-bin", raw.token),)
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await raw.stub.Get(cache_pb2.GetRequest(), timeout=PATIENCE_S, metadata=metadata).read()
    assert type(error_from(caught.value)) is BadInput
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await raw.stub.Put(iter([cache_pb2.PutRequest()]), timeout=PATIENCE_S, metadata=metadata)
    assert type(error_from(caught.value)) is BadInput


@settings(max_examples=60, deadline=None, suppress_health_check=_ALL)
@given(
    method=st.sampled_from(["OpenSession", "Acquire", "Settle", "Wait", "Lookup"]),
    garbage=st.binary(max_size=80),
)
def test_bytes_that_are_no_message_harm_nobody(
    node: RunningNode, method: str, garbage: bytes
) -> None:
    with grpc.insecure_channel(node.rpc) as channel:
        call: Any = channel.unary_unary(f"/kvstore.rpc.v1.CacheNode/{method}")  # type: ignore[call-arg]
        with pytest.raises(grpc.RpcError) as caught:
            call(garbage, timeout=PATIENCE_S)
    # Bytes that happen to be a message are a call without a session.
    assert isinstance(error_from(caught.value), BadInput | SessionLost | Unsupported | Forbidden)


async def test_the_tcp_port_serves_no_blocks_without_a_session(node: RunningNode) -> None:
    async with open_channel(node.listen) as channel:
        stranger = Raw(cache_pb2_grpc.CacheNodeStub(channel), b"")
        with pytest.raises(SessionLost):
            await stranger.acquire(root=bytes(32))
        assert (await stranger.call("Stats", cache_pb2.StatsRequest())).node == node.name
