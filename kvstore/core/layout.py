"""The one byte-exact table of formats, and the sizes that follow from it (DESIGN D1).

A block is one contiguous object of 16 tokens, the same in HBM, arena, NVMe and on the wire:

    block = [kv_heads, share] padded to 4 KiB       heads outermost
    share = [layers, cell]                          one KV head's part
    cell  = K codes [16, head_dim] | V codes [16, head_dim] | scales     a multiple of 128 B

so a tensor-parallel rank's heads are one byte range of every block, and an 8-layer slice is
one run per head. The formulas hold for MHA (kv_heads = query heads), GQA and MQA (kv_heads = 1)
alike: only `kv_heads` differs.

This module knows sizes. Encoders and decoders of the quantised rows live in `kvkernels.formats`.
"""

from dataclasses import dataclass
from enum import IntEnum
from typing import Final, NamedTuple

from kvstore.core.errors import BadInput, TooLarge, Unsupported
from kvstore.core.limits import BLOCK_TOKENS, GRANULE_BYTES, MAX_BLOCK_BYTES, MAX_SHARES

LAYOUT_VERSION: Final = 1
CELL_ALIGNMENT: Final = 128


class Codec(IntEnum):
    """How the elements of a cell are stored; four bits of a page-table entry (DESIGN D3)."""

    RAW16 = 0
    """bfloat16 or float16, as the namespace says; no scales."""
    RAW32 = 1
    """float32; what a CPU worker keeps."""
    FP8 = 2
    """e4m3fn with one f32 scale per token for K and for V: f32[2][16]."""
    INT8 = 3
    """Symmetric int8 with one f32 scale per token for K and for V: f32[2][16]."""
    INT4 = 4
    """Offset-binary nibbles; byte j holds dim j (low) and dim j + D/2 (high); fp16[2][16][2]."""


class Format(NamedTuple):
    """One row of the table: bits per element and bytes of scales per cell."""

    codec: Codec
    bits: int
    scale_bytes: int


FORMATS: Final[dict[Codec, Format]] = {
    Codec.RAW16: Format(Codec.RAW16, 16, 0),
    Codec.RAW32: Format(Codec.RAW32, 32, 0),
    Codec.FP8: Format(Codec.FP8, 8, 2 * BLOCK_TOKENS * 4),
    Codec.INT8: Format(Codec.INT8, 8, 2 * BLOCK_TOKENS * 4),
    Codec.INT4: Format(Codec.INT4, 4, 2 * BLOCK_TOKENS * 2 * 2),
}

RAW_CODEC: Final[dict[str, Codec]] = {
    "float32": Codec.RAW32,
    "bfloat16": Codec.RAW16,
    "float16": Codec.RAW16,
}


