"""The log that node and worker publish through: snapshot, order, overflow, marks, filters."""

import hashlib

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvstore.core.names import BlockName, Root
from kvstore.directory import publisher as module
from kvstore.directory.events import (
    Began,
    Changed,
    Ended,
    Event,
    Loaded,
    Marked,
    TierKind,
    pieces,
)
from kvstore.directory.publisher import Publisher, Subscription, coalesce, xor_prefixes

ROOT = Root(hashlib.sha256(b"root").digest())
OTHER = Root(hashlib.sha256(b"other").digest())
NAMES = [BlockName(hashlib.sha256(bytes([i])).digest()) for i in range(24)]
Held = set[tuple[Root, BlockName]]


class Table:
    """A holder's slots: names by index, scanned a few at a time."""

    def __init__(self) -> None:
        self.slots: list[tuple[Root, BlockName] | None] = [None for _ in range(2 * len(NAMES))]
        self.step = 5

    def scan(self, cursor: int, limit: int) -> tuple[list[Changed], int | None]:
        stop = cursor + min(limit, self.step)
        found = [Changed(h[0], TierKind.DRAM, [h[1]]) for h in self.slots[cursor:stop] if h]
        return found, stop if stop < len(self.slots) else None

    def put(self, publisher: Publisher, root: Root, name: BlockName) -> None:
        if (root, name) not in self.slots:
            self.slots[self.slots.index(None)] = (root, name)
            publisher.set(root, TierKind.DRAM, [name], block_bytes=4096)

    def drop(self, publisher: Publisher, root: Root, name: BlockName) -> None:
        if (root, name) in self.slots:
            self.slots[self.slots.index((root, name))] = None
            publisher.delete(root, TierKind.DRAM, [name])

    def held(self) -> Held:
        return {entry for entry in self.slots if entry}


class Picture:
    """What a subscriber knows; applies events as a view does, minding epoch and sequence."""

    def __init__(self) -> None:
        self.held: Held = set()
        self.fresh: Held | None = None
        self.sequence = 0

    def apply(self, events: list[Event]) -> None:
        for event in events:
            match event:
                case Began():
                    self.fresh, self.sequence = set(), event.sequence
                case Ended():
                    assert self.fresh is not None
                    self.held, self.fresh = self.fresh, None
                case Changed(first_sequence=0):
                    assert self.fresh is not None
                    self.fresh |= {(event.root, name) for name in event.names}
                case Changed():
                    assert event.first_sequence == self.sequence + 1, "a hole in the stream"
                    self.sequence += len(event.names)
                    blocks = {(event.root, name) for name in event.names}
                    self.held = self.held - blocks if event.deleted else self.held | blocks
                case _:
                    raise AssertionError(event)


def make(log_names: int = 1000) -> tuple[Table, Publisher]:
    table = Table()
    return table, Publisher("n", 3, [TierKind.DRAM], table, host="h", log_names=log_names)


def drain(subscription: Subscription, picture: Picture) -> None:
    while (events := subscription.take()) is not None:
        picture.apply(events)


STEPS = st.lists(
    st.tuples(st.sampled_from(["put", "drop", "take"]), st.sampled_from(NAMES)), max_size=60
)


@given(steps=STEPS, log_names=st.sampled_from([1, 4, 1000]))
def test_a_subscriber_ends_with_the_truth(
    steps: list[tuple[str, BlockName]], log_names: int
) -> None:
    table, publisher = make(log_names)
    subscription = publisher.subscribe(lambda: None)
    picture = Picture()
    for what, name in steps:
        if what == "put":
            table.put(publisher, ROOT, name)
        elif what == "drop":
            table.drop(publisher, ROOT, name)
        elif (events := subscription.take()) is not None:
            picture.apply(events)
    drain(subscription, picture)
    assert picture.held == table.held()
    [mark] = subscription.mark()
    assert isinstance(mark, Marked)
    assert mark.sequence == publisher.sequence
    assert mark.digests[0].count == len(picture.held)
    xor = 0
    for root, name in picture.held:
        xor ^= xor_prefixes(root, [name])
    assert mark.digests[0].xor_prefixes == xor


def test_a_slow_subscriber_starts_again() -> None:
    table, publisher = make(log_names=4)
    subscription = publisher.subscribe(lambda: None)
    picture = Picture()
    drain(subscription, picture)
    for name in NAMES:
        table.put(publisher, ROOT, name)
    drain(subscription, picture)
    assert subscription.overflows == 1
    assert picture.held == table.held()


