"""The client against a real keeper and cache node."""

import asyncio
import threading
from collections.abc import Iterator

import pytest

import kvstore
from kvstore.client import Client
from kvstore.client.aio import AsyncClient
from kvstore.client.blocking import Client as BlockingClient
from kvstore.client.session import socket_path
from kvstore.core.errors import BadInput, Unreachable
from kvstore.core.outcomes import MissReason, Outcome, SettleOutcome
from kvstore.directory.events import TierKind
from kvstore.testing.node import RunningNode, start_node
from tests.patience import PATIENCE_S, PATIENT
from tests.session_process import PAYLOAD, SHARES, connect, names_of, namespace

DONE = SettleOutcome.DONE


@pytest.fixture(scope="module")
def node() -> Iterator[RunningNode]:
    with start_node(arena_bytes=32 << 20) as running:
        yield running


@pytest.fixture
def client(node: RunningNode, request: pytest.FixtureRequest) -> Iterator[Client]:
    with connect(node.run_dir, request.node.name) as connected:
        yield connected


def payloads(count: int, first: int = 0) -> list[bytes]:
    return [bytes([first + i]) * PAYLOAD for i in range(count)]


def test_what_was_put_is_got_back(client: Client) -> None:
    names = names_of(client, 1, 8)
    assert client.get(names) == []
    assert client.put(names, payloads(8)) == [DONE] * 8
    assert client.get(names) == payloads(8)
    assert client.get(b"".join(names)) == payloads(8), "packed names are names"
    assert client.put(names, payloads(8, 100)) == [None] * 8, "it has them all"
    assert client.get(names) == payloads(8)


def test_only_the_prefix_without_a_hole_comes_back(client: Client) -> None:
    names = names_of(client, 1, 6)
    client.put(names[:2], payloads(2))
    client.put(names[4:], payloads(2, 4), first_block=4)
    assert client.get(names) == payloads(2)
    found = client.lookup(names)
    assert found.prefix == 2
    assert [bool(tiers) for tiers in found.tiers] == [True, True, False, False, True, True]
    assert found.tiers[0] == {TierKind.DRAM}


def test_nothing_asked_is_nothing_given(client: Client) -> None:
    assert client.get([]) == []
    assert client.put([], []) == []
    assert client.wait([]) == []
    acquired = client.acquire([])
    assert (acquired.lease, acquired.ready, acquired.reserved) == (0, [], [])


def test_blocks_are_read_and_written_in_place(client: Client) -> None:
    names = names_of(client, 1, 3)
    writing = client.acquire(names, reserve=3)
    assert (writing.ready, writing.reason) == ([], MissReason.ABSENT)
    assert [item.index for item in writing.reserved] == [0, 1, 2]
    for item, payload in zip(writing.reserved, payloads(3), strict=True):
        assert not client.still(item.slot), "nobody may read it yet"
        client.view(item.slot)[:PAYLOAD] = payload
    slots = [item.slot for item in writing.reserved]
    assert client.settle(commit=slots[:2], abort=slots[2:]).abort == [DONE]
    assert not client.is_ready(slots[2])

    reading = client.acquire(names)
    assert len(reading.ready) == 2
    assert reading.lease
    for ref, payload in zip(reading.ready, payloads(2), strict=True):
        assert bytes(client.view(ref)[:PAYLOAD]) == payload
        assert bytes(client.arena[ref.offset : ref.offset + PAYLOAD]) == payload
        assert client.still(ref)
    assert client.wait_ready(reading.ready) == 2
    assert client.stats().leases >= 1
    assert client.settle(release=[reading.lease]).release == [DONE]


def test_waiting_for_another_sessions_block(client: Client, node: RunningNode) -> None:
    names = names_of(client, 1, 2)
    writing = client.acquire(names, reserve=1)
    slot = writing.reserved[0].slot
    with connect(node.run_dir, "test_waiting_for_another_sessions_block") as other:
        assert other.root == client.root
        refused = other.acquire(names[:1], reserve=1)
        assert (refused.reserved, refused.reserve_reason) == ([], MissReason.COMPUTING)
        assert other.wait(names, deadline_ms=50) == [Outcome.LATE, Outcome.MISS]
        answers: list[list[Outcome]] = []
        waiting = threading.Thread(target=lambda: answers.append(other.wait(names[:1])))
        waiting.start()
        client.view(slot)[:PAYLOAD] = payloads(1)[0]
        client.settle(commit=[slot])
        waiting.join(PATIENCE_S)
        assert answers == [[Outcome.HIT]]
        assert other.get(names) == payloads(1)


