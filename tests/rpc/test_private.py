"""Private slots of a real node: written, read back, through the node's death, and given back."""

import asyncio
from collections.abc import AsyncIterator, Iterator
from functools import partial

import pytest

from kvstore.client import AsyncClient, ClientConfig
from kvstore.client.remote import AsyncRemoteClient
from kvstore.core.errors import BadInput
from kvstore.core.outcomes import MissReason, SettleOutcome
from kvstore.rpc.v1 import cache_pb2
from kvstore.testing.node import RunningNode, start_node
from tests.patience import PATIENCE_MS
from tests.session_process import PAYLOAD, SHARES, namespace

SIZE = 3 << 12
ARENA = 16 << 20


@pytest.fixture(scope="module")
def node() -> Iterator[RunningNode]:
    with start_node(arena_bytes=ARENA) as running:
        yield running


@pytest.fixture
async def client(node: RunningNode) -> AsyncIterator[AsyncClient]:
    connected = await AsyncClient.connect(
        node.run_dir,
        namespace=namespace("private"),
        payload_bytes=PAYLOAD,
        shares=SHARES,
        config=ClientConfig(call_ms=PATIENCE_MS, connect_ms=PATIENCE_MS),
    )
    yield connected
    await connected.close()


async def test_what_is_written_there_outlives_the_node(
    node: RunningNode, client: AsyncClient
) -> None:
    got = await client.private.reserve(5, block_bytes=SIZE)
    assert got.reason is MissReason.NONE and len(got.slots) == 5
    places = [slice(ref.offset, ref.offset + SIZE) for ref in got.slots]
    for number, place in enumerate(places):
        client.arena[place] = bytes([number + 1]) * SIZE
    assert (await client.stats()).reserved_bytes == 5 * SIZE
    before = node.kill_node()
    await asyncio.to_thread(node.wait_restarted, before)
    assert client.private.holds(got.slots)
    for number, place in enumerate(places):
        assert client.arena[place] == bytes([number + 1]) * SIZE
    settled = await client.settle(commit=got.slots[:1], abort=got.slots)
    assert settled.commit == [SettleOutcome.NOT_YOURS]
    assert settled.abort == [SettleOutcome.DONE] * 5
    assert not client.private.holds(got.slots[:1])
    assert (await client.stats()).reserved_bytes == 0


async def test_a_quarter_of_the_arena_is_the_most(client: AsyncClient) -> None:
    size = 1 << 20
    got = await client.private.reserve(10, block_bytes=size)
    assert (len(got.slots), got.reason) == (ARENA // 4 // size, MissReason.QUOTA)
    more = await client.private.reserve(1, block_bytes=size)
    assert (more.slots, more.reason) == ([], MissReason.QUOTA)
    await client.settle(abort=got.slots)
    # The end of a session gives back what is left.
    await client.private.reserve(1, block_bytes=size)
    await client.close()


async def test_bad_sizes_and_counts_are_named(client: AsyncClient) -> None:
    assert (await client.stats()).reserved_bytes == 0, "what the closed session had is free"
    for count, size, name in ((0, SIZE, "count"), (1, 5_000, "block_bytes"), (1, 0, "payload")):
        with pytest.raises(BadInput, match=name):
            await client.private.reserve(count, block_bytes=size)
    with pytest.raises(BadInput, match="count"):
        await client.private.reserve(-1, block_bytes=SIZE)


async def test_who_does_not_map_the_arena_gets_none(node: RunningNode) -> None:
    remote = await AsyncRemoteClient.connect(
        node.listen, namespace=namespace("far"), payload_bytes=PAYLOAD, shares=SHARES
    )
    try:
        request = partial(cache_pb2.ReservePrivateRequest, block_bytes=SIZE, count=1)
        with pytest.raises(BadInput, match="map the arena"):
            await remote._call("ReservePrivate", request, 5_000)
    finally:
        await remote.close()
