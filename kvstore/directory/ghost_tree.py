"""The tree of prompts with its evicted runs packed, and unpacked when somebody looks. Pure.

A run is packed once nothing of it is held, nobody has asked for it lately, and what follows it is
packed. Whoever looks a run up behind its parent finds it unpacked, so to the tree nothing changes:
only `len` of what follows a run, and `get` and `pop`, may be asked of it.
"""

from collections.abc import Callable
from typing import Final, TypeVar

from kvstore.directory.ages import Ages
from kvstore.directory.ghosts import POSITION_MAX, Ghosts
from kvstore.directory.prefix_tree import PrefixTree, Run

PACKED_MAX: Final = 8
"""Blocks of a run that is packed. Longer ones take little for each block as they are."""
_Default = TypeVar("_Default")


class Kids(dict[int, Run]):
    """Runs that follow one, by first key. Packed ones are counted, and found by `get` and `pop`."""

    __slots__ = ("_row", "_wake", "packed")

    def __init__(self, wake: Callable[["Kids", int, int], Run | None], row: int) -> None:
        super().__init__()
        self._wake = wake
        self._row = row
        self.packed = 0

    def __len__(self) -> int:
        return super().__len__() + self.packed

    def get(self, key: int, default: _Default | None = None) -> Run | _Default | None:  # type: ignore[override]
        """Return the run that starts with `key`, unpacked if it has to be."""
        found = super().get(key)
        if found is None and self.packed:
            found = self._wake(self, self._row, key)
        return default if found is None else found

    def pop(self, key: int, default: _Default | None = None) -> Run | _Default | None:  # type: ignore[override]
        """Take out the run that starts with `key`, unpacked if it has to be."""
        found = self.get(key)
        return default if found is None else super().pop(key)


class GhostTree(PrefixTree):
    """Packs what is evicted. `ages` has a row for every run that the policy has placed there."""

    def __init__(
        self,
        ages: Ages,
        changed: Callable[[Run], None],
        divided: Callable[[Run, Run], None],
        gone: Callable[[Run], None],
    ) -> None:
        super().__init__(changed, divided, gone)
        self.ghosts = Ghosts()
        self._ages = ages
        for run in (self._root, self._loose):
            ages.add(run)

    def drop(self, key: int) -> None:
        """Mark a block as not held; unknown ones are ignored."""
        run = self._where.get(key)
        super().drop(key)
        if run is not None:
            self.pack(run)

    def pack(self, run: Run) -> None:
        """Pack a run if it can be, and then what stands before it."""
        while self._is_idle(run):
            parent = run.parent
            assert parent is not None and not run.held_kids
            above = self._ages.row(parent)
            row = self._ages.row(run)
            self.ghosts.put(row, run, above=above, kids=len(run.kids or ()))
            self._ages.hide(run)
            kids = self._kids(parent, above)
            del kids[run.keys[0]]
            kids.packed += 1
            if kids.packed == len(kids):
                kids.clear()  # gives its table back; the packed ones do not stand in it
            run = parent

    def _is_idle(self, run: Run) -> bool:
        """Say whether a run is better remembered packed."""
        kids = run.kids
        return (
            not run.held
            and len(run.keys) <= PACKED_MAX
            and run.position <= POSITION_MAX
            and run.parent is not None
            and (kids is None or (isinstance(kids, Kids) and kids.packed == len(kids)))
            and self._ages.row(run) > 0
            and not any(key in self._asked for key in run.keys)
        )

    def _kids(self, parent: Run, row: int) -> Kids:
        """Return what follows a run, able to count packed ones."""
        if isinstance(parent.kids, Kids):
            return parent.kids
        kids = Kids(self._wake, row)
        kids.update(parent.kids or {})
        parent.kids = kids
        return kids

    def _wake(self, kids: Kids, above: int, key: int) -> Run | None:
        """Unpack the run behind the one in row `above` that starts with `key`."""
        row = self.ghosts.find(above, key)
        if not row:
            return None
        parent = self._ages.runs[above]
        assert parent is not None and parent.kids is kids
        run = self.ghosts.run(row, parent)
        behind = self.ghosts.kids[self.ghosts.seat[row]]
        if behind:
            self._kids(run, row).packed = behind
        self.ghosts.drop(row)
        self._ages.show(row, run)
        kids[key] = run
        kids.packed -= 1
        return run

    def forget_row(self, row: int) -> None:
        """Drop the ghosts at the end of what stands in a row, if nothing follows it."""
        run = self._ages.runs[row]
        if run is not None:
            if not run.kids and run.held < len(run.keys):
                self.forget(run)
            return
        seat = self.ghosts.seat[row]
        if self.ghosts.kids[seat]:
            return
        keys = self.ghosts.keys(row)
        for key in keys:  # asked for since at another place
            self._asked.pop(key, None)
        self.blocks -= len(keys)
        self.ghost_runs -= 1
        above = self.ghosts.above[seat]
        parent = self._ages.runs[above]
        if parent is None:
            self.ghosts.kids[self.ghosts.seat[above]] -= 1
        else:
            assert isinstance(parent.kids, Kids)
            parent.kids.packed -= 1
            if not parent.kids:
                parent.kids = None
        self.ghosts.drop(row)
        self._ages.drop(row)
