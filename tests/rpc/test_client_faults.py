"""What a client does when the answer is late, lost, malformed, or its keeper is gone.

Much of it is kvstore.client.link's work: rejoining, and sweeping up what lost answers reserved.
"""

import asyncio
import gc
import os
import secrets
import shutil
import threading
import time
from collections.abc import AsyncIterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from kvstore.client import AsyncClient, ClientConfig, copies, link
from kvstore.core.errors import BadInput, Refused, SessionLost, Unreachable
from kvstore.core.names import BlockName, Namespace
from kvstore.core.outcomes import SettleOutcome
from kvstore.rpc.v1 import cache_pb2
from kvstore.testing.node import new_run_dir
from tests.patience import PATIENCE_MS, PATIENCE_S, Hurried, until
from tests.scripted_node import ScriptedNode

NAMESPACE = Namespace(weights_digest="w", kv_dtype="float32", layers=1, kv_heads=1, head_dim=8)
NAMES = [BlockName(bytes([i]) * 32) for i in range(4)]
FAST = ClientConfig(call_ms=PATIENCE_MS, sweep_ms=20, rejoin_first_ms=10, rejoin_most_ms=40)


@pytest.fixture
async def node() -> AsyncIterator[ScriptedNode]:
    run_dir = new_run_dir()
    scripted = ScriptedNode(run_dir)
    await scripted.start()
    yield scripted
    await scripted.stop()
    shutil.rmtree(run_dir)


@pytest.fixture
async def client(node: ScriptedNode) -> AsyncIterator[AsyncClient]:
    connected = await connect(node)
    yield connected
    await connected.close()


async def connect(node: ScriptedNode, config: ClientConfig = FAST) -> AsyncClient:
    return await AsyncClient.connect(
        node.run_dir, namespace=NAMESPACE, payload_bytes=4096, shares=1, config=config
    )


@pytest.fixture
def sweeps_soon(monkeypatch: pytest.MonkeyPatch) -> None:
    """A sweep lets the longest call end first, and ours are patient."""
    monkeypatch.setattr(link, "asyncio", Hurried())


@pytest.fixture
def held_copy(monkeypatch: pytest.MonkeyPatch) -> tuple[threading.Event, threading.Event]:
    begun, go_on = threading.Event(), threading.Event()

    def held(*arguments: Any) -> None:
        begun.set()
        assert go_on.wait(PATIENCE_S)

    monkeypatch.setattr(copies, "copy_in", held)
    return begun, go_on


async def hang(request: Any) -> Any:
    await asyncio.Event().wait()


def raising(error: Exception) -> Any:
    async def step(request: Any) -> Any:
        raise error

    return step


async def test_a_hanging_node_costs_one_deadline(node: ScriptedNode, client: AsyncClient) -> None:
    node.script["Acquire"] = [hang]
    started = time.monotonic()
    with pytest.raises(Unreachable):
        await client.acquire(NAMES, deadline_ms=100)
    assert 0.09 < time.monotonic() - started < PATIENCE_S / 2
    assert (await client.acquire(NAMES, reserve=1)).reserved, "the next call is served"


async def test_a_node_that_forgot_the_session_is_told_again(
    node: ScriptedNode, client: AsyncClient
) -> None:
    node.script["Acquire"] = [raising(SessionLost("restarted"))]
    node.incarnation = 2
    acquired = await client.acquire(NAMES, reserve=2)
    assert len(acquired.reserved) == 2
    assert client.incarnation == 2
    assert node.count("OpenSession") == 2


async def test_calls_side_by_side_open_the_root_once(
    node: ScriptedNode, client: AsyncClient
) -> None:
    node.script["Acquire"] = [raising(SessionLost("restarted"))] * 8
    await asyncio.gather(*(client.acquire(NAMES) for _ in range(8)))
    assert node.count("OpenSession") <= 3, "one for the first connect, one or two for all eight"


