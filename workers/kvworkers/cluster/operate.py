"""Carries out an operator's orders on a running cluster, so that no request fails by them.

drain: off the member list ─▶ frontends know ─▶ workers finish what runs ─▶ parts end
                                                   │ at the deadline: the frontends go on
                                                   └ elsewhere with the tokens so far
"""

import asyncio
import time
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from typing import Any, Final

from kvstore.core.errors import BadInput, NotFound, Refused, Unreachable
from kvstore.observe.metrics import ClusterMetrics
from kvstore.rpc.interceptors import Context
from kvstore.rpc.v1 import cluster_pb2, cluster_pb2_grpc
from kvworkers.cluster.config import MAX_WORKERS
from kvworkers.cluster.plan import Part, Phase, Report, Role, heard_of
from kvworkers.cluster.stage import Stage, frontend_beside

POLL_SECONDS: Final = 0.1
HEARD_SECONDS: Final = 30.0
"""By then every frontend has the new member list, or it is away and has none."""
SERVING_SECONDS: Final = 240.0
"""A restarted worker loads its model."""
_SLACK_SECONDS: Final = 10.0


class Operator:
    """Does one order at a time."""

    def __init__(self, stage: Stage, metrics: ClusterMetrics) -> None:
        self._stage = stage
        self._metrics = metrics
        self.order = ""
        """What is being carried out, for people; empty: nothing."""

    async def drain(self, node: str) -> list[str]:
        """Take a host out of service; returns the parts that ended."""
        async with self._doing(f"drain {node}"):
            orders = self._stage.orders.without_host(node)  # raises before anything is touched
            workers = self._stage.on_host(node, self._stage.of(Role.WORKER))
            if len(workers) == len(self._stage.of(Role.WORKER)):
                raise BadInput(f"{node} runs every worker: scale or add a host first")
            await self._stage.follow(orders)
            own = frontend_beside(node)
            frontends = [] if self._stage.config.frontends else [own]
            await self._empty([*workers, node])
            for name in frontends:  # last: what it was streaming went on elsewhere meanwhile
                await self._finish(name)
            await self._stage.drop(*workers, node, *frontends)
            return [*workers, node, *frontends]

    async def scale(self, workers: int) -> list[str]:
        """Change the number of workers; returns those that came or went."""
        if not 1 <= workers <= MAX_WORKERS:
            raise BadInput(f"workers {workers}: must lie in 1..{MAX_WORKERS}")
        async with self._doing(f"scale to {workers}"):
            more = workers - len(self._stage.orders.workers)
            if more >= 0:
                added = await self._stage.add_workers(more) if more else []
                await self._serving(added)
                return added
            leaving = self._stage.orders.last_workers(-more)
            await self._empty(leaving)
            await self._stage.drop(*leaving)
            return leaving

    async def restart(self, names: Sequence[str]) -> list[str]:
        """Restart parts one at a time; returns them."""
        for name in names:
            if name not in self._stage.parts:
                raise NotFound(f"there is no part {name!r}")
        async with self._doing("restart"):
            chosen = list(names) or self._in_turn()
            for name in chosen:
                await self._empty([name])
                await self._stage.renew(name)
                await self._serving([name])
            return chosen

    def _in_turn(self) -> list[str]:
        """Return every part that others stand in for: all but a frontend that is the only one."""
        frontends = self._stage.of(Role.FRONTEND)
        others = frontends if len(frontends) > 1 else []
        return [*self._stage.of(Role.WORKER), *self._stage.of(Role.NODE), *others]

    async def _empty(self, names: Sequence[str]) -> None:
        """Take parts off the member list and let them finish, workers before nodes."""
        for name in names:
            self._stage.parts[name].leaving = True
        version = self._stage.members.version
        await self._until(
            lambda: (
                (self._stage.members.version > version or not self._listed(names))
                and heard_of(self._stage.parts.values(), self._stage.members)
            ),
            HEARD_SECONDS,
        )
        workers = [name for name in names if self._stage.parts[name].role is Role.WORKER]
        await asyncio.gather(*(self._finish(name) for name in workers))
        for name in names:
            if name not in workers:  # its workers have given back what they held
                await self._finish(name)

    def _listed(self, names: Sequence[str]) -> bool:
        return any(report.name in names for report in self._stage.members.members)

    async def _finish(self, name: str) -> None:
        """Let a part end what it runs. One that does not answer has nothing to finish."""
        from ray.exceptions import RayError

        part, actor = self._stage.parts[name], self._stage.actors[name]
        drain_ms = self._stage.config.drain_ms
        try:
            async with asyncio.timeout(drain_ms / 1_000 + _SLACK_SECONDS):
                if part.role is Role.NODE:
                    await actor.stop.remote()
                else:
                    await actor.drain.remote(drain_ms)
        except (RayError, TimeoutError):
            self._metrics.failures.labels("drain").inc()

    async def _serving(self, names: Sequence[str]) -> None:
        """Wait until parts serve and every frontend knows; raises `Unreachable` otherwise."""

        def serve() -> bool:
            parts = [self._stage.parts[name] for name in names]
            listed = {report.name for report in self._stage.members.members}
            return (
                all(p.report is not None and serves(p.report) for p in parts)
                and listed >= {part.name for part in parts if part.role is not Role.FRONTEND}
                and heard_of(self._stage.parts.values(), self._stage.members)
            )

        if not await self._until(serve, SERVING_SECONDS):
            raise Unreachable(f"{', '.join(names)} did not serve in {SERVING_SECONDS:.0f} s")

    async def _until(self, condition: Callable[[], bool], seconds: float) -> bool:
        """Wait for what the controller's rounds bring about; says whether it came."""
        ends = time.monotonic() + seconds
        while not condition():
            if time.monotonic() >= ends:
                return False
            await asyncio.sleep(POLL_SECONDS)
        return True

    @asynccontextmanager
    async def _doing(self, what: str) -> AsyncIterator[None]:
        if self.order:
            raise Refused(f"the cluster is busy: {self.order}", 5_000)
        self.order = what
        try:
            yield
        finally:
            self.order = ""
            for part in self._stage.parts.values():
                part.leaving = False  # an order that failed leaves nobody out


