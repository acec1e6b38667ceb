"""Serves external processing to a proxy: one stream for each of its HTTP requests."""

import asyncio
from collections.abc import AsyncIterator
from typing import Final

from grpc_health.v1 import health_pb2

from kvstore.adapters.envoy.exchange import Exchange
from kvstore.adapters.envoy.picker import Picker, PickerConfig
from kvstore.adapters.prompts import PromptReader, Tokenizer
from kvstore.core.errors import BadInput
from kvstore.directory.view import Health
from kvstore.observe.pick_metrics import PickMetrics
from kvstore.router.router import Router
from kvstore.router.server import RouterServer
from kvstore.rpc.channel import NO_SECURITY, listen, make_server
from kvstore.rpc.envoy import ext_proc_pb2, ext_proc_pb2_grpc
from kvstore.rpc.interceptors import Context
from kvstore.rpc.security import SecurityConfig

SERVICE: Final = "envoy.service.ext_proc.v3.ExternalProcessor"
READY: Final = ("readiness", SERVICE)
"""Health names that say whether requests can be placed; `liveness` and "" say that it runs."""

_CHECK_S: Final = 0.25
"""How often readiness is looked at: a mark of a publisher comes as often."""

_STATE: Final = health_pb2.HealthCheckResponse


class ExtProcServicer(ext_proc_pb2_grpc.ExternalProcessorServicer):  # type: ignore[misc]
    """`Process` over one picker."""

    def __init__(self, picker: Picker) -> None:
        self._picker = picker

    async def Process(
        self, request_iterator: AsyncIterator[ext_proc_pb2.ProcessingRequest], context: Context
    ) -> AsyncIterator[ext_proc_pb2.ProcessingResponse]:
        """Answer what a proxy tells of one HTTP request, until either side ends."""
        exchange = Exchange(self._picker)
        open_exchanges = self._picker.metrics.exchanges
        open_exchanges.inc()
        try:
            async for message in request_iterator:
                for response in await exchange.hear(message):
                    yield response
                if exchange.over:
                    return
        finally:
            open_exchanges.dec()
            exchange.end()


class ExtProcServer:
    """An endpoint picker beside a router, in the same process and over the same view."""

    def __init__(
        self, beside: RouterServer, config: PickerConfig, tokenizer: Tokenizer | None = None
    ) -> None:
        self._router: Router = beside.router
        self._gate = beside.gate
        metrics = PickMetrics(beside.registry)
        self._picker = Picker(self._router, PromptReader(tokenizer), config, metrics)
        self.address = ""
        """Where it listens, once started."""

    async def start(self, address: str, security: SecurityConfig = NO_SECURITY) -> None:
        """Serve, after the router's start; raises `BadInput` naming a member or the address."""
        for worker in self._router.members.workers():
            if worker.address.startswith("unix:"):
                raise BadInput(f"{worker.name} is at {worker.address}: a proxy needs host:port")
        self._server, self._health = make_server(gate=self._gate)
        ext_proc_pb2_grpc.add_ExternalProcessorServicer_to_server(
            ExtProcServicer(self._picker), self._server
        )
        self.address = listen(self._server, address, security)
        await self._server.start()
        for name in ("", "liveness"):
            await self._health.set(name, _STATE.SERVING)
        await self._say(ready=False)
        self._watch = asyncio.create_task(self._watch_readiness(), name="readiness")

    async def stop(self, *, grace_ms: int = 1_000) -> None:
        """End: exchanges in flight get `grace_ms`."""
        self._watch.cancel()
        await self._health.enter_graceful_shutdown()
        await self._server.stop(grace_ms / 1_000)

    async def _watch_readiness(self) -> None:
        """Say that requests can be placed while any worker is alive."""
        said = False
        while True:
            workers = self._router.members.workers()
            ready = any(self._router.health(one.name) is Health.LIVE for one in workers)
            if ready is not said:
                await self._say(ready=ready)
                said = ready
            await asyncio.sleep(_CHECK_S)

    async def _say(self, *, ready: bool) -> None:
        for name in READY:
            await self._health.set(name, _STATE.SERVING if ready else _STATE.NOT_SERVING)
