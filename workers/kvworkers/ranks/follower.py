"""A rank that is not the first: loads its part of the model, then does what rank 0 says.

    reader thread:    frames, in the order in which rank 0 sent them
    compute thread:   steps and copies of pages, one after another
    event loop:       copies, each behind the steps that were sent before it

It holds nothing that anybody would miss: when rank 0 is gone, or anything fails, its process ends.
"""

import asyncio
import logging
import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, Final, TypeVar

import torch

from kvstore.core.errors import BadInput, KvStoreError, Unreachable
from kvstore.core.names import Fidelity
from kvstore.transport.arena import ArenaMapping
from kvworkers.models.loading import LoadedModel, load_model
from kvworkers.models.sharding import Part
from kvworkers.models.step import Carried
from kvworkers.pages.sizing import DevicePages, new_pages
from kvworkers.ranks.channel import Channel
from kvworkers.ranks.collective import Collective
from kvworkers.ranks.messages import Frame, Kind, Orders, copies_of, step_of
from kvworkers.ranks.mover import PartMover
from kvworkers.stream.device_mover import DeviceMover

_log = logging.getLogger(__name__)

ORDERS_S: Final = 60.0
"""How long rank 0 may take to answer a hello."""
START_S: Final = 900.0
"""How long the slowest rank may take to load its part."""
_REGISTER_S: Final = 3_600.0
"""Longer than any arena takes to be registered."""

_Result = TypeVar("_Result")


class Follower:
    """One rank from its connection to its end. Made and run on one event loop."""

    def __init__(self, channel: Channel, rank: int) -> None:
        self._channel = channel
        self._rank = rank
        self._loop = asyncio.get_running_loop()
        self._compute = ThreadPoolExecutor(1, thread_name_prefix="compute")
        self._waits = ThreadPoolExecutor(1, thread_name_prefix="stepped")
        self._reader = ThreadPoolExecutor(1, thread_name_prefix="frames")
        self._moves: set[asyncio.Task[None]] = set()
        self._last_step: asyncio.Future[Any] | None = None
        """Gives the CUDA event behind the last step, None on a CPU."""
        self._arena = 0
        self._mapping: ArenaMapping | None = None
        self._failure: asyncio.Future[None] = self._loop.create_future()

    async def run(self) -> None:
        """Serve until rank 0 says that it is over; raises `Unreachable` when it just goes."""
        self._channel.send(Frame(Kind.HELLO, {"rank": self._rank}))
        orders = Orders.of(await self._expect(Kind.ORDERS, ORDERS_S))
        part = Part(self._rank, orders.ranks)
        self._collective = Collective(part)
        self._model = await self._there(partial(_load, orders, part, self._collective))
        self._channel.send(Frame(Kind.LOADED))
        await self._expect(Kind.GO, START_S)
        pages = await self._there(partial(hold_pages, self._model, orders, self._collective))
        self._view = pages.view
        self._mover = PartMover(pages.memory, self._model)
        self._channel.send(Frame(Kind.READY, {"pages": pages.count}))
        await self._obey()
        await self._close()

    async def _obey(self) -> None:
        while True:
            came = self._loop.run_in_executor(self._reader, self._channel.receive)
            either: list[asyncio.Future[Any]] = [came, self._failure]
            await asyncio.wait(either, return_when=asyncio.FIRST_COMPLETED)
            if self._failure.done():
                self._failure.result()
            frame, descriptor = came.result()
            if frame.kind is Kind.END:
                return
            self._take(frame, descriptor)

    def _take(self, frame: Frame, descriptor: int | None) -> None:
        if frame.kind in (Kind.STEP, Kind.COPY):
            does = self._step if frame.kind is Kind.STEP else self._copy
            self._last_step = self._loop.run_in_executor(self._compute, does, frame)
            self._last_step.add_done_callback(self._stepped)
        elif frame.kind is Kind.MOVE:
            self._task(self._move(frame, self._last_step, self._mapping))
        elif frame.kind is Kind.MAP and descriptor is not None:
            self._map(frame, descriptor)
        else:
            raise BadInput(f"rank 0 said {frame.kind}")

    def _step(self, frame: Frame) -> Any:
        """Compute a step; returns once it is queued where the device computes by itself."""
        step, number = step_of(frame), frame.number("number")
        if frame.facts.get("carried"):
            tokens = self._collective.from_first(torch.empty_like(step.tokens, device=self._device))
            step = replace(step, carried=Carried(tokens, torch.arange(tokens.shape[0])))
        self._model.forward(step, self._view)
        return self._said_when_done(number)

    def _copy(self, frame: Frame) -> Any:
        """Copy pages behind the steps before it: a later load may write what it copies from."""
        self._model.copy_pages(self._view, copies_of(frame))
        return self._said_when_done(frame.number("number"))

    def _said_when_done(self, number: int) -> Any:
        done: Any = None
        if self._device.type == "cuda":
            done = torch.cuda.Event(blocking=True)  # type: ignore[no-untyped-call]
            done.record(torch.cuda.current_stream(self._device))
        self._waits.submit(self._say_stepped, number, done)
        return done

    @property
    def _device(self) -> torch.device:
        return self._model.device

    def _say_stepped(self, number: int, done: Any) -> None:
        try:
            if done is not None:
                done.synchronize()
            self._channel.send(Frame(Kind.STEPPED, {"number": number}))
        except Exception as error:  # task boundary: the event loop ends this rank
            self._loop.call_soon_threadsafe(self._fail, error)

    def _stepped(self, step: "asyncio.Future[Any]") -> None:
        if not step.cancelled() and (error := step.exception()) is not None:
            self._fail(error)

    async def _move(
        self, frame: Frame, behind: "asyncio.Future[Any] | None", mapping: ArenaMapping | None
    ) -> None:
        # Rank 0's steps have ended that wrote these pages, or read what lay in them: ours have not.
        done = await asyncio.shield(behind) if behind is not None else None
        if done is not None:
            await asyncio.to_thread(done.synchronize)
        error = ""
        try:
            # Its places lie in the arena that was mapped when rank 0 said so, in no later one.
            if mapping is None or mapping is not self._mapping:
                raise Unreachable("the arena of this copy is not mapped")
            await self._mover.move(
                mapping.data,
                frame.arrays["offsets"].tolist(),
                frame.arrays["pages"].tolist(),
                store=bool(frame.facts.get("store")),
                alone=bool(frame.facts.get("alone")),
                raw=bool(frame.facts.get("raw")),
            )
        except KvStoreError as failure:
            error = f"rank {self._rank}: {failure}"
        self._channel.send(Frame(Kind.MOVED, {"job": frame.number("job"), "error": error}))

    def _map(self, frame: Frame, descriptor: int) -> None:
        self._arena = frame.number("arena")
        self._mover.mover.forget()  # Rank 0 begins no copy before all say that they reach it.
        try:
            self._mapping = ArenaMapping(descriptor)
        finally:
            os.close(descriptor)
        self._mover.mover.meet(self._mapping.data)
        self._mapping.prefault_soon()
        self._task(self._reach(self._arena, self._mapping.data))

    async def _reach(self, number: int, arena: memoryview) -> None:
        mover = self._mover.mover
        if isinstance(mover, DeviceMover):
            await asyncio.to_thread(mover.registered, arena, deadline_s=_REGISTER_S)
        if number == self._arena:
            facts = {"arena": number, "bytes": mover.reachable_bytes}
            self._channel.send(Frame(Kind.REACHED, facts))

    def _task(self, work: Any) -> None:
        task = self._loop.create_task(work)
        self._moves.add(task)
        task.add_done_callback(self._moved)

    def _moved(self, task: "asyncio.Task[None]") -> None:
        self._moves.discard(task)
        if not task.cancelled() and (error := task.exception()) is not None:
            self._fail(error)

    def _fail(self, error: BaseException) -> None:
        if not self._failure.done():
            self._failure.set_exception(error)

    async def _expect(self, kind: Kind, seconds: float) -> Frame:
        expect = partial(self._channel.expect, kind, deadline_s=seconds)
        return await self._loop.run_in_executor(self._reader, expect)

    async def _there(self, work: Callable[[], _Result]) -> _Result:
        return await self._loop.run_in_executor(self._compute, work)

    async def _close(self) -> None:
        if self._moves:
            await asyncio.wait(self._moves)
        await asyncio.to_thread(self._mover.mover.close)
        await self._there(self._collective.leave)


