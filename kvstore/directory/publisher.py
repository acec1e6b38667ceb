"""What a holder of blocks tells its subscribers: one log for all, a cursor for each. Pure.

    holder --set/delete--> Publisher (sequence, digests, bounded log) --take--> Subscription

A subscription sends Begin(S0), slices of the holder's table as they are, End(S0), then every
event from S0 + 1 on. The slices are fuzzy: they are read while the table changes; each change is
in the log, and events are absolute, so replaying them after the slices gives the truth. A
subscriber that falls behind the log's bound starts again with Begin: memory is bounded by the
log, never by the slowest subscriber.

Used by the cache node (tier `dram` …) and by GPU workers (tier `hbm`, with `load`). All calls come
from one thread.
"""

from collections.abc import Callable, Collection, Sequence
from typing import Final, Protocol

from kvstore.core.names import BlockName, Root
from kvstore.directory.events import (
    Began,
    Changed,
    Digest,
    Ended,
    Event,
    Loaded,
    Marked,
    TierKind,
)

SLICE_NAMES: Final = 4_096
"""Names in one message of a snapshot or of events: 128 KiB, a bounded hold of the loop."""

LOG_NAMES: Final = 1 << 18
"""Names the log keeps: what a subscriber may lag before it needs a new snapshot (about 20 MiB)."""


class Holdings(Protocol):
    """The holder's own table, read in slices by index so that it may change between them."""

    def scan(self, cursor: int, limit: int) -> tuple[list[Changed], int | None]:
        """Return what the next slots hold and the next cursor, None at the end.

        Starts at cursor 0; looks at no more than `limit` slots. Every block held throughout the
        whole scan must appear in it.
        """
        ...


class Publisher:
    """The event log of one process that holds blocks."""

    def __init__(
        self,
        name: str,
        incarnation: int,
        tiers: Sequence[TierKind],
        holdings: Holdings,
        *,
        host: str = "",
        log_names: int = LOG_NAMES,
    ) -> None:
        self.name = name
        self.incarnation = incarnation
        self.tiers = tuple(tiers)
        self.holdings = holdings
        self.host = host
        self.load: Loaded | None = None
        """Sent with every mark when set; workers only."""
        self.sequence = 0
        """Number of the last event; the first event has number 1."""
        self._log_names_max = log_names
        # Runs by number: any subscriber finds its place in one probe.
        self._runs: dict[int, Changed] = {}
        self._first_run = 0
        self._next_run = 0
        self._log_names = 0
        self._count = dict.fromkeys(self.tiers, 0)
        self._xor = dict.fromkeys(self.tiers, 0)
        self._wakers: set[Callable[[], None]] = set()

    def set(
        self,
        root: Root,
        tier: TierKind,
        names: Sequence[BlockName],
        *,
        block_bytes: int = 0,
        group: str = "full",
    ) -> None:
        """Say that blocks not held in `tier` before are held now; each block once."""
        self._publish(root, tier, names, block_bytes, group, deleted=False)

    def delete(
        self, root: Root, tier: TierKind, names: Sequence[BlockName], *, group: str = "full"
    ) -> None:
        """Say that blocks held in `tier` before are gone; each block once."""
        self._publish(root, tier, names, 0, group, deleted=True)

    def _publish(
        self,
        root: Root,
        tier: TierKind,
        names: Sequence[BlockName],
        block_bytes: int,
        group: str,
        *,
        deleted: bool,
    ) -> None:
        if not names:
            return
        self._count[tier] += -len(names) if deleted else len(names)
        assert self._count[tier] >= 0, f"more deletes than sets in {tier.name}"
        self._xor[tier] ^= xor_prefixes(root, names)
        for start in range(0, len(names), SLICE_NAMES):
            part = tuple(names[start : start + SLICE_NAMES])
            first = self.sequence + 1
            run = Changed(root, tier, part, deleted, first, block_bytes, group)
            self._runs[self._next_run] = run
            self._next_run += 1
            self.sequence += len(part)
            self._log_names += len(part)
        while self._log_names > self._log_names_max and len(self._runs) > 1:
            self._log_names -= len(self._runs.pop(self._first_run).names)
            self._first_run += 1
        for wake in tuple(self._wakers):
            wake()

    def digests(self) -> tuple[Digest, ...]:
        """Return what a subscriber's picture must add up to at `sequence`."""
        return tuple(Digest(tier, self._count[tier], self._xor[tier]) for tier in self.tiers)

    def subscribe(
        self,
        wake: Callable[[], None],
        *,
        root: Root | None = None,
        tiers: Collection[TierKind] = (),
    ) -> "Subscription":
        """Return a new subscription; `wake` is called at every change until it is closed.

        With a filter by root or tier the sequence numbers have holes and the digests cover more
        than is sent: such a subscriber must check neither.
        """
        self._wakers.add(wake)
        return Subscription(self, wake, root, frozenset(tiers))

    def unsubscribe(self, wake: Callable[[], None]) -> None:
        """Stop calling `wake`."""
        self._wakers.discard(wake)

    @property
    def subscribers(self) -> int:
        """How many subscriptions are open."""
        return len(self._wakers)

    @property
    def next_run(self) -> int:
        """Number that the next logged run will have."""
        return self._next_run

    def run(self, number: int) -> Changed | None:
        """Return a logged run, or None when the log begins later."""
        assert number < self._next_run
        return self._runs.get(number)


