"""A worker whose pages are too few, with a real node: what makes way comes back bit for bit."""

import asyncio
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from kvworkers.stream.mover import Mover
from kvworkers.worker import WorkerServer

from kvstore.testing.node import RunningNode, start_node
from tests.patience import PATIENCE_MS, until
from tests.rpc.test_worker_store import prompt_of, reserved_bytes, worker
from tests.tiny_model import reference_reply
from tests.worker_process import ask

OUT = 60
PROMPTS = [prompt_of(400 + n, 40 + 17 * n) for n in range(6)]
PAGES = 28


@pytest.fixture
def node() -> Iterator[RunningNode]:
    with start_node(arena_bytes=64 << 20) as running:
        yield running


def metric(server: WorkerServer, name: str, **labels: str) -> float:
    return server.registry.get_sample_value(f"kvstore_worker_{name}", labels) or 0.0


async def storm(server: WorkerServer, **fields: Any) -> None:
    """Ask for everything at once; replies have to be the plain model's."""
    await ask(server.address, [5, 6, 7], max_tokens=1)
    asked = (ask(server.address, p, max_tokens=OUT, **fields) for p in PROMPTS)
    for prompt, answer in zip(PROMPTS, await asyncio.gather(*asked), strict=True):
        assert answer.tokens == reference_reply(prompt, OUT)


def few_pages(**options: Any) -> dict[str, Any]:
    # The tiny model's block has 4 KiB: two layers of two heads of eight.
    return {"pool_bytes": PAGES * 4_096, **options}


class Spy:
    """Notes what goes out raw, and compares what comes back."""

    def __init__(self, patch: pytest.MonkeyPatch) -> None:
        self.out: dict[int, bytes] = {}
        self.same = 0
        store, load = Mover._store, Mover._load
        spy = self

        def noted(mover: Mover, arena: memoryview, at: Any, rows: Any, raw: bool) -> None:
            if raw:
                spy.out |= {o: _bytes(mover._pool[r]) for o, r in zip(at, rows, strict=True)}
            store(mover, arena, at, rows, raw)

        def compared(mover: Mover, arena: memoryview, at: Any, rows: Any, raw: bool) -> None:
            load(mover, arena, at, rows, raw)
            if raw:
                for offset, row in zip(at, rows, strict=True):
                    assert _bytes(mover._pool[row]) == spy.out[offset]
                    spy.same += 1

        patch.setattr(Mover, "_store", noted)
        patch.setattr(Mover, "_load", compared)


def _bytes(page: torch.Tensor) -> bytes:
    return bytes(page.numpy())


@pytest.mark.parametrize("fidelity", ["exact", "int4"])
async def test_a_storm_over_few_pages_is_exact_bit_for_bit(
    node: RunningNode, fidelity: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    spy = Spy(monkeypatch)
    async with worker(node.run_dir, **few_pages(fidelity=fidelity)) as server:
        await storm(server, no_store=True, no_read=True)
        assert metric(server, "preemptions_total", kind="swap") > 0
        assert metric(server, "preemptions_total", kind="recompute") == 0
        assert metric(server, "moved_bytes_total", direction="swap_out") > 0
        assert spy.same > 0
        assert metric(server, "kv_waste_ratio") < 1
        assert await server.settled(deadline_ms=PATIENCE_MS)
        assert await reserved_bytes(node) == 0, "all slots are given back"


async def test_what_the_store_holds_is_not_copied(node: RunningNode) -> None:
    async with worker(node.run_dir, **few_pages()) as server:
        await storm(server)
        swapped = metric(server, "preemptions_total", kind="swap")
        assert swapped > 0
        out = metric(server, "moved_bytes_total", direction="swap_out")
        # Prompts have 3 to 8 blocks, all settled when their first tokens are out.
        assert out < swapped * 4_096 * (OUT // 16 + 2)


async def test_a_node_that_dies_under_a_storm_costs_no_token(node: RunningNode) -> None:
    async with worker(node.run_dir, **few_pages()) as server:
        await ask(server.address, [5, 6, 7], max_tokens=1)
        asked = [
            asyncio.create_task(ask(server.address, p, max_tokens=OUT, no_store=True, no_read=True))
            for p in PROMPTS
        ]

        async def swapped() -> bool:
            return metric(server, "preempted") > 0

        await until(swapped)
        before = await asyncio.to_thread(node.kill_node)
        for prompt, answer in zip(PROMPTS, await asyncio.gather(*asked), strict=True):
            assert answer.tokens == reference_reply(prompt, OUT)
        # Slots stay the session's: what went out before came back after.
        assert metric(server, "moved_bytes_total", direction="swap_in") > 0
        await asyncio.to_thread(node.wait_restarted, before)

        async def given_back() -> bool:
            return await reserved_bytes(node) == 0

        await until(given_back)


@pytest.mark.parametrize("options", [{"swap_bytes": 0}, {"overcommit": False}])
async def test_what_is_not_wanted_does_not_happen(
    node: RunningNode, options: dict[str, Any]
) -> None:
    async with worker(node.run_dir, **few_pages(**options)) as server:
        await storm(server)
        assert metric(server, "moved_bytes_total", direction="swap_out") == 0
        recomputed = metric(server, "preemptions_total", kind="recompute")
        assert (recomputed > 0) == ("swap_bytes" in options)