class ClusterService(cluster_pb2_grpc.ClusterServicer):  # type: ignore[misc]
    """The gRPC face of the operator. An order outlives the call that gave it."""

    def __init__(
        self,
        stage: Stage,
        operator: Operator,
        *,
        ready: Callable[[], bool],
        hopeless: Callable[[], str],
        metrics: str = "",
    ) -> None:
        self._metrics = metrics
        self._stage = stage
        self._operator = operator
        self._ready = ready
        self._hopeless = hopeless
        self._running: set[asyncio.Task[list[str]]] = set()

    async def Status(
        self, request: cluster_pb2.StatusRequest, context: Context
    ) -> cluster_pb2.StatusReply:
        """Say where every part stands."""
        return cluster_pb2.StatusReply(
            ready=self._ready(),
            hopeless=self._hopeless(),
            members_version=self._stage.members.version,
            parts=[part_status(part) for part in self._stage.parts.values()],
            order=self._operator.order,
            metrics=self._metrics,
        )

    async def Drain(
        self, request: cluster_pb2.DrainRequest, context: Context
    ) -> cluster_pb2.OrderReply:
        """Take a host out of service."""
        return await self._carried_out(self._operator.drain(request.node))

    async def Scale(
        self, request: cluster_pb2.ScaleRequest, context: Context
    ) -> cluster_pb2.OrderReply:
        """Change the number of workers."""
        return await self._carried_out(self._operator.scale(request.workers))

    async def Restart(
        self, request: cluster_pb2.RestartRequest, context: Context
    ) -> cluster_pb2.OrderReply:
        """Restart parts in turn."""
        return await self._carried_out(self._operator.restart(list(request.parts)))

    async def _carried_out(self, order: Any) -> cluster_pb2.OrderReply:
        begun = time.monotonic()
        task: asyncio.Task[list[str]] = asyncio.create_task(order)
        self._running.add(task)
        task.add_done_callback(self._running.discard)
        done = await asyncio.shield(task)
        return cluster_pb2.OrderReply(done=done, seconds=time.monotonic() - begun)


def serves(report: Report) -> bool:
    """Say whether a part takes what it is there for."""
    return report.phase is Phase.SERVING and report.usable


def part_status(part: Part) -> cluster_pb2.PartStatus:
    """Return the wire form of what is known of a part."""
    report = part.report
    if report is None:
        return cluster_pb2.PartStatus(name=part.name, role=part.role, phase=Phase.EMPTY)
    return cluster_pb2.PartStatus(
        name=part.name,
        role=part.role,
        phase="leaving" if part.leaving else report.phase,
        host=report.host,
        address=report.address,
        http=report.http,
        metrics=report.metrics,
        pid=report.pid,
        incarnation=report.incarnation,
        restarts=part.restarts,
        detail=report.detail,
        model=report.model,
    )
