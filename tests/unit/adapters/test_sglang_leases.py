"""The leases of the direct linker's finds: bounded, given back, and never waited for."""

import threading
from collections.abc import Iterator

import pytest

from kvstore.adapters.held import Held
from kvstore.adapters.sglang import direct
from kvstore.adapters.sglang.direct import Part
from kvstore.client.blocking import Client
from kvstore.testing.node import RunningNode, start_node
from tests.patience import PATIENCE_S, until_so
from tests.sglang_devices import Entry, leases, loaded, names, offloaded, opened, rows


@pytest.fixture(scope="module")
def node() -> Iterator[RunningNode]:
    with start_node(arena_bytes=64 << 20) as running:
        yield running


def test_finds_of_requests_that_never_load_are_let_go(
    node: RunningNode, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(direct, "MAX_HELD", 4)
    store, chain = opened(node, Entry()), names("held", 1)
    assert offloaded(store, Part("kv", chain, rows(0)))
    for number in range(12):
        assert store.lookup(f"r{number}", [Part("kv", chain)]) == [1]
        assert store.lookup(f"r{number}", [Part("kv", chain)]) == [1]
    until_so(lambda: leases(node) == 4)
    store.reset()
    until_so(lambda: leases(node) == 0)
    assert loaded(store, "r0", Part("kv", chain, rows(1)))
    store.close()


def test_a_load_ends_before_its_leases_are_given_back(
    node: RunningNode, monkeypatch: pytest.MonkeyPatch
) -> None:
    store, chain, told = opened(node, Entry(), stall_ms=200), names("order", 2), threading.Event()
    assert offloaded(store, Part("kv", chain, rows(0, 1)))
    assert store.lookup("o", [Part("kv", chain)]) == [1, 2]
    waited: list[bool] = []
    release = Held.release

    def slow(held: Held) -> None:
        if threading.current_thread().name.startswith("kvstore-load"):
            waited.append(told.wait(PATIENCE_S))
        release(held)

    monkeypatch.setattr(Held, "release", slow)
    assert loaded(store, "o", Part("kv", chain, rows(2, 3))), "what is complete is not a failure"
    told.set()
    store.close()
    assert waited == [True]


def test_nothing_that_lets_leases_go_waits_for_the_node(
    node: RunningNode, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(direct, "MAX_HELD", 1)
    store, chain = opened(node, Entry()), names("unasked", 1)
    assert offloaded(store, Part("kv", chain, rows(0)))

    def settle(client: Client, **what: object) -> None:
        raise AssertionError(f"{client} waits for the node: {what}")

    monkeypatch.setattr(Client, "settle", settle)
    part = Part("kv", chain, rows(1))
    for rid in ("again", "again", "evicting", "loaded", "cancelled"):
        assert store.lookup(rid, [part]) == [1]
        if rid == "loaded":
            assert loaded(store, rid, part)
    assert store.queue("cancelled", [part]) and store.cancel("cancelled")
    assert store.lookup("reset", [part]) == [1]
    store.reset()
    monkeypatch.undo()
    until_so(lambda: leases(node) == 0)
    store.close()
