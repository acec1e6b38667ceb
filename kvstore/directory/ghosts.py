"""Evicted runs, packed in columns: a hundred bytes for one of a single block. Pure.

As objects, a run's record, its keys, its place among its parent's and its place by age take 400 to
600 bytes, however few its blocks. Here a run is a *seat* across arrays of numbers; its parent is
told by row (`ages`), which stays the same when either is packed or unpacked.

A table finds a run by (row of its parent, first key). It grows by linear hashing, one bucket for
each run that comes, so no request pays for rebuilding an index of a million.
"""

from array import array

from kvstore.directory.policy import Keys
from kvstore.directory.prefix_tree import Run

POSITION_MAX = (1 << 32) - 1
"""Blocks before a run that a column can tell."""


class Ghosts:
    """Packed runs by row. Seat 0 is nobody's, so that 0 says "none" everywhere."""

    def __init__(self) -> None:
        self.seat = array("I")
        """By row, of packed runs only; what it holds for others means nothing."""
        self.above, self.kids = array("I", [0]), array("I", [0])
        """Row of the parent, and how many runs follow, all packed."""
        self.evidence, self.bin, self.shift = array("I", [0]), array("B", [0]), array("b", [0])
        self.last_ms = array("d", [0.0])
        self._key, self._more = array("Q", [0]), list[Keys | None]([None])
        """First key; all keys where there are more."""
        self._position, self._uses, self._ends = array("I", [0]), array("I", [0]), array("B", [0])
        self._block_bytes, self._depth_cost = array("Q", [0]), array("d", [0.0])
        self._gap = array("d", [0.0])
        self._chain = array("I", [0])
        """Row of the next run in the same bucket; of a free seat the next free one."""
        self._columns = (
            self.above, self.kids, self.evidence, self.bin, self.shift, self.last_ms, self._key,
            self._position, self._uses, self._ends, self._block_bytes, self._depth_cost, self._gap,
            self._chain,
        )  # fmt: skip
        self._free = 0
        self._buckets = array("I", [0])
        """First row of each; their number is the table's size."""
        self._round = 1
        """Buckets when the present round of splitting began, a power of two."""
        self._count = 0
        self.longer = 0
        """Packed runs of more than one block: their keys are an object still."""

    def __len__(self) -> int:
        return self._count

    def length(self, row: int) -> int:
        """Return how many blocks a packed run has."""
        more = self._more[self.seat[row]]
        return 1 if more is None else len(more)

    def keys(self, row: int) -> Keys:
        """Return the blocks of a packed run."""
        seat = self.seat[row]
        return self._more[seat] or array("Q", [self._key[seat]])

    def put(self, row: int, run: Run, *, above: int, kids: int) -> None:
        """Pack a run."""
        seat = self._take_seat()
        if row >= len(self.seat):
            self.seat.frombytes(bytes(self.seat.itemsize * (row + 1 - len(self.seat))))
        self.seat[row] = seat
        self.above[seat], self.kids[seat] = above, kids
        self.evidence[seat], self.bin[seat], self.shift[seat] = run.evidence, run.bin, run.shift
        self.last_ms[seat], self._gap[seat], self._uses[seat] = run.last_ms, run.gap, run.uses
        self._position[seat], self._ends[seat] = run.position, run.ends
        self._block_bytes[seat], self._depth_cost[seat] = run.block_bytes, run.depth_cost
        self._key[seat] = run.keys[0]
        if len(run.keys) > 1:
            self._more[seat] = run.keys
            self.longer += 1
        self._link(row, seat)
        self._count += 1
        if self._count > len(self._buckets):
            self._split_bucket()

    def run(self, row: int, parent: Run) -> Run:
        """Return what a row was packed of, but for its runs behind; it stays packed."""
        seat = self.seat[row]
        run = Run(self.keys(row), parent, self._position[seat])
        run.evidence, run.bin, run.shift = self.evidence[seat], self.bin[seat], self.shift[seat]
        run.last_ms, run.gap, run.uses = self.last_ms[seat], self._gap[seat], self._uses[seat]
        run.block_bytes, run.depth_cost = self._block_bytes[seat], self._depth_cost[seat]
        run.ends = bool(self._ends[seat])
        return run

    def drop(self, row: int) -> None:
        """Forget a packed run."""
        seat = self.seat[row]
        bucket = self._bucket(self.above[seat], self._key[seat])
        other = self._buckets[bucket]
        if other == row:
            self._buckets[bucket] = self._chain[seat]
        else:
            while (after := self._chain[self.seat[other]]) != row:
                other = after
            self._chain[self.seat[other]] = self._chain[seat]
        self.longer -= self._more[seat] is not None
        self._more[seat] = None
        self._chain[seat] = self._free
        self._free = seat
        self._count -= 1

    def find(self, above: int, key: int) -> int:
        """Return the row of the packed run with that parent and first key; 0: there is none."""
        row = self._buckets[self._bucket(above, key)]
        while row:
            seat = self.seat[row]
            if self._key[seat] == key and self.above[seat] == above:
                return row
            row = self._chain[seat]
        return 0

    # -- seats and buckets -----------------------------------------------------------------

    def _take_seat(self) -> int:
        seat = self._free
        if seat:
            self._free = self._chain[seat]
            return seat
        for column in self._columns:
            column.append(0)
        self._more.append(None)
        return len(self._more) - 1

    def _bucket(self, above: int, key: int) -> int:
        mixed = hash((above, key))
        bucket = mixed & (self._round - 1)
        if bucket < len(self._buckets) - self._round:  # split in this round already
            bucket = mixed & (2 * self._round - 1)
        return bucket

    def _link(self, row: int, seat: int) -> None:
        bucket = self._bucket(self.above[seat], self._key[seat])
        self._chain[seat] = self._buckets[bucket]
        self._buckets[bucket] = row

    def _split_bucket(self) -> None:
        """Add a bucket, with what belongs there of the one whose turn it is."""
        old = len(self._buckets) - self._round
        row, self._buckets[old] = self._buckets[old], 0
        self._buckets.append(0)
        while row:
            seat = self.seat[row]
            row, moved = self._chain[seat], row
            self._link(moved, seat)
        if len(self._buckets) == 2 * self._round:
            self._round *= 2
