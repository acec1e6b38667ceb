import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvstore.core.names import BlockName, Root, chain, pack_tokens
from kvstore.router import booking
from kvstore.router.booking import REPORT_DELAY_MS, Booking, Bookings

ROOT = Root(bytes(32))


def names(*tokens: int) -> list[BlockName]:
    return list(chain(ROOT, pack_tokens([token for token in tokens for _ in range(16)])))


def book(
    bookings: Bookings, worker: str = "w", *, of: list[BlockName] | None = None, now_ms: float = 0.0
) -> Booking:
    of = names(1) if of is None else of
    return bookings.book(worker, ROOT, of, hit_tokens=0, uncached_tokens=100, now_ms=now_ms)


def test_a_booking_queues_until_the_worker_s_report_can_include_it() -> None:
    bookings = Bookings(lifetime_ms=10_000)
    book(bookings, now_ms=1_000)
    book(bookings, now_ms=1_200)
    assert bookings.queued_tokens("w", load_ms=0.0) == 200
    assert bookings.queued_tokens("w", load_ms=1_000 + REPORT_DELAY_MS + 1) == 100
    assert bookings.queued_tokens("w", load_ms=2_000) == 0
    assert bookings.queued_tokens("other", load_ms=0.0) == 0
    assert bookings.in_flight("w") == 2


def test_names_in_flight_are_hits_to_be_at_their_worker_only() -> None:
    bookings = Bookings(lifetime_ms=10_000)
    made = book(bookings, of=names(1, 2, 3))
    book(bookings, of=names(1, 9))
    assert bookings.coming_blocks("w", ROOT, names(1, 2, 7, 8)) == 2
    assert bookings.coming_blocks("w", ROOT, names(1, 9, 9)) == 2
    assert bookings.coming_blocks("w", ROOT, names(5)) == 0
    assert bookings.coming_blocks("w", Root(bytes([1]) * 32), names(1, 2)) == 0
    assert bookings.coming_blocks("v", ROOT, names(1, 2)) == 0
    assert bookings.complete(made.number) == made
    assert bookings.coming_blocks("w", ROOT, names(1, 2, 7, 8)) == 1


def test_completing_twice_is_harmless() -> None:
    bookings = Bookings(lifetime_ms=10_000)
    made = book(bookings)
    assert bookings.complete(made.number) is made
    assert bookings.complete(made.number) is None
    assert len(bookings) == 0


def test_bookings_expire() -> None:
    bookings = Bookings(lifetime_ms=1_000)
    book(bookings, now_ms=0)
    book(bookings, now_ms=500)
    assert bookings.expire(999) == 0
    assert bookings.expire(1_000) == 1
    book(bookings, now_ms=5_000)
    assert len(bookings) == 1


def test_bounds_drop_the_oldest(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(booking, "MAX_BOOKINGS", 3)
    monkeypatch.setattr(booking, "MAX_NAMES_PER_WORKER", 4)
    bookings = Bookings(lifetime_ms=10_000)
    first = book(bookings, of=names(1, 2, 3))
    book(bookings, of=names(4, 5))
    assert bookings.complete(first.number) is None
    for worker in "abc":
        book(bookings, worker)
    assert (len(bookings), bookings.in_flight("w")) == (3, 0)
    huge = book(bookings, "h", of=names(1, 2, 3, 4, 5, 6))
    assert bookings.complete(huge.number) is huge  # one alone may be over the bound


@given(
    first=st.lists(st.integers(0, 2), max_size=12), second=st.lists(st.integers(0, 2), max_size=12)
)
def test_the_common_prefix_of_two_chains_is_exact(first: list[int], second: list[int]) -> None:
    common = 0
    for ours, theirs in zip(first, second, strict=False):
        if ours != theirs:
            break
        common += 1
    bookings = Bookings(lifetime_ms=10_000)
    book(bookings, of=names(*first))
    assert bookings.coming_blocks("w", ROOT, names(*second)) == common
