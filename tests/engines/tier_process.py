"""vLLM's own tiering manager over our tier, without a GPU: a role a process, in vLLM's environment.

python tier_process.py ROLE TIER_CONFIG: `store` fills chunks through the manager, `load` brings
them back, `miss` asks for what nobody stored, `events` stores, has the node cleared, and says what
vLLM would publish. Prints one JSON line. `serve` reads orders, one JSON object a line, until its
input ends, and answers each with a line: {"store": [number, …]}, {"load": [number, …]}.
"""

# pyright: reportMissingImports=false
import json
import os
import sys
import time
from typing import Any

import numpy as np

CHUNKS, ROW = 16, 64 << 10


def main() -> None:
    replies = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what vLLM prints is no reply
    role, tier = sys.argv[1], json.loads(sys.argv[2])
    manager, view = manager_over(tier, events=role == "events")
    try:
        if role == "serve":
            serve(manager, view, replies)
            return
        roles = {"store": stored, "load": loaded, "miss": missed, "events": published}
        found = roles[role](manager, view)
        replies.write(json.dumps(found) + "\n")
        replies.flush()
    finally:
        del view  # vLLM unmaps what nobody looks at any more
        manager.shutdown()


def manager_over(tier: dict[str, Any], *, events: bool) -> tuple[Any, Any]:
    """Return what vLLM's scheduler has: spec, CPU tier and ours behind it."""
    from vllm.v1.kv_offload.config import (
        OffloadingCacheConfig,
        OffloadingConfig,
        OffloadingGroupConfig,
        OffloadingModelConfig,
        OffloadingParallelConfig,
    )
    from vllm.v1.kv_offload.tiering.spec import TieringOffloadingSpec

    extra = {"cpu_bytes_to_use": CHUNKS * ROW, "secondary_tiers": [tier]}
    config = OffloadingConfig(
        groups=(OffloadingGroupConfig(32, ("layer.0",), 0),),
        worker_kv_bytes_per_block=ROW, enable_kv_cache_events=events, extra_config=extra,
        engine_id=f"test-{os.getpid()}", model=OffloadingModelConfig("model", "bfloat16"),
        cache=OffloadingCacheConfig(32, 1),
        parallel=OffloadingParallelConfig(0, 1, 1, 1, 1, 1, 0, 1, None, True),
    )  # fmt: skip
    manager = TieringOffloadingSpec(config).get_manager()
    return manager, np.asarray(manager.primary_tier.get_kv_memoryview())


def keys(numbers: Any = range(8)) -> list[Any]:
    from vllm.v1.kv_offload.base import make_offload_key

    return [make_offload_key(number.to_bytes(2, "big") * 16, 0) for number in numbers]


def context(name: str) -> Any:
    from vllm.v1.kv_offload.base import ReqContext

    return ReqContext(req_id=name)


def step(manager: Any) -> None:
    """End one of the scheduler's steps."""
    from vllm.v1.kv_offload.base import ScheduleEndContext

    manager.on_schedule_end(ScheduleEndContext(new_req_ids=[], preempted_req_ids=[]))


def until(manager: Any, true: Any) -> float:
    """Step until something is so; return the seconds that took."""
    began = time.perf_counter()
    while not true():
        assert time.perf_counter() - began < 30
        step(manager)
        time.sleep(0.001)
    return time.perf_counter() - began


def row_of(number: int) -> bytes:
    return bytes((number * 37 + at) % 251 for at in range(ROW))


def stored(manager: Any, view: Any) -> dict[str, Any]:
    request = context("a")
    manager.on_new_request(request)
    output = manager.prepare_store(keys(), request)
    for number, chunk in enumerate(output.store_spec.chunk_ids):
        view[int(chunk)] = np.frombuffer(row_of(number), view.dtype)
    manager.complete_store(keys(), request)
    until(manager, lambda: not manager.has_pending_work())
    return {"stored": len(output.store_spec.chunk_ids)}


def loaded(manager: Any, view: Any) -> dict[str, Any]:
    from vllm.v1.kv_offload.base import LookupResult

    request = context("b")
    manager.on_new_request(request)
    first = manager.lookup(keys()[0], request).name
    seconds = until(
        manager,
        lambda: {manager.lookup(key, request) for key in keys()} == {LookupResult.HIT},
    )
    spec = manager.prepare_load(keys(), request)
    whole = [
        view[int(chunk)].tobytes() == row_of(number) for number, chunk in enumerate(spec.chunk_ids)
    ]
    manager.complete_load(keys(), request)
    return {"first": first, "whole": whole, "seconds": seconds}


