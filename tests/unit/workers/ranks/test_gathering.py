"""Rank 0's start, with a rank that a test plays, and one that ends before it says anything."""

import asyncio
from collections.abc import Awaitable, Callable
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
from kvworkers.models.loading import LoadedModel, load_model
from kvworkers.models.sharding import Part
from kvworkers.ranks import follower, gathering
from kvworkers.ranks.channel import Channel
from kvworkers.ranks.collective import Collective
from kvworkers.ranks.gathering import Processes, gather
from kvworkers.ranks.holding import hold
from kvworkers.ranks.messages import Frame, Kind, Orders
from kvworkers.worker_config import WorkerConfig

from kvstore.core.errors import BadInput, Unreachable, Unsupported
from tests.patience import PATIENCE_S
from tests.tiny_model import tiny_model
from tests.unit.workers.ranks.test_messages import ORDERS

Play = Callable[[Channel], None]


class Played:
    """Starts a thread in place of a process."""

    def __init__(self, play: Play | None, *, dead: str = "") -> None:
        self._play = play
        self._dead = dead
        self.played: list[Awaitable[None]] = []

    async def launch(self, path: str, rank: int) -> None:
        if self._play is not None:
            self.played.append(asyncio.ensure_future(asyncio.to_thread(self._run, path, rank)))

    def _run(self, path: str, rank: int) -> None:
        channel = Channel.connect(path, deadline_s=PATIENCE_S)
        try:
            channel.send(Frame(Kind.HELLO, {"rank": rank}))
            assert self._play is not None
            self._play(channel)
        finally:
            channel.close()

    def dead(self) -> str:
        return self._dead

    def close(self) -> None:
        """Nothing is left of a thread."""


ORDERED = replace(ORDERS, model=str(tiny_model()), ranks=2)


def load(part: Part, collective: Collective) -> LoadedModel:
    return load_model(tiny_model(), part=part, total=collective.total)


def says(*frames: Frame, heard: list[Orders] | None = None) -> Play:
    def play(channel: Channel) -> None:
        orders = Orders.of(channel.expect(Kind.ORDERS, deadline_s=PATIENCE_S))
        if heard is not None:
            heard.append(orders)
        for frame in frames:
            channel.send(frame)

    return play


async def test_what_a_rank_says_of_its_failure_is_the_failure(tmp_path: Path) -> None:
    heard: list[Orders] = []
    failed = Frame(Kind.FAILED, {"why": "no room for pages"})
    launcher = Played(says(failed, heard=heard))
    with pytest.raises(Unreachable, match="rank 1: no room for pages"):
        await gather(ORDERED, load, launcher, tmp_path)
    assert heard == [ORDERED]
    await asyncio.gather(*launcher.played)


async def test_a_rank_that_ends_before_it_is_there_is_not_waited_for(tmp_path: Path) -> None:
    launcher = Played(None, dead="rank 1 ended with status 1")
    with pytest.raises(Unreachable, match="rank 1 ended with status 1"):
        await gather(ORDERED, load, launcher, tmp_path)


async def test_a_rank_that_never_comes_is_given_up(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(gathering, "HELLO_S", 0.0)
    with pytest.raises(Unreachable, match="was not there"):
        await gather(ORDERED, load, Played(None), tmp_path)


async def test_two_that_say_the_same_number_are_refused(tmp_path: Path) -> None:
    launcher = Played(says())
    launcher.launch = partial(_always_first, launcher.launch)  # type: ignore[method-assign]
    with pytest.raises(BadInput, match="says that it is rank 1"):
        await gather(replace(ORDERED, ranks=3), load, launcher, tmp_path)
    await asyncio.gather(*launcher.played, return_exceptions=True)


async def _always_first(
    launch: Callable[[str, int], Awaitable[None]], path: str, rank: int
) -> None:
    await launch(path, 1)


async def test_a_process_that_ends_says_so_and_leaves_nothing(tmp_path: Path) -> None:
    processes = Processes(2, "cpu")
    await processes.launch(str(tmp_path / "nobody.sock"), 1)
    assert processes.dead() == ""
    processes.close()
    assert "rank 1 ended with status -9" in processes.dead()


async def test_a_follower_says_why_it_ends(tmp_path: Path) -> None:
    """The other side of the wire, played by the lead: orders of a model that is not there."""
    import socket

    path = tmp_path / "rank0.sock"
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(path))
        listener.listen()
        following = asyncio.ensure_future(follower.follow(str(path), 1))
        sock, _ = await asyncio.to_thread(listener.accept)
    channel = Channel(sock, deadline_s=PATIENCE_S)
    hello = await asyncio.to_thread(channel.expect, Kind.HELLO, deadline_s=PATIENCE_S)
    assert hello.number("rank") == 1
    channel.send(replace(ORDERED, model=str(tmp_path / "no-model")).frame())
    with pytest.raises(Unreachable, match="no-model"):
        await asyncio.to_thread(channel.expect, Kind.LOADED, deadline_s=PATIENCE_S)
    with pytest.raises(BadInput, match="no-model"):
        await following
    channel.close()


async def test_what_cannot_be_parted_is_refused_before_anything_starts() -> None:
    config = WorkerConfig(model=str(tiny_model()), device="cpu", tensor_parallel=3)
    with pytest.raises(Unsupported, match="2 KV heads do not divide into 3"):
        await hold(config, Played(None), lambda why: None)
    for ranks in (0, 65):
        with pytest.raises(BadInput, match=f"tensor_parallel {ranks}"):
            WorkerConfig(tensor_parallel=ranks)
    with pytest.raises(BadInput, match="rank_deadline_ms"):
        WorkerConfig(rank_deadline_ms=0)
