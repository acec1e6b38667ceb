"""Orders on a stage without Ray: what is taken off, in which order, and what is refused."""

import asyncio
from collections.abc import AsyncIterator, Collection
from contextlib import asynccontextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from kvworkers.cluster import operate as module
from kvworkers.cluster.config import ClusterConfig
from kvworkers.cluster.operate import Operator, part_status
from kvworkers.cluster.orders import Orders, Seat
from kvworkers.cluster.placing import Placer
from kvworkers.cluster.plan import Part, Phase, Report, Role, next_members
from kvworkers.cluster.stage import Stage
from prometheus_client import CollectorRegistry

from kvstore.core.errors import BadInput, NotFound, Refused
from kvstore.observe.metrics import ClusterMetrics
from tests.patience import PATIENCE_S


class Actor:
    """A part that notes what it is told, and takes `busy` rounds to finish."""

    def __init__(self, told: list[str], name: str) -> None:
        def method(what: str) -> Any:
            async def remote(*arguments: object) -> None:
                told.append(f"{what} {name}")

            return type("Method", (), {"remote": staticmethod(remote)})

        self.drain, self.stop = method("drain"), method("stop")


class Places(Placer):
    """Ray's part of it."""

    def __init__(self, told: list[str]) -> None:
        self._told = told
        self.kept = Orders()
        self.room = True
        self.alive: set[str] = set()
        self.avoided: set[str] = set()

    async def keep(self, orders: Orders) -> None:
        self.kept = orders

    async def group(self, name: str, count: int, *, avoid: Collection[str] = ()) -> None:
        if not self.room:
            raise Refused("no room")
        self._told.append(f"group {name} {count}")
        self.avoided = set(avoid)

    async def drop_group(self, name: str) -> None:
        self._told.append(f"drop {name}")

    def node(self, name: str, host: str) -> Any:
        return Actor(self._told, name)

    def frontend(self, name: str, host: str = "") -> Any:
        self._told.append(f"{name} on {host}")
        return Actor(self._told, name)

    async def hosts(self) -> set[str]:
        return self.alive

    async def worker(self, name: str, seat: Seat) -> Any:
        return Actor(self._told, name)

    async def end(self, actor: Any, *, restart: bool) -> None:
        self._told.append("renew" if restart else "end")


class Theatre:
    """A stage of two hosts, with the controller's rounds played."""

    def __init__(self) -> None:
        self.told: list[str] = []
        self.places = Places(self.told)
        config = ClusterConfig(model=Path("m"), run_dir=Path("r"), drain_ms=100)
        self.stage = Stage(config, self.places)
        self.stage.orders = Orders({"a": "node-0", "b": "node-1"}).with_workers("workers", 2)
        self.operator = Operator(self.stage, ClusterMetrics(CollectorRegistry()))
        for name, role, host in (
            ("node-0", Role.NODE, "node-0"), ("node-1", Role.NODE, "node-1"),
            ("worker-0", Role.WORKER, "node-0"), ("worker-1", Role.WORKER, "node-1"),
            ("frontend-0", Role.FRONTEND, ""),
        ):  # fmt: skip
            report = Report(name=name, role=role, phase=Phase.SERVING, host=host)
            self.stage.parts[name] = Part(name=name, role=role, report=report)
            self.stage.actors[name] = Actor(self.told, name)
        self.lists: list[list[str]] = []

    async def rounds(self) -> None:
        while True:
            parts = self.stage.parts
            for part in parts.values():
                if part.report is None or (
                    not part.leaving and part.report.phase is Phase.STARTING
                ):
                    part.report = Report(
                        name=part.name, role=part.role, phase=Phase.SERVING, host="node-0"
                    )
            members = next_members(self.stage.members, parts.values())
            if members is not self.stage.members:
                self.lists.append([report.name for report in members.members])
                self.told.append("list " + " ".join(self.lists[-1]))
            self.stage.members = members
            for part in parts.values():
                if part.role is Role.FRONTEND and part.report is not None:
                    part.report = replace(part.report, members_version=members.version)
            await asyncio.sleep(0)


