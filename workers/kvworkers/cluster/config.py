"""What one cluster is: the frozen configuration that `up`, `demo` and the controller share."""

import json
import os
import re
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Final

from kvstore.cli.values import Address, parse_bytes
from kvstore.core.errors import BadInput
from kvstore.core.names import Fidelity, check_fidelity
from kvstore.directory.events import WorkerRole
from kvstore.directory.policies import DEFAULT_POLICY, make_policy
from kvstore.rpc.event_writers import check_redis
from kvstore.rpc.security import check_listen, check_metrics, load_security
from kvstore.service.below import BelowConfig
from kvstore.tiers.quotas import QuotaRule, Quotas
from kvworkers.ranks import MAX_RANKS

MAX_WORKERS: Final = 1_024
"""Workers of one cluster: what a router's view is laid out for."""

MIN_ARENA_BYTES: Final = 64 << 20
"""The smallest chunk of the arena (DESIGN §5, Chunks): less holds no block at all."""

MAX_FRONTENDS: Final = 64
MAX_DRAIN_MS: Final = 3_600_000
MAX_PORT: Final = 65_535
LOOPBACK: Final = "loopback"
HOST: Final = "host"
DEFAULT_NAMESPACE: Final = "kvstore"
_NAMESPACE: Final = re.compile(r"[A-Za-z0-9][A-Za-z0-9-]{0,62}", re.ASCII)

DEFAULT_HTTP: Final = Address("127.0.0.1", 8000)
DEFAULT_GRPC: Final = Address("127.0.0.1", 0)


