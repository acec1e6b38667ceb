"""Blocks that stay while their bytes are taken piece by piece, over a real node."""

import ctypes
import hashlib
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest

from kvstore.adapters.opaque import OpaqueBlocks, Piece, StoreAddress
from kvstore.client.blocking import Client
from kvstore.client.replies import Acquired, SlotRef
from kvstore.core.errors import Unreachable
from kvstore.core.names import BlockName, Namespace, NamespaceKind
from kvstore.testing.node import RunningNode, start_node
from tests.patience import until_so
from tests.sglang_devices import leases

SIZE = 10_000


@pytest.fixture(scope="module")
def node() -> Iterator[RunningNode]:
    with start_node(arena_bytes=16 << 20) as running:
        yield running


@pytest.fixture
def blocks(node: RunningNode) -> Iterator[OpaqueBlocks]:
    namespace = Namespace(
        weights_digest="w", kv_dtype="float32", layers=1, kv_heads=1, head_dim=1,
        kind=NamespaceKind.OPAQUE,
    )  # fmt: skip
    opened = OpaqueBlocks(StoreAddress(where=str(node.run_dir), pause_ms=50), namespace, SIZE)
    yield opened
    opened.close()


def names(label: str, count: int) -> list[BlockName]:
    return [BlockName(hashlib.sha256(f"{label} {at}".encode()).digest()) for at in range(count)]


def stored(blocks: OpaqueBlocks, wanted: list[BlockName]) -> list[bytes]:
    contents = [hashlib.shake_128(name).digest(SIZE) for name in wanted]
    kept = [ctypes.create_string_buffer(content, SIZE) for content in contents]
    runs = [[Piece(ctypes.addressof(one), SIZE)] for one in kept]
    assert all(blocks.store(wanted, runs))
    return contents


def test_any_piece_of_any_held_block_can_be_taken(blocks: OpaqueBlocks) -> None:
    wanted = names("piece", 3)
    contents = stored(blocks, wanted[:2])
    held = blocks.hold(wanted)
    assert held is not None and held.blocks == 2, "the longest prefix"
    into = ctypes.create_string_buffer(700)
    for at, offset in ((0, 0), (1, 300), (0, SIZE - 700)):
        held.copy(at, offset, 700, ctypes.addressof(into))
        assert into.raw == contents[at][offset : offset + 700]
    with pytest.raises(AssertionError):
        held.copy(0, 1 << 20, 700, ctypes.addressof(into))
    assert held.whole(2)
    held.release()
    held.release()


def test_nothing_is_held_of_what_is_not_there(blocks: OpaqueBlocks) -> None:
    assert blocks.hold(names("absent", 2)) is None
    assert blocks.hold([]) is None
    blocks.close()
    assert blocks.hold(names("absent", 2)) is None


def test_a_find_whose_rest_does_not_come_up_is_let_go(
    blocks: OpaqueBlocks, node: RunningNode, monkeypatch: pytest.MonkeyPatch
) -> None:
    wanted = names("rest", 2)
    stored(blocks, wanted)
    acquire = Client.acquire

    def partly(client: Client, asked: list[BlockName], **how: Any) -> Acquired:
        got = acquire(client, asked, **how)
        return replace(got, ready=got.ready[:1], pending=got.ready[1:])

    def lost(client: Client, refs: list[SlotRef], **how: Any) -> int:
        assert refs
        raise Unreachable("the keeper is gone")

    monkeypatch.setattr(Client, "acquire", partly)
    monkeypatch.setattr(Client, "wait_ready", lost)
    assert blocks.hold(wanted, wait_ms=20) is None
    monkeypatch.undo()
    until_so(lambda: leases(node) == 0)


def test_a_release_without_a_node_is_harmless() -> None:
    namespace = Namespace(
        weights_digest="w", kv_dtype="float32", layers=1, kv_heads=1, head_dim=1,
        kind=NamespaceKind.OPAQUE,
    )  # fmt: skip
    with start_node(arena_bytes=16 << 20) as node:
        blocks = OpaqueBlocks(StoreAddress(where=str(node.run_dir)), namespace, SIZE)
        contents = stored(blocks, names("gone", 1))
        held = blocks.hold(names("gone", 1))
        assert held is not None
        node.kill_keeper()
        into = ctypes.create_string_buffer(SIZE)
        held.copy(0, 0, SIZE, ctypes.addressof(into))
        assert into.raw == contents[0], "our mapping outlives the keeper"
        held.release()
        blocks.close()
