"""The parts that are there and the actors behind them: what controller and operator both move."""

import asyncio
import time
from collections.abc import Iterable
from typing import Any, Final

from kvworkers.cluster.config import ClusterConfig
from kvworkers.cluster.orders import Orders
from kvworkers.cluster.placing import Placer
from kvworkers.cluster.plan import MemberList, Part, Role

FIRST_GROUP: Final = "workers"


class Stage:
    """Parts by name, in the order in which they start."""

    def __init__(self, config: ClusterConfig, placer: Placer) -> None:
        self.config = config
        self.parts: dict[str, Part] = {}
        self.actors: dict[str, Any] = {}
        self.members = MemberList()
        self.orders = Orders()
        self._kept: Orders | None = None
        self._placer = placer

    async def place(self) -> None:
        """Make (or after the controller's restart find) nodes, workers and frontends."""
        kept = await self._placer.orders()
        orders = (kept or Orders()).with_hosts(await self._placer.hosts())
        if kept is None:
            await self._placer.group(FIRST_GROUP, self.config.workers)
            orders = orders.with_workers(FIRST_GROUP, self.config.workers)
        await self.follow(orders)
        for index in range(self.config.frontends):
            self._add(f"frontend-{index}", Role.FRONTEND, self._placer.frontend)

    async def follow(self, orders: Orders) -> list[str]:
        """Remember these orders and make the parts that they ask for; returns the new ones."""
        if orders != self._kept:
            await self._placer.keep(orders)
        self.orders = self._kept = orders
        new = []
        for host, name in orders.hosts.items():
            if name not in self.parts:
                self._add(name, Role.NODE, lambda name, host=host: self._placer.node(name, host))
                new.append(name)
            beside = frontend_beside(name)
            if not self.config.frontends and beside not in self.parts:
                self._add(
                    beside,
                    Role.FRONTEND,
                    lambda name, host=host: self._placer.frontend(name, host),
                )
        for name, seat in orders.workers.items():
            if name not in self.parts:
                actor = await self._placer.worker(name, seat)
                self._add(name, Role.WORKER, lambda name, actor=actor: actor)
                new.append(name)
        return new

    async def look_for_hosts(self) -> None:
        """Give hosts that joined Ray a cache node, and let go of those that Ray declared dead."""
        alive = await self._placer.hosts()
        for name in [name for host, name in self.orders.hosts.items() if host not in alive]:
            # Before new hosts are named: one of them may get this very name.
            self.orders = self.orders.with_hosts(
                {host for host, known in self.orders.hosts.items() if known != name}
                | set(self.orders.drained)
            )
            await self.drop(name, *([] if self.config.frontends else [frontend_beside(name)]))
        await self.follow(self.orders.with_hosts(alive))

    async def add_workers(self, count: int) -> list[str]:
        """Place more workers in a group of their own; `Refused` where Ray has no room."""
        taken = self.orders.groups()
        group = next(
            name for n in range(len(taken) + 1) if (name := f"{FIRST_GROUP}-{n}") not in taken
        )
        await self._placer.group(group, count, avoid=self.orders.drained)
        return await self.follow(self.orders.with_workers(group, count))

    async def drop(self, *names: str) -> None:
        """End these parts for good, and give back the places that nobody uses any more."""
        for name in names:
            self.parts.pop(name, None)
            actor = self.actors.pop(name, None)
            if actor is not None:
                await self._placer.end(actor, restart=False)
        groups = self.orders.groups()
        await self.follow(self.orders.without_workers(names))
        for group in groups - self.orders.groups():
            await self._placer.drop_group(group)

    async def renew(self, name: str) -> None:
        """End a part's process; Ray brings it back empty, and it is started again."""
        await self._placer.end(self.actors[name], restart=True)
        part = self.parts[name]
        part.lose()
        part.heard_ms = now_ms()
        part.leaving = False

    async def clear(self) -> None:
        """End every part and forget the orders: nothing of the cluster stays in Ray."""
        await asyncio.gather(*(self._placer.end(a, restart=False) for a in self.actors.values()))
        for group in self.orders.groups():
            await self._placer.drop_group(group)
        await self._placer.forget()

    def of(self, role: Role) -> list[str]:
        """Return the names of the parts with a role."""
        return [part.name for part in self.parts.values() if part.role is role]

    def on_host(self, host: str, parts: Iterable[str]) -> list[str]:
        """Return those of `parts` that run on the host so named."""
        return [
            name
            for name in parts
            if (report := self.parts[name].report) is not None and report.host == host
        ]

    def _add(self, name: str, role: Role, make: Any) -> None:
        self.parts[name] = Part(name=name, role=role, heard_ms=now_ms())
        self.actors[name] = make(name)


def frontend_beside(node: str) -> str:
    """Return the name of the frontend of a host, where every host has one."""
    return f"frontend-{node.rpartition('-')[2]}"


def now_ms() -> int:
    """Return the clock that incarnations are taken from."""
    return time.time_ns() // 1_000_000
