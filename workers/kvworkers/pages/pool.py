"""Pages with reference counts, and an index from names to the pages that hold full blocks.

    free ──allocate──▶ held (references > 0) ──last release──▶ free            unnamed
                         │  ▲                                                  named:
                      publish └──────────match──────── cached ◀─last release─┘
                                                          └──allocate evicts──▶ held

A page is in exactly one of three conditions: free, held, or cached (named, with no holder).
Cached pages are capacity in waiting: `allocate` evicts them, worst first by the policy.

Page tables are append-only: when two sequences compute the same block, each keeps its own
page and only the first one is named. Everything runs on one thread; time is passed in.
"""

from array import array
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import takewhile
from typing import NamedTuple

from kvstore.core.names import BlockName, Root
from kvstore.directory.events import Changed, TierKind
from kvstore.directory.policy import BlockKey, Policy, Prompt, block_key


class PageKey(NamedTuple):
    """What a full page holds."""

    root: Root
    name: BlockName


class PageUse(NamedTuple):
    """What a request that ends tells the policy; `kvstore.directory.policy.Prompt` says of each."""

    kind: str = ""
    share_domain: str = ""
    depth_cost: float = 0.0


class PageChange(NamedTuple):
    """One change of what the pool can give: for publishers of events."""

    key: PageKey
    deleted: bool


@dataclass(frozen=True, slots=True)
class PoolUse:
    """How many pages stand where; the three add up to `total`."""

    free: int
    held: int
    cached: int

    @property
    def total(self) -> int:
        """All pages."""
        return self.free + self.held + self.cached