@asynccontextmanager
async def theatre(monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[Theatre]:
    monkeypatch.setattr(module, "POLL_SECONDS", 0.001)
    made = Theatre()
    playing = asyncio.create_task(made.rounds())
    try:
        async with asyncio.timeout(PATIENCE_S):
            yield made
    finally:
        playing.cancel()


async def test_a_drained_host_is_off_the_list_before_its_workers_finish(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    async with theatre(monkeypatch) as made:
        assert await made.operator.drain("node-1") == ["worker-1", "node-1"]
        order = [made.told.index(what) for what in (
            "list node-0 worker-0", "drain worker-1", "stop node-1", "end",
        )]  # fmt: skip
        assert order == sorted(order)
        assert set(made.stage.parts) == {"node-0", "worker-0", "frontend-0"}
        assert made.places.kept.hosts == {"a": "node-0"}
        assert made.places.kept.drained == {"b": "node-1"}
        assert made.operator.order == ""
        await made.operator.scale(2)
        assert made.places.avoided == {"b"}, "no worker is placed on a drained host"


async def test_what_cannot_be_drained_is_refused_and_nobody_leaves(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    async with theatre(monkeypatch) as made:
        with pytest.raises(NotFound):
            await made.operator.drain("node-7")
        await made.operator.drain("node-1")
        with pytest.raises(BadInput, match="only node"):
            await made.operator.drain("node-0")
        made.stage.orders = made.stage.orders.with_hosts({"a", "c"})
        with pytest.raises(BadInput, match="every worker"):
            await made.operator.drain("node-0")
        assert not any(part.leaving for part in made.stage.parts.values())


async def test_workers_are_added_in_a_group_and_surplus_ones_finish_first(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    async with theatre(monkeypatch) as made:
        assert await made.operator.scale(2) == []
        assert await made.operator.scale(4) == ["worker-2", "worker-3"]
        assert "group workers-0 2" in made.told
        assert await made.operator.scale(2) == ["worker-3", "worker-2"]
        assert made.told.index("drain worker-3") < made.told.index("drop workers-0")
        assert set(made.stage.orders.workers) == {"worker-0", "worker-1"}
        with pytest.raises(BadInput):
            await made.operator.scale(0)
        made.places.room = False
        with pytest.raises(Refused, match="no room"):
            await made.operator.scale(3)
        assert set(made.stage.parts) == {
            "node-0", "node-1", "worker-0", "worker-1", "frontend-0",
        }  # fmt: skip


async def test_a_restart_takes_one_part_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    async with theatre(monkeypatch) as made:
        every = ["worker-0", "worker-1", "node-0", "node-1"]
        assert await made.operator.restart([]) == every
        assert made.told.count("renew") == 4
        assert all(len(names) >= 3 for names in made.lists), "never two away at once"
        with pytest.raises(NotFound, match="frontend-7"):
            await made.operator.restart(["frontend-7"])


async def test_frontends_are_restarted_last_and_drained_first(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    async with theatre(monkeypatch) as made:
        assert await made.operator.restart(["frontend-0"]) == ["frontend-0"], "when it is named"
        assert [t for t in made.told if "list" not in t] == ["drain frontend-0", "renew"]
        again = Report(name="frontend-1", role=Role.FRONTEND, phase=Phase.SERVING)
        made.stage.parts["frontend-1"] = Part(name="frontend-1", role=Role.FRONTEND, report=again)
        made.stage.actors["frontend-1"] = Actor(made.told, "frontend-1")
        restarted = await made.operator.restart([])
        assert restarted[-2:] == ["frontend-0", "frontend-1"] and len(restarted) == 6
        told = [what for what in made.told if "list" not in what]
        assert told[-4:] == ["drain frontend-0", "renew", "drain frontend-1", "renew"]


async def test_one_order_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    async with theatre(monkeypatch) as made:
        first = asyncio.create_task(made.operator.drain("node-1"))
        await asyncio.sleep(0)
        with pytest.raises(Refused, match="busy: drain node-1"):
            await made.operator.scale(1)
        await first


def test_a_leaving_part_says_so() -> None:
    report = Report(name="w", role=Role.WORKER, phase=Phase.SERVING)
    part = Part(name="w", role=Role.WORKER, report=report, leaving=True)
    assert part_status(part).phase == "leaving"
    assert part_status(Part(name="n", role=Role.NODE)).phase == "empty"


async def test_with_a_frontend_on_every_host_they_come_and_go_with_them() -> None:
    told: list[str] = []
    places = Places(told)
    config = ClusterConfig(
        model=Path("m"), run_dir=Path("r"), frontends=0, ray_address="auto",
    )  # fmt: skip
    stage = Stage(config, places)
    places.alive = {"a", "b"}
    await stage.look_for_hosts()
    assert {"frontend-0 on a", "frontend-1 on b"} <= set(told)
    places.alive = {"b", "c"}
    before = told.count("end")
    await stage.look_for_hosts()
    assert told.count("end") == before + 2, "what was on the dead host is ended …"
    assert "frontend-0 on c" in told, "… before its name is given away"
    assert set(stage.parts) == {"node-0", "node-1", "frontend-0", "frontend-1"}
    assert stage.orders.hosts == {"b": "node-1", "c": "node-0"}
    places.alive = {"b"}
    await stage.look_for_hosts()
    assert places.kept.hosts == {"b": "node-1"}, "a controller that starts again knows it"
    address = config.frontend_address(config.http, 1)
    assert address == config.http
