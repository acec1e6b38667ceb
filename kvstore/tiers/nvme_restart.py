"""What a row file says after a restart: in columns, since there are millions of rows. Pure."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Final

import numpy as np
import xxhash
from numpy.typing import NDArray

from kvstore.core.limits import GRANULE_BYTES, NAME_BYTES
from kvstore.core.names import Root
from kvstore.tiers.block_rows import HEADER_BYTES, ROW_BYTES, unpack_row
from kvstore.tiers.sums import SUM_BYTES

_ROW: Final = np.dtype(
    {
        "names": ["payload_bytes", "position", "parent", "root", "root_key", "name", "name_key"],
        "formats": ["<u4", "<u4", "<u8", f"V{NAME_BYTES}", "<u8", f"V{NAME_BYTES}", "<u8"],
        "offsets": [8, 12, 16, 32, 32, 64, 64],
        "itemsize": ROW_BYTES,
    }
)
_SUMMED: Final = ROW_BYTES - SUM_BYTES
_WORD_BYTES: Final = 8
_ROW_WORDS: Final = ROW_BYTES // _WORD_BYTES
_SUM_WORDS: Final = SUM_BYTES // _WORD_BYTES


@dataclass(frozen=True, slots=True)
class FoundRows:
    """The whole rows of one row file, in columns, by slot."""

    slots: list[int]
    keys: list[int]
    names: bytes
    """Packed, in the order of `slots`."""
    roots: list[Root]
    """Distinct roots of the file."""
    root_of: list[int]
    """Index into `roots` for each of `slots`."""
    parents: list[int]
    torn: int
    """Rows that were neither whole nor empty."""


def read_rows(raw: bytes, slot_bytes: int) -> FoundRows:
    """Return what a row file holds; rows that are torn or of another size class are left out."""
    count = len(raw) // ROW_BYTES
    digest = xxhash.xxh3_128_digest
    words = np.frombuffer(raw, np.uint64, count * _ROW_WORDS).reshape(count, _ROW_WORDS)
    written = np.flatnonzero(words.any(axis=1))
    sums = [digest(raw[at : at + _SUMMED]) for at in (written * ROW_BYTES).tolist()]
    right = np.frombuffer(b"".join(sums), np.uint64).reshape(-1, _SUM_WORDS)
    whole = written[(words[written, -_SUM_WORDS:] == right).all(axis=1)]
    table = np.frombuffer(raw, _ROW, count=count)[whole]
    padded = -(-table["payload_bytes"].astype(np.int64) // GRANULE_BYTES) * GRANULE_BYTES
    fits = padded + HEADER_BYTES == slot_bytes
    slots = whole[fits]
    # A row of ours is whole and of this version: one look at any of them tells for the format.
    if len(slots) and unpack_row(raw[slots[0] * ROW_BYTES : (slots[0] + 1) * ROW_BYTES]) is None:
        slots, fits = slots[:0], np.zeros_like(fits)
    table = table[fits]
    root_keys: NDArray[np.uint64] = table["root_key"]
    name_keys: NDArray[np.uint64] = table["name_key"]
    keys = np.bitwise_xor(root_keys, name_keys)
    _, first, root_of = np.unique(root_keys, return_index=True, return_inverse=True)
    return FoundRows(
        slots=slots.tolist(),
        keys=keys.tolist(),
        names=table["name"].tobytes(),
        roots=[Root(table["root"][at].tobytes()) for at in first],
        root_of=root_of.tolist(),
        parents=table["parent"].tolist(),
        torn=len(written) - len(slots),
    )


def chains(keys: Sequence[int], parents: Sequence[int]) -> Iterator[tuple[int, list[int]]]:
    """Yield (parent, run of keys) so that every run follows its parent: a policy's `insert`.

    A run ends where prompts branched or where the block after it is gone. Blocks whose parent is
    not among `keys` start a run with parent 0.
    """
    held = set(keys)
    kids: dict[int, list[int]] = {}
    heads: list[tuple[int, int]] = []
    for key, parent in zip(keys, parents, strict=True):
        if parent in held and parent != key:
            kids.setdefault(parent, []).append(key)
        else:
            heads.append((0, key))
    reached: set[int] = set()
    while heads:
        parent, key = heads.pop()
        run = [key]
        while len(following := kids.get(run[-1], [])) == 1:
            run.append(following[0])
        heads += [(run[-1], kid) for kid in following]
        reached.update(run)
        yield parent, run
    # A ring of parents can only come from rows that lie: each block for itself.
    for key in held - reached:
        yield 0, [key]
