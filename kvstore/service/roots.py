"""The roots a node knows: what a block under each looks like. Pure."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Final

import numpy as np
from numpy.typing import NDArray

from kvstore.core.errors import BadInput, Refused, TooLarge
from kvstore.core.layout import round_up
from kvstore.core.limits import GRANULE_BYTES, MAX_BLOCK_BYTES, MAX_SHARES, NAME_BYTES
from kvstore.core.names import Root

MAX_ROOTS: Final = 65_536
"""Namespaces x share domains of one node; more is a caller that makes them up."""


@dataclass(frozen=True, slots=True)
class BlockShape:
    """Sizes of every block under a root."""

    block_bytes: int
    payload_bytes: int
    shares: int

    @property
    def sizes(self) -> tuple[int, int, int]:
        """The three as a slot's record has them."""
        return self.block_bytes, self.payload_bytes, self.shares

    def check(self, capacity_bytes: int) -> None:
        """Raise `BadInput` or `TooLarge` naming the field when no such block can exist here."""
        if not 0 < self.shares <= MAX_SHARES:
            raise BadInput(f"shares must be 1 to {MAX_SHARES}, got {self.shares}")
        if self.payload_bytes <= 0 or self.payload_bytes % self.shares:
            raise BadInput(
                f"payload_bytes {self.payload_bytes} is not a positive multiple of"
                f" {self.shares} shares"
            )
        if self.payload_bytes > MAX_BLOCK_BYTES:
            raise TooLarge(f"payload_bytes {self.payload_bytes}; {MAX_BLOCK_BYTES} allowed")
        expected = round_up(self.payload_bytes, GRANULE_BYTES)
        if self.block_bytes != expected:
            raise BadInput(f"block_bytes {self.block_bytes} is not {expected}, payload padded")
        if self.block_bytes > capacity_bytes:
            raise TooLarge(f"a block of {self.block_bytes} bytes; the arena has {capacity_bytes}")


@dataclass(slots=True)
class RootInfo:
    """One root as this node knows it."""

    number: int
    """Index in the node's list; what per-slot columns hold instead of 32 bytes."""
    root: Root
    shape: BlockShape
    group: str = "full"
    domain: str = ""
    """Share domain; empty until a session has opened the root in this incarnation."""

    @property
    def prefix(self) -> int:
        """First 64 bits, little endian: half of a block's key."""
        return int.from_bytes(self.root[:8], "little")


class Roots:
    """All roots, by value and by number."""

    def __init__(
        self,
        max_roots: int = MAX_ROOTS,
        on_domain: Callable[[Root, str], None] = lambda root, domain: None,
    ) -> None:
        """`on_domain` is told of roots and the share domains that they belong to."""
        self._by_root: dict[Root, RootInfo] = {}
        self._by_number: list[RootInfo] = []
        self._max_roots = max_roots
        self._on_domain = on_domain

    def open(self, root: Root, shape: BlockShape, *, domain: str = "") -> RootInfo:
        """Return the root's entry, new or known; `BadInput` when its blocks have other sizes."""
        info = self._by_root.get(root)
        if info is None:
            if len(self._by_number) >= self._max_roots:
                raise Refused(f"{self._max_roots} roots are open already")
            info = RootInfo(len(self._by_number), root, shape)
            self._by_root[root] = info
            self._by_number.append(info)
        elif info.shape != shape:
            raise BadInput(f"blocks under this root have {info.shape}, not {shape}")
        if domain and domain != info.domain:
            info.domain = domain
            self._on_domain(root, domain)
        return info

    def get(self, root: Root) -> RootInfo | None:
        """Return a root that was opened, or None."""
        return self._by_root.get(root)

    def at(self, number: int) -> RootInfo:
        """Return the root with this number."""
        return self._by_number[number]

    def __len__(self) -> int:
        return len(self._by_number)


def key_column(info: RootInfo, packed: bytes) -> NDArray[np.uint64]:
    """Return the 64-bit keys of packed names under a root: (root prefix) ^ (name prefix)."""
    words = np.frombuffer(packed, np.uint64)[:: NAME_BYTES // 8]
    return np.bitwise_xor(words, np.uint64(info.prefix))


def keys_of(info: RootInfo, packed: bytes) -> list[int]:
    """Return the keys of packed names as integers, for indexes."""
    keys: list[int] = key_column(info, packed).tolist()
    return keys
