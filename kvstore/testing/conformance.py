"""A suite that any store of KV blocks, or any adapter of one, can be held against.

Subclass a suite in a test module and say how to open the thing; pytest does the rest:

    class TestMyStore(StoreConformance):
        def open(self) -> ByteStore:
            return MyStore(...)

`docs/engines/conformance.md` tells what each suite asks. Plain asserts, no engine package.
"""

import contextlib
import hashlib
import random
import time
from collections.abc import Callable, Sequence
from typing import Any, Final, Protocol

from kvstore.core.errors import BadInput
from kvstore.core.layout import BlockLayout, Codec
from kvstore.core.names import BlockName

HASH_VECTORS: Final = {
    "sha256": (
        "fe8fa5dda3210d0ca2031e37cbe3b001186773cd1c710beb2d45fcb51d434798",
        "8be7aaa33831156d316f1f463ae57e643deb63f42e633e2d631df88815cc4629",
        "700a67997281b8a6054e672a0644fdefdd355998255c1ce71796914c58b54a1e",
    ),
    "sha256_cbor": (
        "dc918a88b139e5afe60b88eda27508d4aee16c10fdc354791efea06206ac0749",
        "c300ec275d7bf08af8fc63e76cdc0086911bbc7091e03c5cf892553bef84ef0c",
        "9792dd13eaf4fce5856f795db782b31ae39c63dd8103d5249475583a8a3ea2c2",
    ),
}
"""vLLM 0.33, no PYTHONHASHSEED: tokens 0 … 15, then 16 … 31 behind them, and the first block with
the extra keys ("lora", "a", "/p") and ("cache_salt", "s")."""


class ByteStore(Protocol):
    """Blocks of bytes by 32-byte names. What went wrong is a miss, never an error."""

    def store(self, names: Sequence[BlockName], payloads: Sequence[bytes]) -> list[bool]:
        """Say for each block whether it is there now."""
        ...

    def load(self, names: Sequence[BlockName]) -> list[bytes | None]:
        """Return the bytes of a prefix of `names`, and None from the first miss on."""
        ...

    def prefix(self, names: Sequence[BlockName]) -> int:
        """Return how many leading names are there: a hint."""
        ...

    def close(self) -> None:
        """End it."""
        ...


