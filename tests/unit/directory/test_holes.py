from kvstore.core.names import BlockName, Root
from kvstore.directory.events import Began, Changed, Ended, TierKind
from kvstore.directory.holes import MAX_HOLES, Holes
from kvstore.directory.view import ClusterView

ROOT, OTHER = Root(bytes(32)), Root(bytes([1]) * 32)
NAMES = [BlockName(bytes([number]) * 32) for number in range(1, 101)]


def test_a_position_is_that_of_a_name_under_its_root() -> None:
    holes = Holes()
    holes.note(ROOT, NAMES, 3)
    assert holes.within(ROOT, NAMES) == holes.within(ROOT, NAMES[:4]) == [3]
    assert holes.within(ROOT, NAMES[:3]) == []
    assert holes.within(ROOT, NAMES[1:]) == []
    assert holes.within(OTHER, NAMES) == []


def test_the_oldest_positions_give_way() -> None:
    holes = Holes()
    for blocks in range(MAX_HOLES):
        holes.note(ROOT, NAMES, blocks)
    holes.note(ROOT, NAMES, 0)  # again: now the newest
    holes.note(ROOT, NAMES, MAX_HOLES)
    assert len(holes) == MAX_HOLES
    assert sorted(holes.within(ROOT, NAMES)) == [0, *range(2, MAX_HOLES + 1)]


def test_what_the_view_believes_to_be_there_is_no_hole() -> None:
    view = ClusterView()
    view.follow("w", host="h", now_ms=0.0)
    for event in (
        Began("w", 1, 0, (TierKind.HBM,), "h"),
        Changed(ROOT, TierKind.HBM, NAMES),
        Ended(0),
    ):
        view.apply("w", event, 0.0)
    reach = view.reach("w", (), 0.0)
    assert not view.ended(reach.own, ROOT, NAMES, 5)
    assert not view.ended(reach.own, ROOT, NAMES, len(NAMES))
    assert view.match(ROOT, NAMES, [reach])[0].blocks == len(NAMES)
