"""What the connector counts, through vLLM's own log and Prometheus page."""

# vLLM lives in another environment than the tools that read this.
# pyright: reportMissingImports=false, reportAttributeAccessIssue=false

from collections import Counter
from typing import Any, Final

from vllm.distributed.kv_transfer.kv_connector.v1.metrics import (
    KVConnectorPromMetrics,
    KVConnectorStats,
)

_NAMES: Final = {
    "requests": "Requests that arrived",
    "steps": "Steps that the scheduler planned",
    "lookups": "Questions that the node answered",
    "lookup_hit_tokens": "Prompt tokens that the node said to hold",
    "loaded_tokens": "Prompt tokens loaded from the node",
    "lost_tokens": "Prompt tokens promised by the node, not loaded and hence computed",
    "load_failures": "Requests of which a part was lost",
    "stored_blocks": "Blocks of 16 tokens stored",
    "dropped_stores": "Stores dropped: too many waited, or the node was away",
    "node_failures": "Calls to the node that failed",
    "unexpected": "Failures that are bugs of the connector",
}
_TIERS: Final = "loaded_blocks_"


class KvStoreStats(KVConnectorStats):  # type: ignore[misc]
    """Sums by name since the last report."""

    def reset(self) -> None:
        """Start again from nothing."""
        self.data: dict[str, Any] = {}

    def aggregate(self, other: KVConnectorStats) -> "KvStoreStats":
        """Add another's sums."""
        self.data = dict(Counter(self.data) + Counter(other.data))
        return self

    def reduce(self) -> dict[str, int | float]:
        """Return the sums as they are logged; nanoseconds become milliseconds."""
        return {
            (name[:-3] + "_ms" if name.endswith("_ns") else name): (
                round(value / 1e6, 2) if name.endswith("_ns") else value
            )
            for name, value in sorted(self.data.items())
        }

    def is_empty(self) -> bool:
        """Whether nothing was counted."""
        return not any(self.data.values())


class KvStoreProm(KVConnectorPromMetrics):  # type: ignore[misc]
    """The families `kvstore_vllm_*` on vLLM's /metrics."""

    def __init__(self, *arguments: Any) -> None:
        super().__init__(*arguments)
        self._counters = {
            name: self._family(f"kvstore_vllm_{name}", text) for name, text in _NAMES.items()
        }
        self._by_tier = self._counter_cls(
            name="kvstore_vllm_loaded_blocks",
            documentation="Blocks of 16 tokens loaded, by the node's tier that they came from",
            labelnames=[*self._labelnames, "tier"],
        )
        self._seconds = {
            f"{name}_ns": self._family(f"kvstore_vllm_{name}_seconds", text)
            for name, text in (
                ("scheduler", "Time of the scheduler's thread inside the connector"),
                ("waited", "Time that the scheduler's thread waited for answers"),
                ("load", "Time of loads, from their start to their end"),
                ("store", "Time of stores in the background"),
            )
        }

    def observe(self, transfer_stats_data: dict[str, Any], engine_idx: int = 0) -> None:
        """Add one report to the families."""
        labels = self.per_engine_labelvalues[engine_idx]
        for name, value in transfer_stats_data.items():
            if name in self._counters:
                self._counters[name].labels(*labels).inc(value)
            elif name in self._seconds:
                self._seconds[name].labels(*labels).inc(value / 1e9)
            elif name.startswith(_TIERS):
                self._by_tier.labels(*labels, name.removeprefix(_TIERS)).inc(value)

    def _family(self, name: str, text: str) -> Any:
        return self._counter_cls(name=name, documentation=text, labelnames=self._labelnames)
