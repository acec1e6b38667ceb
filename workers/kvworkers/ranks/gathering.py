"""Rank 0's start: has the others started, loads beside them, and holds what all have together.

listen ─▶ launch the others ─▶ hello, orders ─▶ load ─▶ all loaded: go ─▶ join, pages ─▶ ready
"""

import asyncio
import logging
import os
import socket
import struct
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, Protocol, TypeVar

import torch

from kvstore.core.errors import BadInput, Unreachable
from kvworkers.models.loading import LoadedModel
from kvworkers.models.sharding import Part
from kvworkers.pages.sizing import DevicePages
from kvworkers.ranks.channel import Channel
from kvworkers.ranks.collective import Collective
from kvworkers.ranks.follower import START_S, hold_pages
from kvworkers.ranks.lead import Lead, Member
from kvworkers.ranks.messages import Frame, Kind, Orders

_log = logging.getLogger(__name__)

SOCKET: Final = "rank0.sock"
HELLO_S: Final = 300.0
"""How long a rank may take to be there: importing torch on busy cores takes half a minute."""
_READY_S: Final = 600.0
_LOOK_S: Final = 0.5
_DEATH_S: Final = 10.0
_CREDENTIALS: Final = struct.Struct("3i")

_Result = TypeVar("_Result")

Load = Callable[[Part, Collective], LoadedModel]


class Launcher(Protocol):
    """Who starts processes for the other ranks."""

    async def launch(self, path: str, rank: int) -> None:
        """Begin to start one, which is to connect to the socket at `path`."""
        ...

    def dead(self) -> str:
        """Say which one has ended, or nothing while none has."""
        ...

    def close(self) -> None:
        """End those that are left, and leave nothing of them behind."""
        ...


@dataclass(frozen=True, slots=True)
class Gathered:
    """Rank 0's part of a model, and its hold on the other ranks."""

    model: LoadedModel
    pages: DevicePages
    lead: Lead


async def gather(orders: Orders, load: Load, launcher: Launcher, directory: Path) -> Gathered:
    """Start every rank and load; returns when all can compute.

    `directory` is for the ranks' sockets and stays until they have ended. Raises what the first
    rank that fails says of it; their connections have ended then, and so they do.
    """
    path = directory / SOCKET
    with ExitStack() as undo:
        with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as listener:
            listener.bind(str(path))
            listener.listen()
            for rank in range(1, orders.ranks):
                await launcher.launch(str(path), rank)
            members = await asyncio.to_thread(_accept, listener, orders, launcher, undo)
        part = Part(0, orders.ranks)
        collective = Collective(part)
        model = await _unless_lost(members, lambda: load(part, collective))
        await asyncio.to_thread(_all, members, Kind.LOADED, START_S)
        for member in members.values():
            member.channel.send(Frame(Kind.GO))
        pages = await _unless_lost(members, lambda: hold_pages(model, orders, collective))
        await asyncio.to_thread(_all, members, Kind.READY, _READY_S)
        lead = Lead(members, collective, model.device, deadline_s=orders.deadline_ms / 1000)
        undo.pop_all()
    model.lead = lead
    return Gathered(model, pages, lead)


def _accept(
    listener: socket.socket, orders: Orders, launcher: Launcher, undo: ExitStack
) -> dict[int, Member]:
    """Take every rank's hello and give it its orders."""
    members: dict[int, Member] = {}
    ends = time.monotonic() + HELLO_S
    listener.settimeout(_LOOK_S)
    while len(members) < orders.ranks - 1:
        try:
            sock, _ = listener.accept()
        except TimeoutError:
            if why := launcher.dead():
                raise Unreachable(why) from None
            if time.monotonic() >= ends:
                raise Unreachable(f"a rank was not there in {HELLO_S:g} s") from None
            continue
        channel = Channel(sock, deadline_s=orders.deadline_ms / 1000)
        undo.callback(channel.close)
        raw = sock.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _CREDENTIALS.size)
        pid, uid, _ = _CREDENTIALS.unpack(raw)
        rank = channel.expect(Kind.HELLO, deadline_s=HELLO_S).number("rank")
        if uid != os.getuid() or not 0 < rank < orders.ranks or rank in members:
            raise BadInput(f"a process {pid} of user {uid} says that it is rank {rank}")
        pidfd = os.pidfd_open(pid)
        undo.callback(os.close, pidfd)
        members[rank] = Member(channel, pid, pidfd)
        channel.send(orders.frame())
    return members


