from kvworkers.pages.pool import PageKey, PagePool, PageUse, PoolUse

from kvstore.core.names import BlockName, Root
from kvstore.directory.lru import Lru
from kvstore.directory.policy import Prompt
from kvstore.directory.value_density import ValueDensity

ROOT = Root(b"r" * 32)


def named(count: int) -> list[BlockName]:
    return [BlockName(bytes([i + 1]) * 32) for i in range(count)]


def filled(pool: PagePool, names: list[BlockName], now_ms: float) -> list[int]:
    pages = pool.allocate(len(names), now_ms=now_ms)
    assert pages is not None
    for position, (page, name) in enumerate(zip(pages, names, strict=True)):
        assert pool.publish(page, PageKey(ROOT, name), position=position, now_ms=now_ms)
    return pages


def test_a_suffix_goes_before_its_prefix() -> None:
    pool = PagePool(4, block_bytes=4096, policy=Lru())
    names = named(4)
    pool.release(filled(pool, names, 1.0), now_ms=2.0, use=PageUse())
    assert pool.allocate(1, now_ms=3.0) is not None
    assert pool.count_prefix(ROOT, names) == 3
    assert pool.allocate(2, now_ms=4.0) is not None
    assert pool.count_prefix(ROOT, names) == 1
    assert pool.evictions == 3


def test_a_request_that_does_not_fit_evicts_nothing() -> None:
    pool = PagePool(4, block_bytes=4096, policy=Lru())
    held = pool.allocate(2, now_ms=0.0)
    assert held is not None
    names = named(2)
    pool.release(filled(pool, names, 1.0), now_ms=2.0)
    assert pool.allocate(3, now_ms=3.0) is None
    assert pool.count_prefix(ROOT, names) == 2
    assert pool.use() == PoolUse(free=0, held=2, cached=2)


def test_the_second_copy_of_a_block_stays_private_and_is_freed() -> None:
    pool = PagePool(3, block_bytes=4096, policy=Lru())
    name = named(1)
    first = filled(pool, name, 0.0)
    second = pool.allocate(1, now_ms=1.0)
    assert second is not None
    assert not pool.publish(second[0], PageKey(ROOT, name[0]), position=0, now_ms=1.0)
    pool.release(second, now_ms=2.0)
    assert pool.use() == PoolUse(free=2, held=1, cached=0)
    assert pool.match(ROOT, name) == first


def test_names_under_another_root_do_not_match() -> None:
    pool = PagePool(3, block_bytes=4096, policy=Lru())
    filled(pool, named(2), 0.0)
    assert pool.match(Root(b"s" * 32), named(2)) == []


def test_a_held_page_is_never_the_victim_however_old() -> None:
    pool = PagePool(2, block_bytes=4096, policy=Lru())
    old, young = filled(pool, named(2), 0.0)
    pool.release([young], now_ms=1.0)
    assert pool.allocate(1, now_ms=2.0) == [young]
    assert pool.match(ROOT, named(2)) == [old]
    pool.check()


def test_pages_that_lost_their_name_are_found_by_nobody_and_become_free() -> None:
    pool = PagePool(3, block_bytes=4096, policy=Lru())
    names = named(2)
    pages = filled(pool, names, 0.0)
    assert pool.match(ROOT, names[:1]) == pages[:1], "another one holds the first"
    pool.drain_changes()
    pool.unname(pages)
    assert pool.count_prefix(ROOT, names) == 0
    assert [(change.key.name, change.deleted) for change in pool.drain_changes()] == [
        (names[0], True), (names[1], True)
    ]  # fmt: skip
    pool.check()
    pool.release(pages, now_ms=1.0)
    assert pool.use() == PoolUse(free=2, held=1, cached=0)
    pool.release(pages[:1], now_ms=2.0)
    assert pool.use() == PoolUse(free=3, held=0, cached=0)


class _Listening(Lru):
    """LRU that notes what it is told of requests."""

    def __init__(self) -> None:
        super().__init__()
        self.heard: list[Prompt] = []

    def request(self, prompt: Prompt) -> None:
        self.heard.append(prompt)
        super().request(prompt)


def test_only_the_end_of_a_request_is_evidence() -> None:
    policy = _Listening()
    pool = PagePool(4, block_bytes=4096, policy=policy)
    pages = filled(pool, named(3), 0.0)
    pool.share(pages[1:])
    pool.release(pages[1:], now_ms=1.0)  # a copy to the store is done
    assert policy.heard == []
    pool.release(pages, now_ms=2.0, use=PageUse("tool", "team", 0.25))
    (told,) = policy.heard
    assert (told.kind, told.share_domain, told.depth_cost) == ("tool", "team", 0.25)
    assert (len(told.keys), told.now_ms, told.block_bytes) == (3, 2.0, 4096)


def test_a_hint_decides_which_page_goes() -> None:
    """Requests of kind `tool` come back after ten seconds, those of kind `batch` never do."""
    pool, now_ms = PagePool(2, block_bytes=4096, policy=ValueDensity()), 0.0

    def serve(name: BlockName, now_ms: float, kind: str) -> None:
        pages = pool.match(ROOT, [name])
        if not pages:
            pages = pool.allocate(1, now_ms=now_ms) or []
            pool.publish(pages[0], PageKey(ROOT, name), position=0, now_ms=now_ms)
        pool.release(pages, now_ms=now_ms, use=PageUse(kind))

    for number in range(100):
        tool, batch = (BlockName(bytes([number + 1, k]) * 16) for k in range(2))
        now_ms += 20_000
        serve(batch, now_ms, "batch")
        serve(tool, now_ms, "tool")
        serve(tool, now_ms + 10_000, "tool")
    now_ms += 20_000
    tool, batch, other = (BlockName(bytes([200, k]) * 16) for k in range(3))
    serve(tool, now_ms, "tool")
    serve(batch, now_ms + 1_000, "batch")
    serve(other, now_ms + 2_000, "batch")
    assert pool.count_prefix(ROOT, [tool]) == 1, "though it is the oldest"
    assert pool.count_prefix(ROOT, [batch]) == 0
    pool.check()
