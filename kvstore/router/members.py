"""Who takes part: workers that compute and nodes that hold, and which host each is on."""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import Final, Literal

from kvstore.core.engine_hashes import DEFAULT_SEED, EngineHashes
from kvstore.core.errors import BadInput, TooLarge
from kvstore.core.limits import MAX_ID_BYTES
from kvstore.core.names import Root

MAX_MEMBERS: Final = 4_096
"""Members of one router: each costs a stream and a task; beyond it shard views by root."""

Kind = Literal["worker", "node"]


@dataclass(frozen=True, slots=True)
class Member:
    """One publisher: a worker (tier `hbm`) or a cache node (`dram` and below)."""

    kind: Kind
    name: str
    """Stable across restarts: `worker-3`, `node-a`."""
    address: str
    """Where its gRPC server listens: `host:port` or `unix:/path`."""
    host: str = ""
    """Who shares an arena: a worker reaches the nodes of its own host. Empty: its `Watch` says."""
    incarnation: int = 0
    """Grows with every restart; a change makes the router follow it anew."""

    def __post_init__(self) -> None:
        if self.kind not in ("worker", "node"):
            raise BadInput(f"member kind {self.kind!r} is neither worker nor node")
        if not self.name or len(self.name.encode()) > MAX_ID_BYTES:
            raise BadInput(f"member name {self.name[:32]!r} is empty or over {MAX_ID_BYTES} bytes")
        if not self.address:
            raise BadInput(f"member {self.name} has no address")


@dataclass(frozen=True, slots=True)
class VllmEvents:
    """Where a worker that is a vLLM engine publishes its events (`--kv-events-config`)."""

    endpoint: str
    root: Root
    """What callers name its prompts under."""
    replay: str = ""
    hashes: EngineHashes | None = None
    """How it hashes blocks, where that is known."""


@dataclass(frozen=True, slots=True)
class Change:
    """What distinguishes two member lists. A member that changed is in `gone` and in `new`."""

    gone: tuple[Member, ...]
    new: tuple[Member, ...]


@dataclass(frozen=True)
class Members:
    """One consistent list of members, by name."""

    by_name: dict[str, Member] = field(default_factory=dict)

    @classmethod
    def of(cls, members: Iterable[Member]) -> "Members":
        """Return the list; raises `BadInput` for a name given twice, `TooLarge` over the bound."""
        by_name: dict[str, Member] = {}
        for member in members:
            if member.name in by_name:
                raise BadInput(f"two members are called {member.name}")
            by_name[member.name] = member
        if len(by_name) > MAX_MEMBERS:
            raise TooLarge(f"{len(by_name)} members; {MAX_MEMBERS} allowed")
        return cls(by_name)

    def __iter__(self) -> Iterator[Member]:
        """Iterate in the order given."""
        return iter(self.by_name.values())

    def __len__(self) -> int:
        """Return the number of members."""
        return len(self.by_name)

    def workers(self) -> list[Member]:
        """Return the workers in the order given."""
        return [member for member in self if member.kind == "worker"]

    def nodes(self) -> list[Member]:
        """Return the cache nodes in the order given."""
        return [member for member in self if member.kind == "node"]

    def change_to(self, other: "Members") -> Change:
        """Return what has to stop and what has to start so that this list becomes `other`."""
        return Change(
            gone=tuple(member for member in self if other.by_name.get(member.name) != member),
            new=tuple(member for member in other if self.by_name.get(member.name) != member),
        )


def parse_member(kind: Kind, text: str, *, default_name: str = "") -> Member:
    """Return the member that a flag such as `worker-0=127.0.0.1:7001@host-a` describes.

    `NAME=` may be left out where `default_name` is given; `@HOST` says who shares an arena.
    """
    name, separator, rest = text.partition("=")
    if not separator:
        name, rest = default_name, text
    address, _, host = rest.partition("@")
    if not name or ":" not in address:
        raise BadInput(f"{text!r} is not NAME=HOST:PORT[@HOSTNAME]")
    return Member(kind, name, address, host)


def parse_hashes(text: str) -> EngineHashes | None:
    """Return what `ALGORITHM[:SEED]` describes, None for no text."""
    algorithm, colon, seed = text.partition(":")
    if not text:
        return None
    if colon and not seed:
        raise BadInput(f"{text!r} is not ALGORITHM[:SEED]")
    return EngineHashes.of(algorithm, seed or DEFAULT_SEED)


def parse_vllm(
    text: str, root: Root, hashes: EngineHashes | None = None
) -> tuple[Member, VllmEvents]:
    """Return the engine that `NAME=HOST:PORT,EVENTS[,REPLAY]` describes."""
    engine, *endpoints = text.split(",")
    if not 1 <= len(endpoints) <= 2 or not all(endpoints):
        raise BadInput(f"{text!r} is not NAME=HOST:PORT,EVENTS[,REPLAY]")
    replay = endpoints[1] if len(endpoints) > 1 else ""
    return parse_member("worker", engine), VllmEvents(endpoints[0], root, replay, hashes)
