"""Metric families of a cache node's client."""

from prometheus_client import CollectorRegistry, Counter


class ClientMetrics:
    """What a client of a cache node counts; its host passes its own registry in."""

    def __init__(self, registry: CollectorRegistry) -> None:
        self.failures = Counter(
            "kvstore_client_failures", "Calls to the cache node that failed", ["call", "error"],
            registry=registry,
        )  # fmt: skip
        self.sessions = Counter(
            "kvstore_client_sessions", "Sessions opened", ["reason"], registry=registry
        )
        self.strays = Counter(
            "kvstore_client_stray_blocks", "Slots given back whose reservation's answer was lost",
            registry=registry,
        )  # fmt: skip
