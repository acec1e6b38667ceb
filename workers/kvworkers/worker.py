"""A worker: one model on one device, served over gRPC. Ray is not needed for it.

    python -m kvworkers.worker --model PATH --node RUN_DIR

starts one and prints a ready line. The Ray actor of a cluster is a thin shell over `WorkerServer`.
"""

import asyncio
import contextlib
import json
import logging
import os
import secrets
import signal
import sys
import threading
import time
from pathlib import Path
from typing import Final

import click
import torch
from prometheus_client import CollectorRegistry

from kvstore.client import AsyncClient, ClientConfig
from kvstore.core.errors import BadInput, KvStoreError, Unreachable
from kvstore.core.heap import settle_heap
from kvstore.core.limits import BLOCK_TOKENS
from kvstore.core.names import Fidelity, Root, derive_root, pack_tokens
from kvstore.directory.events import TierKind, WorkerRole
from kvstore.directory.policies import make_policy
from kvstore.directory.publisher import Publisher
from kvstore.observe.metrics import ClientMetrics, WorkerMetrics
from kvstore.observe.tracing import start_tracing
from kvstore.rpc.channel import listen, make_server
from kvstore.rpc.event_writers import written_to_redis
from kvstore.rpc.gate import gate_of
from kvstore.rpc.metrics_port import serve_metrics
from kvstore.rpc.security import load_security
from kvstore.rpc.v1 import worker_pb2_grpc
from kvworkers.engine.cache import StoreConfig, StoreLink
from kvworkers.engine.engine import Engine
from kvworkers.engine.report import Reporter
from kvworkers.engine.sampling import SamplingParams
from kvworkers.engine.scheduler import Scheduler, SchedulerConfig
from kvworkers.engine.sequence import Request
from kvworkers.models.loading import LoadedModel
from kvworkers.pages.pool import PagePool
from kvworkers.ranks.gathering import Launcher
from kvworkers.ranks.holding import Held, hold
from kvworkers.stream.mover import Mover
from kvworkers.worker_config import WorkerConfig
from kvworkers.worker_service import SERVICE_NAME, WorkerIdentity, WorkerService, WorkerState

_log = logging.getLogger(__name__)

_WARM_UP_TOKENS: Final = 64
_LAST_STORES_MS: Final = 1_000
_RECONNECT_FIRST_S: Final = 0.1
_RECONNECT_MOST_S: Final = 2.0
_END_S: Final = 10.0
"""How long a worker that is broken may take to end in good order."""


