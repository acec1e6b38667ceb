"""Quotas in the arena: one's own go first, another's never, and the reason has a name."""

from prometheus_client import CollectorRegistry

from kvstore.core.limits import GRANULE_BYTES
from kvstore.core.names import Root
from kvstore.core.outcomes import MissReason
from kvstore.observe.metrics import TierMetrics
from kvstore.service.counting import DomainBytes
from kvstore.service.making_room import keep_quota
from kvstore.service.roots import RootInfo, keys_of
from kvstore.service.sessions import Session
from kvstore.tiers.quotas import QuotaRule, Quotas
from tests.arena_fixture import SHAPE, SmallStore, names, small_store


def small_with(small: SmallStore, *rules: str) -> SmallStore:
    """Return the next incarnation, with quotas."""
    return small.again(Quotas([QuotaRule.parse(rule) for rule in rules]))


def of_domain(small: SmallStore, number: int, domain: str) -> tuple[Session, RootInfo]:
    session = small.store.sessions.open(number, bytes([number]) * 16)
    root = Root(bytes([number]) * 32)
    info = small.table.roots.open(root, SHAPE, domain=domain)
    session.roots[root] = info
    return session, info


def put(small: SmallStore, session: Session, info: RootInfo, prompt: list[bytes]) -> None:
    small.put(session, info, prompt, 0.0)
    slots = [small.table.index[key] for key in keys_of(info, b"".join(prompt))]
    small.table.seal(slots, [bytes(16)] * len(slots))


def held(small: SmallStore, info: RootInfo, prompt: list[bytes]) -> list[bool]:
    return [small.table.find(info, keys_of(info, name)[0], name) is not None for name in prompt]


def test_a_domain_at_its_quota_evicts_its_own() -> None:
    with small_store(16) as first:
        small = small_with(first, f"domain:a:dram={4 * GRANULE_BYTES}")
        other = of_domain(small, 1, "b")
        put(small, *other, names(5))
        mine = of_domain(small, 2, "a")
        put(small, *mine, names(3, 1))
        again = of_domain(small, 3, "a")  # another root of the same domain
        put(small, *again, names(3, 2))
        assert held(small, other[1], names(5)) == [True] * 5
        assert held(small, mine[1], names(3, 1)) == [True, False, False]
        assert held(small, again[1], names(3, 2)) == [True] * 3
        assert small.table.book.by_domain == {"a": 4 * GRANULE_BYTES, "b": 5 * GRANULE_BYTES}


def test_a_reserve_beyond_the_quota_says_so() -> None:
    with small_store(16) as first:
        small = small_with(first, f"root:*:dram={3 * GRANULE_BYTES}")
        session, info = of_domain(small, 1, "a")
        packed = b"".join(names(5))
        answer = small.store.acquire(session, info, packed, reserve=5, first_block=0, now_ms=1.0)
        assert len(answer.reserved_slots) == 3
        assert answer.reserve_reason is MissReason.QUOTA
        assert small.table.book.refusals == 1
        refs = [(slot, small.table.generation[slot]) for slot in answer.reserved_slots]
        small.store.abort(session, info, refs)
        assert not small.table.book.by_root
        answer = small.store.acquire(session, info, packed, reserve=2, first_block=0, now_ms=1.0)
        assert answer.reserve_reason is MissReason.NONE


def test_a_quota_that_shrank_is_kept_again_at_once() -> None:
    with small_store(16) as first:
        small = small_with(first, f"domain:a:dram={3 * GRANULE_BYTES}")
        late = Root(bytes(31) + b"l")
        session = small.store.sessions.open(1, bytes(16))
        info = small.table.roots.open(late, SHAPE)  # whose it is nobody has said yet
        session.roots[late] = info
        put(small, session, info, names(8))
        small.table.quotas.opened(late, "a")
        assert keep_quota(small.table, info, keys_of(info, names(1, 9)[0]), 1.0)
        assert small.table.book.by_domain == {"a": 2 * GRANULE_BYTES}
        assert held(small, info, names(8)) == [True] * 2 + [False] * 6


def test_what_domains_hold_is_shown_for_a_bounded_number_of_them() -> None:
    with small_store(16) as first:
        small = small_with(first, f"domain:late:dram={GRANULE_BYTES}")
        registry = CollectorRegistry()
        shown = DomainBytes(small.table.quotas, TierMetrics(registry))

        def value(domain: str) -> float | None:
            labels = {"tier": "dram", "domain": domain}
            return registry.get_sample_value("kvstore_tier_domain_bytes", labels)

        book = small.table.book
        for number in range(100):
            root = Root(bytes([number]) * 32)
            small.table.quotas.opened(root, f"d{number}")
            book.add(root, 10)
        late, unknown = Root(b"l" * 32), Root(b"\xff" * 32)
        small.table.quotas.opened(late, "late")
        book.add(late, 7)
        book.add(unknown, 3)
        shown.measure()
        assert (value("d0"), value("late"), value("unknown")) == (10, 7, 3)
        assert (value("d99"), value("other")) == (None, 10 * (100 - 63))
        book.add(late, -7)
        shown.measure()
        assert value("late") == 0
