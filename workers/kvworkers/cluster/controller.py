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
from prometheus_client import CollectorRegistry, start_http_server

from kvstore.core.errors import KvStoreError
from kvstore.observe.metrics import ClusterMetrics
from kvstore.rpc.channel import open_channel
from kvstore.rpc.errors import error_from
from kvworkers.cluster.config import ClusterConfig
from kvworkers.cluster.parts import SHELLS
from kvworkers.cluster.plan import (
    Action,
    MemberList,
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

_log = logging.getLogger(__name__)

_POLL_SECONDS: Final = 0.25
"""Between two rounds. A restarted worker is noticed within one round and a report's deadline."""

_REPORT_SECONDS: Final = 5.0
"""Deadline of one report; a part may be importing an engine and answer late."""

_HEALTH_SECONDS: Final = 2.0

_STOP_SECONDS: Final = 10.0

_PLACE_SECONDS: Final = 60.0
"""How long the placement group may wait for its bundles before the cluster gives up."""


@dataclass(frozen=True, slots=True)
class Status:
    """What the controller knows, for people and for `up`'s progress."""

    parts: tuple[Report, ...]
    ready: bool
    hopeless: str
    members_version: int
    metrics: str = ""
    """Where the controller's own metrics are served."""


class Controller:
    """Keeps the parts of one cluster alive. Every method may be called again after a restart."""

    def __init__(self, config: ClusterConfig) -> None:
        self._config = config
        self._parts: dict[str, Part] = {}
        self._actors: dict[str, Any] = {}
        self._members = MemberList()
        registry = CollectorRegistry()
        self._metrics = ClusterMetrics(registry)
        server, _ = start_http_server(0, addr="127.0.0.1", registry=registry)
        self._metrics_address = f"127.0.0.1:{server.server_port}"
        self._busy: dict[str, asyncio.Task[None]] = {}
        self._loop_task: asyncio.Task[None] | None = None
        self._fault = ""
        self._health = _Health()
        self._hosts: dict[str, str] = {}
        """Ray's node id → our name of the host, which is its cache node's name."""

    async def status(self) -> Status:
        """Return what is known now; the first call after a (re)start sets the loop going."""
        if self._loop_task is None:
            self._loop_task = asyncio.create_task(self._run(), name="controller")
        return Status(
            parts=tuple(part.report for part in self._parts.values() if part.report is not None),
            ready=bool(self._parts) and ready(self._parts.values(), self._members),
            hopeless=self._fault or hopeless(self._parts.values()),
            members_version=self._members.version,
            metrics=self._metrics_address,
        )

    async def stop(self) -> None:
        """End all parts in good order: frontends first, so that nothing new comes in."""
        if self._loop_task is not None:
            self._loop_task.cancel()
        for task in self._busy.values():
            task.cancel()
        for role in (Role.FRONTEND, Role.WORKER, Role.NODE):
            actors = [self._actors[p.name] for p in self._parts.values() if p.role is role]
            await asyncio.gather(*(self._end(actor) for actor in actors))

    async def _end(self, actor: Any) -> None:
        from ray.exceptions import RayError

        try:
            await _answer(actor.stop.remote(), _STOP_SECONDS)
        except (RayError, TimeoutError):
            self._metrics.failures.labels("stop").inc()

    async def _run(self) -> None:
        try:
            await self._place()
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
        await asyncio.gather(*(self._hear(part) for part in self._parts.values()))
        now_ms = _now_ms()
        self._members = next_members(self._members, self._parts.values())
        self._count()
        for action in next_actions(self._parts, self._members, now_ms=now_ms):
            self._begin(action)

    def _count(self) -> None:
        self._metrics.members_version.set(self._members.version)
        standing = Counter(
            (part.role, part.report.phase) for part in self._parts.values() if part.report
        )
        for role in Role:
            for phase in Phase:
                self._metrics.parts.labels(role, phase).set(standing[role, phase])

    async def _place(self) -> None:
        """Make (or after a restart find) one node per host, the workers and a frontend."""
        import ray
        from ray.util.scheduling_strategies import (
            NodeAffinitySchedulingStrategy,
            PlacementGroupSchedulingStrategy,
        )

        hosts = sorted(node["NodeID"] for node in ray.nodes() if node["Alive"])
        for index, ray_node in enumerate(hosts):
            name = self._hosts[ray_node] = f"node-{index}"
            self._add(name, Role.NODE, NodeAffinitySchedulingStrategy(ray_node, soft=False))
        device = {"GPU": 1} if ray.cluster_resources().get("GPU", 0) >= 1 else {"CPU": 1}
        group = await self._placement_group(device)
        for index in range(self._config.workers):
            place = PlacementGroupSchedulingStrategy(group, placement_group_bundle_index=index)
            self._add(f"worker-{index}", Role.WORKER, place, **device)
        self._add("frontend-0", Role.FRONTEND, "DEFAULT")

    async def _placement_group(self, device: dict[str, int]) -> Any:
        from ray.util.placement_group import get_placement_group, placement_group

        try:
            group = get_placement_group("workers")
        except ValueError:  # the first life of this controller
            bundles = [dict[str, float](device) for _ in range(self._config.workers)]
            group = placement_group(bundles, strategy="SPREAD", name="workers", lifetime="detached")
        await _answer(group.ready(), _PLACE_SECONDS)
        return group

    def _add(self, name: str, role: Role, place: Any, *, CPU: float = 0, GPU: float = 0) -> None:
        import ray

        self._parts[name] = Part(name=name, role=role, heard_ms=_now_ms())
        self._actors[name] = (
            ray.remote(SHELLS[role])
            .options(
                name=name,
                lifetime="detached",  # lives on when the controller dies
                get_if_exists=True,
                max_restarts=-1,
                max_task_retries=0,
                num_cpus=CPU,
                num_gpus=GPU,
                scheduling_strategy=place,
            )
            .remote(name, self._config)
        )

    async def _hear(self, part: Part) -> None:
        """Take in a part's report, and its gRPC health where it says that it serves."""
        from ray.exceptions import RayActorError, RayError

        reference = self._actors[part.name].report.remote()
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
            part.hear(report, now_ms=_now_ms())
            self._metrics.restarts.labels(part.name).inc(part.restarts - before)

    def _begin(self, action: Action) -> None:
        """Carry an action out beside the loop, one at a time per part."""
        if (running := self._busy.get(action.name)) is not None and not running.done():
            return
        self._parts[action.name].told_ms = _now_ms()
        self._busy[action.name] = asyncio.create_task(self._carry_out(action), name=action.name)

    async def _carry_out(self, action: Action) -> None:
        import ray

        part, actor = self._parts[action.name], self._actors[action.name]
        match action:
            case Start():
                report = part.report
                host = self._hosts.get(report.ray_node, "") if report is not None else ""
                await self._told("start", actor.start.remote(action.incarnation, host))
            case Push():
                await self._told("push", actor.set_members.remote(self._members))
            case Restart():
                self._metrics.failures.labels("hung").inc()
                part.heard_ms = _now_ms()
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

    def __init__(self) -> None:
        self._channels: dict[str, grpc.aio.Channel] = {}

    async def check(self, address: str) -> None:
        """Return when the server at `address` answers; raises `Unreachable` when it does not."""
        channel = self._channels.get(address)
        if channel is None:
            channel = self._channels[address] = open_channel(address)
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


def _now_ms() -> int:
    return time.time_ns() // 1_000_000
