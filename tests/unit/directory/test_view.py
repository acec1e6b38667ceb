from collections.abc import Sequence

from kvstore.core.names import BlockName, Root
from kvstore.directory.events import (
    Began,
    Changed,
    Digest,
    Ended,
    Event,
    Loaded,
    Lost,
    Marked,
    TierKind,
)
from kvstore.directory.policy import block_key
from kvstore.directory.reach import Held
from kvstore.directory.view import ClusterView, Health, Resync

ROOT = Root(bytes(range(32)))


def names(count: int, start: int = 1) -> list[BlockName]:
    return [BlockName(number.to_bytes(32, "little")) for number in range(start, start + count)]


def digest(tier: TierKind, held: Sequence[bytes]) -> Digest:
    xor = 0
    for name in held:
        xor ^= block_key(ROOT, name)
    return Digest(tier, len(held), xor)


def feed(view: ClusterView, publisher: str, *events: Event, now_ms: float = 0.0) -> None:
    for event in events:
        assert view.apply(publisher, event, now_ms) is None


def hbm(*, held: Sequence[BlockName] = (), sequence: int = 0, incarnation: int = 1) -> list[Event]:
    return [
        Began("w", incarnation, sequence, (TierKind.HBM,), "host-a"),
        Changed(ROOT, TierKind.HBM, held),
        Ended(sequence),
    ]


def view_with_worker() -> ClusterView:
    view = ClusterView()
    view.follow("w", host="", now_ms=0.0)
    feed(view, "w", *hbm(held=names(4)))
    return view


def held(view: ClusterView, asked: Sequence[BlockName], nodes: Sequence[str] = ()) -> Held:
    return view.match(ROOT, asked, [view.reach("w", nodes, 0.0)])[0]


def test_snapshot_then_events_give_the_prefix() -> None:
    view = view_with_worker()
    assert held(view, names(10)) == Held(4, 4)
    feed(view, "w", Changed(ROOT, TierKind.HBM, names(3, start=5), first_sequence=1))
    assert held(view, names(10)) == Held(7, 7)
    feed(view, "w", Changed(ROOT, TierKind.HBM, names(6, start=2), True, first_sequence=4))
    assert held(view, names(10)) == Held(1, 1)
    assert view.publisher("w") is not None and view.publisher("w").host == "host-a"  # type: ignore[union-attr]


def test_a_worker_reaches_the_tiers_of_its_live_nodes() -> None:
    view = view_with_worker()
    view.follow("n", host="host-a", now_ms=0.0)
    feed(
        view, "n",
        Began("n", 1, 0, (TierKind.DRAM,), "host-a"),
        Changed(ROOT, TierKind.DRAM, names(9)),
        Ended(0),
    )  # fmt: skip
    assert held(view, names(10), ["n"]) == Held(4, 9)
    assert view.match(ROOT, names(10), [view.reach("w", ["n"], 5_000.0)]) == [Held(4, 4)]
    assert held(view, names(10), ["n"]).levels == ((TierKind.DRAM, 9),)
    assert held(view, names(3), ["n"]).levels == (), "a tier that adds nothing is left out"
    feed(view, "n", Lost("gone"))
    assert held(view, names(10), ["n"]) == Held(4, 4)


def test_old_knowledge_answers_until_the_new_snapshot_is_whole() -> None:
    view = view_with_worker()
    began, changed, ended = hbm(held=names(2), incarnation=2)
    feed(view, "w", began)
    assert held(view, names(10)) == Held(4, 4)
    feed(view, "w", changed, ended)
    assert held(view, names(10)) == Held(2, 2)
    while view.sweep(3):
        pass
    assert len(view) == 2


def test_a_snapshot_that_breaks_off_leaves_no_trace() -> None:
    view = view_with_worker()
    feed(view, "w", *hbm(held=names(9))[:2])
    feed(view, "w", *hbm(held=names(3)))
    assert held(view, names(10)) == Held(3, 3)


def test_events_applied_before_are_left_out_and_overlaps_apply_their_new_part() -> None:
    view = view_with_worker()
    feed(view, "w", Changed(ROOT, TierKind.HBM, names(2, start=5), first_sequence=1))
    feed(view, "w", Changed(ROOT, TierKind.HBM, names(2, start=5), True, first_sequence=3))
    feed(view, "w", Changed(ROOT, TierKind.HBM, names(2, start=5), first_sequence=1))
    assert held(view, names(10)) == Held(4, 4)
    feed(view, "w", Changed(ROOT, TierKind.HBM, names(6, start=1), first_sequence=1))
    assert held(view, names(10)) == Held(6, 6)


def test_a_gap_asks_once_for_a_new_snapshot() -> None:
    view = view_with_worker()
    late = Changed(ROOT, TierKind.HBM, names(1, start=5), first_sequence=3)
    assert view.apply("w", late, 0.0) is Resync.GAP
    assert held(view, names(10)) == Held(5, 5)
    again = Changed(ROOT, TierKind.HBM, names(1, start=6), first_sequence=9)
    assert view.apply("w", again, 0.0) is None
    feed(view, "w", *hbm(held=names(1), sequence=9))
    assert view.apply("w", Changed(ROOT, TierKind.HBM, names(1), first_sequence=12), 0.0) is (
        Resync.GAP
    )


