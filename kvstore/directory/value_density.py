"""Our policy: keep what saves most recomputation per byte and second (docs/policy.md). Pure.

Each run of blocks (`prefix_tree`) belongs to a class of evidence; `reuse` learns when such runs are
asked for again and prices them. Leaves are kept in cells of equal price, youngest last; the
cheapest cell gives its oldest run, from its end: suffixes before prefixes. A newcomer that is worth
less than what would have to go for it is not admitted.
"""

import heapq
import math
from array import array
from collections.abc import Callable, Iterator, Sequence
from typing import Final

from kvstore.directory.ages import Ages
from kvstore.directory.ghost_tree import GhostTree
from kvstore.directory.policy import BlockKey, Prompt
from kvstore.directory.prefix_tree import Run, common
from kvstore.directory.reuse import BINS, EDGES_MS, UNKNOWN, Evidence, ReuseModel, bin_of, bin_seen
from kvstore.directory.rhythm import Rhythm

DEFAULT_MAX_GHOSTS: Final = 1 << 20
"""Evicted blocks remembered; about a hundred thousandth of the bytes that they described."""
GHOST_BYTES: Final = 128
"""Bound of what is remembered of one, on average over as many as may be remembered."""
_KEY_BYTES: Final = 8
_RUN_BYTES: Final = 600
"""A run with what follows it and its entries in indexes, as `tests/unit/directory/test_ghosts.py`
measures it."""
_PACKED_BYTES: Final = 110
"""The same of a packed one, but for its first key."""
_ARRAY_BYTES: Final = 80
"""An array, where a packed run has more keys than one."""
_FIRST_REFRESH: Final = 16
_REFRESH_SHARE: Final = 64
"""Prices are learned anew every sixty-fourth of all requests so far: evidence grows by 1.6 %."""
_REFRESH_MAX: Final = 1024
_MAX_CLASSES: Final = 2048
"""Beyond it hints of callers open no new classes."""
_ENDS_MAX: Final = 3
_KIDS_MAX: Final = 3
_USE_CLASSES: Final = [0, 1, 2, 3, 4, 5, 5, 5, 5, 6]
"""By number of uses; more are as nine."""
_Cell = tuple[int, int, int, int, int]
"""Class, age bin, shift, value bucket, block bytes: everything that the price depends on."""
_Worth = tuple[float, float]
"""Price, and last use in ms: of equal prices the older goes, as under LRU."""
_NO_LIMIT: Final[_Worth] = (math.inf, math.inf)


