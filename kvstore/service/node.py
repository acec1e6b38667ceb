"""The cache node's process: `python -m kvstore.service.node`, started by its keeper only.

It inherits the arena and one end of the control socket. It lives exactly as long as that socket:
when the keeper goes, so does the node. All state is on one event loop; one thread hashes.
"""

import argparse
import asyncio
import contextlib
import ctypes
import logging
import signal
import socket
import sys
import time
from pathlib import Path
from typing import Any, Final

import grpc.aio
from grpc_health.v1 import health_pb2
from prometheus_client import CollectorRegistry

from kvstore.core.errors import BadInput, KvStoreError, Unreachable
from kvstore.core.slots import SlotState
from kvstore.directory.policies import make_policy
from kvstore.observe.metrics import NodeMetrics, PeerMetrics, TierMetrics, exposition
from kvstore.observe.tracing import start_tracing
from kvstore.rpc.channel import listen, make_server
from kvstore.rpc.credentials import Credentials, ssl_context
from kvstore.rpc.event_writers import written_to_redis
from kvstore.rpc.gate import gate_of
from kvstore.rpc.security import load_security
from kvstore.rpc.trace_interceptor import TraceInterceptor
from kvstore.rpc.v1 import cache_pb2_grpc, inspect_pb2_grpc, record_pb2_grpc
from kvstore.service.adopt import adopt
from kvstore.service.below import BelowConfig, BelowDram, NodeParts
from kvstore.service.bulk_port import BulkPort
from kvstore.service.calls import ServiceParts
from kvstore.service.control import Control, Message
from kvstore.service.counting import DomainBytes
from kvstore.service.hashing import Hasher
from kvstore.service.inspection import InspectorService
from kvstore.service.metrics_http import MetricsServer
from kvstore.service.recorder import Recorders, RecorderService
from kvstore.service.remote_sessions import RemoteSessions
from kvstore.service.requests import now_ms
from kvstore.service.scrubbing import Scrubber
from kvstore.service.servicer import CacheNodeService
from kvstore.service.slots import SlotTable
from kvstore.service.store import ArenaStore
from kvstore.service.store_limits import StoreLimits
from kvstore.tiers.quotas import QuotaRule, Quotas
from kvstore.transport.arena import ArenaMapping

HOUSEKEEPING_S: Final = 0.1
_START_DEADLINE_S: Final = 30.0
_PR_SET_PDEATHSIG: Final = 1
_SWITCH_S: Final = 0.0002
_log = logging.getLogger("kvstore.node")


