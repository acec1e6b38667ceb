"""A compressed tree of prompts: which blocks follow which, and which of them a tier holds. Pure.

A *run* is a stretch of blocks that every prompt so far has asked for together. Most of a prompt is
a handful of runs, so telling of a request costs a few dictionary lookups and memory comparisons,
not work per block. Runs of evicted blocks stay as ghosts: 8 bytes a block and no index entry.

    root ── system prompt ──┬── document A ── question 1
                            └── document B ──┬── question 2
                                             └── question 3        one run each

Held blocks of a run are its first `held` ones. A block held behind a hole starts a run of its own.
"""

from array import array
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Final

from kvstore.directory.policy import Keys

ASKED_MAX: Final = 65_536
"""Blocks not held that can be found by key alone: those of the latest prompts, which may be
inserted any moment. About 100 bytes each."""


class Run:
    """A stretch of blocks with one history."""

    __slots__ = (
        "bin", "block_bytes", "cell", "depth_cost", "ends", "evidence", "gap", "held", "held_kids",
        "keys", "kids", "last_ms", "parent", "position", "shift", "uses",
    )  # fmt: skip

    def __init__(self, keys: Keys, parent: "Run | None", position: int) -> None:
        self.keys = keys
        self.parent = parent
        self.position = position
        """Index of its first block in its prompts."""
        self.kids: dict[int, Run] | None = None
        """Runs that follow, by their first key."""
        self.held = 0
        self.held_kids = 0
        """Runs that follow and hold something."""
        self.uses = 0
        """Requests that asked for it."""
        self.ends = False
        """Whether a prompt ended here."""
        self.last_ms = 0.0
        self.evidence = 0
        self.bin = 0
        self.gap = 0.0
        """Mean of the bins of the gaps between its uses."""
        self.shift = 0
        """Bins by which it is slower than its class."""
        self.block_bytes = 0
        self.depth_cost = 0.0
        self.cell: tuple[int, int, int, int, int] | None = None
        """Where the policy keeps it while it can be shortened."""

    @property
    def is_leaf(self) -> bool:
        """Whether its last held block has nothing held behind it."""
        return self.held > 0 and self.held_kids == 0