def round_up(value: int, multiple: int) -> int:
    """Return the smallest multiple of `multiple` that is not below `value`."""
    return -(-value // multiple) * multiple


class ByteRange(NamedTuple):
    """A contiguous part of a block: `[start, stop)` in bytes."""

    start: int
    stop: int


@dataclass(frozen=True, slots=True, kw_only=True)
class BlockLayout:
    """Sizes and offsets inside one block object of one layer group."""

    layers: int
    kv_heads: int
    head_dim: int
    codec: Codec
    padded: bool = True
    """False for a part of a block, a rank's heads: behind it come others, and no padding."""

    def __post_init__(self) -> None:
        for name in ("layers", "kv_heads", "head_dim"):
            if getattr(self, name) <= 0:
                raise BadInput(f"layout {name} must be positive, got {getattr(self, name)}")
        if self.head_dim % 8:
            raise BadInput(f"head_dim {self.head_dim} is not a multiple of 8")
        if self.kv_heads > MAX_SHARES:
            raise TooLarge(f"{self.kv_heads} KV heads; {MAX_SHARES} allowed")
        if self.block_bytes > MAX_BLOCK_BYTES:
            raise TooLarge(f"a block of {self.block_bytes} bytes; {MAX_BLOCK_BYTES} allowed")

    @property
    def codes_bytes(self) -> int:
        """Bytes of K codes, and as many of V codes, in a cell."""
        return BLOCK_TOKENS * self.head_dim * FORMATS[self.codec].bits // 8

    @property
    def cell_bytes(self) -> int:
        """Bytes of one layer of one head: K codes, V codes, scales."""
        return round_up(2 * self.codes_bytes + FORMATS[self.codec].scale_bytes, CELL_ALIGNMENT)

    @property
    def share_bytes(self) -> int:
        """Bytes of one KV head's part of a block."""
        return self.layers * self.cell_bytes

    @property
    def payload_bytes(self) -> int:
        """Bytes of a block before padding."""
        return self.kv_heads * self.share_bytes

    @property
    def block_bytes(self) -> int:
        """Bytes of a block as every tier holds it; of a part, its own."""
        return round_up(self.payload_bytes, GRANULE_BYTES if self.padded else CELL_ALIGNMENT)

    @property
    def bytes_per_token(self) -> float:
        """Stored bytes per token, padding included."""
        return self.block_bytes / BLOCK_TOKENS

    def heads(self, first: int, count: int) -> ByteRange:
        """Return the bytes of `count` KV heads from `first`: a tensor-parallel rank's part."""
        if not (0 <= first and 0 < count and first + count <= self.kv_heads):
            raise BadInput(f"heads [{first}, {first + count}) of {self.kv_heads}")
        return ByteRange(first * self.share_bytes, (first + count) * self.share_bytes)

    def layer_run(self, head: int, first_layer: int, count: int) -> ByteRange:
        """Return the bytes of `count` layers of one head: one piece of a layer-wise load."""
        if not (0 <= first_layer and 0 < count and first_layer + count <= self.layers):
            raise BadInput(f"layers [{first_layer}, {first_layer + count}) of {self.layers}")
        start = self.heads(head, 1).start + first_layer * self.cell_bytes
        return ByteRange(start, start + count * self.cell_bytes)


@dataclass(frozen=True, slots=True, kw_only=True)
class LatentLayout:
    """Sizes inside one block of MLA layers: one share, since all heads share a token's one row.

        block = [layers, cell] padded to 4 KiB
        cell  = [16, latent + rope]     raw elements; the latent part is K and V, the rotary part K

    Latents have no quantised form yet.
    """

    layers: int
    latent_dim: int
    rope_dim: int
    codec: Codec = Codec.RAW16

    def __post_init__(self) -> None:
        for name in ("layers", "latent_dim", "rope_dim"):
            if getattr(self, name) <= 0:
                raise BadInput(f"latent layout {name} must be positive, got {getattr(self, name)}")
        if self.latent_dim % 8 or self.rope_dim % 8:
            raise BadInput(f"latent {self.latent_dim} or rope {self.rope_dim}: no multiple of 8")
        if self.codec not in (Codec.RAW16, Codec.RAW32):
            raise Unsupported(f"MLA latents have no {self.codec.name.lower()} blocks")
        if self.block_bytes > MAX_BLOCK_BYTES:
            raise TooLarge(f"a block of {self.block_bytes} bytes; {MAX_BLOCK_BYTES} allowed")

    @property
    def cell_bytes(self) -> int:
        """Bytes of one layer: a row of latent and rotary elements for each of 16 tokens."""
        return BLOCK_TOKENS * (self.latent_dim + self.rope_dim) * FORMATS[self.codec].bits // 8

    @property
    def payload_bytes(self) -> int:
        """Bytes of a block, which is one share, before padding."""
        return self.layers * self.cell_bytes

    @property
    def block_bytes(self) -> int:
        """Bytes of a block as every tier holds it."""
        return round_up(self.payload_bytes, GRANULE_BYTES)

    def layer_run(self, first_layer: int, count: int) -> ByteRange:
        """Return the bytes of `count` layers: one piece of a layer-wise load."""
        if not (0 <= first_layer and 0 < count and first_layer + count <= self.layers):
            raise BadInput(f"layers [{first_layer}, {first_layer + count}) of {self.layers}")
        start = first_layer * self.cell_bytes
        return ByteRange(start, start + count * self.cell_bytes)


def kv_bytes_per_token(*, layers: int, kv_heads: int, head_dim: int, element_bytes: int) -> int:
    """Return 2·L·H_kv·d·P, the textbook KV size of one token (MHA, GQA and MQA alike)."""
    return 2 * layers * kv_heads * head_dim * element_bytes
