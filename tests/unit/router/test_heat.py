import pytest

from kvstore.core.names import BlockName, Root
from kvstore.directory.events import Began, Changed, Ended, Event, Loaded, TierKind
from kvstore.directory.view import ClusterView
from kvstore.router import heat
from kvstore.router.booking import Bookings
from kvstore.router.heat import FADE_MS, TARGET, Heat
from kvstore.router.members import Member, Members
from kvstore.router.placement import Placement, Prompt

ROOT = Root(bytes(32))


def names(count: int, tail: int = 0) -> list[BlockName]:
    return [BlockName(bytes([tail if at >= 8 else 0, at]) * 16) for at in range(count)]


def test_a_prefix_is_hot_when_its_requests_fill_its_holders() -> None:
    warm = Heat()
    for number in range(11):
        warm.add(names(12, tail=number), 0.9, 0.0)  # 0.9 of a worker, all with the first 8 blocks
    own = [12, 0, 0]
    assert warm.hot_blocks(names(12), own, 0.0) == 8
    assert warm.hot_blocks(names(12), [8, 8, 0], 0.0) == 0, "two copies are enough for now"
    assert warm.hot_blocks(names(12), [0, 0, 0], 0.0) == 0, "a copy of what nobody has is no copy"
    assert warm.hot_blocks(names(12), [9, 9, 9], 0.0) == 0
    assert warm.hot_blocks(names(12), own, FADE_MS) == 0, "heat fades"


def test_one_busy_conversation_is_not_hot() -> None:
    warm = Heat()
    for turn in range(100):
        warm.add(names(20 + turn), 1.0, 0.0)
    assert warm.hot_blocks(names(200), [150, 0], 0.0) == 0


def test_a_request_that_takes_long_is_no_heat_by_itself() -> None:
    """A minute of work keeps one worker busy for a minute: it does not need six."""
    warm = Heat()
    for number in range(3):
        warm.add(names(12, tail=number), 60.0, number * 60_000.0)
    assert warm.hot_blocks(names(12), [12, 0], 120_000.0) == 0
    for number in range(60):  # 6 workers' work: one such request every ten seconds
        warm.add(names(12, tail=number), 60.0, 180_000.0 + number * 10_000.0)
    assert warm.hot_blocks(names(12), [12, 12, 0], 780_000.0) == 8


def test_prefixes_remembered_are_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(heat, "MAX_PREFIXES", 3)
    warm = Heat()
    warm.add(names(64), 1.0, 0.0)
    assert len(warm) == 3


def feed(view: ClusterView, name: str, *events: Event) -> None:
    for event in events:
        assert view.apply(name, event, 0.0) is None


def test_a_hot_prefix_gets_a_copy_before_its_holder_has_a_queue() -> None:
    view, bookings = ClusterView(), Bookings(lifetime_ms=1e6)
    placement = Placement(view, bookings)
    placement.members = Members.of([Member("worker", name, "h:1", name) for name in "abc"])
    for name in "abc":
        view.follow(name, host=name, now_ms=0.0)
        held = names(8) if name == "a" else []
        feed(view, name, Began(name, 1, 0, (TierKind.HBM,)),
             Changed(ROOT, TierKind.HBM, held), Ended(0),
             Loaded(prefill_tokens_per_s=1_000.0))  # fmt: skip
    workers: list[str] = []
    decision = None
    for number in range(200):
        prompt = Prompt(ROOT, names(12, tail=number + 1), 200)
        decision = placement.decide(prompt, 0.0)
        assert decision is not None
        placement.warm(decision, prompt, 0.0)
        booking = bookings.book(
            decision.worker, ROOT, prompt.names, hit_tokens=decision.hit_tokens,
            uncached_tokens=200 - decision.hit_tokens, now_ms=0.0,
        )  # fmt: skip
        bookings.prefilled(booking)  # it ends at once: nobody ever queues
        workers.append(decision.worker)
        if decision.worker != "a":
            break
    busy_s = 72 / 1_000
    assert len(workers) == pytest.approx(TARGET * FADE_MS / 1_000 / busy_s, abs=3)
    assert decision is not None
    assert "the first 128 are hot and get another copy" in decision.missed
    assert decision.scores[0].others_s < 0
    again = placement.decide(Prompt(ROOT, names(12, tail=99), 200), 0.0)
    assert again is not None and again.hot_tokens == 0, "one copy at a time"


def test_the_hottest_prefixes_come_first_and_longest_first() -> None:
    warm = Heat()
    for number in range(3):
        warm.add(names(12, tail=number), 1.0, 0.0)
    hottest = warm.hottest(2, 0.0)
    assert [one.blocks for one in hottest] == [8, 4], "equally hot: the longest says most"
    assert hottest[0].name == names(12)[7] and hottest[0].rate == pytest.approx(0.2)
    assert warm.hottest(1, FADE_MS)[0].rate < 0.1, "heat fades"
