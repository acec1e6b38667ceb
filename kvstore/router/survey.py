"""What a router sees of its cluster, for people: members and hot prefixes. Pure."""

from collections.abc import Iterator
from dataclasses import dataclass

from kvstore.directory.events import Loaded, TierKind
from kvstore.directory.view import ClusterView, Health
from kvstore.router.members import Members


@dataclass(frozen=True, slots=True)
class MemberState:
    """One member at one moment, as far as its stream tells."""

    name: str
    kind: str
    """`worker` or `node`."""
    host: str
    address: str
    health: Health
    silence_ms: float
    blocks: dict[TierKind, int]
    """Blocks that it lists, by tier."""
    load: Loaded | None
    """Workers only."""


def survey(members: Members, view: ClusterView, now_ms: float) -> Iterator[MemberState]:
    """Iterate over the members in the order of their list."""
    for member in members:
        known = view.publisher(member.name)
        yield MemberState(
            name=member.name,
            kind=member.kind,
            host=member.host or (known.host if known is not None else ""),
            address=member.address,
            health=view.health_of(known, now_ms),
            silence_ms=now_ms - known.heard_ms if known is not None else 0.0,
            blocks={tier: place.count for tier, place in known.places.items()} if known else {},
            load=known.load if known is not None else None,
        )