async def test_a_node_that_always_forgets_is_not_asked_for_ever(
    node: ScriptedNode, client: AsyncClient
) -> None:
    node.script["Acquire"] = [raising(SessionLost("again"))] * 50
    with pytest.raises(SessionLost):
        await client.acquire(NAMES)
    assert node.count("Acquire") == 4


async def test_a_refusal_is_passed_on_and_not_repeated(
    node: ScriptedNode, client: AsyncClient
) -> None:
    node.script["Acquire"] = [raising(Refused("draining", 300))]
    with pytest.raises(Refused) as caught:
        await client.acquire(NAMES)
    assert caught.value.retry_after_ms == 300
    assert node.count("Acquire") == 1


async def test_a_node_back_within_the_deadline_goes_unnoticed(
    node: ScriptedNode, client: AsyncClient
) -> None:
    await node.stop_rpc()
    call = asyncio.create_task(client.acquire(NAMES, reserve=1, deadline_ms=PATIENCE_MS))
    await asyncio.sleep(0)
    await node.start_rpc()
    assert len((await call).reserved) == 1


async def test_a_node_that_stays_away_costs_one_deadline(
    node: ScriptedNode, client: AsyncClient
) -> None:
    await node.stop_rpc()
    started = time.monotonic()
    with pytest.raises(Unreachable):
        await client.lookup(NAMES, deadline_ms=150)
    assert time.monotonic() - started < PATIENCE_S / 2
    assert client.connected, "the keeper still holds the session"
    await node.start_rpc()


async def test_a_node_that_dies_again_while_the_root_is_opened_goes_unnoticed(
    node: ScriptedNode, client: AsyncClient
) -> None:
    """A connection looks ready until it is used: the reopening itself meets a dead node."""
    node.script["Acquire"] = [raising(SessionLost("restarted"))]
    node.script["OpenSession"] = [raising(Unreachable("stream removed"))] * 3
    assert len((await client.acquire(NAMES, reserve=1, deadline_ms=PATIENCE_MS)).reserved) == 1
    node.script["Acquire"] = [raising(SessionLost("restarted"))]
    node.script["OpenSession"] = [raising(Unreachable("for good"))] * 1_000
    started = time.monotonic()
    with pytest.raises(Unreachable):
        await client.acquire(NAMES, deadline_ms=100)
    assert time.monotonic() - started < PATIENCE_S / 2
    node.script.clear()


async def test_another_root_after_a_restart_is_no_silent_change(
    node: ScriptedNode, client: AsyncClient
) -> None:
    node.script["Acquire"] = [raising(SessionLost("restarted"))]
    node.root = b"x" * 32
    with pytest.raises(SessionLost, match="cluster key"):
        await client.acquire(NAMES)


async def test_a_malformed_answer_is_as_good_as_none(
    node: ScriptedNode, client: AsyncClient
) -> None:
    async def broken(request: Any) -> Any:
        return cache_pb2.AcquireReply(ready=3, slots=[1])

    node.script["Acquire"] = [broken]
    with pytest.raises(Unreachable, match="malformed"):
        await client.acquire(NAMES)


async def test_a_dead_keeper_ends_calls_in_flight_and_later_ones_at_once(
    node: ScriptedNode,
) -> None:
    client = await connect(node)
    node.script["Acquire"] = [hang]
    call = asyncio.create_task(client.acquire(NAMES))
    await until(lambda: node.count("Acquire") == 1)
    node.stop_accepting()
    node.hang_up()
    started = time.monotonic()
    with pytest.raises(Unreachable):
        await call
    assert not client.connected
    with pytest.raises(Unreachable):
        await client.acquire(NAMES)
    assert time.monotonic() - started < PATIENCE_S / 2
    await client.close()


