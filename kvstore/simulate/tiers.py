"""Replays a trace through a cluster's tiers: hits by tier, seconds saved, bytes moved."""

import time
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from kvstore.core.errors import BadInput
from kvstore.simulate.hierarchy import Hierarchy, PolicyMaker, Shape
from kvstore.simulate.prices import TIERS, Prices
from kvstore.simulate.trace import Trace, TraceRequest


@dataclass(frozen=True, slots=True, kw_only=True)
class Fractions:
    """Capacities of the whole cluster as shares of the trace's unique blocks."""

    hbm: float = 0.005
    dram: float = 0.04
    nvme: float = 0.32
    pool: float = 0.0

    def shape(self, trace: Trace, *, hosts: int, workers: int, peers: bool) -> Shape:
        """Return the blocks that each tier of each host has."""
        if hosts < 1 or workers < 1:
            raise BadInput(f"{hosts} nodes with {workers} workers each: at least one of each")

        def share(fraction: float, parts: int) -> int:
            return max(1, trace.capacity(fraction) // parts) if fraction else 0

        return Shape(
            hosts=hosts,
            workers=workers,
            hbm_blocks=share(self.hbm, hosts * workers),
            dram_blocks=share(self.dram, hosts),
            nvme_blocks=share(self.nvme, hosts),
            pool_blocks=share(self.pool, 1),
            peers=peers,
        )


@dataclass(frozen=True, slots=True)
class TiersResult:
    """What the tiers made of one trace."""

    hit: Mapping[str, float]
    """Share of all prompt tokens by the tier they were loaded from, 0 to 1."""
    declined: float
    """Share of tokens that were cached and computed all the same, being cheaper so."""
    compute_s: float
    """Seconds to compute every prompt with no cache."""
    load_s: float
    """Seconds spent on loading."""
    saved_s: float
    """Seconds of computing spared, less loading."""
    moved_bytes: Mapping[str, int]
    """Bytes by crossing, such as `dram>nvme`."""
    seconds: float
    """Wall time of the replay."""

    @property
    def token_hit(self) -> float:
        """Share of tokens loaded from any tier."""
        return sum(self.hit.values())


class _Books:
    """Adds up tokens and seconds."""

    def __init__(self, trace: Trace, prices: Prices) -> None:
        self._block_tokens = trace.block_tokens
        self._prices = prices
        self.tokens: Counter[str] = Counter()
        self.declined = 0
        self.compute_s = self.load_s = self.spared_s = 0.0
        self._full: list[float] = []
        """Seconds to compute a full block, by position; asked for once each."""

    def plan(self, request: TraceRequest, found: list[str]) -> list[str | None]:
        """Return where each block comes from: the found ones where loading beats computing."""
        size = self._block_tokens
        sources: list[str | None] = [None] * len(request.blocks)
        for at in range(len(request.blocks)):
            tokens = min(size, request.input_tokens - at * size)
            compute_s = self._compute_s(tokens, request.first_block + at)
            self.compute_s += compute_s
            if at >= len(found):
                continue
            load_s = self._prices.load_s(found[at], tokens * self._prices.bytes_per_token)
            if load_s < compute_s:
                sources[at] = found[at]
                self.tokens[found[at]] += tokens
                self.load_s += load_s
                self.spared_s += compute_s
            else:
                self.declined += tokens
        return sources

    def _compute_s(self, tokens: int, position: int) -> float:
        size = self._block_tokens
        if tokens != size:
            return self._prices.compute_s(tokens, position * size)
        while len(self._full) <= position:
            self._full.append(self._prices.compute_s(size, len(self._full) * size))
        return self._full[position]


def replay_tiers(
    trace: Trace,
    shape: Shape,
    make: PolicyMaker,
    prices: Prices,
    *,
    on_request: Callable[[], None] | None = None,
) -> TiersResult:
    """Replay `trace` through `shape`, each tier under a policy of its own from `make`.

    Requests of a session go to one worker, others in turn: what a router does better is the
    business of `simulate route`.
    """
    began = time.perf_counter()
    block_bytes = trace.block_tokens * prices.bytes_per_token
    hierarchy = Hierarchy(shape, make, block_bytes, block_tokens=trace.block_tokens)
    books = _Books(trace, prices)
    places: dict[str, int] = {}
    for number, request in enumerate(trace.requests):
        place = places.setdefault(request.session, len(places)) if request.session else number
        at_host, worker = divmod(place % (shape.hosts * shape.workers), shape.workers)
        host = hierarchy.hosts[at_host]
        found: list[str] = []
        for block in request.blocks:
            tier = hierarchy.find(host, worker, block)
            if tier is None:
                break
            found.append(tier)
        hierarchy.serve(host, worker, request, books.plan(request, found))
        if on_request is not None:
            on_request()
    total = max(1, trace.input_tokens)
    return TiersResult(
        hit={tier: books.tokens[tier] / total for tier in TIERS},
        declined=books.declined / total,
        compute_s=books.compute_s,
        load_s=books.load_s,
        saved_s=books.spared_s - books.load_s,
        moved_bytes=dict(sorted(hierarchy.moved.items())),
        seconds=time.perf_counter() - began,
    )
