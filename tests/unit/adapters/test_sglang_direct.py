"""The direct linker's calls, in SGLang's order, over a real node and without SGLang's package.

`tests/engines/test_sglang_linker.py` holds the class that SGLang loads against SGLang's own.
"""

import signal
import threading
from collections.abc import Iterator, Sequence
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from kvstore.adapters.opaque import Block
from kvstore.adapters.sglang import direct
from kvstore.adapters.sglang.device import DevicePages
from kvstore.adapters.sglang.direct import DirectStore, Part, Pool
from kvstore.adapters.sglang.identity import (
    Ranks,
)
from kvstore.core.errors import Unreachable, Unsupported
from kvstore.testing.node import RunningNode, start_node
from tests.patience import PATIENCE_S, until_so
from tests.sglang_devices import (
    LAYERS,
    PAGE,
    Entry,
    loaded,
    names,
    now,
    offloaded,
    opened,
    pool_of,
    rows,
)


@pytest.fixture(scope="module")
def node() -> Iterator[RunningNode]:
    with start_node(arena_bytes=64 << 20) as running:
        yield running


def test_what_one_engine_offloads_another_restores_behind_its_own_hit(node: RunningNode) -> None:
    ours, theirs = Entry(), Entry()
    ours.fill(1)
    writer, reader = opened(node, ours), opened(node, theirs)
    chain = names("tail", 5)
    assert writer.lookup("a", [Part("kv", chain)]) == []
    assert offloaded(writer, Part("kv", chain[:4], rows(0, 1, 2, 3)))
    assert reader.lookup("b", [Part("kv", chain)]) == [1, 2, 3, 4]
    tail = chain[2:]
    assert reader.lookup("b", [Part("kv", tail)]) == [1, 2], "relative to the tail that was asked"
    assert loaded(reader, "b", Part("kv", tail[:2], rows(9, 5)))
    for mine, other in ((9, 2), (5, 3)):
        for got, stored in zip(theirs.page(mine * PAGE), ours.page(other * PAGE), strict=True):
            assert torch.equal(got, stored)
    assert not any(part.any() for part in theirs.page(0)), "nobody else's pages are written"
    assert reader.start(now) == -1
    reader.counter.set_consumer(-1)
    reader.counter.wait_until(2)
    assert reader.finish(-1)
    writer.close()
    reader.close()


def test_offloads_end_in_their_order_and_wait_for_the_forward(node: RunningNode) -> None:
    entry = Entry()
    entry.fill(2)
    store, written = opened(node, entry), threading.Event()
    first, second = names("first", 1), names("second", 1)

    def forward() -> None:
        assert written.wait(PATIENCE_S)

    assert store.offload([Part("kv", first, rows(0))], forward)
    assert store.offload([Part("kv", second, rows(1))], now)
    assert store.completed() == 0
    assert store.lookup("x", [Part("kv", first)]) == []
    written.set()
    until_so(lambda: store.completed() == 2)
    assert [store.pop(), store.pop()] == [True, True]
    assert store.completed() == 0
    assert not store.offload([], now)
    store.close()


def test_a_forward_that_fails_is_an_offload_that_failed_in_its_turn(node: RunningNode) -> None:
    store = opened(node, Entry())

    def forward() -> None:
        raise RuntimeError("the device is gone")

    chain = names("device", 2)
    assert store.offload([Part("kv", chain[:1], rows(0))], forward)
    assert store.offload([Part("kv", chain[1:], rows(1))], now)
    until_so(lambda: store.completed() == 2)
    assert [store.pop(), store.pop()] == [False, True]
    store.close()


def test_a_rank_whose_pages_another_stores_says_yes_and_stores_nothing(node: RunningNode) -> None:
    store, chain = opened(node, Entry(), writes=False), names("replica", 1)
    assert store.offload([Part("kv", chain, rows(0))], now)
    assert store.completed() == 1 and store.pop()
    assert store.lookup("r", [Part("kv", chain)]) == []
    store.close()


