"""Our own store, hashes and event consumer, held against the suite that others can run."""

import ctypes
import signal
from collections.abc import Iterator, Sequence
from typing import Any, ClassVar

import numpy as np
import pytest

from kvstore.adapters.opaque import Block, OpaqueBlocks, Piece, StoreAddress
from kvstore.adapters.vllm.pages import EnginePages
from kvstore.core.engine_hashes import EngineHashes
from kvstore.core.layout import BlockLayout, Codec
from kvstore.core.names import BlockName, Namespace, NamespaceKind, Root
from kvstore.directory.publisher import xor_prefixes
from kvstore.router.vllm_events import VllmIndex
from kvstore.testing.conformance import (
    ByteStore,
    Cells,
    EventConformance,
    HashConformance,
    LayoutConformance,
    StoreConformance,
)
from kvstore.testing.node import RunningNode, start_node

PIECES = (30_000, 9_000, 1_000)
"""Runs of memory of one block: no layout of an engine is one run."""


class Memory:
    """Host memory of an engine, in pieces that do not lie together."""

    def __init__(self, count: int) -> None:
        self._parts = [[ctypes.create_string_buffer(size) for size in PIECES] for _ in range(count)]

    def blocks(self) -> list[Block]:
        return [[Piece(ctypes.addressof(p), len(p)) for p in parts] for parts in self._parts]

    def fill(self, at: int, payload: bytes) -> None:
        start = 0
        for part in self._parts[at]:
            part.raw = payload[start : start + len(part)]
            start += len(part)

    def bytes_of(self, at: int) -> bytes:
        return b"".join(part.raw for part in self._parts[at])


class Opaque:
    """`OpaqueBlocks` as the suite calls a store."""

    def __init__(self, where: str) -> None:
        model = Namespace(
            weights_digest="w", kv_dtype="float32", layers=1, kv_heads=1, head_dim=1,
            kind=NamespaceKind.OPAQUE,
        )  # fmt: skip
        self._blocks = OpaqueBlocks(StoreAddress(where=where, pause_ms=50), model, sum(PIECES))

    def store(self, names: Sequence[BlockName], payloads: Sequence[bytes]) -> list[bool]:
        memory = Memory(len(names))
        for at, payload in enumerate(payloads):
            memory.fill(at, payload)
        return self._blocks.store(names, memory.blocks())

    def load(self, names: Sequence[BlockName]) -> list[bytes | None]:
        memory = Memory(len(names))
        done = self._blocks.load(names, memory.blocks())
        return [memory.bytes_of(at) if here else None for at, here in enumerate(done)]

    def prefix(self, names: Sequence[BlockName]) -> int:
        return self._blocks.prefix(names)

    def close(self) -> None:
        self._blocks.close()


class TestOpaqueBlocks(StoreConformance):
    capacity_blocks = 224  # of 40 KiB, in 8 MiB
    faults = True
    node: ClassVar[RunningNode]

    @pytest.fixture(scope="class", autouse=True)
    @classmethod
    def _running(cls) -> Iterator[None]:
        with start_node(arena_bytes=8 << 20) as node:
            cls.node = node
            yield

    def open(self) -> ByteStore:
        return Opaque(str(self.node.run_dir))

    def kill(self) -> None:
        self.node.kill_node()

    def hang(self) -> None:
        self.node.signal_node(signal.SIGSTOP)

    def resume(self) -> None:
        self.node.signal_node(signal.SIGCONT)


class TestPagesOfVllm(LayoutConformance):
    """vLLM's on a CPU: K of 16 tokens transposed, V row by row, in blocks of 32 tokens."""

    PART = 1
    """The second half of the engine's block: the first is another's."""

    def fill(self, layout: BlockLayout, cells: Cells) -> Any:
        element = {Codec.RAW16: np.uint16, Codec.RAW32: np.uint32}[layout.codec]
        shape = (1, layout.kv_heads, 32, 2 * layout.head_dim)
        layers = [np.zeros(shape, element) for _ in range(layout.layers)]
        for (head, layer), both in cells.items():
            keys, values = (np.frombuffer(one, element).reshape(16, -1) for one in both)
            k, v = layers[layer][0, head].reshape(2, 2, -1)
            k[self.PART], v[self.PART] = keys.T.reshape(-1), values.reshape(-1)
        return layers

    def read(self, layout: BlockLayout, pages: Any) -> Cells:
        cells: Cells = {}
        for head in range(layout.kv_heads):
            for layer in range(layout.layers):
                k, v = pages[layer][0, head].reshape(2, 2, -1)[:, self.PART]
                keys = k.reshape(-1, 16).T.tobytes()
                cells[head, layer] = keys, v.tobytes()
        return cells

    def store(self, layout: BlockLayout, pages: Any, target: memoryview) -> None:
        EnginePages(pages, layout, tile=16).store(0, self.PART, target)

    def load(self, layout: BlockLayout, source: memoryview) -> Any:
        pages = self.fill(layout, {})
        EnginePages(pages, layout, tile=16).load(source, 0, self.PART)
        return pages


class TestOurHashes(HashConformance):
    def digest(
        self, algorithm: str, parent: bytes | None, tokens: Sequence[int],
        extra: Sequence[tuple[str, ...]],
    ) -> bytes:  # fmt: skip
        return EngineHashes.of(algorithm).block(parent, tokens, extra)


class TestOurConsumer(EventConformance):
    def setup_method(self) -> None:
        self.index = VllmIndex(Root(bytes(32)))

    def apply(self, payload: bytes) -> object:
        return self.index.apply(payload)

    def check(self) -> None:
        held = self.index.held()
        assert self.index.digest().count == sum(len(part.names) for part in held)
        xor = 0
        for part in held:
            xor ^= xor_prefixes(part.root, part.names)
        assert self.index.digest().xor_prefixes == xor


class TestOurCheckingConsumer(TestOurConsumer):
    def setup_method(self) -> None:
        self.index = VllmIndex(Root(bytes(32)), EngineHashes())