@dataclass(frozen=True, slots=True, kw_only=True)
class ClusterConfig:
    """One cluster. `model` is a prepared directory; `run_dir` holds every socket and log.

    Of the `workers` the last `prefill` and the first `decode` have those roles, the others both.
    `pool_bytes` is each worker's page pool, `threads` its compute threads; 0 leaves the choice to
    the worker and to the machine. `swap_bytes` is what each may take of the arena for requests that
    make way; None: as the node allows. With `overcommit` they admit requests by what replies are
    expected to become. `fidelity` is how exactly workers' stores keep K and V. `policy`
    evicts in every tier. `nvme` is a directory on a local disk in which each node keeps a tier of
    `nvme_bytes`; None: there is none. `files` is a directory that all nodes share, with
    `files_bytes` for all blocks in it. `cluster_key` is the file that names are derived with, the
    same on every host; None: one is made, good for one host. `events_redis` is the URL of a Redis
    that carries events from nodes and workers to frontends; "": they use `Watch`. `trace` is the
    OTLP collector that every part sends spans to; empty: none does. Frontend i listens on the ports
    of `http` and `grpc` plus i; 0 frontends stands for one on every host, all on the same ports.
    Nodes, workers and controller listen on `loopback` or on their `host`'s address, which needs
    `security`. A worker or frontend that is drained gets `drain_ms`. `ray_address` is a running Ray
    cluster to join; empty: one of our own on this machine.
    Raises `BadInput` naming the flag at fault.
    """

    model: Path
    run_dir: Path
    workers: int = 2
    prefill: int = 0
    decode: int = 0
    arena_bytes: int = 1 << 30
    pool_bytes: int = 0
    threads: int = 0
    tensor_parallel: int = 1
    """Devices of each worker, on one host; the worker's ranks are an actor each."""
    swap_bytes: int | None = None
    overcommit: bool = True
    fidelity: str = Fidelity.EXACT.value
    policy: str = DEFAULT_POLICY
    nvme: Path | None = None
    nvme_bytes: int = 0
    files: Path | None = None
    files_bytes: int = 0
    quotas: tuple[str, ...] = ()
    """What share domains and roots may hold on each node, as `--quota` of `kvstore node` has it."""
    cluster_key: Path | None = None
    trace: str = ""
    events_redis: str = ""
    http: Address = DEFAULT_HTTP
    grpc: Address = DEFAULT_GRPC
    frontends: int = 1
    control_port: int = 0
    drain_ms: int = 30_000
    listen: str = LOOPBACK
    security: Path | None = None
    ray_address: str = ""
    ray_namespace: str = DEFAULT_NAMESPACE
    spare_cpus: int = 0
    """Logical processors of our own Ray that `kvstore scale` may give to more workers."""

    def __post_init__(self) -> None:
        if not 1 <= self.workers <= MAX_WORKERS:
            raise BadInput(f"--workers {self.workers}: must lie in 1..{MAX_WORKERS}")
        if not 1 <= self.tensor_parallel <= MAX_RANKS:
            raise BadInput(f"--tensor-parallel {self.tensor_parallel}: must lie in 1..{MAX_RANKS}")
        self._check_roles()
        if self.arena_bytes < MIN_ARENA_BYTES:
            raise BadInput(f"--arena {self.arena_bytes}: at least {MIN_ARENA_BYTES} bytes")
        if self.pool_bytes < 0 or self.threads < 0:
            raise BadInput("--pool and --threads must not be negative")
        if self.swap_bytes is not None and self.swap_bytes < 0:
            raise BadInput(f"--swap {self.swap_bytes}: must not be negative")
        if not 0 <= self.frontends <= MAX_FRONTENDS:
            raise BadInput(f"--frontends {self.frontends}: must lie in 0..{MAX_FRONTENDS}")
        if self.frontends == 0 and not self.ray_address:
            raise BadInput("--frontends 0: one per host is for a Ray cluster that is joined")
        if not 0 <= self.drain_ms <= MAX_DRAIN_MS:
            raise BadInput(f"--drain-ms {self.drain_ms}: must lie in 0..{MAX_DRAIN_MS}")
        if not 0 <= self.control_port <= MAX_PORT:
            raise BadInput(f"--control-port {self.control_port}: must lie in 0..{MAX_PORT}")
        if not 0 <= self.spare_cpus <= MAX_WORKERS:
            raise BadInput(f"--spare {self.spare_cpus}: must lie in 0..{MAX_WORKERS}")
        if not _NAMESPACE.fullmatch(self.ray_namespace):
            raise BadInput(f"--ray-namespace {self.ray_namespace!r}: letters, digits and dashes")
        self._check_addresses()
        make_policy(self.policy)
        check_fidelity("--fidelity", self.fidelity)
        check_redis("--events-redis", self.events_redis)
        BelowConfig(
            nvme=self.nvme,
            nvme_bytes=self.nvme_bytes,
            files=self.files,
            files_bytes=self.files_bytes,
            policy=self.policy,
        )
        Quotas([QuotaRule.parse(rule, parse_bytes) for rule in self.quotas])

    def _check_roles(self) -> None:
        for flag, count in (("--prefill", self.prefill), ("--decode", self.decode)):
            if not 0 <= count <= self.workers:
                raise BadInput(f"{flag} {count}: must lie in 0..{self.workers}")
        if self.prefill == self.workers:
            raise BadInput(f"--prefill {self.prefill}: none of the workers would answer")
        if self.prefill + self.decode > self.workers:
            many = f"with {self.decode} to decode more than the {self.workers} workers"
            raise BadInput(f"--prefill {self.prefill}: {many}")

    def role_of(self, worker: str) -> WorkerRole:
        """Return the role of the worker with this name: by its number, so it keeps it.

        Those that only compute prompts come last: whatever `kvstore scale` leaves can answer.
        """
        number = int(worker.rpartition("-")[2])
        if self.workers - self.prefill <= number < self.workers:
            return WorkerRole.PREFILL
        return WorkerRole.DECODE if number < self.decode else WorkerRole.BOTH

    def _check_addresses(self) -> None:
        security = load_security(self.security)
        if self.listen not in (LOOPBACK, HOST):
            raise BadInput(f"--listen {self.listen!r}: must be {LOOPBACK} or {HOST}")
        if self.listen == HOST:
            check_listen("--listen host:", "0.0.0.0:0", security)
            check_metrics("--listen host:", "0.0.0.0:0", security)
        for flag, address in (("--http", self.http), ("--grpc", self.grpc)):
            check_listen(flag, str(address), security)
            if address.port and address.port + self.frontends - 1 > MAX_PORT:
                raise BadInput(f"{flag} {address}: no port is left for frontend {self.frontends}")

    def listen_host(self) -> str:
        """Return where a part listens on the machine that runs this; asks Ray where it may be."""
        if self.listen == LOOPBACK:
            return "127.0.0.1"
        from ray.util import get_node_ip_address

        return str(get_node_ip_address())

    def frontend_address(self, address: Address, index: int) -> Address:
        """Return where frontend `index` listens, given where the first one does."""
        if self.frontends == 0:  # each on a host of its own
            return address
        return Address(address.host, address.port + index if address.port else 0)

    def threads_per_worker(self, cores: int | None = None) -> int:
        """Return the compute threads of one rank: an equal part of the machine by default."""
        return self.threads or max(1, (cores or os.cpu_count() or 1) // self.ranks())

    def ranks(self) -> int:
        """Return how many processes compute, each on a device of its own."""
        return self.workers * self.tensor_parallel

    def _paths(self) -> dict[str, Path | None]:
        return {
            "nvme": self.nvme,
            "files": self.files,
            "cluster_key": self.cluster_key,
            "security": self.security,
        }

    def key_file(self) -> Path:
        """Return where the nodes of a host find the cluster key.

        Beside the blocks that outlive a run: they are found under their old key only.
        """
        beside = self.files or self.nvme or self.run_dir
        return self.cluster_key or beside / "cluster.key"

    def to_json(self) -> str:
        """Return one line that `from_json` reads back."""
        fields = asdict(self)
        fields.update(
            model=str(self.model),
            run_dir=str(self.run_dir),
            **{name: str(path) if path else None for name, path in self._paths().items()},
            http=str(self.http),
            grpc=str(self.grpc),
        )
        return json.dumps(fields)

    @classmethod
    def from_json(cls, text: str) -> "ClusterConfig":
        """Read what `to_json` wrote; a wrong field is a `BadInput`."""
        try:
            fields = json.loads(text)
            fields.update(
                model=Path(fields["model"]),
                run_dir=Path(fields["run_dir"]),
                **{
                    name: Path(fields[name]) if fields[name] else None
                    for name in ("nvme", "files", "cluster_key", "security")
                },
                quotas=tuple(fields.get("quotas", ())),
                http=Address.parse(fields["http"]),
                grpc=Address.parse(fields["grpc"]),
            )
            return cls(**fields)
        except (AttributeError, KeyError, TypeError, ValueError) as error:
            raise BadInput(f"not a cluster's configuration: {error}") from error

    def at(self, run_dir: Path) -> "ClusterConfig":
        """Return the same cluster in a directory of its own."""
        return replace(self, run_dir=run_dir)

    def with_model(self, model: Path) -> "ClusterConfig":
        """Return the same cluster serving `model`."""
        return replace(self, model=model)