async def test_a_cancelled_call_stays_a_cancellation(
    node: ScriptedNode, client: AsyncClient
) -> None:
    node.script["Lookup"] = [hang]
    call = asyncio.create_task(client.acquire(NAMES))
    node.script["Acquire"] = [hang]
    await until(lambda: node.count("Acquire") == 1)
    call.cancel()
    with pytest.raises(asyncio.CancelledError):
        await call


async def test_a_new_keeper_is_joined_and_old_slots_stay_old(
    node: ScriptedNode, client: AsyncClient
) -> None:
    announced: list[AsyncClient] = []
    client.on_new_session = announced.append
    old = (await client.acquire(NAMES, reserve=2)).reserved
    held = client.view(old[0].slot)
    held[:5] = b"still"
    node.hang_up()
    await until(lambda: bool(announced))
    assert client.connected
    new = (await client.acquire(NAMES, reserve=1)).reserved[0].slot
    with pytest.raises(SessionLost):
        client.view(old[0].slot)
    assert not client.still(old[0].slot)
    assert bytes(held[:5]) == b"still", "the old mapping lives as long as its last view"
    before = node.count("Settle")
    settled = await client.settle(commit=[old[0].slot, new], abort=[old[1].slot])
    assert settled.commit == [SettleOutcome.STALE, SettleOutcome.DONE]
    assert settled.abort == [SettleOutcome.STALE]
    assert node.count("Settle") == before + 1
    assert list(node.calls[-1][1].commit.slots) == [new.slot]


async def test_mappings_and_descriptors_do_not_pile_up(
    node: ScriptedNode, client: AsyncClient
) -> None:
    def settled() -> tuple[int, int]:
        gc.collect()
        maps = Path("/proc/self/maps").read_text().count("kvstore-arena")
        return len(os.listdir("/proc/self/fd")), maps

    for _ in range(2):
        sessions = node.sessions
        node.hang_up()
        await until(lambda old=sessions: node.sessions > old and client.connected)  # type: ignore[misc]
    first = settled()
    for _ in range(5):
        sessions = node.sessions
        node.hang_up()
        await until(lambda old=sessions: node.sessions > old and client.connected)  # type: ignore[misc]
    await until(lambda: settled() == first)


@pytest.mark.usefixtures("sweeps_soon")
@pytest.mark.parametrize("how", ["deadline", "cancelled", "repeated"])
async def test_slots_of_a_lost_answer_are_given_back(
    node: ScriptedNode, client: AsyncClient, how: str
) -> None:
    async def reserve_and_lose(request: Any) -> Any:
        node.reserve(1, request.reserve)
        if how == "repeated":
            raise SessionLost("the node died after it had reserved")
        await asyncio.Event().wait()

    node.script["Acquire"] = [reserve_and_lose]
    kept: list[int] = []
    limit = 100 if how == "deadline" else PATIENCE_MS
    call = asyncio.create_task(client.acquire(NAMES, reserve=3, deadline_ms=limit))
    if how == "cancelled":
        await until(lambda: len(node.reserved()) == 3)
        call.cancel()
        with pytest.raises(asyncio.CancelledError):
            await call
    elif how == "deadline":
        with pytest.raises(Unreachable):
            await call
    else:
        kept = [item.slot.slot for item in (await call).reserved]
        assert len(kept) == 3
        assert len(node.reserved()) == 6
    held = (await client.acquire(NAMES, reserve=1)).reserved[0].slot.slot
    await until(lambda: len(node.reserved()) == len(kept) + 1)
    assert sorted(node.reserved()) == sorted([*kept, held]), "what a caller holds is never taken"


@pytest.mark.usefixtures("sweeps_soon")
async def test_a_settle_that_failed_does_not_keep_its_slots(
    node: ScriptedNode, client: AsyncClient
) -> None:
    acquired = await client.acquire(NAMES, reserve=2)
    node.script["Settle"] = [hang]
    with pytest.raises(Unreachable):
        await client.settle(commit=[item.slot for item in acquired.reserved], deadline_ms=50)
    await until(lambda: not node.reserved())


