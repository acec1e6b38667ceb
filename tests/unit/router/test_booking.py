import pytest

from kvstore.core.names import BlockName, Root, chain, pack_tokens
from kvstore.router import booking
from kvstore.router.booking import REPORT_DELAY_MS, Booking, Bookings
from kvstore.router.score import Work

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
    assert bookings.queued("w", load_ms=0.0)[0].tokens == 200
    assert bookings.queued("w", load_ms=1_000 + REPORT_DELAY_MS + 1)[0].tokens == 100
    assert bookings.queued("w", load_ms=2_000)[0].tokens == 0
    assert bookings.queued("other", load_ms=0.0)[0].tokens == 0
    assert bookings.in_flight("w") == 2
    # A restarted worker has sent no report: whatever it was sent counts again.
    assert bookings.queued("w", load_ms=0.0)[0].tokens == 200


def test_the_work_of_many_prompts_is_no_longer_prompt() -> None:
    bookings = Bookings(lifetime_ms=10_000)
    for _ in range(3):
        book(bookings)
    assert bookings.queued("w", load_ms=0.0)[0] == Work(300, 3 * 100 * 50)
    assert Work.of(300, 0).token_depths == 300 * 150
    assert Work.of(10, 50).token_depths == sum(50 + k + 0.5 for k in range(10))


def test_a_first_token_ends_queue_and_load_and_not_what_is_coming() -> None:
    bookings = Bookings(lifetime_ms=10_000)
    made = bookings.book(
        "w", ROOT, names(1, 2), hit_tokens=0, uncached_tokens=100, now_ms=0, loading={"h/nvme": 64}
    )
    assert bookings.loading("h/nvme") == 64
    for _ in range(2):
        bookings.prefilled(made)
        assert (bookings.loading("h/nvme"), bookings.queued("w", load_ms=0.0)[0]) == (0, Work())
    assert bookings.coming_blocks(ROOT, names(1, 2)) == {"w": 2}
    assert bookings.get(made.number) is made
    assert bookings.queued("w", load_ms=-1.0)[0] == Work()


def test_names_in_flight_are_hits_to_be_at_their_worker_only() -> None:
    bookings = Bookings(lifetime_ms=10_000)
    made = book(bookings, of=names(1, 2, 3))
    book(bookings, of=names(1, 9))
    assert bookings.coming_blocks(ROOT, names(1, 2, 7, 8)) == {"w": 2}
    assert bookings.coming_blocks(ROOT, names(1, 9, 9)) == {"w": 2}
    assert bookings.coming_blocks(ROOT, names(5)) == {}
    assert bookings.coming_blocks(Root(bytes([1]) * 32), names(1, 2)) == {}
    assert bookings.complete(made.number) == made
    assert bookings.coming_blocks(ROOT, names(1, 2, 7, 8)) == {"w": 1}


def test_completing_twice_is_harmless() -> None:
    bookings = Bookings(lifetime_ms=10_000)
    made = book(bookings)
    assert bookings.complete(made.number) is made
    assert bookings.complete(made.number) is None
    assert bookings.get(made.number) is None
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


def test_completed_bookings_leave_the_queue_behind_one_that_is_not() -> None:
    bookings = Bookings(lifetime_ms=1e9)
    book(bookings)
    for _ in range(1_000):
        bookings.complete(book(bookings).number)
    assert bookings.queued("w", load_ms=-1e9)[0].tokens == 100
    assert len(bookings._by_worker["w"].waiting) == 1
