"""A Ray Serve deployment behind our request router, as a process: writes a JSON file.

The replicas are a model's stand-in: they say who they are, and publish vLLM's KV events when told.
Ray reads its environment when it is imported, so whoever starts this sets it.
"""

# pyright: reportArgumentType=false, reportFunctionMemberAccess=false
import argparse
import json
import time
import urllib.request
from pathlib import Path
from typing import Any

import ray
from ray import serve
from ray.serve.config import RequestRouterConfig

from tests.scripted_vllm import BLOCK, ScriptedVllm, stored

SYSTEM = list(range(1_000, 1_000 + 32 * BLOCK))


class Replica:
    """One replica; with `events` it publishes as an engine does."""

    def __init__(self, events: bool) -> None:
        self._name: str = serve.get_replica_context().replica_id.unique_id
        self._engine = ScriptedVllm() if events else None
        self._started = False

    async def _publisher(self) -> ScriptedVllm | None:
        if self._engine is not None and not self._started:
            self._started = True
            await self._engine.start()
        return self._engine

    async def record_routing_stats(self) -> dict[str, Any]:
        engine = await self._publisher()
        if engine is None:
            return {}
        told = {"endpoint": engine.endpoint, "replay_endpoint": engine.replay}
        return {"kv_event_metadata": told}

    async def completions(self, request: dict[str, Any]) -> str:
        return self._name

    async def publish(self, tokens: list[int]) -> str:
        engine = await self._publisher()
        assert engine is not None
        await engine.publish(stored(tokens))
        return self._name


def turns(handle: Any, conversations: int) -> list[list[str]]:
    """Return for each conversation which replica answered each of four growing prompts."""
    served: list[list[str]] = [[] for _ in range(conversations)]
    for turn in range(4):
        prompts = [
            [number * 10_000 + at for at in range(320 * (turn + 1))]
            for number in range(conversations)
        ]
        calls = [handle.completions.remote({"prompt": prompt}) for prompt in prompts]
        for answers, call in zip(served, calls, strict=True):
            answers.append(call.result(timeout_s=60))
    return served


def held(handle: Any) -> dict[str, Any]:
    """Return who said that it holds a prompt, and who got six requests that begin with it.

    One after the other and alike: a prefix in demand would be copied to other replicas.
    """
    holder = handle.publish.remote(SYSTEM).result(timeout_s=60)
    deadline = time.monotonic() + 60
    request = {"prompt": [*SYSTEM, *range(20)]}
    got: list[str] = []
    while got[-6:] != [holder] * 6 and time.monotonic() < deadline:
        got.append(handle.completions.remote(request).result(timeout_s=60))
        time.sleep(0.05)  # the replicas tell Ray once in half a second where they publish
    return {"holder": holder, "got": got[-6:]}


def exported() -> dict[str, float]:
    """Return our series on Ray's own metrics page: the sum of each name over its labels."""
    port = ray.nodes()[0]["MetricsExportPort"]
    deadline = time.monotonic() + 60
    found: dict[str, float] = {}
    while "ray_kvstore_route_seconds_count" not in str(found) and time.monotonic() < deadline:
        time.sleep(0.5)
        try:
            with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=5) as page:
                lines = page.read().decode().splitlines()
        except OSError:
            continue  # Ray's agent starts after its node
        found = {}
        for line in lines:
            if line.startswith("ray_kvstore_"):
                name = line.partition("{")[0]
                found[name] = found.get(name, 0.0) + float(line.rpartition(" ")[2])
    return found


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--temporary", required=True)
    parser.add_argument("--found", type=Path, required=True)
    parser.add_argument("--events", action="store_true")
    chosen = parser.parse_args()
    ray.init(
        address="local", num_cpus=4, include_dashboard=False, object_store_memory=80 << 20,
        _temp_dir=chosen.temporary, log_to_driver=False, configure_logging=False,
        _system_config={"metrics_report_interval_ms": 1_000},
    )  # fmt: skip
    router = RequestRouterConfig(
        request_router_class="kvstore.adapters.ray_serve.request_router.KvStoreRequestRouter",
        request_router_kwargs={"base_models": ["m"]},
        request_routing_stats_period_s=0.5,
    )
    deployment = serve.deployment(
        Replica, num_replicas=3, ray_actor_options={"num_cpus": 0}, max_ongoing_requests=8,
        request_router_config=router,
    )  # fmt: skip
    handle: Any = serve.run(deployment.bind(chosen.events), name="llm", route_prefix=None)
    if chosen.events:
        found: Any = held(handle)
    else:
        found = {"turns": turns(handle, 6), "metrics": exported()}
    chosen.found.write_text(json.dumps(found))
    serve.shutdown()
    ray.shutdown()


if __name__ == "__main__":
    main()
