"""What a decision needs of every worker and does not depend on the prompt: kept between decisions.

Members change seldom, loads a few times a second, decisions come thousands a second. Pure.
"""

from collections.abc import Sequence
from math import inf
from typing import Final

from kvstore.directory.events import Loaded, TierKind, WorkerRole
from kvstore.directory.reach import Reach
from kvstore.directory.view import ClusterView, PublisherView, reach_over
from kvstore.router.learning import Learned
from kvstore.router.members import Member, Members
from kvstore.router.score import ASSUMED_PACE, NO_WORK, Pace, Rates, Work, paces

_SILENT: Final = Loaded()
"""Stands for the load of a worker that has reported none."""

KEPT_FREE: Final = 16
"""Answers that a `decode` worker counts as running beside those that do: its operator keeps it free
for them, and what comes while it computes a prompt waits as well. So many a worker runs at most,
unless told otherwise."""


def delayed(load: Loaded) -> int:
    """Return how many answers a prefill delays at a worker that reports this."""
    if load.role is WorkerRole.PREFILL:
        return 0  # nobody answers there: its requests wait for their turn, and that is its queue
    running = load.running + load.waiting
    return running + KEPT_FREE if load.role is WorkerRole.DECODE else running


class Seat:
    """A worker of the member list with what the view knows of it."""

    __slots__ = (
        "_bits",
        "_tiers",
        "host",
        "known",
        "kv_used",
        "load",
        "load_rates",
        "member",
        "name",
        "pace",
        "publisher",
        "reach",
        "reported",
        "role",
        "running",
    )  # fmt: skip

    def __init__(self, member: Member, known: PublisherView | None, host: str) -> None:
        self.member = member
        self.name = member.name
        self.known = known
        self.host = host
        self.publisher = host
        """Who answers for the tiers of its host: the node; where there are several, the host."""
        self.load = _SILENT
        self.pace: Pace = ASSUMED_PACE
        self.reported: Work = NO_WORK
        """What the worker says it has to compute."""
        self.load_rates: dict[TierKind, float] = {}
        """Seconds a token, by the tiers that the worker has loaded from."""
        self.role = WorkerRole.BOTH
        self.running = 0
        """Requests there that a prefill delays."""
        self.kv_used = 0.0
        self.reach = Reach(0)
        self._bits: dict[TierKind, int] | None = None
        self._tiers: Sequence[tuple[TierKind, int]] = ()

    def read_load(self) -> bool:
        """Take over a new load report; say whether there was one."""
        load = (self.known.load if self.known is not None else None) or _SILENT
        if load is self.load:
            return False
        self.load = load
        if 0 < load.queued_token_depths < inf:
            self.reported = Work(load.queued_tokens, load.queued_token_depths)
        else:  # lengths that nobody tells: as long as each other
            self.reported = Work.of(load.queued_tokens, 0, max(1, load.waiting))
        self.load_rates = dict(load.load_rates)
        self.role = load.role
        self.running = delayed(load)
        self.kv_used = load.kv_used_bytes / max(1, load.kv_capacity_bytes)
        return True

    def reach_with(self, tiers: Sequence[tuple[TierKind, int]]) -> Reach:
        """Return what it reaches when its host has these places."""
        bits = self.known.tier_bits if self.known is not None else None
        if bits is not self._bits or tiers != self._tiers:
            self._bits, self._tiers = bits, tiers
            self.reach = reach_over(self.known, tiers)
        return self.reach

    def device(self, tier: TierKind) -> str:
        """Return what a load occupies: its own wire, or what the workers of a host share."""
        return f"{self.name if tier is TierKind.DRAM else self.host}/{tier.name.lower()}"


class Seats:
    """The workers of a member list."""

    def __init__(self, view: ClusterView, learned: Learned) -> None:
        self._view = view
        self._learned = learned
        self._members: Members | None = None
        self._versions = (-1, -1)
        self.all: list[Seat] = []
        self.nodes: dict[str, list[str]] = {}
        """Names of cache nodes by host."""
        self.roles = False
        """Whether any worker has one of its own."""

    def update(self, members: Members) -> list[Seat]:
        """Return the seats of `members` as of this moment."""
        known_version, learned_version = self._versions
        if members is not self._members or known_version != self._view.version:
            self._members = members
            self._build(members)
            learned_version = -1
        changed = [seat for seat in self.all if seat.read_load()]
        if changed or learned_version != self._learned.version:
            for seat, pace in zip(self.all, paces([*map(self._rates, self.all)]), strict=True):
                seat.pace = pace
            self.roles = any(seat.role is not WorkerRole.BOTH for seat in self.all)
        self._versions = (self._view.version, self._learned.version)
        return self.all

    def _build(self, members: Members) -> None:
        self.nodes = {}
        for node in members.nodes():
            host = _host(node, self._view.publisher(node.name))
            self.nodes.setdefault(host, []).append(node.name)
        self.all = []
        for worker in members.workers():
            known = self._view.publisher(worker.name)
            seat = Seat(worker, known, _host(worker, known))
            nodes = self.nodes.get(seat.host, ())
            if len(nodes) == 1:
                seat.publisher = nodes[0]
            self.all.append(seat)

    def _rates(self, seat: Seat) -> Rates:
        load = seat.load
        measured = load.prefill_linear_s > 0 or load.prefill_tokens_per_s > 0
        return Rates(
            load.prefill_tokens_per_s,
            load.prefill_linear_s,
            load.prefill_quadratic_s,
            self._learned.correction(seat.name, measured=measured),
        )


def _host(member: Member, known: PublisherView | None) -> str:
    return member.host or (known.host if known is not None else "")
