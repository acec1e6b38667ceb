"""How often a share domain may call, and with how many bytes: token buckets. Pure."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Final

from kvstore.core.errors import Refused
from kvstore.rpc.security import Rate

MAX_DOMAINS: Final = 65_536
_BURST_S: Final = 2.0
_MAX_RETRY_MS: Final = 60_000


@dataclass(slots=True)
class Bucket:
    """Fills by `per_s` up to `most`; what was taken beyond the level is owed, and others wait."""

    per_s: float
    most: float
    level: float
    at_s: float

    def wait_s(self, amount: float, now_s: float) -> float:
        """Return how long until `amount` may be taken; zero: now."""
        self.level = min(self.most, self.level + max(0.0, now_s - self.at_s) * self.per_s)
        self.at_s = max(now_s, self.at_s)
        return max(0.0, amount - self.level) / self.per_s

    def take(self, amount: float) -> None:
        """Take what a call used."""
        self.level -= amount


class RateLimiter:
    """One pair of buckets per share domain; at most `MAX_DOMAINS`, the oldest is forgotten."""

    def __init__(self, default: Rate, by_domain: Mapping[str, Rate] | None = None) -> None:
        self._default = default
        self._by_domain = dict(by_domain or {})
        self._buckets: dict[str, tuple[Bucket | None, Bucket | None]] = {}

    def admit(self, domain: str, now_s: float) -> None:
        """Count one call of `domain`; raises `Refused` with the pause to make when it is over."""
        calls, amount = self._of(domain, now_s)
        # A body's size is known only when it has come: it is owed, and paid before the next call.
        wait_s = max(
            calls.wait_s(1, now_s) if calls is not None else 0.0,
            amount.wait_s(0, now_s) if amount is not None else 0.0,
        )
        if wait_s > 0:
            retry_ms = min(_MAX_RETRY_MS, max(1, round(wait_s * 1_000)))
            raise Refused("the rate limit of this share domain is reached", retry_ms)
        if calls is not None:
            calls.take(1)

    def charge(self, domain: str, request_bytes: int, now_s: float) -> None:
        """Count the bytes of an admitted call."""
        _, amount = self._of(domain, now_s)
        if amount is not None:
            amount.take(request_bytes)

    def _of(self, domain: str, now_s: float) -> tuple[Bucket | None, Bucket | None]:
        pair = self._buckets.get(domain)
        if pair is None:
            if len(self._buckets) >= MAX_DOMAINS:
                del self._buckets[next(iter(self._buckets))]
            rate = self._by_domain.get(domain, self._default)
            burst = max(1.0, rate.burst or rate.calls_per_s * _BURST_S)
            pair = self._buckets[domain] = (
                _bucket(rate.calls_per_s, burst, now_s),
                _bucket(rate.bytes_per_s, rate.bytes_per_s * _BURST_S, now_s),
            )
        return pair


def _bucket(per_s: float, most: float, now_s: float) -> Bucket | None:
    return Bucket(per_s, most, most, now_s) if per_s else None