class StoreConformance:
    """What every store keeps, whatever befalls the process behind it."""

    payload_bytes: int = 40_000
    """Not a multiple of a page, so that padding shows."""
    capacity_blocks: int = 0
    """More blocks than it can hold, for the test that over-fills it; 0: not tested."""
    deadline_s: float = 5.0
    """How long a call may take when nobody answers."""
    faults: bool = False
    """Whether `kill`, `hang` and `resume` are given."""
    damages: bool = False
    """Whether `damage` is given."""

    def kill(self) -> None:
        """End the process behind the store; something restarts it."""
        raise NotImplementedError

    def hang(self) -> None:
        """Stop that process without ending it."""
        raise NotImplementedError

    def resume(self) -> None:
        """Let it go on."""
        raise NotImplementedError

    def damage(self) -> None:
        """Spoil the bytes of every block at rest, so that the next load meets them."""
        raise NotImplementedError

    def open(self) -> ByteStore:
        """Return the store."""
        raise NotImplementedError

    def blocks(self, label: str, count: int) -> tuple[list[BlockName], list[bytes]]:
        """Return names of that label, and bytes that tell them apart."""
        names = [
            BlockName(hashlib.sha256(f"{label} {at}".encode()).digest()) for at in range(count)
        ]
        return names, [hashlib.shake_128(name).digest(self.payload_bytes) for name in names]

    def test_what_was_never_stored_misses(self) -> None:
        store = self.open()
        names, _ = self.blocks("never", 3)
        assert store.load(names) == [None] * 3
        assert store.prefix(names) == 0
        store.close()

    def test_what_was_stored_comes_back_bit_for_bit(self) -> None:
        store = self.open()
        names, payloads = self.blocks("round trip", 5)
        assert store.store(names, payloads) == [True] * 5
        assert store.prefix(names) == 5
        assert store.load(names) == payloads
        assert store.store(names, payloads) == [True] * 5, "storing twice is harmless"
        store.close()

    def test_a_prefix_ends_at_the_first_hole(self) -> None:
        store = self.open()
        names, payloads = self.blocks("hole", 4)
        kept = [0, 1, 3]
        assert all(store.store([names[at] for at in kept], [payloads[at] for at in kept]))
        assert store.prefix(names) == 2
        assert store.load(names) == [*payloads[:2], None, None]
        assert store.store(names, payloads) == [True] * 4, "a hole can be filled"
        assert store.load(names) == payloads
        store.close()

    def test_nothing_is_nothing(self) -> None:
        store = self.open()
        assert store.store([], []) == []
        assert store.load([]) == []
        assert store.prefix([]) == 0
        store.close()

    def test_a_store_that_is_over_full_loses_blocks_and_never_lies(self) -> None:
        if not self.capacity_blocks:
            return
        store = self.open()
        names, payloads = self.blocks("over full", self.capacity_blocks)
        for at in range(0, len(names), 16):
            store.store(names[at : at + 16], payloads[at : at + 16])
        found = [store.load([name])[0] for name in names]
        assert None in found, "it was to be more than fits"
        assert any(found), "it kept nothing"
        for block, payload in zip(found, payloads, strict=True):
            assert block in (None, payload)
        store.close()

    def test_a_dead_process_costs_a_deadline(self) -> None:
        if self.faults:
            self._survives(self.kill, None)

    def test_a_hung_process_costs_a_deadline(self) -> None:
        if self.faults:
            self._survives(self.hang, self.resume)

    def test_damaged_bytes_are_a_miss_and_never_given(self) -> None:
        if not self.damages:
            return
        store = self.open()
        names, payloads = self.blocks("damaged", 4)
        assert store.store(names, payloads) == [True] * 4
        self.damage()
        for _ in range(3):
            for block, payload in zip(store.load(names), payloads, strict=True):
                assert block is None or block == payload, "a wrong byte was given"
        self._comes_back(store, names, payloads)
        store.close()

    def _survives(self, fault: Callable[[], None], mend: Callable[[], None] | None) -> None:
        store = self.open()
        names, payloads = self.blocks("survivor", 4)
        store.store(names, payloads)
        fault()
        try:
            began_s = time.monotonic()
            for block, payload in zip(store.load(names), payloads, strict=True):
                assert block in (None, payload)
            store.store(names, payloads)
            assert 0 <= store.prefix(names) <= 4
            took_s = time.monotonic() - began_s
            assert took_s < self.deadline_s, f"three calls took {took_s:.1f} s"
        finally:
            if mend is not None:
                mend()
        self._comes_back(store, names, payloads)
        store.close()

    def _comes_back(
        self, store: ByteStore, names: Sequence[BlockName], payloads: Sequence[bytes]
    ) -> None:
        """See that the same handle works again: no new store is opened."""
        ends_s = time.monotonic() + 20
        while store.load(names) != payloads:
            assert time.monotonic() < ends_s, "it did not come back"
            store.store(names, payloads)
            time.sleep(0.05)


Cells = dict[tuple[int, int], tuple[bytes, bytes]]
"""By (head, layer): K and V of 16 tokens, each `[16, D]` row after row."""


class LayoutConformance:
    """Whether an engine's pages become blocks of the one layout (docs/formats.md) and pages again.

    `Pages` below is whatever holds 16 tokens of all layers in the engine's own arrangement.
    """

    layouts: Sequence[BlockLayout] = (
        BlockLayout(layers=2, kv_heads=3, head_dim=64, codec=Codec.RAW32),
        BlockLayout(layers=3, kv_heads=1, head_dim=128, codec=Codec.RAW16),
        BlockLayout(layers=1, kv_heads=8, head_dim=64, codec=Codec.RAW16),
    )

    def fill(self, layout: BlockLayout, cells: Cells) -> Any:
        """Return pages that hold `cells`."""
        raise NotImplementedError

    def read(self, layout: BlockLayout, pages: Any) -> Cells:
        """Return what pages hold."""
        raise NotImplementedError

    def store(self, layout: BlockLayout, pages: Any, target: memoryview) -> None:
        """Write pages as one block, padding included; `target` holds another's bytes."""
        raise NotImplementedError

    def load(self, layout: BlockLayout, source: memoryview) -> Any:
        """Return new pages with the block's bytes."""
        raise NotImplementedError

    def test_pages_become_blocks_of_the_one_layout_and_pages_again(self) -> None:
        for layout in self.layouts:
            cells = _cells_of(layout)
            block = bytearray(b"\xee" * layout.block_bytes)
            self.store(layout, self.fill(layout, cells), memoryview(block))
            payload = b"".join(
                b"".join(cells[head, layer])
                for head in range(layout.kv_heads)
                for layer in range(layout.layers)
            )
            assert bytes(block) == payload.ljust(layout.block_bytes, b"\0")
            assert self.read(layout, self.load(layout, memoryview(block))) == cells


