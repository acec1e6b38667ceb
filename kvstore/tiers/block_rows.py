"""What stands on disk: a row of 128 bytes that names and verifies a block. Pure.

The same row stands twice. In front of the block's bytes it is the *authority*: header and payload
cross the device in one operation, and a read believes the payload only when the row is whole, names
the wanted block, and the payload has the row's sum. In the row file it is an *index*: it finds
the block after a restart, and a stale or torn one costs a counted miss.

    slot      = header page (row, zeros to 4 KiB) | block, padded to 4 KiB
    row file  = one row per slot of the segment, zeros where it holds nothing
"""

import struct
from typing import Final

import xxhash

from kvstore.core.layout import round_up
from kvstore.core.limits import GRANULE_BYTES, MAX_BLOCK_BYTES, MAX_SHARES, NAME_BYTES
from kvstore.core.names import BlockName, Root
from kvstore.tiers.base import BlockHeader
from kvstore.tiers.sums import SUM_BYTES

ROW_BYTES: Final = 128
HEADER_BYTES: Final = GRANULE_BYTES
"""The row's page in front of a block: O_DIRECT moves whole logical sectors only."""
NO_ROW: Final = bytes(ROW_BYTES)
_MAGIC: Final = b"kv"
_VERSION: Final = 1
_GROUP_BYTES: Final = 8
# magic, version, shares, payload bytes, position, parent, group, root, name, sum of the payload
_ROW: Final = struct.Struct(f"<2sHIIIQ{_GROUP_BYTES}s{NAME_BYTES}s{NAME_BYTES}s{SUM_BYTES}s")
assert _ROW.size + SUM_BYTES == ROW_BYTES


def slot_bytes(payload_bytes: int) -> int:
    """Return the bytes that a block takes on disk, header page and padding included."""
    return HEADER_BYTES + round_up(payload_bytes, GRANULE_BYTES)


def pack_row(header: BlockHeader) -> bytes:
    """Return the 128 bytes that stand for a block."""
    group = header.group.encode()
    assert len(group) <= _GROUP_BYTES, f"layer group {header.group!r} does not fit a row"
    packed = _ROW.pack(
        _MAGIC,
        _VERSION,
        header.shares,
        header.payload_bytes,
        header.position,
        header.parent,
        group,
        header.root,
        header.name,
        header.sum,
    )
    return packed + xxhash.xxh3_128_digest(packed)


def unpack_row(raw: bytes | memoryview) -> BlockHeader | None:
    """Return the block that a row stands for; None for anything but a whole row of ours."""
    packed = raw[: _ROW.size]
    if xxhash.xxh3_128_digest(packed) != raw[_ROW.size : ROW_BYTES]:
        return None
    magic, version, shares, payload_bytes, position, parent, group, root, name, block_sum = (
        _ROW.unpack(packed)
    )
    if magic != _MAGIC or version != _VERSION or not 0 < shares <= MAX_SHARES:
        return None
    if not 0 < payload_bytes <= MAX_BLOCK_BYTES or payload_bytes % shares:
        return None
    return BlockHeader(
        root=Root(root),
        name=BlockName(name),
        payload_bytes=payload_bytes,
        shares=shares,
        sum=block_sum,
        position=position,
        group=group.rstrip(b"\0").decode("ascii", "replace"),
        parent=parent,
    )
