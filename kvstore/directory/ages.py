"""Runs by how long they have been unused: one ring a bin, linked through columns. Pure.

Every run has a *row* from its first use to its end, whether it stands here as an object or is
packed as a ghost (`ghosts`): packing leaves the order as it is, and tells parents by row. The first
`BINS` rows are the joints of the rings.

    bin 3:  ┌─▶ 3 ─▶ 71 ─▶ 58 ─▶ 90 ─┐      71 is the longest unused; `runs[58]` is None: a ghost
            └────────────────────────┘
"""

from array import array
from collections.abc import Iterator

from kvstore.directory.prefix_tree import Run
from kvstore.directory.reuse import BINS


class Ages:
    """Rows of runs, and their order in each bin of age."""

    def __init__(self) -> None:
        self._before = array("I", range(BINS))
        self._after = array("I", range(BINS))
        self.runs: list[Run | None] = [None] * BINS
        """By row; None where the run is packed, or no run is."""
        self._rows: dict[Run, int] = {}
        self._free = 0
        """First of the rows that nobody has, linked by `_after`; joints are never free."""

    def row(self, run: Run) -> int:
        """Return the row of a run, 0 where it has none."""
        return self._rows.get(run, 0)

    def add(self, run: Run) -> int:
        """Give a run a row, in no bin yet."""
        assert run not in self._rows
        row = self._free
        if row:
            self._free = self._after[row]
        else:
            row = len(self.runs)
            self.runs.append(None)
            self._before.append(row)
            self._after.append(row)
        self._before[row] = self._after[row] = row
        self.show(row, run)
        return row

    def show(self, row: int, run: Run) -> None:
        """Let a row stand for a run that was packed until now, or is new."""
        self.runs[row] = run
        self._rows[run] = row

    def hide(self, run: Run) -> None:
        """Let go of a run that is packed from now on; its row stays where it is."""
        self.runs[self._rows.pop(run)] = None

    def drop(self, row: int) -> None:
        """Take a row out, and its run if there is one."""
        assert row >= BINS
        run = self.runs[row]
        if run is not None:
            self.hide(run)
        self._unlink(row)
        self._after[row] = self._free
        self._free = row

    def append(self, run: Run, bin_number: int) -> None:
        """Make a run the youngest of a bin, wherever it was."""
        row = self._rows.get(run) or self.add(run)
        self._unlink(row)
        last = self._before[bin_number]
        self._after[last] = self._before[bin_number] = row
        self._before[row] = last
        self._after[row] = bin_number

    def _unlink(self, row: int) -> None:
        before, after = self._before[row], self._after[row]
        self._after[before] = after
        self._before[after] = before

    def rows(self, bin_number: int) -> Iterator[int]:
        """Yield the rows of a bin, the longest unused first; what was yielded may be dropped."""
        row = self._after[bin_number]
        while row >= BINS:
            after = self._after[row]
            yield row
            row = after

    def grow(self, bin_number: int, last: int) -> None:
        """Move the rows of a bin up to `last` to the young end of the next bin."""
        first, rest = self._after[bin_number], self._after[last]
        self._after[bin_number] = rest
        self._before[rest] = bin_number
        older = bin_number + 1
        tail = self._before[older]
        self._after[tail] = first
        self._before[first] = tail
        self._after[last] = older
        self._before[older] = last