def published(manager: Any, view: Any) -> dict[str, Any]:
    from vllm.distributed.kv_transfer.kv_connector.v1.offloading.events import (
        OffloadingEventsTracker,
    )
    from vllm.v1.kv_offload.base import OffloadingKVEventsConfig

    from kvstore.client.blocking import Client
    from kvstore.core.names import Namespace, NamespaceKind

    tracker = OffloadingEventsTracker(OffloadingKVEventsConfig(True, False))
    told: list[Any] = []

    def heard(kind: str) -> int:
        told.extend(one for one in tracker.take_events(manager.take_events()) if one.ownership)
        return sum(len(one.block_hashes) for one in told if type(one).__name__ == kind)

    stored(manager, view)
    until(manager, lambda: heard("BlockStored") == len(keys()))
    removed_before = heard("BlockRemoved")
    other = Namespace(weights_digest="any", kv_dtype="bf16", layers=1, kv_heads=1, head_dim=1,
                      kind=NamespaceKind.OPAQUE)  # fmt: skip
    where = json.loads(sys.argv[2])["run_dir"]
    with Client.connect(where, namespace=other, payload_bytes=ROW, shares=1) as client:
        client.clear(everything=True)
    seconds = until(manager, lambda: heard("BlockRemoved") == len(keys()))
    hashes = {
        kind: {block for one in told if type(one).__name__ == kind for block in one.block_hashes}
        for kind in ("BlockStored", "BlockRemoved")
    }
    return {
        "removed_before": removed_before,
        "same": hashes["BlockStored"] == hashes["BlockRemoved"],
        "places": sorted({(one.medium, one.locality, one.ownership) for one in told}),
        "seconds": seconds,
    }


def serve(manager: Any, view: Any, replies: Any) -> None:
    """Carry out orders. Chunks are more than the CPU tier holds, so loads come from the node."""
    for at, line in enumerate(sys.stdin):
        order = json.loads(line)
        request = context(f"r{at}")
        manager.on_new_request(request)
        work = put if "store" in order else fetch
        answer = work(manager, view, request, order.get("store") or order["load"])
        manager.on_request_finished(request)
        replies.write(json.dumps(answer) + "\n")
        replies.flush()


def put(manager: Any, view: Any, request: Any, numbers: list[int]) -> dict[str, Any]:
    """Store chunks, and wait until vLLM's cascade to the node has ended."""
    output = manager.prepare_store(keys(numbers), request)
    chunks = dict(zip(output.keys_to_store, output.store_spec.chunk_ids, strict=True))
    for number, key in zip(numbers, keys(numbers), strict=True):
        if key in chunks:
            view[int(chunks[key])] = np.frombuffer(row_of(number), view.dtype)
    if chunks:
        manager.complete_store(list(chunks), request)
    until(manager, lambda: not manager.has_pending_work())
    return {"stored": len(chunks)}


def fetch(manager: Any, view: Any, request: Any, numbers: list[int]) -> dict[str, Any]:
    """Look chunks up until vLLM knows, load those there; say how many, and how many are right."""
    from vllm.v1.kv_offload.base import LookupResult

    verdicts: dict[Any, Any] = {}
    slowest = 0.0

    def known() -> bool:
        nonlocal slowest
        for key in keys(numbers):
            began = time.perf_counter()
            verdicts[key] = manager.lookup(key, request)
            slowest = max(slowest, time.perf_counter() - began)
        return all(one in (LookupResult.HIT, LookupResult.MISS) for one in verdicts.values())

    until(manager, known)
    here = [n for n, key in zip(numbers, keys(numbers), strict=True)
            if verdicts[key] is LookupResult.HIT]  # fmt: skip
    right = 0
    if here:
        spec = manager.prepare_load(keys(here), request)
        rows = zip(here, spec.chunk_ids, strict=True)
        right = sum(view[int(chunk)].tobytes() == row_of(number) for number, chunk in rows)
        manager.complete_load(keys(here), request)
    return {"here": len(here), "right": right, "slowest_ms": slowest * 1e3}


def missed(manager: Any, view: Any) -> dict[str, Any]:
    from vllm.v1.kv_offload.base import LookupResult

    request = context("c")
    manager.on_new_request(request)
    slowest, verdicts = 0.0, []
    for key in keys():
        answer = LookupResult.RETRY
        while answer is LookupResult.RETRY:
            began = time.perf_counter()
            answer = manager.lookup(key, request)
            slowest = max(slowest, time.perf_counter() - began)
            step(manager)
            time.sleep(0.001)
        verdicts.append(answer.name)
    return {"verdicts": verdicts, "slowest_ms": slowest * 1e3}


if __name__ == "__main__":
    main()