class WorkerServer:
    """A running worker. `start` returns when it serves; one event loop owns it."""

    def __init__(self, config: WorkerConfig, launcher: Launcher | None = None) -> None:
        """`launcher` starts the other ranks of a tensor-parallel one; None: as processes."""
        self.config = config
        self.registry = CollectorRegistry()
        self.address = ""
        """Where gRPC is served, once started."""
        self.metrics_address = ""
        self.model_name = ""
        self.incarnation = config.incarnation or time.time_ns() // 1_000_000
        self._metrics = WorkerMetrics(self.registry)
        self._client_metrics = ClientMetrics(self.registry)
        self._local_root = derive_root(secrets.token_bytes(32), bytes(32), config.share_domain)
        self._client: AsyncClient | None = None
        self._link: StoreLink | None = None
        self._stack = contextlib.AsyncExitStack()
        self._engine: Engine | None = None
        self._launcher = launcher
        self._held: Held | None = None
        self._why_lost = ""

    @property
    def broken(self) -> asyncio.Event:
        """Set when steps fail one after another or a rank is lost: end the process."""
        assert self._engine is not None, "not started"
        return self._engine.broken

    async def start(self) -> None:
        """Load, connect, warm up, then serve. On an error everything begun is undone."""
        try:
            await self._start()
        except BaseException:
            await self._stack.aclose()
            raise

    async def stop(self) -> None:
        """Drain for `drain_ms`, then end everything. Harmless when repeated."""
        await self._stack.aclose()

    async def drain(self, *, drain_ms: int) -> None:
        """Refuse new requests and let running ones finish for so long; `stop` ends the rest."""
        assert self._engine is not None, "not started"
        await self._engine.stop(drain_ms=drain_ms)

    async def settled(self, *, deadline_ms: int) -> bool:
        """Wait until everything computed so far was given to the store; False at the deadline."""
        return self._link is None or await self._link.drained(deadline_ms=deadline_ms)

    async def _start(self) -> None:
        config = self.config
        held = self._held = await hold(config, self._launcher, self._lost)
        self._stack.push_async_callback(held.close)
        model, pages, mover, spec = held.model, held.pages, held.mover, held.model.spec
        self.model_name = spec.name
        self._metrics.reachable_arena_bytes.set_function(lambda: mover.reachable_bytes)
        self._stack.push_async_callback(self._leave_node, mover)
        await self._join_node(model, mover)
        host = config.host or (self._client.node if self._client else config.name)
        policy = make_policy(config.policy)
        pool = PagePool(pages.count, block_bytes=spec.layout.block_bytes, policy=policy)
        publisher = Publisher(config.name, self.incarnation, [TierKind.HBM], pool, host=host)
        engine = self._engine = self._new_engine(model, pages.view, pool, publisher)
        if self._why_lost:
            raise Unreachable(self._why_lost)
        engine.start()
        self._stack.push_async_callback(engine.stop, drain_ms=config.drain_ms)
        await _warm_up(engine, spec.max_model_tokens)
        identity = WorkerIdentity(
            name=config.name,
            incarnation=self.incarnation,
            host=host,
            share_domain=config.share_domain,
            device=str(model.device),
            role=WorkerRole(config.role),
        )
        tracing = start_tracing(config.trace, service="kvstore-worker", name=config.name)
        self._stack.push_async_callback(asyncio.to_thread, tracing.close)
        tokens = pages.count * BLOCK_TOKENS
        late = self._metrics.store_failures.labels("hand_over", "late").inc
        await self._serve(
            WorkerState(
                identity, spec, engine, publisher,
                capacity_tokens=tokens, tracing=tracing, late=late,
            )
        )  # fmt: skip
        await self._stack.enter_async_context(
            written_to_redis(publisher, config.events_redis, self.registry)
        )

    def _new_engine(
        self, model: LoadedModel, view: torch.Tensor, pool: PagePool, publisher: Publisher
    ) -> Engine:
        config = self.config
        bounds = SchedulerConfig(
            max_model_tokens=model.spec.max_model_tokens,
            step_tokens=config.step_tokens,
            max_running=config.max_running,
            max_waiting=config.max_waiting,
            overcommit=config.overcommit,
        )
        return Engine(
            model,
            view,
            pool,
            Scheduler(bounds, pool),
            Reporter(publisher, self._metrics, WorkerRole(config.role)),
            root=self._root,
            store=lambda: self._link,
        )

    async def _serve(self, state: WorkerState) -> None:
        security = load_security(self.config.security)
        port = serve_metrics("metrics", self.config.metrics, self.registry, security)
        self._stack.push_async_callback(asyncio.to_thread, port.close)
        self.metrics_address = port.address
        server, health = make_server(gate=gate_of(security, self.registry))
        worker_pb2_grpc.add_WorkerServicer_to_server(WorkerService(state), server)
        self.address = listen(server, self.config.listen, security)
        await server.start()
        self._stack.push_async_callback(server.stop, 1.0)
        # Draining comes before the server's end, so running streams reach their callers.
        self._stack.push_async_callback(state.engine.stop, drain_ms=self.config.drain_ms)
        serving = health_status("SERVING")
        for name in ("", SERVICE_NAME):
            await health.set(name, serving)
        self._stack.push_async_callback(health.enter_graceful_shutdown)

    def _root(self) -> Root:
        """Return the node's root, or one of our own while there was never a node."""
        return self._client.root if self._client is not None else self._local_root

    def _lost(self, why: str) -> None:
        """Take note that a rank is lost: nothing can be computed without its heads."""
        self._metrics.rank_failures.inc()
        self._why_lost = why
        if self._engine is not None:
            self._engine.broken.set()

    async def _join_node(self, model: LoadedModel, mover: Mover) -> None:
        """Connect to the cache node; when it is away, go on without and keep trying."""
        if not self.config.store or self.config.node is None:
            return
        try:
            await self._connect(model, mover)
        except KvStoreError as error:
            _log.warning("the cache node is away, starting without it: %s", error)
            self._metrics.store_failures.labels("connect", type(error).__name__).inc()
            task = asyncio.create_task(self._keep_connecting(model, mover), name="join-node")
            self._stack.push_async_callback(_cancelled, task)

    async def _keep_connecting(self, model: LoadedModel, mover: Mover) -> None:
        pause = _RECONNECT_FIRST_S
        while self._client is None:
            await asyncio.sleep(pause)
            pause = min(2 * pause, _RECONNECT_MOST_S)
            try:
                await self._connect(model, mover)
            except KvStoreError as error:
                self._metrics.store_failures.labels("connect", type(error).__name__).inc()

    async def _connect(self, model: LoadedModel, mover: Mover) -> None:
        spec = model.spec
        assert self.config.node is not None and self._held is not None
        client = await AsyncClient.connect(
            self.config.node,
            namespace=spec.namespace,
            payload_bytes=model.forms.stored.payload_bytes,
            shares=spec.layout.kv_heads,
            share_domain=self.config.share_domain,
            name=f"{self.config.name} pid {os.getpid()}",
            pids=(os.getpid(), *self._held.pids),
            config=ClientConfig(),
            metrics=self._client_metrics,
        )
        mover.meet(client.arena, lambda: client.arena_fd)
        self._client = client
        self._link = StoreLink(
            client,
            mover,
            self._metrics,
            config=StoreConfig(
                call_ms=self.config.store_call_ms, swap_bytes=self.config.swap_bytes
            ),
        )

    async def _leave_node(self, mover: Mover) -> None:
        if self._link is not None:
            await self._link.drained(deadline_ms=_LAST_STORES_MS)
            await self._link.close()
        await asyncio.to_thread(mover.close)  # Before the arena it may have registered is unmapped.
        if self._client is not None:
            await self._client.close()


