"""The engine: a loop of admit, plan, compute, apply; and what callers see of it.

    event loop:     submit ─▶ admit ─▶ load (task) ─▶ plan ─────────▶ apply ─▶ tokens to streams
                                                        │               ▲
    compute thread:                                     └─ begin n + 1, ┘
                                                           wait for n

All state belongs to the event loop; the compute thread gets a finished plan and gives back tokens.
Where the device computes by itself, a step is begun before the one before it is waited for.
A sequence's pages are given back only when neither a step nor a copy can be writing them.
"""

import asyncio
import logging
import time
from collections.abc import AsyncGenerator, Callable, Sequence
from contextlib import suppress
from typing import Final

from torch import Tensor

from kvstore.core.errors import KvStoreError, Refused, Unreachable
from kvstore.core.names import Root
from kvstore.directory.events import Loaded
from kvworkers.engine.active import Active, Actives, Flight
from kvworkers.engine.cache import StoreLink
from kvworkers.engine.forks import Forks
from kvworkers.engine.moves import Moves
from kvworkers.engine.output import Output, OutputStream
from kvworkers.engine.prefix import PrefixStore
from kvworkers.engine.rates import RateFit
from kvworkers.engine.report import Reporter, load_of, measure
from kvworkers.engine.sampling import Sampled, Sampler
from kvworkers.engine.scheduler import Scheduler
from kvworkers.engine.sequence import FinishReason, Request, SequenceState
from kvworkers.engine.sequence import Sequence as Run
from kvworkers.engine.siblings import awaits_first
from kvworkers.engine.steps import StepRunner
from kvworkers.engine.work import Work
from kvworkers.models.loading import LoadedModel
from kvworkers.pages.pool import PagePool

_log = logging.getLogger(__name__)

MAX_FAILING_STEPS: Final = 3
"""Steps in a row that may fail before the model counts as broken."""
_NAMED_A_TURN: Final = 256
"""Blocks that become known by name at once while nobody waits: a millisecond or two."""