class Node:
    """One incarnation of the node over one arena."""

    def __init__(self, options: argparse.Namespace, control: Control, arena: ArenaMapping) -> None:
        self._options = options
        self._control = control
        self._arena = arena
        arena.incarnation += 1
        self._registry = CollectorRegistry()
        self._metrics = NodeMetrics(self._registry)
        self._metrics.info.labels(options.name).set(1)
        self._metrics.numa_nodes.set(options.numa_nodes)
        self._below_config = BelowConfig(
            nvme=Path(options.nvme) if options.nvme else None,
            nvme_bytes=options.nvme_bytes,
            files=Path(options.files) if options.files else None,
            files_bytes=options.files_bytes,
            peers=Path(options.peers) if options.peers else None,
            policy=options.policy,
        )
        table = SlotTable(
            arena,
            make_policy(options.policy),
            self._metrics,
            node=options.name,
            host=options.name,
            tiers=self._below_config.kinds,
            quotas=Quotas(options.quota),
        )
        limits = StoreLimits(
            lease_ms=options.lease_ms,
            claim_ms=options.claim_ms,
            reserve_quota_bytes=arena.size.data_bytes // 2,
            private_quota_bytes=arena.size.data_bytes // 4,
        )
        # A keeper's death starts incarnations anew; the clock goes on.
        self._store = ArenaStore(table, limits, first_lease=time.time_ns())
        self._hasher = Hasher(self._store, self._metrics)
        self._security = load_security(Path(options.security) if options.security else None)
        self._gate = gate_of(self._security, self._registry, local_sockets=True)
        self._tracing = start_tracing(options.trace, service="kvstore-node", name=options.name)
        self._recorders = Recorders(self._metrics)
        self._peer_metrics = PeerMetrics(self._registry)
        self._tier_metrics = TierMetrics(self._registry)
        self._domain_bytes = DomainBytes(table.quotas, self._tier_metrics)
        self._bulk = BulkPort(table, self._peer_metrics, now_ms)
        self._remote = RemoteSessions(self._store, self._bulk)
        self._below: BelowDram | None = None
        self._adopted = False
        self._ended = asyncio.Event()
        self._started_s = time.monotonic()

    async def run(self) -> None:
        """Serve until the keeper goes away or asks to stop."""
        loop = asyncio.get_running_loop()
        loop.add_signal_handler(signal.SIGTERM, self._ended.set)
        # Ctrl-C goes to the whole foreground group; the keeper decides when the node ends.
        loop.add_signal_handler(signal.SIGINT, lambda: None)
        await asyncio.wait_for(self._until_start(), _START_DEADLINE_S)
        self._adopt()
        parts = NodeParts(
            node=self._options.name,
            store=self._store,
            hasher=self._hasher,
            metrics=self._metrics,
            tier_metrics=self._tier_metrics,
            peer_metrics=self._peer_metrics,
            credentials=Credentials.of(self._security),
        )
        below = self._below = await BelowDram.start(self._below_config, parts)
        loop.add_reader(self._control.fileno(), self._hear)
        tasks = [
            asyncio.create_task(self._hasher.run(), name="hash"),
            asyncio.create_task(self._keep_house(), name="housekeeping"),
            asyncio.create_task(self._scrubbed(), name="scrub"),
            asyncio.create_task(self._ended.wait(), name="ended"),
        ]
        traced = [TraceInterceptor(self._tracing)] if self._tracing.on else ()
        server, health = make_server(gate=self._gate, interceptors=traced)
        metrics = MetricsServer(exposition(self._registry))
        try:
            self._add_services(server, below)
            listen(server, self._options.rpc)
            bound = listen(server, self._options.listen, self._security)
            metrics_bound = await metrics.start(self._options.metrics, ssl_context(self._security))
            bulk_bound = await self._bulk.start(self._options.bulk, ssl_context(self._security))
            await server.start()
            await health.set("", health_pb2.HealthCheckResponse.SERVING)
            self._say("ready", listen=bound, metrics=metrics_bound, bulk=bulk_bound)
            done = await self._until_one_ends(tasks)
        finally:
            loop.remove_reader(self._control.fileno())
            await server.stop(0.2)
            await self._bulk.stop()
            await below.close()
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
            await metrics.stop()
            await asyncio.to_thread(self._tracing.close)
        for task in done:
            task.result()  # a failed task ends the process: its keeper starts a fresh one

    async def _until_one_ends(self, tasks: list["asyncio.Task[Any]"]) -> "set[asyncio.Task[Any]]":
        publisher, url = self._store.table.publisher, self._options.events_redis
        async with written_to_redis(publisher, url, self._registry):
            done, _ = await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
        return done

    def _add_services(self, server: grpc.aio.Server, below: BelowDram) -> None:
        cache_pb2_grpc.add_CacheNodeServicer_to_server(self._service(below), server)
        record_pb2_grpc.add_RecorderServicer_to_server(
            RecorderService(self._recorders, self._gate.identity), server
        )
        inspect_pb2_grpc.add_InspectorServicer_to_server(
            InspectorService(self._store, below, self._gate.identity), server
        )

    def _service(self, below: BelowDram) -> CacheNodeService:
        return CacheNodeService(
            ServiceParts(
                name=self._options.name,
                cluster_key=Path(self._options.cluster_key_file).read_bytes(),
                store=self._store,
                hasher=self._hasher,
                below=below,
                metrics=self._metrics,
                identity=self._gate.identity,
                recorders=self._recorders,
                bulk=self._bulk,
                remote=self._remote,
                catch_up=self._hear,
                started_s=self._started_s,
            )
        )

    def _adopt(self) -> None:
        found = adopt(self._store, time.monotonic() * 1_000)
        self._adopted = True  # before, it was not known who has reserved slots
        table, sessions = self._store.table, self._store.sessions
        for number in sorted(sessions.numbers()):
            session = sessions.by_number(number)
            if session is not None and session.closed and not session.writes:
                self._say("writers_done", number=number)
        self._hasher.adopt(
            slot for slot, state in enumerate(table.state) if state == SlotState.SEALED
        )
        if any(found):
            _log.info(
                "incarnation %d adopted %d blocks, %d reservations; freed %d slots, %d unreadable",
                self._arena.incarnation, found.sealed, found.reserved, found.freed,
                found.unreadable,
            )  # fmt: skip

    # -- the keeper ------------------------------------------------------------------------

    async def _until_start(self) -> None:
        """Take in the live sessions that the keeper tells before it says start."""
        loop = asyncio.get_running_loop()
        started = asyncio.Event()

        def hear() -> None:
            while not started.is_set() and (message := self._receive()) is not None:
                if message["op"] == "start":
                    started.set()
                    loop.remove_reader(self._control.fileno())
                else:
                    self._obey(message)

        loop.add_reader(self._control.fileno(), hear)
        await started.wait()

    def _hear(self) -> None:
        while (message := self._receive()) is not None:
            self._obey(message)

    def _receive(self) -> Message | None:
        try:
            return self._control.receive()
        except Unreachable:
            # The keeper is gone, and with it the arena's owner and every session.
            self._ended.set()
            with contextlib.suppress(ValueError):
                asyncio.get_running_loop().remove_reader(self._control.fileno())
            return None

    def _obey(self, message: Message) -> None:
        match message["op"]:
            case "sessions":
                for number, token, client, closed in message["sessions"]:
                    self._open(number, token, client, closed=closed)
            case "opened":
                self._open(message["number"], message["token"], message["client"], closed=False)
            case "closed":
                self._close(message["number"], writers_gone=False)
            case "exited":
                self._close(message["number"], writers_gone=True)
            case "ping":
                self._say("pong", n=message["n"])
            case other:
                _log.error("the keeper said %r", other)

    def _open(self, number: int, token: str, client: str, *, closed: bool) -> None:
        # A session granted while this node was being started is told twice.
        if self._store.sessions.by_number(number) is None:
            self._store.sessions.open(number, bytes.fromhex(token), client=client, closed=closed)

    def _close(self, number: int, *, writers_gone: bool) -> None:
        session = self._store.sessions.by_number(number)
        if session is None:
            return
        self._store.close(session, writers_gone=writers_gone)
        if writers_gone:
            self._store.sessions.forget(session)
        elif self._adopted and not session.writes:
            self._say("writers_done", number=number)
        self._hasher.announce()

    def _say(self, operation: str, **fields: Any) -> None:
        try:
            self._control.send(operation, **fields, incarnation=self._arena.incarnation)
        except Unreachable:
            self._ended.set()

    async def _scrubbed(self) -> None:
        """Scrub; a node that is told not to has nothing to end for."""
        rate = self._options.scrub_bytes_per_s
        await Scrubber(self._store.table, self._hasher, rate).run()
        await self._ended.wait()

    # -- housekeeping ----------------------------------------------------------------------

    async def _keep_house(self) -> None:
        while True:
            expired = self._store.expire(now_ms())
            if expired:
                self._metrics.leases_expired.inc(expired)
            ended = self._remote.expire(now_ms())
            if ended:
                self._hasher.announce()
            self._bulk.expire(now_ms())
            self._control_flush()
            self._measure()
            await asyncio.sleep(HOUSEKEEPING_S)

    def _control_flush(self) -> None:
        try:
            self._control.flush()
        except Unreachable:
            self._ended.set()

    def _measure(self) -> None:
        table, metrics = self._store.table, self._metrics
        metrics.sessions.set(len(self._store.sessions))
        self._peer_metrics.remote_sessions.set(len(self._remote))
        metrics.leases.set(len(self._store.leases))
        metrics.used_bytes.labels("dram").set(table.used_bytes)
        metrics.capacity_bytes.labels("dram").set(table.space.data_bytes)
        metrics.queued.labels("seal").set(len(self._store.to_seal))
        metrics.queued.labels("verify").set(self._hasher.unverified)
        metrics.queued.labels("watch").set(table.publisher.subscribers)
        self._measure_space()
        self._domain_bytes.measure()
        if self._below is not None:
            self._below.measure()
        for state in SlotState:
            if state is not SlotState.FREE:
                metrics.slots.labels(state.name.lower()).set(table.counts[state])

    def _measure_space(self) -> None:
        space, pins, metrics = self._store.table.space, self._store.pins, self._metrics
        metrics.pinned_blocks.set(len(pins))
        metrics.pinned_bytes.set(pins.total_bytes)
        free = space.free_bytes
        metrics.free_bytes.labels("extents").set(free)
        metrics.free_bytes.labels("slots").set(space.free_slot_bytes)
        metrics.fragmentation.set(1 - space.largest_free_bytes / free if free else 0.0)


