"""What a rank that follows copies, and into which arena."""

import asyncio
import socket
from collections.abc import AsyncIterator
from typing import Any

import pytest
from kvworkers.ranks.channel import Channel
from kvworkers.ranks.follower import Follower
from kvworkers.ranks.messages import Frame, Kind, move_frame

from kvstore.transport.arena import ArenaSize, create_arena
from tests.patience import PATIENCE_S


class Copies:
    """Stands for the follower's mover and notes where it was to copy."""

    def __init__(self) -> None:
        self.mover = self
        self.arenas: list[int] = []
        self.reachable_bytes = 0

    async def move(self, arena: memoryview, *places: Any, **how: Any) -> None:
        self.arenas.append(len(arena))

    def forget(self) -> None:
        pass

    def meet(self, arena: memoryview) -> None:
        self.reachable_bytes = len(arena)


@pytest.fixture
async def scene() -> AsyncIterator[tuple[Follower, Copies, Channel]]:
    mine, theirs = socket.socketpair()
    own = Channel(mine, deadline_s=PATIENCE_S)
    follower, copies = Follower(own, 1), Copies()
    follower._mover = copies  # type: ignore[assignment]
    lead = Channel(theirs, deadline_s=PATIENCE_S)
    yield follower, copies, lead
    lead.close()
    own.close()


async def test_a_copy_that_waited_for_a_step_is_for_the_arena_of_its_time(
    scene: tuple[Follower, Copies, Channel],
) -> None:
    """Places of the arena before a keeper's restart are other blocks' in the one after it."""
    follower, copies, lead = scene
    steps = [asyncio.get_running_loop().create_future() for _ in range(2)]
    for number, step in enumerate(steps, start=1):
        descriptor = create_arena(ArenaSize(number << 20, 16))
        follower._take(Frame(Kind.MAP, {"arena": number}), descriptor)
        follower._last_step = step
        follower._take(move(number), None)
        await asyncio.sleep(0)
    for step in reversed(steps):
        step.set_result(None)
    said: dict[int, object] = {}
    while len(said) < 2:
        frame, _ = await asyncio.to_thread(lead.receive, deadline_s=PATIENCE_S)
        if frame.kind is Kind.MOVED:
            said[frame.number("job")] = frame.facts["error"]
    assert said[2] == "" and "not mapped" in str(said[1])
    assert copies.arenas == [2 << 20]


def move(job: int) -> Frame:
    return move_frame(job, store=True, alone=False, raw=False, offsets=[0], pages=[0])