class Engine:
    """Serves requests of one model on one device. Made and used on one event loop."""

    def __init__(
        self,
        model: LoadedModel,
        pages: Tensor,
        pool: PagePool,
        scheduler: Scheduler,
        reporter: Reporter,
        *,
        root: Callable[[], Root],
        store: Callable[[], StoreLink | None],
        overlap: bool | None = None,
    ) -> None:
        """`pages` is `model.page_view` of the pool's tensor.

        `root` and `store` are asked per request: a cache node may come and go. `overlap` as
        `StepRunner` takes it.
        """
        self.broken = asyncio.Event()
        """Set when steps fail one after another: the process should end and be replaced."""
        self.rates = RateFit()
        self._model = model
        self._runner = StepRunner(model, pages, overlap=overlap)
        self._pool = pool
        self._scheduler = scheduler
        self._reporter = reporter
        self.root = root
        """Under which new requests are named."""
        self._prefix = PrefixStore(
            pool, store, changed=lambda: self._wake.set(), rates=lambda: self.rates.rates()
        )
        self._actives = Actives()
        self._wake = asyncio.Event()
        self._moves = Moves(
            scheduler, self._prefix, self._actives, reporter,
            wake=self._wake.set, retire=self._retire, broken=self._break,
        )  # fmt: skip
        self._forks = Forks(
            scheduler, pool, self._prefix, self._runner, reporter,
            take=self._take, retire=self._retire, broken=self._break, wake=self._wake.set,
        )  # fmt: skip
        self._idle = asyncio.Event()
        self._draining = False
        self._failing_steps = 0
        self._ended_ms = 0.0
        self._loop = asyncio.get_running_loop()
        self._task: asyncio.Task[None] | None = None

    def start(self) -> None:
        """Begin to take steps."""
        assert self._task is None
        self._task = self._loop.create_task(self._run_guarded(), name="engine")

    async def stop(self, *, drain_ms: int) -> None:
        """Refuse new requests, let running ones finish until the deadline, abort the rest."""
        self._draining = True
        self._wake.set()
        ends = self._loop.time() + drain_ms / 1000
        while self._actives and self._loop.time() < ends and not self.broken.is_set():
            self._idle.clear()
            try:
                async with asyncio.timeout_at(ends):
                    await self._idle.wait()
            except TimeoutError:
                break
        for active in list(self._actives.values()):
            # Not an end of the reply: whoever asked goes on elsewhere with the tokens it has.
            self._fail(active, Unreachable("the worker is ending"))
        if self._task is not None:
            self._task.cancel()
            await asyncio.gather(self._task, return_exceptions=True)
        loads = [a.load_task for a in self._actives.values() if a.load_task is not None]
        await asyncio.gather(*loads, return_exceptions=True)
        await self._runner.close()
        for active in list(self._actives.values()):
            active.run.in_step = 0
            while active.run.unnamed_blocks:
                self._scheduler.name_blocks(active.run, now_ms=self._now_ms())
            self._retire(active)

    def load(self) -> Loaded:
        """Return load and measured rates, as routers want them."""
        draining = self._draining or self.broken.is_set()
        return load_of(self._pool, self._scheduler, self.rates.rates(), draining=draining)

    def forget_rates(self) -> None:
        """Measure anew, and tell routers at once that nothing is measured."""
        self.rates = RateFit()
        self._reporter.publish(self._pool, self.load())

    async def generate(self, request: Request) -> AsyncGenerator[Output, None]:
        """Run one request; closing the iterator frees its pages after two steps at most.

        Raises `BadInput` and `TooLarge` before any work, `Refused` when the queue is full or the
        worker is ending, `Unreachable` when a step failed under it.
        """
        try:
            active = self._submit(request)
        except KvStoreError:
            self._reporter.refused()
            raise
        try:
            while True:
                output = await active.stream.take()
                yield output
                if output.finish is not None:
                    return
        finally:
            self._end(active, FinishReason.ABORT)

    def _submit(self, request: Request) -> Active:
        if self._draining or self.broken.is_set():
            raise Refused("the worker is ending", retry_after_ms=1_000)
        run = Run(request, self.root(), arrived_ms=self._now_ms())
        run.check_tokens(self._model.spec.vocab_size)
        rate = self.rates.rates().prefill_tokens_per_s
        waits = self._scheduler.queued_tokens / rate * 1000 if rate else 1_000.0
        self._scheduler.submit(run, retry_after_ms=max(1, int(waits)))
        active = Active(run, Sampler(request.sampling), OutputStream())
        self._actives[run] = active
        # A step may take a second: until its end routers would take this worker for idle.
        self._reporter.publish(self._pool, self.load())
        self._wake.set()
        return active

    async def _run_guarded(self) -> None:
        try:
            await self._run()
        except Exception as error:  # task boundary: nobody may wait for steps that never come
            _log.exception("the engine's loop failed")
            self._break(error)

    async def _run(self) -> None:
        flight: Flight | None = None
        while True:
            self._wake.clear()
            now_ms = self._now_ms()
            for late in self._actives.expired(now_ms):
                # Not an end of the reply: a cut one must never pass for a whole one.
                self._fail(late, Unreachable("the request's deadline passed"))
            for run in self._scheduler.make_room(now_ms, self._prefix.prices):
                self._moves.leave(self._actives[run])
            admitted = [self._actives[run] for run in self._scheduler.admit(now_ms)]
            for active in self._forks.begin(admitted):
                self._moves.begin(active)
            works = self._scheduler.plan(self._moves.follows)
            if flight is not None and not self._ahead(works):
                works = []  # What the step before chose is seen first.
            self._reporter.publish(self._pool, self.load())
            self._reporter.occupancy(self._pool, self._scheduler)
            if works or flight is not None:
                flight = await self._turn(works, flight)
            elif not self._actives.unnamed():
                await self._rest(now_ms)
            await self._name_some()

    async def _name_some(self) -> None:
        """Make some of the blocks known that had to wait until tokens were on their way."""
        late = self._actives.unnamed()
        if late is None:
            return
        await asyncio.sleep(0)
        self._scheduler.name_blocks(late.run, now_ms=self._now_ms(), limit=_NAMED_A_TURN)
        if late.over:
            self._retire(late)
        elif late.run.first_token_ms is not None:
            self._settle(late.run)

    async def _rest(self, now_ms: float) -> None:
        """Sleep until something changes, a hold ends or a request's deadline passes."""
        seconds = self._actives.seconds_to_rest(now_ms, self._scheduler.next_hold_end_ms(now_ms))
        with suppress(TimeoutError):
            async with asyncio.timeout(seconds):
                await self._wake.wait()

    def _ahead(self, works: Sequence[Work]) -> bool:
        """Say whether a step of `works` may be on the device together with its neighbours.

        Not one that follows a load: whether its blocks are good is known when the load has ended.
        """
        follows = any(work.sequence.gate is not None for work in works)
        return not follows and self._runner.runs_ahead(self._actives.samplers(works))

    async def _turn(self, works: Sequence[Work], before: Flight | None) -> Flight | None:
        """Begin a step of `works`, if any; end the one before it; return what is still on."""
        flight = await self._launch(works, before) if works else None
        if before is not None:
            await self._collect(before)
        if flight is not None and not flight.ahead:
            await self._collect(flight)
            return None
        return flight

    async def _launch(self, works: Sequence[Work], before: Flight | None) -> Flight | None:
        started = self._now_ms()
        for work in works:
            work.sequence.in_step += 1
            if work.sequence.first_step_ms is None:
                work.sequence.first_step_ms = started
        actives = [self._actives[work.sequence] for work in works]
        samplers = self._actives.samplers(works)
        ahead = self._ahead(works)
        loads = [a.load_task for a in actives if a.run.gate is not None and a.load_task is not None]
        self._scheduler.launch(works)
        try:
            launched = await self._runner.launch(
                works, samplers, None if before is None else before.launched
            )
        except Exception as error:  # task boundary: other requests go on
            self._step_failed(actives, error)
            return None
        return Flight(works, actives, launched, started, ahead, loads)

    async def _collect(self, flight: Flight) -> None:
        if flight.loads:
            await asyncio.wait(flight.loads)
        # Over blocks that never came nothing may be chosen: samplers remember what they chose.
        sampling = [work for work in flight.works if work.samples]
        good = [not flight.loads or w.sequence.computed >= w.start for w in sampling]
        try:
            keep = [awaits_first(work.sequence) for work in sampling]
            sampled = await self._runner.collect(flight.launched, good, keep)
        except Exception as error:  # task boundary, as above
            self._step_failed(flight.actives, error)
            return
        self._failing_steps = 0
        now_ms = self._now_ms()
        seconds = (now_ms - max(flight.started_ms, self._ended_ms)) / 1000
        if flight.loads:
            self._reporter.step(seconds)  # It waited for them: that says nothing of the device.
        else:
            measure(self._reporter, self.rates, flight.works, seconds)
        self._ended_ms = now_ms
        drawn = iter(sampled)
        for active, work in zip(flight.actives, flight.works, strict=True):
            self._apply(active, work, next(drawn) if work.samples else None)

    def _apply(self, active: Active, work: Work, sampled: Sampled | None) -> None:
        run, now_ms = active.run, self._now_ms()
        run.in_step -= 1
        if active.over:
            self._retire(active)
            return
        if run.computed < work.start:
            self._scheduler.void(run)
            return
        if work.samples and sampled is None:
            # K and V of this prompt are as wrong as what came of them: keep none of them.
            self._scheduler.disown(run)
            self._fail(active, Unreachable("the model gave logits that are not finite"))
            return
        self._scheduler.advance(work, now_ms=now_ms)
        if sampled is not None:
            self._take(active, sampled, now_ms)
        else:
            self._prefix.settle_chunk(run)
        if run.state is SequenceState.LEAVING:
            self._moves.leave(active)

    def _take(self, active: Active, sampled: Sampled, now_ms: float) -> None:
        """Give a token to its caller, or end its reply."""
        run = active.run
        if run.first_token_ms is None:
            self._first_token(active, now_ms)
            if awaits_first(run) and run.family is not None:
                run.family.first = sampled
                # Before this may be its end: its pages are there.
                forks = self._scheduler.fork(run, now_ms)
                self._forks.begin([self._actives[one] for one in forks])
        if run.ends_with(sampled.token, self._model.spec.eos_token_ids):
            self._end(active, FinishReason.STOP)
            return
        run.tokens.append(sampled.token)
        run.extend_names()
        active.stream.push(sampled)
        self._reporter.token()
        if run.generated >= run.request.sampling.max_tokens:
            self._end(active, FinishReason.LENGTH)
        self._settle(run)

    def _first_token(self, active: Active, now_ms: float) -> None:
        active.run.first_token_ms = now_ms
        first = active.first_tokens(now_ms)
        active.stream.begin(first)
        self._reporter.first_token(first)

    def _settle(self, run: Run) -> None:
        """Tell the store what became of a prompt, once it is known by name as far as computed."""
        if not run.unnamed_blocks:
            self._prefix.settle_prompt(run)

    def _end(self, active: Active, reason: FinishReason) -> None:
        """Finish a run now, or as soon as nothing writes its pages any more."""
        if active.over:
            return
        active.run.finish = reason
        active.stream.finish(reason)
        self._retire(active)

    def _fail(self, active: Active, error: KvStoreError) -> None:
        if active.over:
            return
        active.error = error
        active.run.finish = FinishReason.ABORT
        active.stream.fail(error)
        self._retire(active)

    def _retire(self, active: Active) -> None:
        run = active.run
        if run.in_step or run.loading or run.unnamed_blocks or run not in self._actives:
            return
        del self._actives[run]
        self._prefix.settle_prompt(run)
        self._prefix.forget(run)
        if active.error is None:
            self._prefix.store_rest(run)
        self._prefix.leave(run)
        depth_cost = self.rates.rates().depth_cost
        self._scheduler.finish(run, now_ms=self._now_ms(), depth_cost=depth_cost)
        self._reporter.finished(run, failed=active.error is not None, now_ms=self._now_ms())
        if not self._actives:
            self._idle.set()
        self._wake.set()

    def _step_failed(self, actives: Sequence[Active], error: Exception) -> None:
        _log.error("a step failed", exc_info=error)
        self._failing_steps += 1
        for active in actives:
            active.run.in_step -= 1
            self._fail(active, Unreachable(f"a step failed: {type(error).__name__}"))
            self._retire(active)
        if self._failing_steps >= MAX_FAILING_STEPS:
            self._break(error)

    def _break(self, error: Exception) -> None:
        """Give up: fail everybody, and let the process be replaced."""
        self.broken.set()
        for active in list(self._actives.values()):
            self._fail(active, Unreachable(f"the worker is broken: {type(error).__name__}"))

    def _now_ms(self) -> float:
        return time.monotonic() * 1000
