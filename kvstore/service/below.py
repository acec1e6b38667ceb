"""The tiers below DRAM of one node, wired to its table, its policies and its watchers."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Final

from prometheus_client import CollectorRegistry

from kvstore.core.errors import BadInput
from kvstore.core.names import BlockName, Root
from kvstore.directory.events import TierKind
from kvstore.directory.policies import make_policy
from kvstore.observe.metrics import NodeMetrics, PeerMetrics, TierMetrics
from kvstore.service.hashing import Hasher
from kvstore.service.holdings import NodeHoldings, publish
from kvstore.service.movement import Lower, Movement
from kvstore.service.peers import Peers
from kvstore.service.store import ArenaStore
from kvstore.tiers.base import Held
from kvstore.tiers.nvme import NvmeTier
from kvstore.tiers.nvme_config import NvmeConfig
from kvstore.tiers.peer import PeerTier, RootFacts

_SEAL_S: Final = 1.0
_FLUSH_S: Final = 2.0
"""How long a node that ends in good order may hash, and write below, what is not there yet."""
_PEER_BATCH: Final = 16 << 20
"""Bytes on one ticket: enough to forget the call that fetches it, few enough to share streams."""


@dataclass(frozen=True, slots=True, kw_only=True)
class BelowConfig:
    """Which tiers a node has below DRAM."""

    nvme: Path | None = None
    nvme_bytes: int = 0
    peers: Path | None = None
    """File that lists the other nodes."""
    policy: str

    def __post_init__(self) -> None:
        if (self.nvme is None) != (self.nvme_bytes == 0):
            raise BadInput("--nvme and --nvme-bytes belong together: a directory, and its bytes")
        if self.nvme is not None:
            NvmeConfig(directory=self.nvme, capacity_bytes=self.nvme_bytes)

    @property
    def kinds(self) -> tuple[TierKind, ...]:
        """Every tier that the node publishes."""
        return (TierKind.DRAM,) if self.nvme is None else (TierKind.DRAM, TierKind.NVME)


class BelowDram:
    """What lies below one arena, and the movement between. Made by `start`."""

    def __init__(
        self,
        store: ArenaStore,
        hasher: Hasher,
        metrics: NodeMetrics,
        *,
        nvme: NvmeTier | None,
        peers: tuple[Peers, PeerTier] | None,
    ) -> None:
        """For `start`: use that."""
        self._metrics = metrics
        self._hasher = hasher
        self.nvme = nvme
        self._peers = peers
        self._lowers: list[Lower] = []
        if nvme is not None:
            self._lowers.append(Lower(TierKind.NVME, nvme))
        if peers is not None:
            self._lowers.append(
                Lower(TierKind.PEER, peers[1], own=False, keeps=False, batch_bytes=_PEER_BATCH)
            )
        self.movement = Movement(store, hasher, self._lowers, metrics)

    @classmethod
    async def start(
        cls,
        config: BelowConfig,
        store: ArenaStore,
        hasher: Hasher,
        metrics: NodeMetrics,
        registry: CollectorRegistry,
        *,
        node: str,
        peer_metrics: PeerMetrics,
    ) -> "BelowDram":
        """Open the tiers; raises `BadInput` or `Refused` naming a directory that cannot be used."""
        tier_metrics = TierMetrics(registry)
        peers: tuple[Peers, PeerTier] | None = None
        if config.peers is not None:
            known = Peers(node, config.peers, peer_metrics)
            peers = known, PeerTier(known, partial(_facts, store), tier_metrics)
            known.start()
        if config.nvme is None:
            return cls(store, hasher, metrics, nvme=None, peers=peers)

        def tell(held: Sequence[Held], deleted: bool) -> None:
            publish(store.table.publisher, held, deleted=deleted)

        nvme = await NvmeTier.start(
            NvmeConfig(directory=config.nvme, capacity_bytes=config.nvme_bytes),
            make_policy(config.policy),
            tier_metrics,
            listener=tell,
        )
        store.on_request = nvme.request
        store.table.bypass = False
        store.table.publisher.holdings = NodeHoldings(store.table, nvme)
        return cls(store, hasher, metrics, nvme=nvme, peers=peers)

    def bits(self, root: Root, name: BlockName) -> int:
        """Return which tiers below hold a block: bit (1 << tier) for each."""
        return sum(1 << int(lower.kind) for lower in self._lowers if lower.tier.holds(root, name))

    def measure(self) -> None:
        """Set the gauges."""
        self.movement.measure()
        for part in self._peers or ():
            part.measure()
        if self.nvme is not None:
            self.nvme.measure()
            self._metrics.used_bytes.labels("nvme").set(self.nvme.used_bytes)
            self._metrics.capacity_bytes.labels("nvme").set(self.nvme.capacity_bytes)

    async def close(self) -> None:
        """Write what is not below yet, as far as there is time, and close the tiers.

        The hasher has to run still: what has no sum is not written.
        """
        if self._peers is not None:
            await self._peers[0].close()
        if self.nvme is not None:
            await self._hasher.sealed(_SEAL_S)
        await self.movement.flush(_FLUSH_S)
        await self.movement.close()
        if self._peers is not None:
            await self._peers[1].close()
        if self.nvme is not None:
            await self.nvme.close()


def _facts(store: ArenaStore, root: Root) -> RootFacts | None:
    """Return what a neighbour has to know of a root that it may never have opened."""
    info = store.table.roots.get(root)
    if info is None:
        return None
    shape = info.shape
    return RootFacts(shape.payload_bytes, shape.shares, info.group, info.domain)
