"""The one controller of a cluster: polls the parts, does what `plan` says, keeps the members.

It is itself an actor that Ray restarts; everything it knows it hears again from the parts, which
are detached and live on without it. Frontends keep the last member list.
"""

import asyncio
import logging
import time
from collections import Counter
from dataclasses import dataclass
from typing import Any, Final

import grpc.aio
from grpc_health.v1 import health_pb2, health_pb2_grpc
from prometheus_client import CollectorRegistry

from kvstore.core.errors import KvStoreError
from kvstore.observe.metrics import ClusterMetrics
from kvstore.rpc.channel import listen, make_server, open_channel
from kvstore.rpc.credentials import Credentials
from kvstore.rpc.errors import error_from
from kvstore.rpc.gate import gate_of
from kvstore.rpc.metrics_port import serve_metrics
from kvstore.rpc.security import load_security
from kvstore.rpc.v1 import cluster_pb2_grpc
from kvworkers.cluster.config import ClusterConfig
from kvworkers.cluster.operate import ClusterService, Operator
from kvworkers.cluster.placing import Placer
from kvworkers.cluster.plan import (
    Action,
    Part,
    Phase,
    Push,
    Report,
    Restart,
    Role,
    Start,
    hopeless,
    next_actions,
    next_members,
    ready,
)
from kvworkers.cluster.stage import Stage, now_ms

_log = logging.getLogger(__name__)

_POLL_SECONDS: Final = 0.25
"""Between two rounds. A restarted worker is noticed within one round and a report's deadline."""

_REPORT_SECONDS: Final = 5.0
"""Deadline of one report; a part may be importing an engine and answer late."""

_HEALTH_SECONDS: Final = 2.0

_STOP_SECONDS: Final = 10.0

_LOOK_SECONDS: Final = 5.0
"""Between two looks for hosts that joined Ray or were declared dead."""


@dataclass(frozen=True, slots=True)
class Status:
    """What the controller knows, for people and for `up`'s progress."""

    parts: tuple[Report, ...]
    ready: bool
    hopeless: str
    members_version: int
    metrics: str = ""
    """Where the controller's own metrics are served."""
    control: str = ""
    """Where it takes orders: `kvstore.rpc.v1.Cluster`."""