def _cells_of(layout: BlockLayout) -> Cells:
    """Return bytes that tell every row of every cell apart."""

    def codes(*place: int) -> bytes:
        return hashlib.shake_128(repr((layout, place)).encode()).digest(layout.codes_bytes)

    return {
        (head, layer): (codes(head, layer, 0), codes(head, layer, 1))
        for head in range(layout.kv_heads)
        for layer in range(layout.layers)
    }


class HashConformance:
    """Whether a hasher agrees with the engines' published digests."""

    algorithms: Sequence[str] = tuple(HASH_VECTORS)

    def digest(
        self, algorithm: str, parent: bytes | None, tokens: Sequence[int],
        extra: Sequence[tuple[str, ...]],
    ) -> bytes:  # fmt: skip
        """Return the digest of one block."""
        raise NotImplementedError

    def test_the_published_digests(self) -> None:
        for algorithm in self.algorithms:
            first, second, extra = map(bytes.fromhex, HASH_VECTORS[algorithm])
            assert self.digest(algorithm, None, range(16), ()) == first
            assert self.digest(algorithm, first, range(16, 32), ()) == second
            keys = (("lora", "a", "/p"), ("cache_salt", "s"))
            assert self.digest(algorithm, None, range(16), keys) == extra


class EventConformance:
    """Whether a consumer of engines' KV events survives what no engine should send."""

    rounds: int = 300
    seed: int = 1

    def apply(self, payload: bytes) -> object:
        """Apply one packed batch `[time, events, rank]` to a consumer that goes on living.

        May raise `BadInput`, nothing else.
        """
        raise NotImplementedError

    def check(self) -> None:
        """Assert that the consumer's own figures agree with what it holds."""

    def test_no_batch_breaks_the_consumer(self) -> None:
        import msgspec  # with the extra `vllm`: the other suites do without

        dice = random.Random(self.seed)
        for _ in range(self.rounds):
            batch = [1.5, [_event(dice) for _ in range(dice.randrange(4))], 0]
            payload = bytearray(msgspec.msgpack.encode(batch))
            if dice.random() < 0.2:
                payload[dice.randrange(len(payload))] ^= 1 << dice.randrange(8)
            with contextlib.suppress(BadInput):
                self.apply(bytes(payload))
            self.check()


def _event(dice: random.Random) -> dict[str, Any]:
    """Return an event that is right, wrong, or wrong in one field."""
    hashes = [dice.choice((at, at.to_bytes(32, "big"))) for at in dice.sample(range(1, 40), 3)]
    tokens = [dice.randrange(50_000) for _ in range(48)]
    event: dict[str, Any] = {
        "type": dice.choice(
            ("BlockStored", "BlockStored", "BlockRemoved", "AllBlocksCleared", "?")
        ),
        "block_hashes": hashes,
        "parent_block_hash": dice.choice((None, None, dice.randrange(40))),
        "token_ids": tokens[: dice.choice((48, 48, 40, 0))],
        "block_size": dice.choice((16, 16, 16, 0, -16, 7)),
        "medium": dice.choice(("GPU", "GPU", "CPU", None)),
        "extra_keys": dice.choice((None, None, [["salt"], None, None], [[["i", 1]]], [])),
    }
    if dice.random() < 0.2:
        event[dice.choice(tuple(event))] = dice.choice(
            (None, -1, 1 << 63, "x", b"", [], [None], {})
        )
    return event
