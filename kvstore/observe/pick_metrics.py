"""Metric families of an endpoint picker: a router behind a gateway."""

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram

from kvstore.observe.buckets import LATENCY_SECONDS


class PickMetrics:
    """What an endpoint picker counts of a gateway's HTTP requests."""

    def __init__(self, registry: CollectorRegistry) -> None:
        self.picks = Counter(
            "kvstore_picks", "HTTP requests by what a gateway was told: an endpoint (picked), 503"
            " (none_ready), 429 (shed), 400 or 413 (refused)", ["outcome"], registry=registry,
        )  # fmt: skip
        self.prompts = Counter(
            "kvstore_pick_prompts", "Prompts by how they were read: tokens, text (no tokenizer),"
            " none (no prompt, or none that can be read)", ["read"], registry=registry,
        )  # fmt: skip
        self.seconds = Histogram(
            "kvstore_pick_seconds", "From the end of a request to its endpoint, waiting included",
            buckets=LATENCY_SECONDS, registry=registry,
        )  # fmt: skip
        self.exchanges = Gauge(
            "kvstore_pick_exchanges", "HTTP exchanges of a gateway that are open",
            registry=registry,
        )  # fmt: skip
        self.failures = Counter(
            "kvstore_pick_failures", "Picked requests that failed: status (5xx), moved (another"
            " endpoint answered), gone (no answer came)", ["reason"], registry=registry,
        )  # fmt: skip
