"""Which index for the NVMe tier: a table of 128-byte rows, or SQLite in WAL mode?

    python benchmarks/nvme_index.py DIRECTORY [BLOCKS]

Both hold what a restart needs (root, name, place, sizes, sums). Printed, one JSON object a line:
seconds until every block can be looked up after a restart, microseconds per block to write one row
beside its block, bytes per block on disk. The decision is docs/decisions/0002-nvme-index.md.
"""

import hashlib
import json
import os
import sqlite3
import statistics
import sys
import time
from pathlib import Path

from kvstore.core.names import BlockName, Root
from kvstore.tiers.base import BlockHeader
from kvstore.tiers.block_rows import ROW_BYTES, pack_row, slot_bytes
from kvstore.tiers.nvme_restart import read_rows
from kvstore.tiers.nvme_space import NvmeSpace

PAYLOAD_BYTES = 2 << 20
ROOT = Root(hashlib.sha256(b"root").digest())
SEGMENT_ROWS = 1 << 14
RUNS = 7
COMMIT_EVERY = 32


def headers(count: int) -> list[BlockHeader]:
    """Return made-up blocks: one long chain."""
    made, name = [], BlockName(hashlib.sha256(b"name").digest())
    for position in range(count):
        name = BlockName(hashlib.sha256(name).digest())
        made.append(BlockHeader(ROOT, name, PAYLOAD_BYTES, 8, name[:16], position=position))
    return made


class RowFiles:
    """What the tier does: a row file per segment, rows written in place, read as columns."""

    name = "rows"

    def __init__(self, directory: Path) -> None:
        self._directory = directory

    def write(self, blocks: list[BlockHeader]) -> None:
        for start in range(0, len(blocks), SEGMENT_ROWS):
            fd = os.open(self._path(start), os.O_RDWR | os.O_CREAT, 0o600)
            for slot, header in enumerate(blocks[start : start + SEGMENT_ROWS]):
                os.pwrite(fd, pack_row(header), slot * ROW_BYTES)
            os.close(fd)

    def load(self) -> int:
        size = slot_bytes(PAYLOAD_BYTES)
        space = NvmeSpace(64 * SEGMENT_ROWS * size * 16, segment_bytes=SEGMENT_ROWS * size)
        for number, path in enumerate(sorted(self._directory.glob("*.rows"))):
            found = read_rows(path.read_bytes(), size)
            space.restore(
                space.add(number, size), found.slots, found.keys, found.names,
                found.roots, found.root_of,
            )  # fmt: skip
        return len(space)

    def size(self) -> int:
        return sum(path.stat().st_size for path in self._directory.glob("*.rows"))

    def _path(self, start: int) -> Path:
        return self._directory / f"{start:09}.rows"


class Sqlite:
    """The other one: a table by (root, name), committed every few blocks."""

    name = "sqlite"

    def __init__(self, directory: Path) -> None:
        self._path = directory / "index.db"

    def write(self, blocks: list[BlockHeader]) -> None:
        database = self._open()
        database.execute(
            "create table blocks (root blob, name blob, place integer, payload integer,"
            " shares integer, position integer, sum blob, primary key (root, name)) without rowid"
        )
        for start in range(0, len(blocks), COMMIT_EVERY):
            database.executemany(
                "insert into blocks values (?, ?, ?, ?, ?, ?, ?)",
                [
                    (b.root, b.name, start + at, b.payload_bytes, b.shares, b.position, b.sum)
                    for at, b in enumerate(blocks[start : start + COMMIT_EVERY])
                ],
            )
            database.commit()
        database.close()

    def load(self) -> int:
        database = self._open()
        index = {
            int.from_bytes(root[:8], "little") ^ int.from_bytes(name[:8], "little"): place
            for root, name, place in database.execute("select root, name, place from blocks")
        }
        database.close()
        return len(index)

    def size(self) -> int:
        return sum(path.stat().st_size for path in self._path.parent.glob("index.db*"))

    def _open(self) -> sqlite3.Connection:
        database = sqlite3.connect(self._path)
        database.execute("pragma journal_mode=wal")
        database.execute("pragma synchronous=normal")
        return database


def main(directory: Path, blocks: int) -> None:
    """Write both once, load them in turns, print medians."""
    made = headers(blocks)
    kinds = []
    for kind in (RowFiles, Sqlite):
        place = directory / kind.name
        place.mkdir(parents=True)
        one = kind(place)
        started = time.perf_counter()
        one.write(made)
        kinds.append((one, (time.perf_counter() - started) / blocks * 1e6))
    seconds: dict[str, list[float]] = {one.name: [] for one, _ in kinds}
    for _ in range(RUNS):
        for one, _ in kinds:
            started = time.perf_counter()
            assert one.load() == blocks
            seconds[one.name].append(time.perf_counter() - started)
    for one, write_us in kinds:
        row = {
            "index": one.name,
            "blocks": blocks,
            "load_s": round(statistics.median(seconds[one.name]), 3),
            "write_us": round(write_us, 2),
            "bytes_per_block": round(one.size() / blocks, 1),
            "runs": RUNS,
        }
        sys.stdout.write(json.dumps(row) + "\n")


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]) if len(sys.argv) > 2 else 1_000_000)
