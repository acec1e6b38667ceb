"""Configuration of keeper and node: frozen, checked once, passed down in pieces."""

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from kvstore.core.errors import BadInput
from kvstore.core.limits import GRANULE_BYTES, MAX_ID_BYTES
from kvstore.directory.policies import DEFAULT_POLICY, make_policy
from kvstore.rpc.event_writers import check_redis
from kvstore.rpc.security import check_listen, check_metrics, load_security
from kvstore.service.below import BelowConfig
from kvstore.service.scrubbing import DEFAULT_BYTES_PER_S
from kvstore.tiers.quotas import QuotaRule, Quotas
from kvstore.transport.arena import ArenaSize
from kvstore.transport.numa import AUTO, chosen_nodes, host_nodes

SOCKET_PATH_BYTES: Final = 107
"""What `sockaddr_un` holds."""
BYTES_PER_SLOT: Final = 16 << 10
"""Smallest mean block the slot table is sized for: the table takes 0.8 % of the arena."""
MIN_SLOTS: Final = 256
MAX_SLOTS: Final = 1 << 22
KEEPER_SOCKET: Final = "keeper.sock"
NODE_SOCKET: Final = "node.sock"


@dataclass(frozen=True, slots=True, kw_only=True)
class KeeperConfig:
    """One host's keeper and the node it runs."""

    run_dir: Path
    name: str
    arena_bytes: int
    listen: str = "127.0.0.1:0"
    metrics: str = "127.0.0.1:0"
    security: Path | None = None
    """Who may connect: docs/security.md; None: loopback only."""
    cluster_key_file: Path | None = None
    parent_pid: int = 0
    max_sessions: int = 1_024
    lease_ms: int = 30_000
    claim_ms: int = 5_000
    policy: str = DEFAULT_POLICY
    trace: str = ""
    """Where spans go: `http://HOST:PORT` of an OTLP collector; empty: nowhere."""
    """What is evicted and admitted, by the name in `kvstore.directory.policies`."""
    nvme: Path | None = None
    """Directory of the NVMe tier; None: there is none."""
    nvme_bytes: int = 0
    """Bytes that it may take on its disk."""
    events_redis: str = ""
    """Redis that the node's events are written to besides `Watch`; "": none."""
    files: Path | None = None
    """Directory of shared files; None: there are none."""
    files_bytes: int = 0
    """Bytes that the blocks in it may take, whoever wrote them."""
    bulk: str = "127.0.0.1:0"
    """Bulk port: bytes for clients and nodes that do not map the arena."""
    peers: Path | None = None
    """File that lists the other nodes; None: there are none."""
    scrub_bytes_per_s: int = DEFAULT_BYTES_PER_S
    """How fast idle blocks in memory are reread; 0: not at all."""
    quotas: tuple[QuotaRule, ...] = ()
    """Bytes that share domains and roots may hold: docs/tiers.md."""
    numa: str = AUTO
    """NUMA nodes that the arena lies on, such as `0-1`; `auto`: all where there are several."""
    ping_period_ms: int = 1_000
    hang_ms: int = 10_000
    """A node that leaves a ping unanswered this long is killed and restarted."""
    start_ms: int = 60_000
    """A node that is not ready after this long is killed and restarted."""
    stop_ms: int = 5_000

    def __post_init__(self) -> None:
        if self.arena_bytes < GRANULE_BYTES or self.arena_bytes % GRANULE_BYTES:
            raise BadInput(
                f"--arena-bytes {self.arena_bytes} is not a positive multiple of {GRANULE_BYTES}"
            )
        if not self.name or not self.name.isprintable() or len(self.name.encode()) > MAX_ID_BYTES:
            raise BadInput(f"--name must be printable and at most {MAX_ID_BYTES} bytes")
        if len(os.fsencode(self.run_dir / KEEPER_SOCKET)) > SOCKET_PATH_BYTES:
            raise BadInput(f"--run-dir {self.run_dir} is too long for a Unix socket's path")
        security = load_security(self.security)
        check_listen("--listen", self.listen, security)
        check_listen("--bulk", self.bulk, security)
        check_metrics("--metrics", self.metrics, security)
        make_policy(self.policy)
        BelowConfig(
            nvme=self.nvme,
            nvme_bytes=self.nvme_bytes,
            files=self.files,
            files_bytes=self.files_bytes,
            peers=self.peers,
            policy=self.policy,
        )
        if self.scrub_bytes_per_s < 0:
            raise BadInput(f"--scrub-bytes-per-s {self.scrub_bytes_per_s} is negative")
        Quotas(self.quotas)
        chosen_nodes(self.numa, host_nodes())
        check_redis("--events-redis", self.events_redis)
        if self.parent_pid < 0:
            raise BadInput(f"--parent-pid {self.parent_pid} is no process id")

    @property
    def arena_size(self) -> ArenaSize:
        """Arena with a slot for every `BYTES_PER_SLOT`."""
        slots = min(max(self.arena_bytes // BYTES_PER_SLOT, MIN_SLOTS), MAX_SLOTS)
        return ArenaSize(self.arena_bytes, slots)

    @property
    def key_file(self) -> Path:
        """Where the cluster key lies."""
        return self.cluster_key_file or self.run_dir / "cluster.key"

    @property
    def keeper_socket(self) -> Path:
        """Where sessions are opened."""
        return self.run_dir / KEEPER_SOCKET

    @property
    def rpc(self) -> str:
        """gRPC address of the node on this host."""
        return f"unix:{self.run_dir / NODE_SOCKET}"
