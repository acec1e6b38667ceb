"""What a publisher counts that writes its events to Redis or Valkey."""

from prometheus_client import CollectorRegistry, Counter, Gauge


class RedisMetrics:
    """What a node or worker counts that writes its events to Redis."""

    def __init__(self, registry: CollectorRegistry) -> None:
        self.connected = Gauge(
            "kvstore_redis_connected", "1 while events are written to Redis", registry=registry
        )
        self.faults = Counter(
            "kvstore_redis_faults", "Times that writing events to Redis stopped, by error",
            ["error"], registry=registry,
        )  # fmt: skip
        self.streams = Counter(
            "kvstore_redis_streams", "Streams begun, each with a snapshot", registry=registry
        )
