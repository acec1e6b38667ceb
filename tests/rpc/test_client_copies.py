"""`get_into`, `release` and `put`: what threads copy, and what is told of it when."""

import asyncio
import shutil
import threading
from collections.abc import AsyncIterator, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, wait
from typing import Any

import pytest

from kvstore.client import AsyncClient, Client, ClientConfig, blocking, copies, link
from kvstore.core.errors import BadInput, Unreachable
from kvstore.core.names import BlockName, Namespace
from kvstore.testing.node import RunningNode, new_run_dir, start_node
from tests.patience import PATIENCE_MS, PATIENCE_S
from tests.scripted_node import ScriptedNode
from tests.session_process import PAYLOAD, connect, names_of

MODEL = Namespace(weights_digest="w", kv_dtype="float32", layers=1, kv_heads=1, head_dim=8)
NAMES = [BlockName(bytes([i]) * 32) for i in range(8)]
RUBBISH = 0xEE


@pytest.fixture(scope="module")
def node() -> Iterator[RunningNode]:
    with start_node(arena_bytes=32 << 20) as running:
        yield running


@pytest.fixture
def client(node: RunningNode, request: pytest.FixtureRequest) -> Iterator[Client]:
    with connect(node.run_dir, request.node.name) as connected:
        yield connected


@pytest.fixture
async def scripted() -> AsyncIterator[ScriptedNode]:
    run_dir = new_run_dir()
    node = ScriptedNode(run_dir)
    await node.start()
    yield node
    await node.stop()
    shutil.rmtree(run_dir)


async def joined(node: ScriptedNode) -> AsyncClient:
    config = ClientConfig(call_ms=PATIENCE_MS, transfer_ms=PATIENCE_MS)
    return await AsyncClient.connect(
        node.run_dir, namespace=MODEL, payload_bytes=4096, shares=1, config=config
    )


def buffers(count: int, size: int = PAYLOAD) -> list[memoryview]:
    return [memoryview(bytearray([RUBBISH]) * size) for _ in range(count)]


def test_blocks_come_into_buffers_of_ours(client: Client) -> None:
    names = names_of(client, 1, 6)
    blocks = [bytes([i]) * PAYLOAD for i in range(4)]
    client.put(names[:4], blocks)
    into = buffers(6, PAYLOAD + 8)
    assert client.get_into(names, into) == 4
    assert [bytes(buffer[:PAYLOAD]) for buffer in into[:4]] == blocks
    assert all(set(buffer[PAYLOAD:]) == {RUBBISH} for buffer in into), "more than a payload came"
    assert all(set(buffer) == {RUBBISH} for buffer in into[4:]), "what is not there was written"
    assert client.get_into([], []) == 0


def test_buffers_that_take_no_block_are_bad_input(client: Client) -> None:
    names = names_of(client, 1, 1)
    apart = memoryview(bytearray(2 * PAYLOAD))[::2]
    for wrong in (memoryview(bytes(PAYLOAD)), memoryview(bytearray(PAYLOAD - 1)), apart):
        with pytest.raises(BadInput, match="buffer"):
            client.get_into(names, [wrong])
    with pytest.raises(BadInput, match="2 buffers for 1 names"):
        client.get_into(names, buffers(2))


def test_a_lease_ends_soon_after_its_release(client: Client) -> None:
    names = names_of(client, 1, 2)
    client.put(names, [bytes(PAYLOAD)] * 2)
    assert client.get_into(names, buffers(2)) == 2
    leases = [client.acquire(names).lease for _ in range(3)]
    for lease in leases:
        client.release(lease)
    client.release(0)
    with pytest.raises(BadInput, match="not a lease: -1"):
        client.release(-1)
    # Releases go before it on the same loop: at the latest the next two calls find them done.
    for _ in range(200):
        if client.stats().leases == 0:
            return
    raise AssertionError(f"{client.stats().leases} leases are held after 200 calls")


async def test_leases_released_quickly_go_in_few_calls(scripted: ScriptedNode) -> None:
    client = await joined(scripted)
    first = asyncio.Event()
    go_on = asyncio.Event()

    async def slow(request: Any) -> Any:
        first.set()
        await go_on.wait()
        raise Unreachable("lost")

    scripted.script["Settle"] = [slow]
    client.release(1)
    await first.wait()
    for lease in range(2, 50):
        client.release(lease)
    go_on.set()
    async with asyncio.timeout(PATIENCE_S):
        while scripted.count("Settle") < 3:  # noqa: ASYNC110 - repeated at once, then the rest
            await asyncio.sleep(0.002)
    released = [list(request.release) for name, request in scripted.calls if name == "Settle"]
    assert released[-1] == list(range(2, 50)), "one call for all that came meanwhile"
    await client.close()
    client.release(50)
    assert scripted.count("Settle") == len(released), "a closed client's leases are gone"


@pytest.mark.parametrize("wrong", [-1, 1 << 64, "7", 1.5, None])
async def test_what_is_no_lease_spoils_no_release_of_others(
    scripted: ScriptedNode, wrong: Any
) -> None:
    client = await joined(scripted)
    client.release(1)
    with pytest.raises(BadInput, match="not a lease"):
        client.release(wrong)
    client.release(2)
    await released(scripted, [[1, 2]])
    await client.close()