class Controller:
    """Keeps the parts of one cluster alive. Every method may be called again after a restart."""

    def __init__(self, config: ClusterConfig) -> None:
        self._config = config
        self._stage = Stage(config, Placer(config))
        self._registry = CollectorRegistry()
        self._metrics = ClusterMetrics(self._registry)
        self._security = load_security(config.security)
        self._host = config.listen_host()
        self._metrics_port = serve_metrics(
            "metrics", f"{self._host}:0", self._registry, self._security
        )
        self._control: grpc.aio.Server | None = None
        self._control_address = ""
        self._operator = Operator(self._stage, self._metrics)
        self._look_s = 0.0
        self._busy: dict[str, asyncio.Task[None]] = {}
        self._loop_task: asyncio.Task[None] | None = None
        self._fault = ""
        self._health = _Health(Credentials.of(self._security))

    async def status(self) -> Status:
        """Return what is known now; the first call after a (re)start sets the loop going."""
        if self._loop_task is None:
            self._loop_task = asyncio.create_task(self._run(), name="controller")
        return Status(
            parts=tuple(
                part.report for part in self._stage.parts.values() if part.report is not None
            ),
            ready=self._ready(),
            hopeless=self._hopeless(),
            members_version=self._stage.members.version,
            metrics=self._metrics_port.address,
            control=self._control_address,
        )

    def _ready(self) -> bool:
        stage = self._stage
        return bool(stage.parts) and ready(stage.parts.values(), stage.members)

    def _hopeless(self) -> str:
        return self._fault or hopeless(self._stage.parts.values())

    async def stop(self) -> None:
        """End all parts in good order: frontends first, so that nothing new comes in."""
        if self._loop_task is not None:
            self._loop_task.cancel()
        for task in self._busy.values():
            task.cancel()
        for role in (Role.FRONTEND, Role.WORKER, Role.NODE):
            actors = [
                self._stage.actors[p.name] for p in self._stage.parts.values() if p.role is role
            ]
            await asyncio.gather(*(self._end(actor) for actor in actors))
        if self._control is not None:
            await self._control.stop(0)

    async def clear(self) -> None:
        """Leave nothing in Ray: for a cluster that others started and that goes on without us."""
        await self.stop()
        await self._stage.clear()

    async def _end(self, actor: Any) -> None:
        from ray.exceptions import RayError

        try:
            await _answer(actor.stop.remote(), _STOP_SECONDS)
        except (RayError, TimeoutError):
            self._metrics.failures.labels("stop").inc()

    async def _run(self) -> None:
        try:
            await self._serve_control()
            await self._stage.place()
        except Exception as error:  # task boundary: becomes the cluster's reason not to come up
            self._fault = f"placing the parts failed: {type(error).__name__}: {error}"
            return
        while True:
            try:
                await self._round()
            except Exception:  # task boundary: a cluster whose controller gave up heals no more
                _log.exception("a round failed")
                self._metrics.failures.labels("round").inc()
            await asyncio.sleep(_POLL_SECONDS)

    async def _round(self) -> None:
        await asyncio.gather(*(self._hear(part) for part in list(self._stage.parts.values())))
        if self._look_s <= time.monotonic() and not self._operator.order:
            self._look_s = time.monotonic() + _LOOK_SECONDS
            await self._stage.look_for_hosts()
        self._stage.members = next_members(self._stage.members, self._stage.parts.values())
        self._count()
        for action in next_actions(self._stage.parts, self._stage.members, now_ms=now_ms()):
            self._begin(action)

    async def _serve_control(self) -> None:
        """Listen for the operator's orders."""
        server, health = make_server(gate=gate_of(self._security, self._registry))
        service = ClusterService(
            self._stage, self._operator, ready=self._ready, hopeless=self._hopeless,
            metrics=self._metrics_port.address,
        )  # fmt: skip
        cluster_pb2_grpc.add_ClusterServicer_to_server(service, server)
        wanted = f"{self._host}:{self._config.control_port}"
        self._control_address = listen(server, wanted, self._security)
        await server.start()
        await health.set("", health_pb2.HealthCheckResponse.SERVING)
        self._control = server

    def _count(self) -> None:
        self._metrics.members_version.set(self._stage.members.version)
        standing = Counter(
            (part.role, part.report.phase) for part in self._stage.parts.values() if part.report
        )
        for role in Role:
            for phase in Phase:
                self._metrics.parts.labels(role, phase).set(standing[role, phase])

    async def _hear(self, part: Part) -> None:
        """Take in a part's report, and its gRPC health where it says that it serves."""
        from ray.exceptions import RayActorError, RayError

        reference = self._stage.actors[part.name].report.remote()
        try:
            report: Report = await _answer(reference, _REPORT_SECONDS)
            if report.phase is Phase.SERVING:
                await self._health.check(report.address)
        except RayActorError:
            self._metrics.failures.labels("lost").inc()
            part.lose()
        except (TimeoutError, KvStoreError, RayError):
            # Slow or between two lives: routers see that by themselves. Silence adds up.
            self._metrics.failures.labels("silent").inc()
        else:
            before = part.restarts
            part.hear(report, now_ms=now_ms())
            self._metrics.restarts.labels(part.name).inc(part.restarts - before)

    def _begin(self, action: Action) -> None:
        """Carry an action out beside the loop, one at a time per part."""
        if (running := self._busy.get(action.name)) is not None and not running.done():
            return
        self._stage.parts[action.name].told_ms = now_ms()
        self._busy[action.name] = asyncio.create_task(self._carry_out(action), name=action.name)

    async def _carry_out(self, action: Action) -> None:
        import ray

        part, actor = self._stage.parts[action.name], self._stage.actors[action.name]
        match action:
            case Start():
                report = part.report
                host = self._stage.orders.hosts.get(report.ray_node, "") if report else ""
                if not host and part.role is Role.WORKER:
                    return  # its host has just joined: the next look gives it a name
                await self._told("start", actor.start.remote(action.incarnation, host))
            case Push():
                await self._told("push", actor.set_members.remote(self._stage.members))
            case Restart():
                self._metrics.failures.labels("hung").inc()
                part.heard_ms = now_ms()
                ray.kill(actor, no_restart=False)

    async def _told(self, what: str, reference: Any) -> None:
        """Wait until a part has taken an order; one that is away is counted and told again."""
        from ray.exceptions import RayError

        try:
            await _answer(reference, _REPORT_SECONDS)
        except (RayError, TimeoutError):
            self._metrics.failures.labels(what).inc()


class _Health:
    """Asks gRPC health services, over one kept channel per address."""

    def __init__(self, credentials: Credentials) -> None:
        self._credentials = credentials
        self._channels: dict[str, grpc.aio.Channel] = {}

    async def check(self, address: str) -> None:
        """Return when the server at `address` answers; raises `Unreachable` when it does not."""
        channel = self._channels.get(address)
        if channel is None:
            channel = self._channels[address] = open_channel(address, self._credentials)
        try:
            stub = health_pb2_grpc.HealthStub(channel)
            await stub.Check(health_pb2.HealthCheckRequest(), timeout=_HEALTH_SECONDS)
        except grpc.aio.AioRpcError as failure:
            del self._channels[address]
            await channel.close(None)
            raise error_from(failure) from failure


async def _answer(reference: Any, seconds: float) -> Any:
    async with asyncio.timeout(seconds):
        return await reference
