"""Hosts with several HBMs over one DRAM and NVMe, and what hosts share: which block is where.

The rules are the service's, per block:

- A new block is in its worker's HBM and is written to DRAM at once (HBM → arena, then Settle).
- Loading into HBM never removes the DRAM copy. It is DRAM's first victim while exactly one HBM of
  the host lists the block.
- What the host's last HBM drops goes back to DRAM where DRAM has dropped its copy meanwhile: the
  two together hold a block once, and the copy costs a fraction of the load that it spares.
- Below, the last known copy is written back, not dropped: DRAM → NVMe, NVMe → shared pool, as far
  as the policy there admits it. Nothing is written where it is already.
- NVMe and pool keep their copy when it is promoted.
- Only the lowest tier may keep a block out (bypass): a tier above it is the only way into it.

Every tier's content is decided by a production `Policy` object of its own.
"""

from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from collections.abc import Set as AbstractSet
from dataclasses import dataclass, replace

from kvstore.core.errors import BadInput
from kvstore.directory.policy import BlockKey, Policy
from kvstore.simulate.prices import DRAM, HBM, NVME, PEER, POOL
from kvstore.simulate.replay import PolicyTier
from kvstore.simulate.trace import TraceRequest

PolicyMaker = Callable[[], Policy]
"""Makes an empty policy."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Shape:
    """How many hosts and workers, and room in blocks of each tier of each; 0: no such tier."""

    hosts: int = 1
    workers: int = 1
    """HBMs per host."""
    hbm_blocks: int
    dram_blocks: int
    nvme_blocks: int = 0
    pool_blocks: int = 0
    """One shared pool for all hosts (a shared file system)."""
    peers: bool = False
    """Whether hosts read each other's DRAM and NVMe."""

    def __post_init__(self) -> None:
        for name in ("hosts", "workers", "hbm_blocks", "dram_blocks"):
            if getattr(self, name) < 1:
                raise BadInput(f"{name} is {getattr(self, name)}, at least 1 needed")


class DramTier(PolicyTier):
    """The arena: what exactly one HBM of the host holds as well goes first."""

    def __init__(
        self, policy: Policy, capacity_blocks: int, *, block_bytes: int, bypass: bool = True
    ) -> None:
        super().__init__(policy, capacity_blocks, block_bytes=block_bytes, bypass=bypass)
        self.kept: dict[BlockKey, None] = {}
        """Held here and in one HBM; longest so first."""

    def drop(
        self,
        count: int,
        now_ms: float,
        *,
        leased: AbstractSet[BlockKey],
        newcomers: Sequence[BlockKey] = (),
    ) -> list[BlockKey]:
        """Drop at most `count` blocks that are not leased; copies of an HBM's first."""
        victims: list[BlockKey] = []
        for block in self.kept:
            if len(victims) == count:
                break
            if block not in leased:
                victims.append(block)
        for victim in victims:
            del self.kept[victim]
            self.held.remove(victim)
            self.policy.remove(victim)
        if len(victims) < count:
            left = newcomers[len(victims) :]
            more = super().drop(count - len(victims), now_ms, leased=leased, newcomers=left)
            for victim in more:
                self.kept.pop(victim, None)
            victims += more
        return victims


class Host:
    """One host's tiers."""

    def __init__(self, number: int, shape: Shape, make: PolicyMaker, block_bytes: int) -> None:
        self.number = number
        self.hbms = [
            PolicyTier(make(), shape.hbm_blocks, block_bytes=block_bytes)
            for _ in range(shape.workers)
        ]
        pool = shape.pool_blocks > 0
        self.dram = DramTier(
            make(),
            shape.dram_blocks,
            block_bytes=block_bytes,
            bypass=not (shape.nvme_blocks or pool),
        )
        self.nvme = _optional(shape.nvme_blocks, make, block_bytes, bypass=not pool)
        self.listed: Counter[BlockKey] = Counter()
        """How many HBMs of this host hold a block."""

    def below_hbm(self, block: BlockKey) -> bool:
        """Say whether DRAM or NVMe hold the block."""
        return block in self.dram.held or (self.nvme is not None and block in self.nvme.held)

    def mark(self, blocks: Iterable[BlockKey]) -> None:
        """Take note for DRAM's order of what the HBMs hold of `blocks` now."""
        kept, held = self.dram.kept, self.dram.held
        for block in blocks:
            if self.listed[block] == 1 and block in held:
                kept.setdefault(block)
            else:
                kept.pop(block, None)