def _all(members: dict[int, Member], kind: Kind, seconds: float) -> None:
    """Wait until every rank has said `kind`."""
    ends = time.monotonic() + seconds
    for rank, member in members.items():
        try:
            member.channel.expect(kind, deadline_s=max(0.001, ends - time.monotonic()))
        except Unreachable as error:
            raise Unreachable(f"rank {rank}: {error}") from error


async def _unless_lost(members: dict[int, Member], work: Callable[[], _Result]) -> _Result:
    """Do `work` in a thread; raise sooner where a rank ends, for then it may never."""
    loop = asyncio.get_running_loop()
    lost: asyncio.Future[int] = loop.create_future()

    def ended(rank: int) -> None:
        if not lost.done():
            lost.set_result(rank)

    for rank, member in members.items():
        loop.add_reader(member.pidfd, ended, rank)
    job = asyncio.ensure_future(asyncio.to_thread(work))
    try:
        either: list[asyncio.Future[Any]] = [job, lost]
        await asyncio.wait(either, return_when=asyncio.FIRST_COMPLETED)
        if lost.done():
            rank = lost.result()
            why = await asyncio.to_thread(_last_words, members[rank].channel)
            raise Unreachable(f"rank {rank}: {why}")
        return job.result()
    finally:
        lost.cancel()
        job.add_done_callback(_nobody_asks)
        for member in members.values():
            loop.remove_reader(member.pidfd)


def _nobody_asks(job: "asyncio.Future[_Result]") -> None:
    """Take note of a failure that the loss of a rank came before."""
    if not job.cancelled():
        job.exception()


def _last_words(channel: Channel) -> str:
    """Return why a rank has ended that is gone."""
    try:
        while True:
            channel.expect(Kind.END, deadline_s=1.0)
    except BadInput:
        return _last_words(channel)  # what it said before
    except Unreachable as error:
        return str(error)


class Processes:
    """Starts ranks as processes of this one's, each with one of its GPUs."""

    def __init__(self, ranks: int, device: str) -> None:
        """Raises `BadInput` where there are fewer GPUs than ranks."""
        self._started: dict[int, subprocess.Popen[bytes]] = {}
        self._visible: list[str] = []
        if device != "cpu":
            chosen = os.environ.get("CUDA_VISIBLE_DEVICES")
            count = torch.cuda.device_count()
            self._visible = chosen.split(",") if chosen else [str(n) for n in range(count)]
            if count < ranks:
                raise BadInput(f"tensor_parallel {ranks}: this process may use {count} GPUs")

    async def launch(self, path: str, rank: int) -> None:
        """Begin to start one."""
        environment = dict(os.environ)
        if self._visible:
            environment["CUDA_VISIBLE_DEVICES"] = self._visible[rank]
        command = [sys.executable, "-m", "kvworkers.ranks", "--lead", path, "--rank", str(rank)]
        self._started[rank] = await asyncio.to_thread(
            subprocess.Popen,
            command,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            env=environment,
        )

    def dead(self) -> str:
        """Say which one has ended."""
        for rank, process in self._started.items():
            if (status := process.poll()) is not None:
                return f"rank {rank} ended with status {status} before it was there"
        return ""

    def close(self) -> None:
        """Kill those that are left; all are waited for."""
        for process in self._started.values():
            process.kill()
        for process in self._started.values():
            try:
                process.wait(_DEATH_S)
            except subprocess.TimeoutExpired:
                _log.error("process %s does not end: its device hangs", process.pid)