def test_too_many_offloads_fail_in_their_turn(
    node: RunningNode, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(direct, "MAX_OFFLOADS", 1)
    store, written = opened(node, Entry()), threading.Event()
    chain = names("many", 2)
    assert store.offload([Part("kv", chain[:1], rows(0))], lambda: assert_set(written))
    assert store.offload([Part("kv", chain[1:], rows(1))], now)
    assert store.completed() == 0, "the later one is not told before the earlier"
    written.set()
    until_so(lambda: store.completed() == 2)
    assert [store.pop(), store.pop()] == [True, False]
    store.close()


def assert_set(event: threading.Event) -> None:
    assert event.wait(PATIENCE_S)


def test_a_window_pool_makes_the_lengths_sparse(node: RunningNode) -> None:
    kv, state, kv2, state2 = Entry(), Entry("swa"), Entry(), Entry("swa")
    kv.fill(3)
    state.fill(4)
    writer, reader = opened(node, kv, state), opened(node, kv2, state2)
    chain = names("window", 6)
    both = [Part("kv", chain[:4], rows(0, 1, 2, 3)), Part("swa", chain[2:4], rows(2, 3))]
    assert offloaded(writer, *both)
    assert offloaded(writer, Part("kv", chain[4:], rows(4, 5)))
    asked = [Part("kv", chain), Part("swa", chain[4:], trailing=True)]
    assert reader.lookup("w", asked) == [4], "a window of two pages ends at page 4 alone"
    load = [Part("kv", chain[:4], rows(8, 9, 10, 11)), Part("swa", chain[2:4], rows(0, 7), True)]
    assert loaded(reader, "w", *load)
    assert torch.equal(state2.page(7 * PAGE)[0], state.page(3 * PAGE)[0])
    assert torch.equal(kv2.page(11 * PAGE)[5], kv.page(3 * PAGE)[5])
    writer.close()
    reader.close()


def test_a_load_can_be_cancelled_until_it_starts(node: RunningNode) -> None:
    store, chain = opened(node, Entry()), names("cancel", 1)
    assert offloaded(store, Part("kv", chain, rows(0)))
    assert store.lookup("c", [Part("kv", chain)]) == [1]
    assert store.queue("c", [Part("kv", chain, rows(1))])
    assert store.cancel("c")
    assert not store.cancel("c")
    assert store.start(now) == -1
    assert not store.queue("c", [Part("unknown", chain, rows(1))])
    assert not store.queue("c", [])
    store.close()


class Spoilt:
    """Pages whose second layer does not arrive."""

    def __init__(self, pages: Any) -> None:
        self._pages, self.page_bytes = pages, pages.page_bytes

    def scatter(self, layer: int, rows: Sequence[int], fetch: Any) -> None:
        if layer == 1:
            raise OSError("a copy failed")
        self._pages.scatter(layer, rows, fetch)

    def gather(self, rows: Sequence[int]) -> tuple[object, list[Block]]:
        found: tuple[object, list[Block]] = self._pages.gather(rows)
        return found


def test_a_layer_that_fails_lets_the_forward_on_and_finish_says_so(node: RunningNode) -> None:
    pool, chain = pool_of(node, Entry()), names("layer", 2)
    spoilt = Pool(Spoilt(pool.pages), pool.blocks)
    store = DirectStore(
        {"kv": spoilt}, layers=LAYERS, writes=True, wait_ms=0, stall_ms=10_000
    )  # fmt: skip
    assert offloaded(store, Part("kv", chain, rows(0, 1)))
    assert store.lookup("l", [Part("kv", chain)]) == [1, 2]
    assert not loaded(store, "l", Part("kv", chain, rows(2, 3)))
    store.close()


def test_blocks_that_went_between_lookup_and_load_are_a_failed_load(node: RunningNode) -> None:
    store, chain = opened(node, Entry()), names("gone", 2)
    assert offloaded(store, Part("kv", chain, rows(0, 1)))
    assert store.lookup("g", [Part("kv", chain)]) == [1, 2]
    other = names("never stored", 2)
    assert not loaded(store, "g", Part("kv", other, rows(2, 3)))
    assert loaded(store, "again", Part("kv", chain, rows(2, 3))), "asked for at the load itself"
    store.close()


def test_slots_that_were_reused_while_they_were_copied_are_a_failed_load(
    node: RunningNode, monkeypatch: pytest.MonkeyPatch
) -> None:
    store, chain = opened(node, Entry()), names("reused", 1)
    assert offloaded(store, Part("kv", chain, rows(0)))
    assert store.lookup("u", [Part("kv", chain)]) == [1]
    monkeypatch.setattr("kvstore.client.blocking.Client.still", lambda client, ref: False)
    assert not loaded(store, "u", Part("kv", chain, rows(1)))
    store.close()


def test_pages_of_another_shape_or_rank_are_other_pages(node: RunningNode) -> None:
    chain = names("identity", 1)
    writer = opened(node, Entry())
    assert offloaded(writer, Part("kv", chain, rows(0)))
    second = Ranks(tp="1/2", pp="0/1", cp="0/1", dcp="0/1", replicated=False)
    pool = pool_of(node, Entry(), second)
    rank = DirectStore({"kv": pool}, layers=LAYERS, writes=True, wait_ms=0, stall_ms=1_000)
    wide = opened(node, Entry(dim=16))
    weights = opened(node, Entry(), weights_digest="v" * 64)
    for store in (rank, wide, weights):
        assert store.lookup("i", [Part("kv", chain)]) == []
        store.close()
    writer.close()


def test_an_arena_that_is_full_of_leases_refuses_offloads() -> None:
    with start_node(arena_bytes=16 << 20) as node:
        entry = Entry(dim=2_048)  # 768 KiB a page: the arena holds fewer than twenty
        store, chain = opened(node, entry), names("full", 40)
        kept, held = 0, 0
        for at, name in enumerate(chain):
            if not offloaded(store, Part("kv", [name], rows(at % 20))):
                break
            kept += 1
            held += len(store.lookup(f"f{at}", [Part("kv", [name])]))
        assert 0 < kept < len(chain) and held == kept
        assert loaded(store, "f0", Part("kv", chain[:1], rows(1)))
        store.close()


def test_whatever_happens_to_the_node_every_call_comes_back() -> None:
    with start_node(arena_bytes=16 << 20) as node:
        entry, chain = Entry(), names("node", 4)
        entry.fill(5)
        part = Part("kv", chain, rows(4, 5, 6, 7))
        store = opened(node, entry, call_ms=250)
        until_so(lambda: offloaded(store, Part("kv", chain, rows(0, 1, 2, 3))))
        until_so(lambda: store.lookup("hang", [Part("kv", chain)]) == [1, 2, 3, 4])
        node.signal_node(signal.SIGSTOP)
        assert loaded(store, "hang", part), "what is leased lies in shared memory"
        assert store.lookup("late", [Part("kv", chain)]) == []
        assert not offloaded(store, Part("kv", names("new", 1), rows(0)))
        assert not loaded(store, "late", part)
        node.signal_node(signal.SIGCONT)
        until_so(lambda: store.lookup("back", [Part("kv", chain)]) == [1, 2, 3, 4])
        node.wait_restarted(node.kill_node())
        assert store.queue("back", [part])
        index = store.start(now)
        store.counter.set_consumer(index)
        store.counter.wait_until(LAYERS - 1)
        if store.finish(index):  # the arena outlived the node, and so did the bytes
            assert torch.equal(entry.page(7 * PAGE)[0], entry.page(3 * PAGE)[0])
        until_so(lambda: store.lookup("again", [Part("kv", chain)]) == [1, 2, 3, 4])
        assert loaded(store, "again", part)
        assert torch.equal(entry.page(7 * PAGE)[0], entry.page(3 * PAGE)[0])
        node.kill_keeper()
        assert store.lookup("dead", [Part("kv", chain)]) == []
        assert not loaded(store, "dead", part)
        store.close()


def test_a_reset_does_not_come_back_while_something_is_moving(node: RunningNode) -> None:
    pool, written = pool_of(node, Entry()), threading.Event()
    store = DirectStore({"kv": pool}, layers=LAYERS, writes=True, wait_ms=0, stall_ms=50)
    assert store.offload([Part("kv", names("reset", 1), rows(0))], lambda: assert_set(written))
    with pytest.raises(Unreachable, match="did not end"):
        store.reset()
    written.set()
    until_so(lambda: store.completed() == 1)
    store.close()


def test_buffers_that_have_no_rows_are_refused_by_name() -> None:
    flat, lost = Entry(), Entry()
    flat.components = [[torch.zeros(64)]]
    flat.buffer_meta = [[(0, 4, 4)]]
    lost.layer_mapping = {0: (0, 3)}
    for entry, named in ((flat, "shape"), (lost, "no layer")):
        with pytest.raises(Unsupported, match=named):
            DevicePages(entry)
    meta = SimpleNamespace(
        name="kv", page_size=1, components=[[torch.zeros(4, 2, device="meta")]],
        buffer_meta=[[(0, 8, 8)]], layer_mapping={0: 0},
    )  # fmt: skip
    with pytest.raises(Unsupported, match="meta"):
        DevicePages(meta)