def _optional(
    blocks: int, make: PolicyMaker, block_bytes: int, *, bypass: bool = True
) -> PolicyTier | None:
    if not blocks:
        return None
    return PolicyTier(make(), blocks, block_bytes=block_bytes, bypass=bypass)


class Hierarchy:
    """All hosts and the shared pool; moves blocks and counts the bytes per crossing."""

    def __init__(
        self, shape: Shape, make: PolicyMaker, block_bytes: int, *, block_tokens: int = 0
    ) -> None:
        """`block_tokens` tells which requests end in a block that is not full; 0: none does."""
        self.shape = shape
        self.block_bytes = block_bytes
        self._block_tokens = block_tokens
        self.hosts = [Host(n, shape, make, block_bytes) for n in range(shape.hosts)]
        self.pool = _optional(shape.pool_blocks, make, block_bytes)
        self.moved: Counter[str] = Counter()
        """Bytes by crossing: `hbm>dram`, `nvme>dram` …"""
        self._at: dict[BlockKey, int] = {}
        """Block → bit set of hosts with it in DRAM or NVMe; absent where there is none."""
        self._parents: dict[BlockKey, BlockKey | None] = {}
        """Block → the one before it: what a policy is told when a block moves by itself."""

    def find(self, host: Host, worker: int, block: BlockKey) -> str | None:
        """Return the nearest tier that holds `block`, seen from a worker."""
        if block in host.hbms[worker].held:
            return HBM
        if block in host.dram.held:
            return DRAM
        if host.nvme is not None and block in host.nvme.held:
            return NVME
        if self.shape.peers and self._at.get(block, 0) & ~(1 << host.number):
            return PEER
        if self.pool is not None and block in self.pool.held:
            return POOL
        return None

    def serve(
        self, host: Host, worker: int, request: TraceRequest, sources: Sequence[str | None]
    ) -> None:
        """Carry out a request: `sources` says per block where it is loaded from, None: computed."""
        blocks = request.blocks
        self._remember(request)
        own = 0
        while own < len(blocks) and sources[own] == HBM:
            own += 1
        partial = request.is_partial(self._block_tokens)
        hbm = host.hbms[worker]
        hbm_missing = [at for at, block in enumerate(blocks) if block not in hbm.held]
        into_hbm = hbm.serve(request, hbm_missing, partial=partial)
        self._count(f"{DRAM}>{HBM}", sum(source not in (HBM, None) for source in sources))
        # The node sees what lies behind the worker's own pages, as in `Acquire(first_block=…)`.
        rest = TraceRequest(
            request.timestamp_ms, request.input_tokens, request.output_tokens, blocks[own:],
            request.session, request.turn, request.kind, request.first_block + own,
        )  # fmt: skip
        self._tell_lower(host, rest, sources[own:], partial=partial)
        dram = host.dram
        missing = [
            at for at, block in enumerate(rest.blocks)
            if sources[own + at] != HBM and block not in dram.held
        ]  # fmt: skip
        into_dram = dram.serve(rest, missing, partial=partial)
        for at in into_dram.admitted:
            self._count(f"{sources[own + at] or HBM}>{DRAM}", 1)
        self._arrived(host, (rest.blocks[at] for at in into_dram.admitted))
        host.listed.update(blocks[at] for at in into_hbm.admitted)
        host.mark(reversed(blocks))
        self._left_dram(host, into_dram.victims, request.timestamp_ms)
        self._left_hbm(host, into_hbm.victims, request.timestamp_ms)

    # -- what leaves a tier ----------------------------------------------------------------

    def _left_hbm(self, host: Host, victims: Sequence[BlockKey], now_ms: float) -> None:
        last: list[BlockKey] = []
        for block in victims:
            host.listed[block] -= 1
            if not host.listed[block]:
                del host.listed[block]
                if block not in host.dram.held:
                    last.append(block)
        host.mark(victims)
        self._put_dram(host, last, now_ms)

    def _put_dram(self, host: Host, blocks: Sequence[BlockKey], now_ms: float) -> None:
        admitted, dropped = host.dram.put(blocks, self._parents, now_ms)
        self._count(f"{HBM}>{DRAM}", len(admitted))
        self._arrived(host, admitted)
        self._left_dram(host, dropped, now_ms)
        refused = set(blocks).difference(admitted)
        last = [
            block for block in blocks
            if block in refused and not host.below_hbm(block) and not self._elsewhere(host, block)
        ]  # fmt: skip
        self._put_nvme(host, last, now_ms, source=HBM)

    def _left_dram(self, host: Host, victims: Sequence[BlockKey], now_ms: float) -> None:
        self._departed(host, victims)
        last = [b for b in victims if not host.listed[b] and not self._elsewhere(host, b)]
        self._put_nvme(host, [b for b in last if not host.below_hbm(b)], now_ms, source=DRAM)

    def _put_nvme(
        self, host: Host, blocks: Sequence[BlockKey], now_ms: float, *, source: str
    ) -> None:
        if host.nvme is None:
            self._put_pool(blocks, now_ms, source=source)
            return
        admitted, dropped = host.nvme.put(blocks, self._parents, now_ms)
        self._count(f"{source}>{NVME}", len(admitted))
        self._arrived(host, admitted)
        self._departed(host, dropped)
        last = [
            block for block in dropped
            if not host.listed[block] and block not in host.dram.held
            and not self._elsewhere(host, block)
        ]  # fmt: skip
        self._put_pool(last, now_ms, source=NVME)

    def _put_pool(self, blocks: Sequence[BlockKey], now_ms: float, *, source: str) -> None:
        if self.pool is None:
            return
        admitted, _ = self.pool.put(blocks, self._parents, now_ms)
        self._count(f"{source}>{POOL}", len(admitted))

    def _elsewhere(self, host: Host, block: BlockKey) -> bool:
        """Say whether a copy that this host can reach is known outside it."""
        if self.pool is not None and block in self.pool.held:
            return True
        return self.shape.peers and bool(self._at.get(block, 0) & ~(1 << host.number))

    # -- books -----------------------------------------------------------------------------

    def _arrived(self, host: Host, blocks: Iterable[BlockKey]) -> None:
        for block in blocks:
            self._at[block] = self._at.get(block, 0) | 1 << host.number

    def _departed(self, host: Host, blocks: Iterable[BlockKey]) -> None:
        for block in blocks:
            if not host.below_hbm(block):
                left = self._at.pop(block, 0) & ~(1 << host.number)
                if left:
                    self._at[block] = left

    def _tell_lower(
        self,
        host: Host,
        request: TraceRequest,
        sources: Sequence[str | None],
        *,
        partial: bool,
    ) -> None:
        """Tell the tiers below DRAM of a request, and peers of what is read from them."""
        for tier in (host.nvme, self.pool):
            if tier is not None and request.blocks:
                tier.hear(request, partial=partial)
        read: dict[int, list[int]] = {}
        for at, source in enumerate(sources):
            if source == PEER:
                others = self._at[request.blocks[at]] & ~(1 << host.number)
                read.setdefault((others & -others).bit_length() - 1, []).append(at)
        for number, places in read.items():
            asked = replace(
                request,
                blocks=[request.blocks[at] for at in places],
                first_block=request.first_block + places[0],
            )
            peer = self.hosts[number]
            for tier in (peer.dram, peer.nvme):
                if tier is not None:
                    tier.hear(asked)

    def _remember(self, request: TraceRequest) -> None:
        parent: BlockKey | None = None
        for block in request.blocks:
            self._parents.setdefault(block, parent)
            parent = block

    def _count(self, crossing: str, blocks: int) -> None:
        if blocks:
            self.moved[crossing] += blocks * self.block_bytes
