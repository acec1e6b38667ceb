"""One process that serves users: HTTP and gRPC over one pipeline, with the router inside."""

import asyncio
import socket
import time
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

import uvicorn
from fastapi import FastAPI
from grpc_health.v1 import health_pb2
from prometheus_client import CollectorRegistry

from kvstore.core.errors import BadInput
from kvstore.directory.view import Health
from kvstore.observe.metrics import RouterMetrics, exposition
from kvstore.observe.tracing import start_tracing
from kvstore.router.members import Member, Members
from kvstore.router.router import Router, RouterConfig
from kvstore.rpc.channel import listen, make_server
from kvstore.rpc.credentials import Credentials, ssl_context
from kvstore.rpc.gate import gate_of
from kvstore.rpc.security import check_listen, load_security
from kvstore.rpc.v1 import inference_pb2_grpc
from kvworkers.frontends.console import Console, add_console, is_loopback_address
from kvworkers.frontends.door import Door
from kvworkers.frontends.fleet import Fleet
from kvworkers.frontends.grpc_frontend import InferenceServicer
from kvworkers.frontends.openai.app import make_app
from kvworkers.frontends.pipeline import Pipeline, PipelineConfig
from kvworkers.frontends.tokenizer import ChatTokenizer

_CUT_SECONDS: Final = 3.0
"""How long the HTTP server may take to cut off what still runs and to end."""


@dataclass(frozen=True, slots=True, kw_only=True)
class FrontendConfig:
    """Where to listen, whose tokenizer to use, and the bounds of what is inside."""

    model: Path | str
    """A model directory: only its tokenizer and chat template are read here."""
    http: str = "127.0.0.1:0"
    grpc: str = "127.0.0.1:0"
    security: Path | None = None
    """Who may connect: docs/security.md; None: loopback only."""
    trace: str = ""
    """Where spans go: `http://HOST:PORT` of an OTLP collector; empty: nowhere."""
    max_body_bytes: int = 8 << 20
    """Of an HTTP request: a conversation of a million tokens has about 5 MB."""
    drain_ms: int = 2_000
    """How long `stop` lets requests go on that run already."""
    pipeline: PipelineConfig = field(default_factory=PipelineConfig)
    router: RouterConfig = field(default_factory=RouterConfig)

    def __post_init__(self) -> None:
        security = load_security(self.security)
        for name in ("http", "grpc"):
            check_listen(f"frontend {name}", str(getattr(self, name)), security)
        if self.max_body_bytes <= 0 or self.drain_ms < 0:
            raise BadInput("frontend max_body_bytes must be positive, drain_ms not negative")


class _Uvicorn(uvicorn.Server):  # type: ignore[misc]
    """Leaves signals to the process that owns the loop."""

    @contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield


class FrontendServer:
    """Serves between `start` and `stop`.

    Construction reads the tokenizer, which takes seconds: do it in a thread.
    """

    def __init__(self, config: FrontendConfig) -> None:
        self._config = config
        self._tokenizer = ChatTokenizer(Path(config.model))
        self.registry = CollectorRegistry()
        self._metrics = RouterMetrics(self.registry)
        self._door = Door(self._metrics)
        self._security = load_security(config.security)
        self._gate = gate_of(self._security, self.registry)
        self._tracing = start_tracing(config.trace, service="kvstore-frontend", name="frontend")
        self.http_address = ""
        """`host:port`, once started."""
        self.grpc_address = ""
        self._started = False

    async def start(self) -> None:
        """Listen on both ports. Raises `BadInput` naming an address that cannot be bound."""
        config = self._config
        created = int(time.time())
        credentials = Credentials.of(self._security)
        self._router = Router(
            metrics=self._metrics,
            config=config.router,
            credentials=credentials,
        )
        self._fleet = Fleet(config.pipeline.share_domain, credentials)
        pipeline = Pipeline(
            config=config.pipeline,
            tokenizer=self._tokenizer,
            router=self._router,
            fleet=self._fleet,
            metrics=self._metrics,
            tracing=self._tracing,
        )
        listening = _bind(config.http)
        self._server, self._health = make_server(gate=self._gate)
        apart = self._security.authenticates
        servicer = InferenceServicer(
            pipeline, created=created, identity=self._gate.identity, apart=apart, door=self._door
        )
        inference_pb2_grpc.add_InferenceServicer_to_server(servicer, self._server)
        try:
            self.grpc_address = listen(self._server, config.grpc, self._security)
        except BadInput:
            listening.close()
            raise
        await self._server.start()
        await self._health.set("", health_pb2.HealthCheckResponse.SERVING)
        app = make_app(
            pipeline,
            metrics=exposition(self.registry),
            ready=self.ready,
            max_body_bytes=config.max_body_bytes,
            created=created,
            gate=self._gate,
            apart=apart,
            door=self._door,
        )
        console = Console(pipeline, self._router)
        add_console(app, console, loopback_only=is_loopback_address(config.http))
        self._history_task = asyncio.create_task(console.run(), name="console history")
        await self._start_http(app, listening)

    def ready(self) -> bool:
        """Say whether any worker could take a request now."""
        offers = self._fleet.offers().values()
        return any(self.worker_ready(worker) for offer in offers for worker in offer.workers)

    def worker_ready(self, worker: str) -> bool:
        """Say whether a worker is alive and has said what it serves."""
        return self._fleet.knows(worker) and self._router.health(worker) is Health.LIVE

    async def set_members(self, members: list[Member]) -> None:
        """Serve with these workers and nodes from now on."""
        listed = Members.of(members)
        self._router.set_members(listed)
        self._fleet.set_members(listed)

    async def drain(self, *, drain_ms: int) -> bool:
        """Refuse new requests, and wait so long at most until those that run have ended.

        Health probes say so from now on, metrics and console go on. Returns whether all ended.
        """
        self._door.close()
        if self._started:
            await self._health.set("", health_pb2.HealthCheckResponse.NOT_SERVING)
        return await self._door.emptied(drain_ms)

    async def stop(self, *, drain_ms: int | None = None) -> None:
        """Drain for `drain_ms` (None: as configured), stop listening, cut off what still runs."""
        if not self._started:
            return
        await self.drain(drain_ms=self._config.drain_ms if drain_ms is None else drain_ms)
        self._started = False
        self._http.should_exit = True
        self._history_task.cancel()
        await asyncio.gather(self._history_task, return_exceptions=True)
        await self._server.stop(None)
        try:
            async with asyncio.timeout(_CUT_SECONDS):
                await asyncio.shield(self._http_task)
        except TimeoutError:
            self._http.force_exit = True
            self._http_task.cancel()
            await asyncio.gather(self._http_task, return_exceptions=True)
        await self._router.close()
        await self._fleet.close()
        await asyncio.to_thread(self._tracing.close)

    async def _start_http(self, app: FastAPI, listening: socket.socket) -> None:
        settings = uvicorn.Config(
            app,
            loop="none",
            lifespan="off",
            ws="none",
            log_level="warning",
            access_log=False,
            timeout_graceful_shutdown=1,  # what may end by itself has ended in `drain`
        )
        settings.load()
        settings.ssl = ssl_context(self._security)
        self._http = _Uvicorn(settings)
        self._http_task = asyncio.create_task(
            self._http.serve(sockets=[listening]), name="http server"
        )
        host, port = listening.getsockname()[:2]
        self.http_address = f"{host}:{port}"
        self._started = True


@asynccontextmanager
async def serving(config: FrontendConfig) -> AsyncIterator[FrontendServer]:
    """Run a frontend for the length of a block."""
    server = await asyncio.to_thread(FrontendServer, config)
    await server.start()
    try:
        yield server
    finally:
        await server.stop()


def _bind(address: str) -> socket.socket:
    """Return a listening TCP socket; raises `BadInput` naming an address that is taken."""
    host, _, port = address.rpartition(":")
    listening = socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET)
    listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listening.bind((host.strip("[]"), int(port)))
        # Listening already: a client may connect the moment the address is known.
        listening.listen(2_048)
    except OSError as error:
        listening.close()
        raise BadInput(f"cannot listen on {address}: {error}") from error
    return listening