class PrefixTree:
    """Runs by their place in prompts, and held blocks by key.

    `changed(run)` is called whenever what a run holds, or what is held behind it, has changed;
    `divided(head, tail)` when `head` was split off in front of `tail`; `gone(run)` when a run
    ceased to be.
    """

    def __init__(
        self,
        changed: Callable[[Run], None],
        divided: Callable[[Run, Run], None],
        gone: Callable[[Run], None],
    ) -> None:
        self._changed = changed
        self._gone = gone
        self._divided = divided
        self._root = Run(array("Q"), None, 0)
        self._loose = Run(array("Q"), None, 0)
        """Parent of runs whose place in a prompt is not known yet."""
        self._where: dict[int, Run] = {}
        self._asked: dict[int, Run] = {}
        self.blocks = 0
        """Blocks known, held or not."""
        self.ghost_runs = 0
        """Runs of which nothing is held."""

    def __len__(self) -> int:
        return len(self._where)

    def __contains__(self, key: object) -> bool:
        return key in self._where

    def held_keys(self) -> Iterator[int]:
        """Yield every held block."""
        return iter(self._where)

    # -- prompts ---------------------------------------------------------------------------

    def walk(self, keys: Keys, first_block: int, *, partial: bool) -> tuple[list[Run], int]:
        """Return the runs of a prompt, made where they are new, and how many blocks were known.

        A partial last block becomes a run of its own: its history is not that of the others.
        """
        node = self._start(keys[0], first_block)
        path: list[Run] = []
        index, count = 0, len(keys)
        while index < count:
            kid = self._next(node, keys, index)
            if kid is None:
                break
            length = len(kid.keys)
            if keys[index : index + length] != kid.keys:
                kid = self._split(kid, common(keys, index, kid.keys))
                length = len(kid.keys)
            path.append(kid)
            node = kid
            index += length
        known = index
        ends = [count - 1, count] if partial and index < count - 1 else [count]
        for end in ends:
            if index < end:
                node = self._new(keys[index:end], node, first_block + index)
                path.append(node)
                index = end
        self._remember(path)
        return path, known

    def _start(self, key: int, first_block: int) -> Run:
        """Return the node behind which a prompt's first key stands."""
        if first_block == 0:
            return self._root
        found = self._where.get(key) or self._asked.get(key)
        if found is None:
            return self._loose
        run, offset = _locate(found, key)
        if offset:
            self._split(run, offset)
        assert run.parent is not None
        return run.parent

    def _next(self, node: Run, keys: Keys, index: int) -> Run | None:
        """Return the run behind `node` that starts with `keys[index]`."""
        kid = node.kids.get(keys[index]) if node.kids else None
        loose = self._loose.kids
        if kid is not None or node is self._loose or not loose:
            return kid
        kid = loose.pop(keys[index], None)
        if kid is None:
            return None
        # Its place in a prompt is known now. What was inserted block by block is one run.
        while (after := index + len(kid.keys)) < len(keys):
            more = loose.get(keys[after])
            if more is None or not self._is_plain(kid) or not self._is_plain(more):
                break
            del loose[keys[after]]
            self._join(kid, more)
        kid.parent = node
        kid.position = node.position + len(node.keys)
        self._attach(kid)
        return kid

    @staticmethod
    def _is_plain(run: Run) -> bool:
        """Say whether a run was inserted and nothing else happened to it."""
        return run.uses == 0 and not run.kids and run.held == len(run.keys)

    def _join(self, run: Run, more: Run) -> None:
        """Let `run`, all held, end with the blocks of `more`, all held, which ceases to be."""
        keys, more.held = more.keys, 0
        self._changed(more)
        self._gone(more)
        self._where.update(dict.fromkeys(keys, run))
        run.keys.extend(keys)
        run.held += len(keys)

    def _new(self, keys: Keys, parent: Run, position: int) -> Run:
        run = Run(keys, parent, position)
        self.blocks += len(keys)
        self.ghost_runs += 1
        self._attach(run)
        return run

    def _attach(self, run: Run) -> None:
        parent = run.parent
        assert parent is not None
        if parent.kids is None:
            parent.kids = {}
        parent.kids[run.keys[0]] = run
        if run.held:
            parent.held_kids += 1
            self._changed(parent)

    def _split(self, run: Run, at: int) -> Run:
        """Cut `run` before `at`; returns the new head, `run` stays as the tail."""
        assert 0 < at < len(run.keys) and run.parent is not None
        head = Run(run.keys[:at], run.parent, run.position)
        assert run.parent.kids is not None
        run.parent.kids[head.keys[0]] = head
        head.kids = {run.keys[at]: run}
        head.uses, head.last_ms, head.block_bytes = run.uses, run.last_ms, run.block_bytes
        head.depth_cost = run.depth_cost
        head.held = min(run.held, at)
        run.held -= head.held
        self.ghost_runs += not run.held  # of two where the whole run is one, or of the tail alone
        head.held_kids = 1 if run.held else 0
        run.keys, run.parent, run.position = run.keys[at:], head, run.position + at
        self._where.update(dict.fromkeys(head.keys[: head.held], head))
        self._divided(head, run)
        self._changed(head)
        self._changed(run)
        return head

    def _remember(self, path: Iterable[Run]) -> None:
        """Let the blocks of a prompt that are not held be found by their keys for a while."""
        if len(self._asked) > ASKED_MAX:
            self._asked.clear()
        for run in path:
            if run.held < len(run.keys):
                self._asked.update(dict.fromkeys(run.keys[run.held :], run))

    # -- holding ---------------------------------------------------------------------------

    def find(self, key: int) -> Run | None:
        """Return the run of a block that is held or was asked for lately."""
        found = self._where.get(key) or self._asked.get(key)
        return None if found is None else _locate(found, key)[0]

    def hold(self, blocks: Sequence[int], parent: int | None) -> list[Run]:
        """Mark blocks that follow one another as held; returns runs that no prompt has named.

        The index keeps the very integers of `blocks`: an owner that has them in an index of its own
        pays for them once, 32 bytes a block.
        """
        new: list[Run] = []
        index = 0
        while index < len(blocks):
            above = blocks[index - 1] if index else parent
            known = self._ghost(blocks[index], above)
            if known is None:
                new.append(self._place(blocks[index:], above))
                break
            run, offset = known
            length = 1
            limit = min(len(run.keys) - offset, len(blocks) - index)
            while length < limit and run.keys[offset + length] == blocks[index + length]:
                length += 1
            self._hold_part(run, offset, blocks[index : index + length])
            index += length
        return new

    def _ghost(self, key: int, above: int | None) -> tuple[Run, int] | None:
        """Return where a block that is not held is known to stand."""
        assert key not in self._where, f"{key} is held already"
        asked = self._asked.get(key)
        if asked is not None:
            return _locate(asked, key)
        found = None if above is None else self._where.get(above)
        if found is None or above is None:
            nodes = [self._root, self._loose]
        else:
            run, offset = _locate(found, above)
            if offset + 1 < len(run.keys):
                return (run, offset + 1) if run.keys[offset + 1] == key else None
            nodes = [run, self._loose]
        for node in nodes:
            kid = node.kids.get(key) if node.kids else None
            if kid is not None:
                return kid, 0
        return None

    def _place(self, keys: Sequence[int], above: int | None) -> Run:
        """Hold blocks that no prompt has named, behind `above` where that is held."""
        found = None if above is None else self._where.get(above)
        node, position = self._loose, 0
        if found is not None and above is not None:
            node, offset = _locate(found, above)
            if offset + 1 < len(node.keys):
                node = self._split(node, offset + 1)
            position = node.position + len(node.keys)
            if node.uses == 0 and not node.kids:  # one run of what one request appends
                node.keys.extend(keys)
                self.blocks += len(keys)
                self._hold_part(node, node.held, keys)
                return node
        run = self._new(array("Q", keys), node, position)
        self._hold_part(run, 0, keys)
        return run

    def _hold_part(self, run: Run, offset: int, part: Sequence[int]) -> None:
        """Hold the blocks of a run from `offset` on that `part` names."""
        assert offset >= run.held, "held already"
        if offset > run.held:  # behind a hole
            self._split(run, offset)
        first = run.held == 0
        run.held += len(part)
        self._where.update(dict.fromkeys(part, run))
        for key in part:
            self._asked.pop(key, None)
        self.ghost_runs -= first
        if first and run.parent is not None:
            run.parent.held_kids += 1
            self._changed(run.parent)
        self._changed(run)

    def drop(self, key: int) -> None:
        """Mark a block as not held; unknown ones are ignored."""
        run = self._where.get(key)
        if run is None:
            return
        offset = run.held - 1
        if run.keys[offset] != key:
            offset = run.keys.index(key)
            run = self._split(run, offset + 1)
        del self._where[key]
        run.held = offset
        self.ghost_runs += not offset
        if offset == 0 and run.parent is not None:
            run.parent.held_kids -= 1
            self._changed(run.parent)
        self._changed(run)

    # -- forgetting ------------------------------------------------------------------------

    def forget(self, run: Run) -> int:
        """Drop the ghosts at the end of a run with nothing behind; returns how many blocks.

        The run itself goes with its last block.
        """
        assert not run.kids and run.parent is not None
        gone = len(run.keys) - run.held
        for key in run.keys[run.held :]:
            self._asked.pop(key, None)
        self.blocks -= gone
        if run.held:
            del run.keys[run.held :]
            return gone
        assert run.parent.kids is not None
        self.ghost_runs -= 1
        del run.parent.kids[run.keys[0]]
        if not run.parent.kids:
            run.parent.kids = None
        self._gone(run)
        return gone


def common(keys: Keys, start: int, other: Keys) -> int:
    """Return how many leading keys of `other` stand in `keys` from `start`; by halving."""
    low, high = 0, min(len(other), len(keys) - start)
    while low < high:
        middle = (low + high + 1) // 2
        same = keys[start + low : start + middle] == other[low:middle]
        low, high = (middle, high) if same else (low, middle - 1)
    return low


def _locate(run: Run, key: int) -> tuple[Run, int]:
    """Return where a key stands: in `run`, or in a head that was split off since."""
    while True:
        try:
            return run, run.keys.index(key)
        except ValueError:
            assert run.parent is not None, f"{key} is nowhere"
            run = run.parent