def test_closing_gives_everything_back(node: RunningNode, request: pytest.FixtureRequest) -> None:
    with connect(node.run_dir, request.node.name) as watcher:
        before = watcher.stats()
        with connect(node.run_dir, request.node.name) as other:
            names = names_of(other, 1, 4)
            other.put(names[:2], payloads(2))
            other.acquire(names, reserve=2)
            held = watcher.stats()
            assert held.leases == before.leases + 1
            assert held.reserved_bytes == before.reserved_bytes + 2 * other.block_bytes
        after = watcher.stats()
        assert after.leases == before.leases
        assert after.reserved_bytes == before.reserved_bytes
        assert after.slots["reserved"] == before.slots["reserved"]


def test_several_threads_share_one_blocking_client(client: Client) -> None:
    failures: list[BaseException] = []

    def work(prompt: int) -> None:
        try:
            names = names_of(client, prompt, 4)
            for _ in range(5):
                client.put(names, payloads(4, prompt))
                assert client.get(names) == payloads(4, prompt)
        except BaseException as error:  # task boundary: reported below
            failures.append(error)

    threads = [threading.Thread(target=work, args=(prompt,)) for prompt in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(PATIENCE_S)
    assert not failures


def test_a_closed_blocking_client_says_so(node: RunningNode) -> None:
    client = connect(node.run_dir, "closed")
    before = {thread.name for thread in threading.enumerate()}
    assert "kvstore-client" in before
    client.close()
    client.close()
    with pytest.raises(Unreachable, match="closed"):
        client.stats()


def test_a_failed_connect_leaves_no_thread(node: RunningNode) -> None:
    before = set(threading.enumerate())
    with pytest.raises(BadInput):
        Client.connect(node.run_dir, namespace=namespace("x"), payload_bytes=100, shares=3)
    assert set(threading.enumerate()) <= before  # those of other tests may end meanwhile


async def test_many_calls_at_once_on_one_async_client(
    node: RunningNode, request: pytest.FixtureRequest
) -> None:
    client = await AsyncClient.connect(
        node.run_dir,
        namespace=namespace(request.node.name),
        payload_bytes=PAYLOAD,
        shares=SHARES,
        config=PATIENT,
    )
    async with client:
        names = [list(kvstore.chain(client.root, kvstore.pack_tokens([p] * 32))) for p in range(20)]
        await asyncio.gather(*(client.put(n, payloads(2, p)) for p, n in enumerate(names)))
        got = await asyncio.gather(*(client.get(n) for n in names))
        assert got == [payloads(2, p) for p in range(20)]
        assert client.node == node.name
        assert client.incarnation == node.incarnation
        assert client.lease_ms == 30_000


def test_the_public_names_are_there(node: RunningNode) -> None:
    assert kvstore.Client is Client is BlockingClient
    assert all(getattr(kvstore, name) is not None for name in kvstore.__all__)
    with pytest.raises(AttributeError):
        kvstore.Nonsense  # noqa: B018
    assert socket_path(node.run_dir) == socket_path(node.run_dir / "keeper.sock")


def test_a_restarted_node_serves_the_same_session_and_blocks() -> None:
    with start_node(arena_bytes=16 << 20) as node, connect(node.run_dir, "restart") as client:
        names = names_of(client, 1, 4)
        client.put(names[:3], payloads(3))
        sealed(client, 3)
        writing = client.acquire(names, reserve=1)
        slot = writing.reserved[0].slot
        assert client.stats().slots["sealed"] == 3
        view = client.view(slot)
        incarnation = node.kill_node()
        view[:PAYLOAD] = payloads(4)[3]
        assert client.settle(commit=[slot]).commit == [DONE], "a reservation outlives the node"
        assert client.incarnation > incarnation
        assert client.get(names) == payloads(4)
        assert client.stats().reserved_bytes == 0
        del view


def test_a_restarted_keeper_is_joined_with_an_empty_arena() -> None:
    joined = threading.Event()
    with start_node(arena_bytes=16 << 20) as first, connect(first.run_dir, "rejoin") as client:
        client.on_new_session(joined.set)
        names = names_of(client, 1, 2)
        client.put(names, payloads(2))
        old = client.acquire(names).ready[0]
        copy_in_use = client.view(old)
        first.kill_keeper()
        with pytest.raises(Unreachable):
            client.get(names)
        with start_node(first.run_dir, arena_bytes=16 << 20):
            assert joined.wait(PATIENCE_S)
            assert client.connected
            assert names_of(client, 1, 2) == names, "the cluster key is the run directory's"
            assert not client.still(old)
            assert client.get(names) == []
            assert client.put(names, payloads(2, 50)) == [DONE] * 2
            assert client.get(names) == payloads(2, 50)
            assert copy_in_use[0] == 0, "the old arena stays mapped while somebody looks at it"
        del copy_in_use


def sealed(client: Client, count: int) -> None:
    """Wait until so many blocks are sealed: those survive the node."""
    ends = threading.Event()
    for _ in range(500):
        if client.stats().slots["sealed"] >= count:
            return
        ends.wait(0.01)
    raise AssertionError("not sealed in time")