@pytest.mark.usefixtures("sweeps_soon")
async def test_a_cancelled_put_aborts_after_its_copy_ended(
    node: ScriptedNode, client: AsyncClient
) -> None:
    put = asyncio.create_task(client.put(NAMES, [secrets.token_bytes(4096)] * 4))
    await until(lambda: len(node.reserved()) == 4 or put.done())
    put.cancel()
    await asyncio.gather(put, return_exceptions=True)
    await until(lambda: not node.reserved())


async def test_a_closed_client_says_so(node: ScriptedNode) -> None:
    client = await connect(node)
    await client.close()
    await client.close()
    assert not client.connected
    with pytest.raises(Unreachable, match="closed"):
        await client.acquire(NAMES)


async def test_connecting_to_nobody_is_unreachable_within_the_deadline(tmp_path: Path) -> None:
    with pytest.raises(Unreachable):
        await AsyncClient.connect(tmp_path, namespace=NAMESPACE, payload_bytes=4096, shares=1)


async def test_a_keeper_without_a_node_is_unreachable_within_the_deadline(
    node: ScriptedNode,
) -> None:
    await node.stop_rpc()
    started = time.monotonic()
    with pytest.raises(Unreachable):
        await connect(node, replace(FAST, connect_ms=150))
    assert time.monotonic() - started < PATIENCE_S / 2
    await node.start_rpc()


async def test_closing_waits_for_a_put_that_still_writes(
    node: ScriptedNode, held_copy: tuple[threading.Event, threading.Event]
) -> None:
    """Slots given back under the writer's hands would be written under their next owner."""
    begun, go_on = held_copy
    client = await connect(node)
    putting = asyncio.create_task(client.put(NAMES, [bytes(4096)] * 4))
    await asyncio.to_thread(begun.wait, PATIENCE_S)
    putting.cancel()
    await asyncio.gather(putting, return_exceptions=True)
    closing = asyncio.create_task(client.close())
    await asyncio.sleep(0.05)
    assert node.count("CloseSession") == node.count("Settle") == 0
    go_on.set()
    await closing
    assert node.count("CloseSession") == 1


async def test_closing_gives_nothing_back_that_is_written_for_too_long(
    node: ScriptedNode, held_copy: tuple[threading.Event, threading.Event]
) -> None:
    begun, go_on = held_copy
    client = await connect(node, replace(FAST, transfer_ms=50))
    putting = asyncio.create_task(client.put(NAMES, [bytes(4096)] * 4))
    await asyncio.to_thread(begun.wait, PATIENCE_S)
    await client.close()
    assert node.count("CloseSession") == 0
    go_on.set()
    with pytest.raises(Unreachable):
        await putting


@pytest.mark.parametrize(("payload_bytes", "shares"), [(0, 1), (-4096, 1), (4096, 0), (4096, 3)])
async def test_impossible_sizes_are_refused_before_anything_is_sent(
    tmp_path: Path, payload_bytes: int, shares: int
) -> None:
    with pytest.raises(BadInput):
        await AsyncClient.connect(
            tmp_path, namespace=NAMESPACE, payload_bytes=payload_bytes, shares=shares
        )


async def test_absurd_arguments_are_bad_input(node: ScriptedNode, client: AsyncClient) -> None:
    absurd: list[dict[str, Any]] = [
        {"reserve": -1}, {"reserve": 1 << 20}, {"first_block": -1}, {"first_block": 1 << 32},
        {"deadline_ms": 0}, {"deadline_ms": 1 << 40},
    ]  # fmt: skip
    for arguments in absurd:
        with pytest.raises(BadInput):
            await client.acquire(NAMES, **arguments)
    with pytest.raises(BadInput):
        await client.settle(release=[-1])
    for payloads in ([b"short"] * 4, [bytes(4096)]):
        with pytest.raises(BadInput):
            await client.put(NAMES, payloads)
    assert node.count("Acquire") + node.count("Settle") == 0
