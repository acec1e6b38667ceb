"""The keeper's care for a node: one that cannot start, and messages while there is none."""

import asyncio
import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from kvstore.core.errors import Unreachable
from kvstore.service import child as module
from kvstore.service.child import NodeChild
from kvstore.service.config import KeeperConfig
from kvstore.transport.arena import ArenaSize, create_arena
from tests.patience import PATIENCE_S


def child(run_dir: Path, arena_fd: int, *, start_ms: int = 15_000) -> NodeChild:
    config = KeeperConfig(
        run_dir=run_dir, name="n", arena_bytes=1 << 20, start_ms=start_ms, stop_ms=2_000
    )
    return NodeChild(config, arena_fd, list, lambda: None)


@pytest.fixture
def arena_fd() -> Iterator[int]:
    descriptor = create_arena(ArenaSize(1 << 20, 64))
    yield descriptor
    os.close(descriptor)


async def test_a_node_that_cannot_start_ends_the_keeper(tmp_path: Path, arena_fd: int) -> None:
    first = child(tmp_path, arena_fd)  # there is no cluster key
    with pytest.raises(Unreachable, match="exit status 2"):
        await first.run()
    assert first.pid == 0


async def test_a_node_that_is_not_ready_in_time_is_killed(tmp_path: Path, arena_fd: int) -> None:
    (tmp_path / "cluster.key").write_bytes(bytes(32))
    late = child(tmp_path, arena_fd, start_ms=1)
    with pytest.raises(Unreachable, match="exit status -9"):
        await late.run()


async def test_without_a_node_messages_are_lost(tmp_path: Path, arena_fd: int) -> None:
    idle = child(tmp_path, arena_fd)
    idle.tell("closed", number=1)
    running = asyncio.create_task(idle.run())
    await asyncio.sleep(0)
    running.cancel()
    await asyncio.gather(running, return_exceptions=True)
    assert idle.pid == 0


async def test_a_process_that_cannot_be_made_is_tried_again(
    tmp_path: Path, arena_fd: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Out of descriptors or memory for a moment: no reason to let the arena and all go."""
    tries = asyncio.Semaphore(0)

    async def no_memory(*arguments: object, **options: object) -> None:
        tries.release()
        raise OSError(12, "Cannot allocate memory")

    monkeypatch.setattr(asyncio, "create_subprocess_exec", no_memory)
    monkeypatch.setattr(module, "_BACKOFF_S", (0.001, 0.001))
    started = child(tmp_path, arena_fd)
    started.incarnation = 1  # an earlier node was ready
    running = asyncio.create_task(started.run())
    async with asyncio.timeout(PATIENCE_S):
        for _ in range(3):
            await tries.acquire()
    running.cancel()
    await asyncio.gather(running, return_exceptions=True)
    first = child(tmp_path, arena_fd)
    with pytest.raises(Unreachable, match="Cannot allocate memory"):
        await first.run()