def health_status(name: str) -> int:
    """Return the health protocol's number for a status."""
    from grpc_health.v1 import health_pb2

    return int(health_pb2.HealthCheckResponse.ServingStatus.Value(name))


async def _warm_up(engine: Engine, max_model_tokens: int) -> None:
    """Run one small request through everything, so that no user pays for first calls."""
    count = min(_WARM_UP_TOKENS, max_model_tokens - 2)
    request = Request(
        request_id="warm-up",
        tokens=pack_tokens([1] * count),
        sampling=SamplingParams(max_tokens=2, ignore_eos=True),
        no_store=True,
        no_read=True,
    )
    async with contextlib.aclosing(engine.generate(request)) as outputs:
        async for _ in outputs:
            pass
    # First calls cost many times what later ones do. A worker that published that as its rate
    # would look slow to routers, be sent nothing, and so never measure better.
    engine.forget_rates()


async def _cancelled(task: "asyncio.Task[None]") -> None:
    task.cancel()
    await asyncio.gather(task, return_exceptions=True)


@click.command()
@click.option("--model", help="Hugging Face directory or GGUF file; default: SmolLM2-135M.")
@click.option("--node", help="Run directory of this host's cache node; without it, no store.")
@click.option("--listen", default="127.0.0.1:0", show_default=True, help="Where to serve gRPC.")
@click.option("--metrics", default="127.0.0.1:0", show_default=True, help="Prometheus metrics.")
@click.option("--name", default="worker-0", show_default=True)
@click.option("--security", type=click.Path(path_type=Path), help="Who may connect, as TOML.")
@click.option("--role", type=click.Choice([role.value for role in WorkerRole]), default="both",
              show_default=True, help="What it is there for: docs/worker.md.")  # fmt: skip