class ValueDensity:
    """Orders blocks by predicted saving per byte and second. Implements `Policy`.

    `depth_cost` is how much more a block costs to compute per block of depth, as a share of the
    first block's cost: quadratic over linear prefill cost, times the tokens of a block; 0 counts
    tokens. It is for prompts that do not tell their own.
    """

    name = "ours"

    def __init__(
        self, *, depth_cost: float = 0.0, max_ghosts: int = DEFAULT_MAX_GHOSTS, bypass: bool = True
    ) -> None:
        assert depth_cost >= 0 and max_ghosts >= 0
        self._depth_cost = depth_cost
        self._max_ghosts = max_ghosts
        self._bypass = bypass
        self._ages = Ages()
        self._tree = GhostTree(self._ages, self._settle, self._divide, self._lose)
        self._model = ReuseModel()
        self._rhythm = Rhythm(_USE_CLASSES[-1] + 1)
        self._due_ms = 0.0
        """No run reaches its next bin before."""
        self._cells: dict[_Cell, dict[Run, None]] = {}
        """Leaves by price, the longest unused first."""
        self._prices: dict[_Cell, float] = {}
        """Prices of cells, as far as they were asked for since they were learned."""
        self._requests = 0
        self._refresh_at = _FIRST_REFRESH

    # -- evidence --------------------------------------------------------------------------

    def request(self, prompt: Prompt) -> None:
        """Learn from a request, and make what it asks for young."""
        if not prompt.keys:
            return
        self._grow_old(prompt.now_ms)
        self._requests += 1
        if self._requests >= self._refresh_at:
            self._model.refresh()
            self._prices.clear()
            share = self._requests // _REFRESH_SHARE
            self._refresh_at += min(max(_FIRST_REFRESH, share), _REFRESH_MAX)
        path, known = self._tree.walk(prompt.keys, prompt.first_block, partial=prompt.partial)
        ends = min(sum(run.ends for run in path), _ENDS_MAX)
        share_known = 0 if known == 0 else 1 if 2 * known < len(prompt.keys) else 2
        # From the end, so that of equally old runs the suffix is found first.
        for run in reversed(path):
            self._use(run, prompt, partial=prompt.partial and run is path[-1],
                      share_known=share_known, ends=ends)  # fmt: skip
        last = path[-2] if prompt.partial and len(path) > 1 else path[-1]
        last.ends = True
        if self._ghosts_over(self._max_ghosts):
            self._forget()

    def _use(self, run: Run, prompt: Prompt, *, partial: bool, share_known: int, ends: int) -> None:
        """Count one use of a run and put it among the youngest."""
        weight = len(run.keys) ** 0.5
        if run.uses and run.evidence != UNKNOWN:
            self._return(run, prompt.now_ms, weight)
        self._be_young(run, prompt.now_ms)
        run.uses += 1
        run.block_bytes = prompt.block_bytes
        run.depth_cost = prompt.depth_cost or run.depth_cost
        if share_known:
            detail = min(len(run.kids) if run.kids else 0, _KIDS_MAX)
        else:  # a prompt that continues nothing tells its size and no more
            detail = len(prompt.keys).bit_length()
        uses = _USE_CLASSES[min(run.uses, len(_USE_CLASSES) - 1)]
        run.evidence = self._class(
            ((uses, partial), share_known, ends, detail, prompt.kind, prompt.share_domain)
        )
        if run.uses > 1:
            run.shift = self._rhythm.shift(uses, run.gap)
        self._model.enter(run.evidence, bin_seen(0, run.shift), weight)
        self._settle(run)

    def _return(self, run: Run, now_ms: float, weight: float) -> None:
        """Learn from the time that a run took to be used again."""
        reached = max(bin_of(now_ms - run.last_ms), run.bin)
        for skipped in range(run.bin + 1, reached + 1):
            self._enter(run.evidence, skipped - run.shift, weight)
        self._model.reuse(run.evidence, bin_seen(reached, run.shift), weight)
        if run.uses > 1:
            uses = _USE_CLASSES[min(run.uses, len(_USE_CLASSES) - 1)]
            self._rhythm.learn(uses, run.gap, reached, weight)
        run.gap += (reached - run.gap) / run.uses

    def _enter(self, evidence: int, age: int, weight: float) -> None:
        """Count what reached an age unused, on its own scale, where that is a step there too."""
        if 0 < age < BINS:
            self._model.enter(evidence, age, weight)

    def _class(self, evidence: Evidence) -> int:
        if len(self._model) >= _MAX_CLASSES:
            evidence = (*evidence[:-2], "", "")
        return self._model.number(evidence)

    def _grow_old(self, now_ms: float) -> None:
        """Move runs to the bins of their ages."""
        if now_ms < self._due_ms:
            return
        due_ms = math.inf
        runs, ghosts = self._ages.runs, self._tree.ghosts
        for number in range(BINS - 1):
            limit = now_ms - EDGES_MS[number]
            moved = 0
            for row in self._ages.rows(number):
                run = runs[row]
                last_ms = ghosts.last_ms[ghosts.seat[row]] if run is None else run.last_ms
                if last_ms > limit:
                    due_ms = min(due_ms, last_ms + EDGES_MS[number])
                    break
                moved = row
                if run is None:
                    self._grow_ghost_old(row, number + 1)
                else:
                    self._grow_run_old(run, number + 1)
            if moved:
                self._ages.grow(number, moved)
        self._due_ms = due_ms

    def _grow_run_old(self, run: Run, age: int) -> None:
        run.bin = age
        if run.evidence != UNKNOWN:
            self._enter(run.evidence, age - run.shift, len(run.keys) ** 0.5)
        if run.held:
            self._settle(run)
        else:
            self._tree.pack(run)

    def _grow_ghost_old(self, row: int, age: int) -> None:
        ghosts = self._tree.ghosts
        seat = ghosts.seat[row]
        ghosts.bin[seat] = age
        evidence = ghosts.evidence[seat]
        if evidence != UNKNOWN:
            self._enter(evidence, age - ghosts.shift[seat], ghosts.length(row) ** 0.5)

    def _be_young(self, run: Run, now_ms: float) -> None:
        """Put a run among the youngest."""
        run.bin = 0
        run.last_ms = now_ms
        self._ages.append(run, 0)
        self._due_ms = min(self._due_ms, now_ms + EDGES_MS[0])

    def _divide(self, head: Run, tail: Run) -> None:
        """Give a head that was split off the history of its tail."""
        head.evidence, head.bin = tail.evidence, tail.bin
        head.gap, head.shift = tail.gap, tail.shift
        self._ages.append(head, head.bin)

    def _lose(self, run: Run) -> None:
        """Take out a run that ceased to be."""
        self._ages.drop(self._ages.row(run))

    def _settle(self, run: Run) -> None:
        """Put a run into the cell where it belongs, or into none."""
        cell: _Cell | None = None
        if run.is_leaf:
            cell = self._cell_of(run, run.position + run.held)
        if cell == run.cell:
            return
        if run.cell is not None:
            members = self._cells[run.cell]
            del members[run]
            if not members:
                del self._cells[run.cell]
        if cell is not None:
            self._cells.setdefault(cell, {})[run] = None
        run.cell = cell

    def _forget(self) -> None:
        """Drop a tenth of the ghosts, the longest unused first."""
        keep = self._max_ghosts - self._max_ghosts // 10
        for number in range(BINS - 1, -1, -1):
            for row in self._ages.rows(number):
                if not self._ghosts_over(keep):
                    return
                self._tree.forget_row(row)

    def _ghosts_over(self, limit: int) -> bool:
        """Say whether ghosts are more than `limit`, or take more than as many may."""
        tree, packed = self._tree, self._tree.ghosts
        ghosts = tree.blocks - len(tree)
        taken = ghosts * _KEY_BYTES + (tree.ghost_runs - len(packed)) * _RUN_BYTES
        taken += len(packed) * _PACKED_BYTES + packed.longer * _ARRAY_BYTES
        return ghosts > limit or taken > limit * GHOST_BYTES

    # -- holding ---------------------------------------------------------------------------

    def insert(self, blocks: Sequence[BlockKey], *, parent: BlockKey | None, now_ms: float) -> None:
        """Hold `blocks`; those that no request asked for are worth what an unknown one is."""
        for run in self._tree.hold(blocks, parent):
            self._be_young(run, now_ms)
            self._settle(run)

    def remove(self, block: BlockKey) -> None:
        """Keep `block` as a ghost; unknown ones are ignored."""
        self._tree.drop(block)

    def __len__(self) -> int:
        return len(self._tree)

    def __contains__(self, block: object) -> bool:
        return block in self._tree

    # -- choosing --------------------------------------------------------------------------

    def victims(
        self,
        count: int,
        *,
        now_ms: float,
        may_evict: Callable[[BlockKey], bool],
        newcomers: Sequence[BlockKey] = (),
    ) -> list[BlockKey]:
        """Return the blocks of the lowest price; for newcomers only those below theirs."""
        assert not newcomers or len(newcomers) == count
        chosen: list[BlockKey] = []
        if count <= 0:
            return chosen
        self._grow_old(now_ms)
        limits = self._worths(newcomers) if self._bypass else iter(())
        limit = next(limits, _NO_LIMIT)
        for worth, block in self._cheapest(may_evict):
            if worth >= limit:
                return chosen
            chosen.append(block)
            if len(chosen) == count:
                return chosen
            limit = next(limits, _NO_LIMIT)
        if not newcomers:
            self._add_any(chosen, count, may_evict)
        return chosen

    def _worths(self, newcomers: Sequence[BlockKey]) -> Iterator[_Worth]:
        """Yield the worth of each newcomer; those that nobody asked for get in at any price."""
        index, keys = 0, array("Q", newcomers)
        while index < len(keys):
            run = self._tree.find(keys[index])
            if run is None:
                yield _NO_LIMIT
                index += 1
                continue
            offset = run.keys.index(keys[index])
            length = common(keys, index, run.keys[offset:])
            # They come together or not at all, so each is worth what they are on average.
            depth = run.position + offset + length // 2
            worth = (self._price(self._cell_of(run, depth)), run.last_ms)
            for _ in range(length):
                yield worth
            index += length

    def _cell_of(self, run: Run, depth: int) -> _Cell:
        value = self._value(run, depth)
        return (run.evidence, run.bin, run.shift, value, run.block_bytes)

    def _value(self, run: Run, depth: int) -> int:
        """Return the bucket, four an octave, of what a block of a run costs to compute."""
        depth_cost = run.depth_cost or self._depth_cost
        return round(4 * math.log2(1 + depth_cost * depth)) if depth_cost else 0

    def _price(self, cell: _Cell) -> float:
        """Return the saving per byte and millisecond of what stands in a cell."""
        known = self._prices.get(cell)
        if known is not None:
            return known
        evidence, age, shift, value, block_bytes = cell
        # An octave is two bins of age and four buckets of value.
        saving: float = self._model.index[evidence][bin_seen(age, shift)]
        price: float = saving * 2.0 ** (value / 4 - shift / 2) / max(1, block_bytes)
        self._prices[cell] = price
        return price

    def _cheapest(self, may_evict: Callable[[BlockKey], bool]) -> Iterator[tuple[_Worth, BlockKey]]:
        """Yield worths and blocks, cheapest first, as if each had been removed."""
        heap = [(self._price(cell), number, iter(runs))
                for number, (cell, runs) in enumerate(self._cells.items())]  # fmt: skip
        heapq.heapify(heap)
        number = len(heap)
        kids_gone: dict[Run, int] = {}
        while heap:
            price, _, runs_left = heap[0]
            run = next(runs_left, None)
            if run is None:
                heapq.heappop(heap)
                continue
            for offset in range(run.held - 1, -1, -1):
                block = BlockKey(run.keys[offset])
                if not may_evict(block):
                    break
                yield (price, run.last_ms), block
            else:
                parent = run.parent
                assert parent is not None
                kids_gone[parent] = kids_gone.get(parent, 0) + 1
                if parent.held and kids_gone[parent] == parent.held_kids:
                    number += 1
                    cell = self._cell_of(parent, parent.position + parent.held)
                    entry = (self._price(cell), number, iter([parent]))
                    heapq.heappush(heap, entry)

    def _add_any(
        self, chosen: list[BlockKey], count: int, may_evict: Callable[[BlockKey], bool]
    ) -> None:
        """Fill up with blocks in front of ones that have to stay: an owner that has to have room
        gets it, though what is left behind such a hole can be reached by nobody."""
        taken = set(chosen)
        for key in map(BlockKey, self._tree.held_keys()):
            if key not in taken and may_evict(key):
                chosen.append(key)
                if len(chosen) == count:
                    return
