"""The tiers below DRAM of one node, wired to its table, its policies and its watchers."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Final

from kvstore.core.errors import BadInput, KvStoreError
from kvstore.core.names import BlockName, Root
from kvstore.directory.events import TierKind
from kvstore.directory.policies import make_policy
from kvstore.directory.policy import Prompt
from kvstore.observe.metrics import NodeMetrics, PeerMetrics, TierMetrics
from kvstore.rpc.credentials import NO_CREDENTIALS, Credentials
from kvstore.service.disk_space import DiskWatch
from kvstore.service.hashing import Hasher
from kvstore.service.holdings import NodeHoldings, Stored, publish
from kvstore.service.movement import Lower, Movement
from kvstore.service.peers import Peers
from kvstore.service.store import ArenaStore
from kvstore.tiers.base import Held, StoredTier, Terms
from kvstore.tiers.files import FilesTier
from kvstore.tiers.files_config import FilesConfig
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
    files: Path | None = None
    """Directory that many nodes share."""
    files_bytes: int = 0
    peers: Path | None = None
    """File that lists the other nodes."""
    policy: str

    def __post_init__(self) -> None:
        if (self.nvme is None) != (self.nvme_bytes == 0):
            raise BadInput("--nvme and --nvme-bytes belong together: a directory, and its bytes")
        if (self.files is None) != (self.files_bytes == 0):
            raise BadInput("--files and --files-bytes belong together: a directory, and its bytes")
        if self.nvme is not None:
            NvmeConfig(directory=self.nvme, capacity_bytes=self.nvme_bytes)
        if self.files is not None:
            FilesConfig(directory=self.files, capacity_bytes=self.files_bytes)

    @property
    def kinds(self) -> tuple[TierKind, ...]:
        """Every tier that the node publishes."""
        below = ((self.nvme, TierKind.NVME), (self.files, TierKind.FILES))
        return (TierKind.DRAM, *(kind for directory, kind in below if directory is not None))


@dataclass(frozen=True, slots=True, kw_only=True)
class NodeParts:
    """What the tiers of a node stand on."""

    node: str
    store: ArenaStore
    hasher: Hasher
    metrics: NodeMetrics
    tier_metrics: TierMetrics
    peer_metrics: PeerMetrics
    credentials: Credentials = NO_CREDENTIALS
    """What other nodes are shown."""


class BelowDram:
    """What lies below one arena, and the movement between. Made by `start`."""

    def __init__(
        self, parts: NodeParts, stored: Stored, peers: Peers | None, disks: DiskWatch
    ) -> None:
        """For `start`: use that."""
        self._disks = disks
        self._parts = parts
        self._peers = peers
        self._peer_tier: PeerTier | None = None
        self.stored = stored
        """The tiers with a medium of their own."""
        lowers = [
            Lower(kind, tier, own=kind is not TierKind.FILES) for kind, tier in stored.items()
        ]
        if peers is not None:
            facts = partial(_facts, parts.store)
            self._peer_tier = PeerTier(
                peers, facts, parts.tier_metrics, credentials=parts.credentials
            )
            lowers.append(
                Lower(TierKind.PEER, self._peer_tier, own=False, keeps=False,
                      batch_bytes=_PEER_BATCH)
            )  # fmt: skip
        self._lowers = sorted(lowers, key=lambda lower: lower.kind)
        self.movement = Movement(parts.store, parts.hasher, self._lowers, parts.metrics)

    @classmethod
    async def start(cls, config: BelowConfig, parts: NodeParts) -> "BelowDram":
        """Open the tiers; raises `BadInput` or `Refused` naming a directory that cannot be used."""
        stored = await _open(config, parts)
        table = parts.store.table
        peers = None
        if config.peers is not None:
            peers = Peers(parts.node, config.peers, parts.peer_metrics, parts.credentials)
            peers.start()
        if stored:
            # The arena is the only way down: it keeps nothing out.
            table.bypass = False
            table.publisher.holdings = NodeHoldings(table, stored)
            parts.store.on_request = partial(_tell_policies, list(stored.values()))
        directories = {TierKind.NVME: config.nvme, TierKind.FILES: config.files}
        return cls(parts, stored, peers, DiskWatch(directories, parts.tier_metrics))

    @property
    def lowers(self) -> Sequence[Lower]:
        """Tiers below DRAM, fastest first."""
        return self._lowers

    def bits(self, root: Root, name: BlockName) -> int:
        """Return which tiers below hold a block: bit (1 << tier) for each."""
        return sum(1 << int(lower.kind) for lower in self._lowers if lower.tier.holds(root, name))

    def measure(self) -> None:
        """Set the gauges."""
        self.movement.measure()
        if self._peers is not None and self._peer_tier is not None:
            self._peers.measure()
            self._peer_tier.measure()
        metrics = self._parts.metrics
        for kind, tier in self.stored.items():
            tier.measure()
            metrics.used_bytes.labels(kind.name.lower()).set(tier.used_bytes)
            metrics.capacity_bytes.labels(kind.name.lower()).set(tier.capacity_bytes)

    async def close(self) -> None:
        """Write what is not below yet, as far as there is time, and close the tiers.

        The hasher has to run still: what has no sum is not written.
        """
        await self._disks.close()
        if self._peers is not None:
            await self._peers.close()
        if self.stored:
            await self._parts.hasher.sealed(_SEAL_S)
        await self.movement.flush(_FLUSH_S)
        await self.movement.close()
        for lower in self._lowers:
            await lower.tier.close()


async def _open(config: BelowConfig, parts: NodeParts) -> Stored:
    """Open the tiers with a medium; when one cannot be used, those before are closed again."""
    stored: Stored = {}
    try:
        if config.nvme is not None:
            stored[TierKind.NVME] = await NvmeTier.start(
                NvmeConfig(directory=config.nvme, capacity_bytes=config.nvme_bytes),
                make_policy(config.policy),
                parts.tier_metrics,
                listener=partial(_publish, parts.store, TierKind.NVME),
                terms=_terms(parts.store, TierKind.NVME),
            )
        if config.files is not None:
            stored[TierKind.FILES] = await FilesTier.start(
                FilesConfig(directory=config.files, capacity_bytes=config.files_bytes),
                make_policy(config.policy),
                parts.tier_metrics,
                listener=partial(_publish, parts.store, TierKind.FILES),
                terms=_terms(parts.store, TierKind.FILES),
            )
    except KvStoreError:
        for tier in stored.values():
            await tier.close()
        raise
    return stored


def _publish(store: ArenaStore, kind: TierKind, held: Sequence[Held], deleted: bool) -> None:
    publish(store.table.publisher, kind, held, deleted=deleted)


def _terms(store: ArenaStore, kind: TierKind) -> Terms:
    book = store.table.quotas.book(kind.name.lower())
    return Terms(book=book, pinned=store.pins.holds)


def _tell_policies(tiers: Sequence[StoredTier], prompt: Prompt) -> None:
    for tier in tiers:
        tier.request(prompt)


def _facts(store: ArenaStore, root: Root) -> RootFacts | None:
    """Return what a neighbour has to know of a root that it may never have opened."""
    info = store.table.roots.get(root)
    if info is None:
        return None
    shape = info.shape
    return RootFacts(shape.payload_bytes, shape.shares, info.group, info.domain)
