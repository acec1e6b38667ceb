"""What the door of a server counts."""

from prometheus_client import CollectorRegistry, Counter


class AccessMetrics:
    """What the door of a server counts."""

    def __init__(self, registry: CollectorRegistry) -> None:
        self.denied = Counter(
            "kvstore_access_denied", "Calls turned away before they were looked at", ["reason"],
            registry=registry,
        )  # fmt: skip
        self.admin_calls = Counter(
            "kvstore_access_admin_calls", "Calls that need the admin role", ["outcome"],
            registry=registry,
        )  # fmt: skip