def test_a_mark_has_digests_only_when_everything_was_sent() -> None:
    table, publisher = make()
    subscription = publisher.subscribe(lambda: None)
    assert subscription.mark() == []
    assert isinstance((subscription.take() or [])[0], Began)
    assert subscription.mark() == [], "slices are sign of life enough"
    drain(subscription, _begun_picture())
    table.put(publisher, ROOT, NAMES[0])
    assert subscription.mark() == [Marked(0, ())]
    assert subscription.take() is not None
    assert subscription.mark() == [Marked(1, publisher.digests())]
    publisher.load = Loaded(running=1)
    assert subscription.mark()[1] == Loaded(running=1)


def _begun_picture() -> Picture:
    picture = Picture()
    picture.fresh = set()
    return picture


def test_neighbours_that_are_alike_travel_as_one() -> None:
    table, publisher = make()
    for name in NAMES[:3]:
        table.put(publisher, ROOT, name)
    subscription = publisher.subscribe(lambda: None)
    drain(subscription, Picture())
    for name in NAMES[3:6]:
        table.put(publisher, ROOT, name)
    table.put(publisher, OTHER, NAMES[6])
    table.drop(publisher, OTHER, NAMES[6])
    events = subscription.take() or []
    shapes = [(e.root, e.deleted, len(e.names)) for e in events if isinstance(e, Changed)]
    assert shapes == [(ROOT, False, 3), (OTHER, False, 1), (OTHER, True, 1)]
    assert coalesce([]) == []


def test_filters_leave_out_what_was_not_asked_for() -> None:
    table, publisher = make()
    table.put(publisher, ROOT, NAMES[0])
    table.put(publisher, OTHER, NAMES[1])
    by_root = publisher.subscribe(lambda: None, root=OTHER)
    by_tier = publisher.subscribe(print, tiers=[TierKind.HBM])
    seen: list[Event] = []
    while (events := by_root.take()) is not None:
        seen += events
    assert [e.names for e in seen if isinstance(e, Changed)] == [[NAMES[1]]]
    table.put(publisher, ROOT, NAMES[2])
    assert by_root.take() == []
    assert by_root.take() is None
    seen = []
    while (events := by_tier.take()) is not None:
        seen += events
    assert not any(isinstance(event, Changed) for event in seen)
    assert isinstance(seen[0], Began)
    assert seen[0].tiers == ()


def test_changes_wake_subscribers_until_they_close() -> None:
    table, publisher = make()
    woken: list[int] = []
    subscription = publisher.subscribe(lambda: woken.append(1))
    table.put(publisher, ROOT, NAMES[0])
    publisher.set(ROOT, TierKind.DRAM, [])
    assert (woken, publisher.subscribers) == ([1], 1)
    subscription.close()
    table.put(publisher, ROOT, NAMES[1])
    assert (woken, publisher.subscribers) == ([1], 0)


def test_a_delete_of_what_is_not_held_is_a_bug() -> None:
    _, publisher = make()
    with pytest.raises(AssertionError, match="more deletes than sets"):
        publisher.delete(ROOT, TierKind.DRAM, [NAMES[0]])


def test_a_long_batch_is_cut_into_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "SLICE_NAMES", 4)
    _, publisher = make()
    subscription = publisher.subscribe(lambda: None)
    drain(subscription, Picture())
    publisher.set(ROOT, TierKind.DRAM, NAMES[:10])
    sizes = []
    while (events := subscription.take()) is not None:
        sizes += [len(event.names) for event in events if isinstance(event, Changed)]
    assert sizes == [4, 4, 2]


def test_pieces_of_a_change_are_numbered_as_it_is() -> None:
    names = [BlockName(bytes([number]) * 32) for number in range(7)]
    change = Changed(Root(bytes(32)), TierKind.DRAM, names, deleted=True, first_sequence=11)
    cut = list(pieces(change, 3))
    assert [(list(one.names), one.first_sequence) for one in cut] == [
        (names[:3], 11),
        (names[3:6], 14),
        (names[6:], 17),
    ]
    assert all(one.deleted and one.tier is TierKind.DRAM for one in cut)
    snapshot = Changed(Root(bytes(32)), TierKind.DRAM, names)
    assert [one.first_sequence for one in pieces(snapshot, 5)] == [0, 0]