def _parse(arguments: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m kvstore.service.node", description=__doc__)
    parser.add_argument("--arena-fd", type=int, required=True)
    parser.add_argument("--control-fd", type=int, required=True)
    parser.add_argument("--name", required=True)
    parser.add_argument("--rpc", required=True)
    parser.add_argument("--listen", required=True)
    parser.add_argument("--metrics", required=True)
    parser.add_argument("--cluster-key-file", required=True)
    parser.add_argument("--lease-ms", type=int, required=True)
    parser.add_argument("--claim-ms", type=int, required=True)
    parser.add_argument("--policy", required=True)
    parser.add_argument("--scrub-bytes-per-s", type=int, required=True)
    parser.add_argument("--quota", type=QuotaRule.parse, action="append", default=[])
    parser.add_argument("--bulk", required=True)
    parser.add_argument("--peers", default="")
    parser.add_argument("--security", default="")
    parser.add_argument("--trace", default="")
    parser.add_argument("--numa-nodes", type=int, default=0)
    parser.add_argument("--nvme", default="")
    parser.add_argument("--nvme-bytes", type=int, default=0)
    parser.add_argument("--events-redis", default="")
    parser.add_argument("--files", default="")
    parser.add_argument("--files-bytes", type=int, default=0)
    return parser.parse_args(arguments)


def main(arguments: list[str]) -> int:
    """Run one incarnation; the exit status says whether it ended as asked."""
    options = _parse(arguments)
    logging.basicConfig(level=logging.INFO, format=f"[{options.name} node] %(message)s")
    # Even a stopped node must not outlive its keeper: it would hold the arena and its ports.
    ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
    # Threads here hash and read; with Python's 5 ms they would hold up an answer by as much.
    sys.setswitchinterval(_SWITCH_S)
    control = Control(socket.socket(fileno=options.control_fd))
    try:
        arena = ArenaMapping(options.arena_fd, owner=True)
        arena.prefault_soon()
        asyncio.run(_serve(options, control, arena))
    except (KvStoreError, OSError) as error:
        _log.error("%s", error)
        return 2 if isinstance(error, BadInput | OSError) else 1
    return 0


async def _serve(options: argparse.Namespace, control: Control, arena: ArenaMapping) -> None:
    await Node(options, control, arena).run()


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
