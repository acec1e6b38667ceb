"""An engine on a device with a real node beside it, in plain processes, and requests to it."""

import asyncio
import contextlib
import random
import time
from collections.abc import AsyncGenerator, AsyncIterator, Sequence
from dataclasses import dataclass

from prometheus_client import CollectorRegistry

from kvstore.client import AsyncClient, ClientConfig
from kvstore.core.errors import Unreachable
from kvstore.core.limits import BLOCK_TOKENS
from kvstore.core.names import pack_tokens
from kvstore.directory.events import TierKind
from kvstore.directory.policies import DEFAULT_POLICY, make_policy
from kvstore.directory.publisher import Publisher
from kvstore.observe.metrics import WorkerMetrics
from kvstore.testing.node import RunningNode, start_node
from kvworkers.engine.cache import StoreConfig, StoreLink
from kvworkers.engine.engine import Engine
from kvworkers.engine.output import FirstTokens, Output
from kvworkers.engine.report import Reporter
from kvworkers.engine.sampling import SamplingParams
from kvworkers.engine.scheduler import Scheduler, SchedulerConfig
from kvworkers.engine.sequence import Request
from kvworkers.models.loading import LoadedModel
from kvworkers.pages.pool import PagePool
from kvworkers.pages.sizing import allocate_pages, fit_pages
from kvworkers.stream.device_mover import DeviceMover, make_mover

_REGISTER_S = 120.0
_STORED_MS = 60_000
_ENDED_S = 10.0
"""After its last token a request gives its blocks their names."""


@dataclass(slots=True)
class Reply:
    """What one request got."""

    tokens: list[int]
    first: FirstTokens
    seconds: float


@dataclass(slots=True)
class Rig:
    """A running engine and what belongs to it."""

    model: LoadedModel
    engine: Engine
    pool: PagePool
    link: StoreLink
    registry: CollectorRegistry
    requests: int = 0

    async def ask(
        self, tokens: list[int], *, out: int = 1, no_read: bool = False, no_store: bool = False
    ) -> Reply:
        """Run one request to its end, greedy, whatever the model says."""
        began, got, first = time.monotonic(), list[int](), None
        async with self.stream(tokens, out=out, no_read=no_read, no_store=no_store) as outputs:
            async for output in outputs:
                got += output.tokens
                first = output.first or first
        assert first is not None
        return Reply(got, first, time.monotonic() - began)

    def stream(
        self, tokens: list[int], *, out: int, no_read: bool = False, no_store: bool = False
    ) -> "contextlib.aclosing[AsyncGenerator[Output, None]]":
        """Begin such a request; what is entered gives its outputs, and ends it when left."""
        self.requests += 1
        request = Request(
            request_id=f"bench-{self.requests}",
            tokens=pack_tokens(tokens),
            sampling=SamplingParams(max_tokens=out, ignore_eos=True),
            no_read=no_read,
            no_store=no_store,
        )
        return contextlib.aclosing(self.engine.generate(request))

    async def _ended(self, others: int) -> None:
        async with asyncio.timeout(_ENDED_S):
            while self.engine.load().running > others:  # noqa: ASYNC110 - nobody is told
                await asyncio.sleep(0)

    async def stored(self) -> None:
        """Wait until the node holds what was computed. Raises `Unreachable` when it does not."""
        await self._ended(0)
        if not await self.link.drained(deadline_ms=_STORED_MS):
            raise Unreachable("blocks were not stored in time")
        await asyncio.sleep(0)

    async def empty_pages(self, *, others: int = 0) -> None:
        """Drop every cached page of the device once no more than `others` requests are in it."""
        await self._ended(others)
        pages = self.pool.allocate(self.pool.available, now_ms=time.monotonic() * 1000)
        assert pages is not None
        self.pool.release(pages, now_ms=time.monotonic() * 1000)
        # What was dropped is told to routers by the next step: not by the one to be timed.
        await self.ask([1] * 17, no_read=True, no_store=True)

    def metric(self, name: str, **labels: str) -> float:
        """Return a sample of the worker's metrics; 0 where there is none."""
        return self.registry.get_sample_value(name, labels) or 0.0

    def prompt(self, seed: int, count: int) -> list[int]:
        """Return `count` random tokens; the same for the same seed."""
        draw = random.Random(seed)
        return [draw.randrange(self.model.spec.vocab_size) for _ in range(count)]


async def _connect(model: LoadedModel, node: RunningNode) -> AsyncClient:
    return await AsyncClient.connect(
        node.run_dir,
        namespace=model.spec.namespace,
        payload_bytes=model.forms.stored.payload_bytes,
        shares=model.spec.layout.kv_heads,
        config=ClientConfig(call_ms=10_000, connect_ms=30_000),
    )


@contextlib.asynccontextmanager
async def rig(
    model: LoadedModel,
    *,
    arena_bytes: int,
    step_tokens: int,
    batch: int,
    max_pages: int = 0,
    node_options: Sequence[str] = (),
) -> AsyncIterator[Rig]:
    """Start a node, pages as memory allows (at most `max_pages`), and an engine over both.

    `node_options` go to `kvstore node` as they are.
    """
    spec = model.spec
    pages = await asyncio.to_thread(fit_pages, model, step_tokens=step_tokens)
    pages = min(pages, max_pages) if max_pages else pages
    held = await asyncio.to_thread(allocate_pages, model, pages, batch=batch)
    pool = PagePool(pages, block_bytes=spec.layout.block_bytes, policy=make_policy(DEFAULT_POLICY))
    publisher = Publisher("bench", 1, [TierKind.HBM], pool)
    registry = CollectorRegistry()
    metrics = WorkerMetrics(registry)
    bounds = SchedulerConfig(
        max_model_tokens=min(spec.max_model_tokens, pages * BLOCK_TOKENS),
        step_tokens=step_tokens,
        max_running=batch,
        max_waiting=1_024,
    )
    async with contextlib.AsyncExitStack() as stack:
        stack.callback(model.release)
        node = stack.enter_context(
            await asyncio.to_thread(
                start_node, arena_bytes=arena_bytes, options=node_options, deadline_s=120.0
            )
        )
        client = await stack.enter_async_context(await _connect(model, node))
        mover = make_mover(held.memory, model.forms)
        stack.push_async_callback(asyncio.to_thread, mover.close)
        if isinstance(mover, DeviceMover) and not await asyncio.to_thread(
            mover.registered, client.arena, deadline_s=_REGISTER_S
        ):
            raise Unreachable("the arena could not be registered with CUDA")
        link = StoreLink(client, mover, metrics, config=StoreConfig(call_ms=2_000))
        stack.push_async_callback(link.close)
        engine = Engine(
            model, held.view, pool, Scheduler(bounds, pool), Reporter(publisher, metrics),
            root=lambda: client.root, store=lambda: link,
        )  # fmt: skip
        engine.start()
        stack.push_async_callback(engine.stop, drain_ms=1_000)
        yield Rig(model, engine, pool, link, registry)
