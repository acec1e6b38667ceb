"""Calls are counted by how they ended, and all of them are timed."""

import asyncio

import pytest
from prometheus_client import CollectorRegistry

from kvstore.core.errors import BadInput
from kvstore.observe.metrics import NodeMetrics
from kvstore.service.calls import Measured


def test_a_call_is_timed_and_its_error_is_counted_by_class() -> None:
    registry = CollectorRegistry()
    metrics = NodeMetrics(registry)
    seconds = metrics.rpc_seconds.labels("Acquire")
    endings: list[type[BaseException] | None] = [
        None, BadInput, ZeroDivisionError, asyncio.CancelledError,
    ]  # fmt: skip
    for ending in endings:
        if ending is None:
            with Measured(metrics, "Acquire", seconds):
                pass
            continue
        with pytest.raises(ending), Measured(metrics, "Acquire", seconds):
            raise ending
    assert registry.get_sample_value(
        "kvstore_node_rpc_seconds_count", {"method": "Acquire"}
    ) == len(endings)

    def failed(error: str) -> float | None:
        labels = {"method": "Acquire", "error": error}
        return registry.get_sample_value("kvstore_node_rpc_errors_total", labels)

    assert failed("BadInput") == 1
    assert failed("Internal") == 1, "no message of a stranger's error becomes a label"
    assert failed("CancelledError") is None, "who hangs up made no error"