def hold_pages(model: LoadedModel, orders: Orders, collective: Collective) -> DevicePages:
    """Join the others and make pages, as many as the rank with the least room has.

    Every rank calls it: the largest step is computed together. Errors as `new_pages` and `join`.
    """
    rendezvous = Path(orders.rendezvous)
    collective.join(rendezvous, model.device, deadline_s=orders.deadline_ms / 1000)
    return new_pages(
        model,
        orders.pool_bytes,
        step_tokens=orders.step_tokens,
        batch=orders.max_running,
        agreed=collective.least,
    )


def _load(orders: Orders, part: Part, collective: Collective) -> LoadedModel:
    return load_model(
        orders.model,
        device=orders.device,
        threads=orders.threads,
        fidelity=Fidelity(orders.fidelity),
        part=part,
        total=collective.total,
    )


async def follow(path: str, rank: int) -> None:
    """Be rank `rank` of the worker whose rank 0 listens on `path`; returns when it lets go.

    Tells it why where it ends for another reason, and raises that.
    """
    channel = await asyncio.to_thread(Channel.connect, path, deadline_s=ORDERS_S)
    try:
        await Follower(channel, rank).run()
    except Exception as error:
        known = isinstance(error, KvStoreError)
        with suppress(KvStoreError):
            why = str(error) if known else f"{type(error).__name__}: {error}"
            channel.send(Frame(Kind.FAILED, {"why": why}))
        raise
    finally:
        channel.close()


async def obey(path: str, rank: int) -> None:
    """Run `follow` and end the process with it, at once where it fails.

    Threads that wait for a device or for other ranks must not hold that up.
    """
    try:
        await follow(path, rank)
    except BaseException:  # task boundary: rank 0 was told
        _log.exception("rank %s ends", rank)
        os._exit(1)
    os._exit(0)
