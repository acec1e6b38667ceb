"""One request through a real cluster: frontend, router, worker and node make one tree of spans."""

import httpx
import pytest
from kvworkers.demo.script import document

from tests.cluster_process import cluster_process, eventually
from tests.collector import collector

pytestmark = [pytest.mark.slow, pytest.mark.e2e]

TRACE = "ab" * 16


def test_one_request_is_one_tree_across_processes() -> None:
    with collector() as kept, cluster_process("--arena", "256MiB", "--trace", kept.address) as up:
        body = {
            "model": up.model, "max_tokens": 4, "temperature": 0,
            "messages": [{"role": "user", "content": " ".join(document("moka").split()[:120])}],
        }  # fmt: skip
        headers = {"traceparent": f"00-{TRACE}-{'cd' * 8}-01"}
        reply = httpx.post(
            f"{up.http}/v1/chat/completions", json=body, headers=headers, timeout=120,
            trust_env=False,
        )  # fmt: skip
        assert reply.status_code == 200

        def whole() -> bool:
            return {"request", "Acquire"} <= {s.name for s in kept.spans if s.trace == TRACE}

        eventually(whole, what="spans of both ends")
    spans = {span.name: span for span in kept.spans if span.trace == TRACE}
    for name, service, parent in (
        ("request", "kvstore-frontend", ""),
        ("route", "kvstore-frontend", "request"),
        ("attempt", "kvstore-frontend", "request"),
        ("worker", "kvstore-worker", "attempt"),
        ("Acquire", "kvstore-node", "worker"),
    ):
        assert spans[name].service == service and not spans[name].failed, name
        assert spans[name].parent == (spans[parent].span if parent else "cd" * 8), name
    assert spans["worker"].values["kvstore.computed_tokens"] > 100
    assert spans["worker"].values["kvstore.ttft_ms"] > 0
