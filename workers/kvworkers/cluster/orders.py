"""What the operator has ordered and where things stand: remembered beside Ray's own state. Pure.

hosts      Ray's node → our name of the host, which is its cache node's name
drained    the same for hosts that were taken out of service and are still in Ray
workers    worker → the placement group that it lives in, and its bundle
"""

import json
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, field

from kvstore.core.errors import BadInput, NotFound


@dataclass(frozen=True, slots=True)
class Seat:
    """A worker's place: a bundle of a placement group."""

    group: str
    bundle: int


@dataclass(frozen=True, slots=True)
class Orders:
    """Everything that a controller must know after its own restart."""

    hosts: Mapping[str, str] = field(default_factory=dict)
    drained: Mapping[str, str] = field(default_factory=dict)
    workers: Mapping[str, Seat] = field(default_factory=dict)

    def to_json(self) -> str:
        """Return what `from_json` reads back."""
        workers = {name: [seat.group, seat.bundle] for name, seat in self.workers.items()}
        return json.dumps(
            {"hosts": dict(self.hosts), "drained": dict(self.drained), "workers": workers}
        )

    @classmethod
    def from_json(cls, text: str) -> "Orders":
        """Read what `to_json` wrote."""
        raw = json.loads(text)
        workers = {name: Seat(*seat) for name, seat in raw["workers"].items()}
        return cls(raw["hosts"], raw["drained"], workers)

    def with_hosts(self, alive: Collection[str]) -> "Orders":
        """Return the orders once the hosts of Ray are these: dead ones go, new ones get a name."""
        kept = {host: name for host, name in self.hosts.items() if host in alive}
        drained = {host: name for host, name in self.drained.items() if host in alive}
        for host in sorted(alive):
            if host not in kept and host not in drained:
                kept[host] = _free_name("node", [*kept.values(), *drained.values()])
        return Orders(kept, drained, self.workers)

    def without_host(self, name: str) -> "Orders":
        """Return the orders without a host; raises `NotFound`, and `BadInput` for the last one."""
        host = next((host for host, known in self.hosts.items() if known == name), None)
        if host is None:
            known = ", ".join(sorted(self.hosts.values())) or "none"
            raise NotFound(f"there is no node {name!r}; there is: {known}")
        if len(self.hosts) == 1:
            raise BadInput(f"{name} is the only node: `kvstore down` ends a cluster")
        hosts = {key: value for key, value in self.hosts.items() if key != host}
        return Orders(hosts, {**self.drained, host: name}, self.workers)

    def with_workers(self, group: str, count: int) -> "Orders":
        """Return the orders with `count` more workers, seated in a new group."""
        workers = dict(self.workers)
        for bundle in range(count):
            workers[_free_name("worker", workers)] = Seat(group, bundle)
        return Orders(self.hosts, self.drained, workers)

    def without_workers(self, names: Iterable[str]) -> "Orders":
        """Return the orders without these workers."""
        gone = set(names)
        workers = {name: seat for name, seat in self.workers.items() if name not in gone}
        return Orders(self.hosts, self.drained, workers)

    def last_workers(self, count: int) -> list[str]:
        """Return the workers that leave when `count` have to: those with the highest numbers."""
        names = sorted(self.workers, key=lambda name: int(name.rpartition("-")[2]))
        return names[::-1][:count]

    def groups(self) -> set[str]:
        """Return the placement groups that some worker lives in."""
        return {seat.group for seat in self.workers.values()}


def _free_name(kind: str, taken: Iterable[str]) -> str:
    used = set(taken)
    return next(name for n in range(len(used) + 1) if (name := f"{kind}-{n}") not in used)
