"""The controller's loop, without Ray's parts."""

import asyncio
from pathlib import Path
from typing import Any

import pytest
from kvworkers.cluster import controller as module
from kvworkers.cluster.config import ClusterConfig
from kvworkers.cluster.controller import Controller
from kvworkers.cluster.stage import Stage

from tests.patience import PATIENCE_S


async def test_a_round_that_fails_is_not_the_last(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    rounds = 0
    second = asyncio.Event()

    async def nothing(self: Any) -> None:
        return

    def members(current: Any, parts: Any) -> Any:
        nonlocal rounds
        rounds += 1
        if rounds == 1:
            raise RuntimeError("a bug")
        second.set()
        return current

    monkeypatch.setattr(Stage, "place", nothing)
    monkeypatch.setattr(Stage, "look_for_hosts", nothing)
    monkeypatch.setattr(module, "next_members", members)
    monkeypatch.setattr(module, "_POLL_SECONDS", 0.01)
    controller = Controller(ClusterConfig(model=tmp_path, run_dir=tmp_path))
    await controller.status()
    async with asyncio.timeout(PATIENCE_S):
        await second.wait()
    await controller.stop()
