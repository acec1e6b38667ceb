"""What a worker is told at its start, checked before any work."""

import re
from dataclasses import dataclass
from pathlib import Path

from kvstore.core.errors import BadInput
from kvstore.core.names import Fidelity, check_fidelity
from kvstore.directory.events import WorkerRole
from kvstore.directory.policies import DEFAULT_POLICY, make_policy
from kvstore.rpc.convert import check_id
from kvstore.rpc.event_writers import check_redis
from kvstore.rpc.security import check_listen, check_metrics, load_security
from kvworkers.ranks import MAX_RANKS


@dataclass(frozen=True, slots=True, kw_only=True)
class WorkerConfig:
    """Everything a worker is told at its start; raises `BadInput` naming the field at fault."""

    model: str | Path | None = None
    """Hugging Face directory or GGUF file; None: the default model."""
    node: str | Path | None = None
    """Run directory of this host's cache node; None: no store."""
    name: str = "worker-0"
    listen: str = "127.0.0.1:0"
    metrics: str = "127.0.0.1:0"
    """Where Prometheus metrics are served."""
    security: Path | None = None
    """Who may connect: docs/security.md; None: loopback only."""
    device: str = "auto"
    """`cpu`, `cuda`, `cuda:N`; `auto`: the first GPU that this process may use, or else the CPU."""
    pool_bytes: int | None = None
    """Pages of the device, in bytes; None: what a GPU has room for, 512 MiB on a CPU."""
    fidelity: str = Fidelity.EXACT.value
    """What its store may do to blocks: a name of `kvstore.core.names.Fidelity`."""
    policy: str = DEFAULT_POLICY
    """Which pages are evicted, by the name in `kvstore.directory.policies`."""
    threads: int | None = None
    """Compute threads of each rank; None: as torch decides."""
    tensor_parallel: int = 1
    """Devices that compute the model together, one process each."""
    rank_deadline_ms: int = 30_000
    """How long one of them may take for a step or a copy; longer means that it is lost."""
    store: bool = True
    """Whether to use the cache node at all."""
    store_call_ms: int = 250
    """Deadline of one call to the cache node; longer means that it is not there."""
    share_domain: str = "default"
    trace: str = ""
    """Where spans go: `http://HOST:PORT` of an OTLP collector; empty: nowhere."""
    events_redis: str = ""
    """Redis that events are written to, besides serving `Watch`; "": none."""
    role: str = WorkerRole.BOTH.value
    """What it is there for: a name of `kvstore.directory.events.WorkerRole`."""
    host: str = ""
    """Who shares an arena; by default the cache node's name."""
    incarnation: int = 0
    """Given by whoever restarts this worker; 0: taken from the clock."""
    step_tokens: int = 512
    max_running: int = 16
    max_waiting: int = 64
    overcommit: bool = True
    """Admit requests by what replies are expected to become; False: by all their `max_tokens`."""
    swap_bytes: int | None = None
    """Bytes of the arena for pages of requests that make way; None: as the node allows; 0: none,
    they are computed anew."""
    drain_ms: int = 5_000
    """How long running requests may go on once the worker is told to end."""

    def __post_init__(self) -> None:
        check_id(self.name, "name")
        if not self.name:
            raise BadInput("name is empty")
        for field in ("pool_bytes", "step_tokens", "max_running", "max_waiting", "store_call_ms"):
            if (value := getattr(self, field)) is not None and value <= 0:
                raise BadInput(f"{field} must be positive, got {value}")
        if self.swap_bytes is not None and self.swap_bytes < 0:
            raise BadInput(f"swap_bytes must not be negative, got {self.swap_bytes}")
        if not re.fullmatch(r"auto|cpu|cuda(:\d{1,3})?", self.device):
            raise BadInput(f"device {self.device!r}: auto, cpu, cuda or cuda:N")
        if not 1 <= self.tensor_parallel <= MAX_RANKS:
            raise BadInput(f"tensor_parallel {self.tensor_parallel}: must lie in 1..{MAX_RANKS}")
        if self.rank_deadline_ms <= 0:
            raise BadInput(f"rank_deadline_ms must be positive, got {self.rank_deadline_ms}")
        if self.role not in frozenset(WorkerRole):
            raise BadInput(f"role {self.role!r}: {', '.join(WorkerRole)}")
        if self.drain_ms < 0 or self.incarnation < 0:
            raise BadInput("drain_ms and incarnation must not be negative")
        if self.threads is not None and self.threads <= 0:
            raise BadInput(f"threads must be positive, got {self.threads}")
        make_policy(self.policy)
        check_fidelity("fidelity", self.fidelity)
        security = load_security(self.security)
        check_listen("listen", self.listen, security)
        check_metrics("metrics", self.metrics, security)
        check_redis("events_redis", self.events_redis)
