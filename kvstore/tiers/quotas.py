"""Bytes that share domains and roots may hold in each tier, and what they do hold. Pure.

    domain:acme:dram=8GiB,nvme=1TiB     what every root of one share domain may take together
    domain:*:dram=2GiB                  the same for each domain that has no rule of its own
    root:3f…c0:files=100GiB             one root, by its 64 hexadecimal digits; root:* is each other

Whoever is at its quota makes room among its own blocks, never another's. A root's domain is known
once a session has opened it; until then (after a restart) its bytes count for the root alone.
"""

from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Final, NamedTuple

from kvstore.core.errors import BadInput
from kvstore.core.names import Root

TIERS: Final = ("dram", "nvme", "files")
"""Tiers with room of their own, by the names that rules give them."""
EACH: Final = "*"
_KINDS: Final = ("domain", "root")
_ROOT_DIGITS: Final = 64


@dataclass(frozen=True, slots=True)
class QuotaRule:
    """What one share domain or root, or each of them (`EACH`), may hold."""

    kind: str
    name: str
    limits: Mapping[str, int]
    """Bytes by tier; a tier that is not here has no bound."""

    @classmethod
    def parse(cls, text: str, read_bytes: Callable[[str], int] = int) -> "QuotaRule":
        """Read `KIND:NAME:TIER=BYTES,…`; raises `BadInput` naming what is wrong.

        `read_bytes` reads one size and raises `ValueError` for what is none.
        """
        kind, _, rest = text.partition(":")
        name, _, sizes = rest.rpartition(":")
        if kind not in _KINDS or not name:
            raise BadInput(f"--quota {text!r} is not domain:NAME:TIER=BYTES or root:HEX:TIER=BYTES")
        if kind == "root" and name != EACH and not _is_root(name):
            raise BadInput(f"--quota {text!r}: a root has {_ROOT_DIGITS} hexadecimal digits")
        limits: dict[str, int] = {}
        for part in sizes.split(","):
            tier, _, size = part.partition("=")
            if tier not in TIERS or tier in limits:
                raise BadInput(f"--quota {text!r}: {tier!r} is not one of {', '.join(TIERS)}, once")
            try:
                limits[tier] = read_bytes(size)
            except ValueError as error:
                raise BadInput(f"--quota {text!r}: {error}") from error
            if limits[tier] <= 0:
                raise BadInput(f"--quota {text!r}: {size} bytes hold nothing")
        return cls(kind, name.lower() if kind == "root" else name, limits)

    def __str__(self) -> str:
        sizes = ",".join(f"{tier}={size}" for tier, size in self.limits.items())
        return f"{self.kind}:{self.name}:{sizes}"


class Claim(NamedTuple):
    """What has to go before one block more is within the quotas."""

    excess_bytes: int
    possible: bool
    """False where the quota is smaller than the block."""
    may_go: Callable[[Root], bool]
    """Says whether blocks under a root are the claimant's own."""


@dataclass(slots=True)
class Book:
    """What one tier holds, by root and share domain. Made by `Quotas.book`."""

    tier: str
    quotas: "Quotas"
    by_root: dict[Root, int] = field(default_factory=lambda: defaultdict(int))
    by_domain: dict[str, int] = field(default_factory=lambda: defaultdict(int))
    """Under "": what stands under roots whose domain is not known."""
    refusals: int = 0
    """Blocks not taken for want of quota; whoever measures takes them off."""

    def add(self, root: Root, size: int) -> None:
        """Charge `size` bytes to a root and its domain; negative: give them back."""
        domain = self.quotas.domain_of(root)
        self.by_root[root] += size
        self.by_domain[domain] += size
        assert self.by_root[root] >= 0, f"{self.tier}: more went than came"
        if not self.by_root[root]:
            del self.by_root[root]
        if not self.by_domain[domain]:
            del self.by_domain[domain]

    def claim(self, root: Root, size: int) -> Claim | None:
        """Return what has to go so that `size` bytes more fit; None: they do."""
        limit = self.quotas.limit(self.tier, "root", root.hex()) if self.quotas.rules else None
        excess = self.by_root.get(root, 0) + size - limit if limit is not None else 0
        if limit is not None and excess > 0:
            return Claim(excess, size <= limit, lambda other: other == root)
        domain = self.quotas.domain_of(root)
        limit = self.quotas.limit(self.tier, "domain", domain) if domain else None
        excess = self.by_domain.get(domain, 0) + size - limit if limit is not None else 0
        if limit is None or excess <= 0:
            return None
        domain_of = self.quotas.domain_of
        return Claim(excess, size <= limit, lambda other: domain_of(other) == domain)

    def move(self, root: Root, domain: str) -> None:
        """Count a root's bytes for the domain that it turned out to belong to."""
        size = self.by_root.get(root, 0)
        if size:
            self.by_domain[""] -= size
            self.by_domain[domain] += size
            if not self.by_domain[""]:
                del self.by_domain[""]


class Quotas:
    """The rules of one node, whose roots are whose, and a book for each tier."""

    def __init__(self, rules: Sequence[QuotaRule] = ()) -> None:
        """Raises `BadInput` for two rules about the same."""
        self.rules = tuple(rules)
        self._limits: dict[tuple[str, str, str], int] = {}
        self._domains: dict[Root, str] = {}
        self._books: dict[str, Book] = {}
        for rule in rules:
            for tier, size in rule.limits.items():
                if (tier, rule.kind, rule.name) in self._limits:
                    raise BadInput(f"--quota: two for {rule.kind}:{rule.name} in {tier}")
                self._limits[tier, rule.kind, rule.name] = size

    @property
    def books(self) -> Sequence[Book]:
        """Every tier's."""
        return list(self._books.values())

    def book(self, tier: str) -> Book:
        """Return the book of a tier."""
        return self._books.setdefault(tier, Book(tier, self))

    def opened(self, root: Root, domain: str) -> None:
        """Take note of the share domain that a root belongs to."""
        if domain and root not in self._domains:
            self._domains[root] = domain
            for book in self._books.values():
                book.move(root, domain)

    def domain_of(self, root: Root) -> str:
        """Return a root's share domain; "" where it is not known."""
        return self._domains.get(root, "")

    def limit(self, tier: str, kind: str, name: str) -> int | None:
        """Return the bytes that one domain or root may hold in a tier; None: as many as fit."""
        own = self._limits.get((tier, kind, name))
        return own if own is not None else self._limits.get((tier, kind, EACH))


def _is_root(name: str) -> bool:
    return len(name) == _ROOT_DIGITS and all(digit in "0123456789abcdefABCDEF" for digit in name)