class PagePool:
    """The one owner of page numbers. Every page handed out is given back by `release`."""

    def __init__(self, pages: int, *, block_bytes: int, policy: Policy) -> None:
        """`pages` are numbered from 0; `policy` must be empty and is used by nobody else."""
        assert pages > 0 and len(policy) == 0
        self.pages = pages
        self.block_bytes = block_bytes
        self.evictions = 0
        self._policy = policy
        self._references = [0] * pages
        self._keys: list[PageKey | None] = [None] * pages
        self._positions = [0] * pages
        self._by_name: dict[BlockName, int] = {}
        """A name says its root: it is the end of a chain of hashes that begins there."""
        self._by_policy_key: dict[BlockKey, int] = {}
        # Taken from the end, so low numbers go first: a mostly idle pool touches little memory.
        self._free = list(range(pages - 1, -1, -1))
        self._cached = 0
        self._changes: list[PageChange] = []

    def use(self) -> PoolUse:
        """Return how the pages are used at this moment."""
        held = self.pages - len(self._free) - self._cached
        return PoolUse(free=len(self._free), held=held, cached=self._cached)

    @property
    def available(self) -> int:
        """Pages that `allocate` could give now."""
        return len(self._free) + self._cached

    def count_prefix(self, root: Root, names: Sequence[BlockName]) -> int:
        """Return how many of `names`, from the start, are here. Holds nothing."""
        return len(self._found(root, names))

    def match(self, root: Root, names: Sequence[BlockName]) -> list[int]:
        """Return the pages of the longest prefix of `names` that is here, one hold on each."""
        pages = self._found(root, names)
        self.share(pages)
        return pages

    def _found(self, root: Root, names: Sequence[BlockName]) -> list[int]:
        # One look a block and no key made for it: prompts have thousands.
        pages: list[int] = []
        for page in map(self._by_name.get, names):
            if page is None:
                break
            key = self._keys[page]
            if key is None or key.root != root:
                break
            pages.append(page)
        return pages

    def share(self, pages: Sequence[int]) -> None:
        """Add one hold to each page; they must be held or cached already."""
        for page in pages:
            assert self._references[page] > 0 or self._keys[page] is not None, f"page {page} free"
            if self._references[page] == 0:
                self._cached -= 1
            self._references[page] += 1

    def count_alone(self, pages: Sequence[int]) -> int:
        """Return how many of these held pages nobody else holds: what giving them back frees."""
        return sum(1 for page in pages if self._references[page] == 1)

    def allocate(self, count: int, *, now_ms: float) -> list[int] | None:
        """Return `count` unnamed pages with one hold each, evicting cached ones; None if too few.

        All or nothing: on None nothing was evicted.
        """
        assert count >= 0
        if count > self.available:
            return None
        if count > len(self._free):
            self._evict(count - len(self._free), now_ms=now_ms)
        taken = self._free[len(self._free) - count :][::-1]
        del self._free[len(self._free) - count :]
        for page in taken:
            assert self._references[page] == 0 and self._keys[page] is None
            self._references[page] = 1
        return taken

    def publish(
        self,
        page: int,
        key: PageKey,
        *,
        position: int,
        now_ms: float,
        parent: PageKey | None = None,
    ) -> bool:
        """Name a held page that is full and will not change; False when the name is taken.

        `parent` is the block before it in its prompt, None for the first.
        On False the page stays private to its holder and becomes free with its last release.
        """
        return self.publish_run([page], [key], position=position, now_ms=now_ms, parent=parent) == 1

    def publish_run(
        self,
        pages: Sequence[int],
        keys: Sequence[PageKey],
        *,
        position: int,
        now_ms: float,
        parent: PageKey | None = None,
    ) -> int:
        """Name held pages that follow one another in a prompt; return how many names were free.

        As `publish` for each, but policies hear of them together: told one by one, they would
        walk up a long prompt once for each of its blocks.
        """
        above = None if parent is None else block_key(parent.root, parent.name)
        fresh: list[BlockKey] = []
        count = 0
        for index, (page, key) in enumerate(zip(pages, keys, strict=True)):
            assert self._references[page] > 0 and self._keys[page] is None, f"page {page}"
            policy_key = block_key(key.root, key.name)
            if key.name in self._by_name or policy_key in self._by_policy_key:
                if fresh:
                    self._policy.insert(fresh, parent=above, now_ms=now_ms)
                fresh, above = [], policy_key
                continue
            self._keys[page] = key
            self._positions[page] = position + index
            self._by_name[key.name] = page
            self._by_policy_key[policy_key] = page
            self._changes.append(PageChange(key, deleted=False))
            fresh.append(policy_key)
            count += 1
        if fresh:
            self._policy.insert(fresh, parent=above, now_ms=now_ms)
        return count

    def unname(self, pages: Sequence[int]) -> None:
        """Make held pages private to those who hold them; those without a name are left alone."""
        for page in pages:
            assert self._references[page] > 0, f"page {page} is not held"
            key = self._keys[page]
            if key is not None:
                self._forget_name(page, key)

    def release(self, pages: Sequence[int], *, now_ms: float, use: PageUse | None = None) -> None:
        """Give back one hold on each page, given in prefix order.

        `use` where a request ends that has used them: its named pages from the start on are
        evidence for the policy. Who only copied from them, or got too few, has used nothing.
        """
        if use is not None:
            self._tell(pages, use, now_ms)
        for page in reversed(pages):
            assert self._references[page] > 0, f"page {page} is not held"
            self._references[page] -= 1
            key = self._keys[page]
            if self._references[page] == 0:
                if key is None:
                    self._free.append(page)
                else:
                    self._cached += 1

    def _tell(self, pages: Sequence[int], use: PageUse, now_ms: float) -> None:
        named = list(takewhile(lambda key: key is not None, map(self._keys.__getitem__, pages)))
        if named:
            self._policy.request(
                Prompt(
                    keys=array("Q", [block_key(key.root, key.name) for key in named if key]),
                    now_ms=now_ms,
                    first_block=self._positions[pages[0]],
                    block_bytes=self.block_bytes,
                    share_domain=use.share_domain,
                    kind=use.kind,
                    depth_cost=use.depth_cost,
                )
            )

    def holds(self, key: PageKey) -> bool:
        """Say whether a page with this name is here."""
        page = self._by_name.get(key.name)
        return page is not None and self._keys[page] == key

    def scan(self, cursor: int, limit: int) -> tuple[list[Changed], int | None]:
        """Return what pages `[cursor, cursor + limit)` hold, for a publisher's snapshot."""
        by_root: dict[Root, list[BlockName]] = {}
        end = min(cursor + limit, self.pages)
        for key in self._keys[cursor:end]:
            if key is not None:
                by_root.setdefault(key.root, []).append(key.name)
        changes = [
            Changed(root, TierKind.HBM, names, block_bytes=self.block_bytes)
            for root, names in by_root.items()
        ]
        return changes, end if end < self.pages else None

    def drain_changes(self) -> list[PageChange]:
        """Return what was named and unnamed since the last call, in order."""
        changes, self._changes = self._changes, []
        return changes

    def check(self) -> None:
        """Assert every invariant; tests call it after each step."""
        held = sum(1 for count in self._references if count > 0)
        cached = sum(
            1
            for count, key in zip(self._references, self._keys, strict=True)
            if count == 0 and key is not None
        )
        assert self.use() == (PoolUse(free=len(self._free), held=held, cached=cached))
        assert self.use().total == self.pages
        assert len(set(self._free)) == len(self._free), "a page is free twice"
        assert all(self._references[p] == 0 and self._keys[p] is None for p in self._free)
        assert len(self._by_name) == len(self._policy) == len(self._by_policy_key)
        named = {name: self._keys[page] for name, page in self._by_name.items()}
        assert all(key is not None and key.name == name for name, key in named.items())

    def _evict(self, count: int, *, now_ms: float) -> None:
        victims = self._policy.victims(count, now_ms=now_ms, may_evict=self._may_evict)
        assert len(victims) == count, f"policy gave {len(victims)} of {count} victims"
        for victim in victims:
            page = self._by_policy_key[victim]
            key = self._keys[page]
            assert key is not None and self._references[page] == 0
            self._forget_name(page, key)
            self._cached -= 1
            self._free.append(page)
            self.evictions += 1

    def _forget_name(self, page: int, key: PageKey) -> None:
        policy_key = block_key(key.root, key.name)
        self._policy.remove(policy_key)
        del self._by_policy_key[policy_key], self._by_name[key.name]
        self._keys[page] = None
        self._changes.append(PageChange(key, deleted=True))

    def _may_evict(self, block: BlockKey) -> bool:
        return self._references[self._by_policy_key[block]] == 0