async def test_more_leases_than_a_call_takes_go_in_several(
    scripted: ScriptedNode, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(link, "MAX_NAMES_PER_CALL", 3)
    client = await joined(scripted)
    for lease in range(1, 8):
        client.release(lease)
    await released(scripted, [[1, 2, 3], [4, 5, 6], [7]])
    await client.close()


async def released(node: ScriptedNode, leases: list[list[int]]) -> None:
    """Wait for the calls that release just these."""
    async with asyncio.timeout(PATIENCE_S):
        while node.count("Settle") < len(leases):  # noqa: ASYNC110 - calls of another task
            await asyncio.sleep(0.002)
    assert [list(call.release) for name, call in node.calls if name == "Settle"] == leases


async def test_a_cancelled_reader_has_its_buffers_back(
    scripted: ScriptedNode, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whoever gets the cancellation may use the buffers again: the thread has to be done."""
    begun, go_on = threading.Event(), threading.Event()

    def slow(*arguments: Any, **options: Any) -> int:
        begun.set()
        assert go_on.wait(PATIENCE_S)
        return 0

    monkeypatch.setattr(copies, "copy_out_into", slow)
    client = await joined(scripted)
    reading = asyncio.create_task(client.get_into(NAMES[:1], buffers(1, 4096)))
    assert await asyncio.to_thread(begun.wait, PATIENCE_S)
    for _ in range(3):  # whoever shuts down may be impatient
        reading.cancel()
        done, _ = await asyncio.wait([reading], timeout=0.02)
        assert not done, "it returned while the thread still wrote"
    assert scripted.count("Settle") == 0, "the lease went while the thread still read"
    go_on.set()
    with pytest.raises(asyncio.CancelledError):
        await reading
    await client.close()


def test_a_reader_that_gave_up_has_its_buffers_back(
    client: Client, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The call without a loop ends by its own clock, and the thread knows nothing of that."""
    begun, closing, go_on = threading.Event(), threading.Event(), threading.Event()
    copy, close = copies._copy, copies.WriteGate.close

    def slow(target: memoryview, source: memoryview) -> None:
        begun.set()
        assert go_on.wait(PATIENCE_S)
        copy(target, source)

    def noted(gate: copies.WriteGate) -> None:
        closing.set()
        close(gate)

    names, into = names_of(client, 1, 4), buffers(4)
    client.put(names, [bytes(PAYLOAD)] * 4)
    monkeypatch.setattr(copies, "_copy", slow)
    monkeypatch.setattr(copies.WriteGate, "close", noted)
    monkeypatch.setattr(blocking, "_GRACE_S", 0.0)
    with ThreadPoolExecutor(1) as pool:
        try:
            reading = pool.submit(client.get_into, names, into, deadline_ms=250)
            assert begun.wait(PATIENCE_S)
            assert closing.wait(PATIENCE_S), "it gave up and left the thread alone"
            assert not wait([reading], timeout=0.05).done, "it returned during a write"
        finally:
            go_on.set()
        with pytest.raises(Unreachable, match="no answer within 500 ms"):
            reading.result(PATIENCE_S)
    # What was being written came whole, and nothing after it.
    assert [set(buffer) for buffer in into] == [{0}, {RUBBISH}, {RUBBISH}, {RUBBISH}]
    # The client is as good as before.
    monkeypatch.setattr(copies, "_copy", copy)
    assert client.get_into(names, into) == 4


async def test_a_cancelled_put_commits_nothing_more(
    scripted: ScriptedNode, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Parts copied before stay committed; the rest is given back, once nobody writes any more."""
    second, go_on = threading.Event(), threading.Event()
    copied: list[int] = []

    def part(arena: Any, reserved: Sequence[Any], sources: Any) -> None:
        copied.extend(item.index for item in reserved)
        if len(copied) == 2:
            second.set()
            assert go_on.wait(PATIENCE_S)

    monkeypatch.setattr(copies, "copy_in", part)
    monkeypatch.setattr(copies, "_PART_BYTES", 4096)
    monkeypatch.setattr(copies, "_EDGE_BYTES", 4096)
    client = await joined(scripted)
    putting = asyncio.create_task(client.put(NAMES, [bytes(4096)] * 8))
    assert await asyncio.to_thread(second.wait, PATIENCE_S)
    async with asyncio.timeout(PATIENCE_S):
        while scripted.count("Settle") < 1:  # noqa: ASYNC110 - the first part's commit
            await asyncio.sleep(0.002)
    putting.cancel()
    await asyncio.gather(putting, return_exceptions=True)
    assert scripted.count("Settle") == 1, "slots were given back under the writer's hands"
    go_on.set()
    async with asyncio.timeout(PATIENCE_S):
        while scripted.count("Settle") < 2:  # noqa: ASYNC110 - when the thread has ended
            await asyncio.sleep(0.002)
    settles = [request for name, request in scripted.calls if name == "Settle"]
    assert [len(request.commit.slots) for request in settles] == [1, 0]
    assert len(settles[1].abort.slots) == 7
    assert copied == [0, 1], "it went on copying for nobody"
    assert not scripted.reserved()
    await client.close()
