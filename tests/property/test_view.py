"""A view fed by a stream that loses, repeats and restarts never crashes, and is healed."""

from hypothesis import given, settings
from hypothesis import strategies as st

from kvstore.core.names import BlockName, Root
from kvstore.directory.events import Began, Changed, Digest, Ended, Event, Marked, TierKind
from kvstore.directory.policy import block_key
from kvstore.directory.reach import Held
from kvstore.directory.view import ClusterView

ROOT = Root(bytes(32))
NAMES = [BlockName(bytes([number]) * 32) for number in range(1, 25)]

Step = tuple[str, int, int]
STEPS = st.lists(
    st.tuples(
        st.sampled_from(["set", "delete", "lose", "repeat", "mark", "snapshot", "restart"]),
        st.integers(0, len(NAMES) - 1),
        st.integers(1, 6),
    ),
    max_size=60,
)


class Publisher:
    """The truth, and the events that tell it."""

    def __init__(self) -> None:
        self.held: dict[BlockName, None] = {}
        self.sequence = 0
        self.incarnation = 1

    def change(self, names: list[BlockName], deleted: bool) -> Event:
        for name in names:
            if deleted:
                self.held.pop(name, None)
            else:
                self.held[name] = None
        first = self.sequence + 1
        self.sequence += len(names)
        return Changed(ROOT, TierKind.HBM, names, deleted, first)

    def snapshot(self) -> list[Event]:
        return [
            Began("w", self.incarnation, self.sequence, (TierKind.HBM,), "h"),
            Changed(ROOT, TierKind.HBM, list(self.held)),
            Ended(self.sequence),
        ]

    def mark(self) -> Event:
        xor = 0
        for name in self.held:
            xor ^= block_key(ROOT, name)
        return Marked(self.sequence, (Digest(TierKind.HBM, len(self.held), xor),))


def prefix(held: dict[BlockName, None]) -> int:
    return next((at for at, name in enumerate(NAMES) if name not in held), len(NAMES))


def matched(view: ClusterView) -> Held:
    return view.match(ROOT, NAMES, [view.reach("w", (), 0.0)])[0]


@settings(max_examples=300, deadline=None)
@given(steps=STEPS)
def test_a_broken_stream_never_crashes_the_view_and_a_snapshot_heals_it(steps: list[Step]) -> None:
    view, truth = ClusterView(), Publisher()
    view.follow("w", host="h", now_ms=0.0)
    sent: list[Event] = []
    for kind, start, count in steps:
        events: list[Event] = []
        if kind in ("set", "delete"):
            events = [truth.change(NAMES[start : start + count], kind == "delete")]
        elif kind == "lose":
            truth.change(NAMES[start : start + count], count % 2 == 0)
        elif kind == "repeat" and sent:
            events = [sent[start % len(sent)]]
        elif kind == "mark":
            events = [truth.mark()]
        elif kind == "snapshot":
            events = truth.snapshot()[: count % 4]
        elif kind == "restart":
            truth = Publisher()
            truth.incarnation += count
            events = truth.snapshot()
        for event in events:
            view.apply("w", event, 0.0)
        sent += events
        found = matched(view)
        assert 0 <= found.own_blocks <= found.blocks <= len(NAMES)
        view.sweep(start)
    for event in truth.snapshot():
        assert view.apply("w", event, 0.0) is None
    assert view.apply("w", truth.mark(), 0.0) is None
    known = view.publisher("w")
    assert known is not None and known.places[TierKind.HBM].count == len(truth.held)
    while view.sweep(5):
        pass
    assert len(view) == len(truth.held)
    found = matched(view)
    # Holes in what is really held may mislead the galloping search; without holes it is exact.
    if set(truth.held) == set(NAMES[: len(truth.held)]):
        assert found == Held(prefix(truth.held), prefix(truth.held))


@settings(max_examples=200, deadline=None)
@given(steps=STEPS)
def test_what_was_lost_on_the_way_is_noticed_by_the_next_two_marks(steps: list[Step]) -> None:
    view, truth = ClusterView(), Publisher()
    view.follow("w", host="h", now_ms=0.0)
    for event in truth.snapshot():
        view.apply("w", event, 0.0)
    asked = False
    for kind, start, count in steps:
        event = truth.change(NAMES[start : start + count], kind == "delete")
        if kind != "lose":
            asked = view.apply("w", event, 0.0) is not None or asked
    for _ in range(2):
        asked = view.apply("w", truth.mark(), 0.0) is not None or asked
    assert asked == any(kind == "lose" for kind, _, _ in steps)


@settings(max_examples=300, deadline=None)
@given(own=st.sets(st.integers(0, 23)), below=st.sets(st.integers(0, 23)))
def test_holes_at_most_promise_too_much_and_one_answer_repairs_it(
    own: set[int], below: set[int]
) -> None:
    """Whatever is held: the exact answer of an `Acquire` is all it takes to promise right."""
    view = ClusterView()
    for name, tier, held in (("w", TierKind.HBM, own), ("n", TierKind.DRAM, below)):
        view.follow(name, host="h", now_ms=0.0)
        names = [NAMES[at] for at in sorted(held)]
        for event in (Began(name, 1, 0, (tier,), "h"), Changed(ROOT, tier, names), Ended(0)):
            view.apply(name, event, 0.0)
    reach = view.reach("w", ["n"], 0.0)
    truth = Held(first_missing(own), first_missing(own | below))
    found = view.match(ROOT, NAMES, [reach])[0]
    assert found.own_blocks >= truth.own_blocks and found.blocks >= truth.blocks
    for places, blocks in ((reach.own, truth.own_blocks), (reach.own | reach.below, truth.blocks)):
        assert view.ended(places, ROOT, NAMES, blocks) == (blocks < len(NAMES))
    assert view.match(ROOT, NAMES, [reach])[0] == truth
    assert view.match(ROOT, NAMES[:7], [reach])[0].blocks == min(7, truth.blocks)
    view.apply("w", Changed(ROOT, TierKind.HBM, NAMES), 0.0)
    assert view.match(ROOT, NAMES, [reach])[0] == Held(len(NAMES), len(NAMES)), "holes filled"


def first_missing(held: set[int]) -> int:
    return next(at for at in range(len(NAMES) + 1) if at not in held)
