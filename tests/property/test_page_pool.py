"""The page pool against a model: nothing in two hands, counts exact, nothing lost."""

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule
from kvworkers.pages.pool import PageKey, PagePool

from kvstore.core.names import BlockName, Root
from kvstore.directory.lru import Lru
from kvstore.directory.policy import block_key

ROOTS = (Root(b"a" * 32), Root(b"b" * 32))
NAMES = tuple(BlockName(bytes([i]) * 32) for i in range(1, 8))
PAGES = 5


class PoolMachine(RuleBasedStateMachine):
    """Holders take and give back lists of pages; the model counts holds per page."""

    def __init__(self) -> None:
        super().__init__()
        self.pool = PagePool(PAGES, block_bytes=4096, policy=Lru())
        self.holders: list[list[int]] = []
        self.names: dict[PageKey, int] = {}
        self.listed: set[PageKey] = set()
        self.now_ms = 0.0

    def holds(self, page: int) -> int:
        return sum(pages.count(page) for pages in self.holders)

    def follow_changes(self) -> None:
        for change in self.pool.drain_changes():
            assert (change.key in self.listed) == change.deleted, "an event told nothing new"
            if change.deleted:
                page = self.names.pop(change.key)
                assert self.holds(page) == 0, "a held page was evicted"
                self.listed.remove(change.key)
            else:
                self.listed.add(change.key)

    @rule(count=st.integers(0, PAGES + 1))
    def allocate(self, count: int) -> None:
        self.now_ms += 1
        idle = sum(1 for page in range(PAGES) if self.holds(page) == 0)
        taken = self.pool.allocate(count, now_ms=self.now_ms)
        assert (taken is None) == (count > idle)
        self.follow_changes()
        if taken is None:
            return
        assert len(set(taken)) == len(taken) == count
        assert all(self.holds(page) == 0 for page in taken), "a page in two hands"
        assert not set(taken) & set(self.names.values()), "a named page was given away"
        self.holders.append(taken)

    @rule(
        which=st.integers(0),
        offset=st.integers(0),
        root=st.sampled_from(ROOTS),
        n=st.integers(0, 6),
    )
    def publish(self, which: int, offset: int, root: Root, n: int) -> None:
        unnamed = [p for pages in self.holders for p in pages if p not in self.names.values()]
        if not unnamed:
            return
        page = unnamed[(which + offset) % len(unnamed)]
        key = PageKey(root, NAMES[n])
        done = self.pool.publish(page, key, position=n, now_ms=self.now_ms)
        # These names exist under both roots, and with them collide in the policy's 64 bits now and
        # then, as those of real chains of hashes never do: both are refused.
        taken = {block_key(known.root, known.name) for known in self.names}
        named = {known.name for known in self.names}
        assert done == (block_key(key.root, key.name) not in taken and key.name not in named)
        if done:
            self.names[key] = page
        self.follow_changes()

    @rule()
    def allocate_more_than_is_free(self) -> None:
        use = self.pool.use()
        if use.cached:
            self.allocate(use.free + 1)

    @rule(root=st.sampled_from(ROOTS), count=st.integers(0, len(NAMES)))
    def match(self, root: Root, count: int) -> None:
        expected = []
        for name in NAMES[:count]:
            page = self.names.get(PageKey(root, name))
            if page is None:
                break
            expected.append(page)
        assert self.pool.count_prefix(root, NAMES[:count]) == len(expected)
        assert self.pool.match(root, NAMES[:count]) == expected
        self.holders.append(expected)

    @rule(which=st.integers(0))
    def share(self, which: int) -> None:
        if self.holders:
            pages = self.holders[which % len(self.holders)]
            self.pool.share(pages)
            self.holders.append(list(pages))

    @rule(which=st.integers(0))
    def release(self, which: int) -> None:
        if self.holders:
            self.now_ms += 1
            self.pool.release(self.holders.pop(which % len(self.holders)), now_ms=self.now_ms)

    @invariant()
    def agrees_with_the_model(self) -> None:
        self.pool.check()
        use = self.pool.use()
        assert use.held == sum(1 for page in range(PAGES) if self.holds(page))
        assert use.total == PAGES
        assert use.cached == sum(1 for page in self.names.values() if self.holds(page) == 0)
        assert all(self.pool.holds(key) for key in self.names)
        assert self.listed == set(self.names)

    @invariant()
    def a_scan_lists_what_is_named(self) -> None:
        seen: list[PageKey] = []
        cursor: int | None = 0
        while cursor is not None:
            changes, cursor = self.pool.scan(cursor, 4)
            seen += [PageKey(change.root, name) for change in changes for name in change.names]
        assert sorted(seen) == sorted(self.names)

    def teardown(self) -> None:
        for pages in self.holders:
            self.pool.release(pages, now_ms=self.now_ms)
        self.holders = []
        self.agrees_with_the_model()
        assert self.pool.allocate(PAGES, now_ms=self.now_ms) is not None, "pages leaked"


TestPagePool = PoolMachine.TestCase
TestPagePool.settings = settings(max_examples=120, stateful_step_count=40, deadline=None)