class Subscription:
    """One subscriber's place: where in the snapshot or in the log it stands."""

    def __init__(
        self,
        publisher: Publisher,
        wake: Callable[[], None],
        root: Root | None,
        tiers: frozenset[TierKind],
    ) -> None:
        self._publisher = publisher
        self._wake = wake
        self._root = root
        self._tiers = tiers
        self._sequence = 0
        self._run = 0
        self._cursor: int | None = 0
        self._begun = False
        self.overflows = 0
        """How often the log ran away and the snapshot started anew."""

    def take(self) -> list[Event] | None:
        """Return the next events, at most about `SLICE_NAMES` names; None when all is sent.

        Call until it answers None; between two calls the owner may run other work. A list can be
        empty: a stretch of the table without blocks, or runs that a filter left out.
        """
        if not self._begun:
            return self._begin()
        if self._cursor is not None:
            return self._slice(self._cursor)
        if self._run == self._publisher.next_run:
            return None
        taken: list[Changed] = []
        names = 0
        while self._run < self._publisher.next_run and names < SLICE_NAMES:
            run = self._publisher.run(self._run)
            if run is None:
                self.overflows += 1
                return self._begin()
            self._run += 1
            self._sequence = run.first_sequence + len(run.names) - 1
            names += len(run.names)
            if self._wants(run):
                taken.append(run)
        return list(coalesce(taken))

    def mark(self) -> list[Event]:
        """Return the heartbeat: with digests when everything was sent, else without.

        Empty during a snapshot, whose slices are sign of life enough.
        """
        if not self._begun or self._cursor is not None:
            return []
        current = self._sequence == self._publisher.sequence
        events: list[Event] = [Marked(self._sequence, self._publisher.digests() if current else ())]
        if self._publisher.load is not None:
            events.append(self._publisher.load)
        return events

    def close(self) -> None:
        """Stop being woken."""
        self._publisher.unsubscribe(self._wake)

    def _begin(self) -> list[Event]:
        publisher = self._publisher
        self._begun = True
        self._cursor = 0
        self._sequence = publisher.sequence
        self._run = publisher.next_run
        tiers = tuple(t for t in publisher.tiers if not self._tiers or t in self._tiers)
        return [Began(publisher.name, publisher.incarnation, self._sequence, tiers, publisher.host)]

    def _slice(self, cursor: int) -> list[Event]:
        found, self._cursor = self._publisher.holdings.scan(cursor, SLICE_NAMES)
        events: list[Event] = [change for change in found if self._wants(change)]
        if self._cursor is None:
            events.append(Ended(self._sequence))
        return events

    def _wants(self, change: Changed) -> bool:
        return (self._root is None or change.root == self._root) and (
            not self._tiers or change.tier in self._tiers
        )


def coalesce(runs: Sequence[Changed]) -> list[Changed]:
    """Merge neighbours that are alike in all but the names and adjoin in sequence."""
    merged: list[Changed] = []
    names: list[BlockName] = []
    for run in runs:
        last = merged[-1] if merged else None
        if (
            last is not None
            and run.first_sequence == last.first_sequence + len(names)
            and run.deleted == last.deleted
            and (run.root, run.tier, run.block_bytes, run.group)
            == (last.root, last.tier, last.block_bytes, last.group)
        ):
            names.extend(run.names)
            continue
        if last is not None:
            merged[-1] = _with_names(last, names)
        merged.append(run)
        names = list(run.names)
    if merged:
        merged[-1] = _with_names(merged[-1], names)
    return merged


def _with_names(run: Changed, names: list[BlockName]) -> Changed:
    return Changed(
        run.root, run.tier, names, run.deleted, run.first_sequence, run.block_bytes, run.group
    )


def xor_prefixes(root: Root, names: Sequence[BlockName]) -> int:
    """Return xor over (first 8 bytes of root) ^ (first 8 bytes of name), little endian."""
    total = int.from_bytes(root[:8], "little") if len(names) % 2 else 0
    for name in names:
        total ^= int.from_bytes(name[:8], "little")
    return total