def test_a_digest_that_differs_at_an_equal_sequence_asks_for_a_new_snapshot() -> None:
    view = view_with_worker()
    feed(view, "w", Marked(0, (digest(TierKind.HBM, names(4)),)))
    feed(view, "w", Marked(0, (digest(TierKind.DRAM, names(1)),)))  # a tier it did not speak for
    assert view.apply("w", Marked(0, (digest(TierKind.HBM, names(5)),)), 0.0) is Resync.DIGEST


def test_digests_wait_until_the_events_caught_up_with_a_fuzzy_snapshot() -> None:
    view = ClusterView()
    view.follow("w", host="", now_ms=0.0)
    began, changed, _ = hbm(held=names(5), sequence=10)
    wrong = digest(TierKind.HBM, [])
    feed(view, "w", began, Marked(10, (wrong,)), changed, Ended(12))
    feed(view, "w", Marked(10, (wrong,)))
    feed(view, "w", Changed(ROOT, TierKind.HBM, names(2), first_sequence=11))
    feed(view, "w", Marked(11, (wrong,)))
    feed(view, "w", Marked(12, (digest(TierKind.HBM, names(5)),)))
    assert view.apply("w", Marked(12, (wrong,)), 0.0) is Resync.DIGEST


def test_one_mark_may_overtake_events_and_a_second_proves_the_gap() -> None:
    view = view_with_worker()
    feed(view, "w", Marked(2))
    feed(view, "w", Changed(ROOT, TierKind.HBM, names(2, start=5), first_sequence=1))
    feed(view, "w", Marked(4))
    assert view.apply("w", Marked(4), 0.0) is Resync.GAP


def test_events_before_any_snapshot_are_out_of_order() -> None:
    view = ClusterView()
    view.follow("w", host="", now_ms=0.0)
    assert view.apply("w", Changed(ROOT, TierKind.HBM, names(1)), 0.0) is Resync.ORDER
    assert held(view, names(3)) == Held(0, 0)
    feed(view, "w", Ended(0), Marked(0))


def test_health_follows_silence_and_loss() -> None:
    view = ClusterView(suspect_after_ms=1_000)
    assert view.health("w", 0.0) is Health.LOST
    assert view.silence_ms("w", 0.0) == float("inf")
    view.follow("w", host="", now_ms=0.0)
    assert view.health("w", 0.0) is Health.JOINING
    feed(view, "w", *hbm(), now_ms=10.0)
    assert view.health("w", 1_010.0) is Health.LIVE
    assert view.health("w", 1_011.0) is Health.SUSPECT
    feed(view, "w", Marked(0), now_ms=1_500.0)
    assert (view.health("w", 1_600.0), view.silence_ms("w", 1_600.0)) == (Health.LIVE, 100.0)
    feed(view, "w", Lost(""), now_ms=1_600.0)
    assert view.health("w", 1_600.0) is Health.LOST
    feed(view, "w", Marked(0), now_ms=1_700.0)
    assert view.health("w", 1_700.0) is Health.LIVE


def test_load_is_kept_until_a_restart() -> None:
    view = view_with_worker()
    feed(view, "w", Loaded(running=3), now_ms=5.0)
    known = view.publisher("w")
    assert known is not None and known.load == Loaded(running=3) and known.load_ms == 5.0
    feed(view, "w", *hbm(incarnation=1))
    assert known.load is not None
    feed(view, "w", *hbm(incarnation=2))
    assert known.load is None


def test_forgetting_voids_everything_and_strangers_are_ignored() -> None:
    view = view_with_worker()
    reach = view.reach("w", (), 0.0)
    feed(view, "w", hbm()[0])
    view.forget("w")
    view.forget("w")
    assert view.match(ROOT, names(4), [reach]) == [Held(0, 0)]
    assert view.apply("w", Marked(0), 0.0) is None
    view.follow("w", host="h", now_ms=0.0)
    view.follow("w", host="other", now_ms=9.0)
    assert view.publisher("w").host == "h"  # type: ignore[union-attr]


def test_deletes_of_unknown_blocks_and_unknown_tiers_change_nothing() -> None:
    view = view_with_worker()
    feed(view, "w", Changed(ROOT, TierKind.HBM, names(3, start=90), True, first_sequence=1))
    feed(view, "w", Changed(ROOT, TierKind.NVME, names(3), first_sequence=4))
    feed(view, "w", Marked(6, (digest(TierKind.HBM, names(4)),)))
    assert held(view, names(5)) == Held(4, 4)


def test_a_view_that_left_blocks_out_does_not_trust_its_digests() -> None:
    view = ClusterView(max_blocks=2)
    view.follow("w", host="", now_ms=0.0)
    feed(view, "w", *hbm(held=names(4)), Marked(0, (digest(TierKind.HBM, names(4)),)))
    assert held(view, names(4)) == Held(2, 2)


def test_a_thousand_workers_are_told_apart() -> None:
    view = ClusterView()
    for number in range(1_000):
        worker = f"w{number}"
        view.follow(worker, host="", now_ms=0.0)
        held_here = names(1 + number % 7, start=1)
        for event in (
            Began(worker, 1, 0, (TierKind.HBM,)), Changed(ROOT, TierKind.HBM, held_here), Ended(0)
        ):  # fmt: skip
            assert view.apply(worker, event, 0.0) is None
    reaches = [view.reach(f"w{number}", (), 0.0) for number in range(1_000)]
    found = view.match(ROOT, names(10), reaches)
    assert [one.own_blocks for one in found] == [1 + number % 7 for number in range(1_000)]
