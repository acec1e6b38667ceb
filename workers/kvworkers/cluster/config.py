"""What one cluster is: the frozen configuration that `up`, `demo` and the controller share."""

import json
import os
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Final

from kvstore.cli.values import Address
from kvstore.core.errors import BadInput
from kvstore.directory.policies import DEFAULT_POLICY, make_policy
from kvstore.rpc.event_writers import check_redis
from kvstore.service.below import BelowConfig

MAX_WORKERS: Final = 1_024
"""Workers of one cluster: what a router's view is laid out for."""

MIN_ARENA_BYTES: Final = 64 << 20
"""The smallest chunk of the arena (DESIGN §5, Chunks): less holds no block at all."""

DEFAULT_HTTP: Final = Address("127.0.0.1", 8000)
DEFAULT_GRPC: Final = Address("127.0.0.1", 0)


@dataclass(frozen=True, slots=True, kw_only=True)
class ClusterConfig:
    """One cluster. `model` is a prepared directory; `run_dir` holds every socket and log.

    `pool_bytes` is each worker's page pool, `threads` its compute threads; 0 leaves the choice to
    the worker and to the machine. `policy` evicts in every tier. `nvme` is a directory on a local
    disk in which each node keeps a tier of `nvme_bytes`; None: there is none. `events_redis` is the
    URL of a Redis that carries events from nodes and workers to frontends; "": they use `Watch`.
    Raises `BadInput` naming the flag at fault.
    """

    model: Path
    run_dir: Path
    workers: int = 2
    arena_bytes: int = 1 << 30
    pool_bytes: int = 0
    threads: int = 0
    policy: str = DEFAULT_POLICY
    nvme: Path | None = None
    nvme_bytes: int = 0
    events_redis: str = ""
    http: Address = DEFAULT_HTTP
    grpc: Address = DEFAULT_GRPC

    def __post_init__(self) -> None:
        if not 1 <= self.workers <= MAX_WORKERS:
            raise BadInput(f"--workers {self.workers}: must lie in 1..{MAX_WORKERS}")
        if self.arena_bytes < MIN_ARENA_BYTES:
            raise BadInput(f"--arena {self.arena_bytes}: at least {MIN_ARENA_BYTES} bytes")
        if self.pool_bytes < 0 or self.threads < 0:
            raise BadInput("--pool and --threads must not be negative")
        make_policy(self.policy)
        check_redis("--events-redis", self.events_redis)
        BelowConfig(nvme=self.nvme, nvme_bytes=self.nvme_bytes, policy=self.policy)

    def threads_per_worker(self, cores: int | None = None) -> int:
        """Return the compute threads of one worker: an equal part of the machine by default."""
        return self.threads or max(1, (cores or os.cpu_count() or 1) // self.workers)

    def to_json(self) -> str:
        """Return one line that `from_json` reads back."""
        fields = asdict(self)
        fields.update(
            model=str(self.model),
            run_dir=str(self.run_dir),
            nvme=str(self.nvme) if self.nvme else None,
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
                nvme=Path(fields["nvme"]) if fields["nvme"] else None,
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
