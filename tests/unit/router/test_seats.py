from math import inf, nan

from kvstore.directory.events import Began, Ended, Event, Loaded, Lost, TierKind
from kvstore.directory.view import ClusterView
from kvstore.router.learning import Actual, Expected, Learned
from kvstore.router.members import Member, Members
from kvstore.router.score import Pace, Work
from kvstore.router.seats import Seats

MEMBERS = Members.of(
    [
        Member("worker", "a", "h:1"),
        Member("worker", "b", "h:2", "host-b"),
        Member("node", "n", "h:3", "host-b"),
        Member("node", "m", "h:4", "host-c"),
        Member("node", "o", "h:5", "host-c"),
    ]
)


def feed(view: ClusterView, name: str, *events: Event) -> None:
    for event in events:
        assert view.apply(name, event, 0.0) is None


def cluster() -> tuple[ClusterView, Learned, Seats]:
    view, learned = ClusterView(), Learned()
    for member in MEMBERS:
        view.follow(member.name, host=member.host, now_ms=0.0)
    return view, learned, Seats(view, learned)


def test_hosts_come_from_members_or_from_what_publishers_say() -> None:
    view, _, seats = cluster()
    first, second = seats.update(MEMBERS)
    assert (first.host, second.host, second.publisher) == ("", "host-b", "n")
    assert seats.nodes == {"host-b": ["n"], "host-c": ["m", "o"]}
    feed(view, "a", Began("a", 1, 0, (TierKind.HBM,), "host-c"), Ended(0))
    first, _ = seats.update(MEMBERS)
    assert (first.host, first.publisher) == ("host-c", "host-c"), "nobody can tell which node lied"
    assert first.device(TierKind.DRAM) == "a/dram"
    assert first.device(TierKind.NVME) == "host-c/nvme"


def test_a_load_changes_what_was_kept() -> None:
    view, _, seats = cluster()
    first, second = seats.update(MEMBERS)
    assert first.pace == second.pace == Pace(1e-3)
    feed(view, "a", Loaded(running=2, waiting=4, queued_tokens=400, prefill_tokens_per_s=50.0))
    assert seats.update(MEMBERS) == [first, second]
    assert first.reported == Work.of(400, 0, 4)
    assert (first.running, first.pace) == (6, Pace(0.02, measured=True))
    assert second.pace == Pace(0.02), "the measured one stands in for it"


def test_depths_of_queued_tokens_are_taken_as_they_are_told() -> None:
    view, _, seats = cluster()
    feed(view, "a", Loaded(waiting=4, queued_tokens=400, queued_token_depths=90_000.0))
    first, _ = seats.update(MEMBERS)
    assert first.reported == Work(400, 90_000.0)
    for wrong in (nan, inf):
        feed(view, "a", Loaded(waiting=4, queued_tokens=400, queued_token_depths=wrong))
        first, _ = seats.update(MEMBERS)
        assert first.reported == Work.of(400, 0, 4), "no number is none told"


def test_a_correction_changes_the_pace_and_a_new_list_builds_anew() -> None:
    _, learned, seats = cluster()
    first, _ = seats.update(MEMBERS)
    expected = Expected(100, 0, 0.1, 0.0, 0.0, first.pace)
    learned.observe("a", expected, Actual(hit_tokens=0, ttft_ms=300), 0.0)
    seats.update(MEMBERS)
    assert round(first.pace.linear_s, 9) == 3e-3
    (alone,) = seats.update(Members.of([MEMBERS.by_name["a"]]))
    assert alone is not first and alone.pace == first.pace


def test_a_reach_is_kept_until_places_change() -> None:
    view, _, seats = cluster()
    _, second = seats.update(MEMBERS)
    assert second.reach_with([]).own == 0
    feed(view, "b", Began("b", 1, 0, (TierKind.HBM,)), Ended(0))
    _, second = seats.update(MEMBERS)
    reach = second.reach_with([(TierKind.DRAM, 64)])
    assert reach.own and reach.levels == ((TierKind.DRAM, reach.own | 64),)
    assert second.reach_with([(TierKind.DRAM, 64)]) is reach
    assert second.reach_with([]).levels == ()
    feed(view, "b", Lost("gone"))