@click.option("--host", default="", help="Who shares an arena; default: the node's name.")
@click.option("--device", default="auto", show_default=True, help="cpu, cuda, cuda:N or auto.")
@click.option("--pool-bytes", type=int, help="Bytes of pages; default: as there is room.")
@click.option("--fidelity", type=click.Choice([f.value for f in Fidelity]), default="exact",
              show_default=True, help="How exactly its store keeps K and V.")  # fmt: skip
@click.option("--tensor-parallel", default=1, show_default=True, help="Devices of this worker.")
@click.option(
    "--rank-deadline-ms",
    default=30_000,
    show_default=True,
    help="How long a device may take for a step before all end.",
)
@click.option("--threads", type=int, help="Compute threads; default: torch's choice.")
@click.option("--no-store", is_flag=True, help="Do not use the cache node.")
@click.option("--store-call-ms", default=250, show_default=True, help="Patience with the node.")
@click.option("--share-domain", default="default", show_default=True)
@click.option("--events-redis", default="", metavar="URL", help="Redis to write events to.")
@click.option("--step-tokens", default=512, show_default=True, help="Tokens of one step.")
@click.option("--max-running", default=16, show_default=True, help="Requests in the batch.")
@click.option("--overcommit/--no-overcommit", default=True, show_default=True,
              help="Admit by what replies are expected to be, not by all they may.")  # fmt: skip
@click.option("--swap-bytes", type=int, help="Arena for requests that make way; default: as the "
              "node allows; 0: none.")  # fmt: skip
@click.option("--trace", default="", help="Send spans to this OTLP collector: http://HOST:PORT.")
@click.option("--incarnation", default=0, help="Number of this start; default: the clock.")
@click.option("--drain-ms", default=5_000, show_default=True, help="For running requests at end.")
@click.option("--json", "as_json", is_flag=True, help="Print the ready line as JSON.")
def main(*, no_store: bool, as_json: bool, **options: object) -> None:
    """Serve one model on this machine until SIGTERM or Ctrl-C."""
    logging.basicConfig(level=logging.INFO, stream=sys.stderr)
    try:
        config = WorkerConfig(store=not no_store, **options)  # type: ignore[arg-type]
        status = asyncio.run(_serve_until_told(config, as_json=as_json))
    except KvStoreError as error:
        click.echo(f"worker: {error}", err=True)
        sys.exit(2 if isinstance(error, BadInput) else 1)
    sys.exit(status)


async def _serve_until_told(config: WorkerConfig, *, as_json: bool) -> int:
    told = asyncio.Event()
    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, told.set)
    server = WorkerServer(config)
    await server.start()
    settle_heap()
    ready = {
        "worker": config.name,
        "address": server.address,
        "metrics": server.metrics_address,
        "pid": os.getpid(),
    }
    text = json.dumps(ready) if as_json else f"{config.name} serves on {server.address}"
    click.echo(text)
    sys.stdout.flush()
    waits = [asyncio.create_task(event.wait()) for event in (told, server.broken)]
    await asyncio.wait(waits, return_when=asyncio.FIRST_COMPLETED)
    for task in waits:
        task.cancel()
    status = 1 if server.broken.is_set() else 0
    if status:
        # Threads may wait for a device or a rank that never answers: that must not hold up the end.
        timer = threading.Timer(_END_S, os._exit, [status])
        timer.daemon = True
        timer.start()
    await server.stop()
    return status


if __name__ == "__main__":
    main()
