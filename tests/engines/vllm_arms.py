"""What the miss benchmark changes and counts inside a running vLLM (`vllm_process.py` calls it).

An arm says which connector the idle engine has: `off` none, as where none was configured; `null`
one that does nothing, so that only vLLM's own way round a connector is left; `ask` ours without
stores, as with `kv_consumer`; `store` ours with stores. Needs VLLM_ENABLE_V1_MULTIPROCESSING=0:
the engine's core has to be in this process.
"""

# vLLM lives in another environment than the tools that read this.
# pyright: reportMissingImports=false
import threading
import time
from collections import Counter
from pathlib import Path
from typing import Any, Final

from vllm import SamplingParams
from vllm.distributed.kv_transfer import kv_transfer_state
from vllm.distributed.kv_transfer.kv_connector.v1.base import (
    KVConnectorBase_V1,
    KVConnectorMetadata,
    KVConnectorRole,
    SupportsHMA,
)

ARMS: Final = ("off", "null", "ask", "store")
DRAIN_S: Final = 10.0
_STEPS: "Counter[str]" = Counter()
_KEPT: dict[str, Any] = {}


class NullConnector(KVConnectorBase_V1, SupportsHMA):  # type: ignore[misc]
    """Finds nothing, moves nothing, keeps nothing."""

    def start_load_kv(self, forward_context: Any, **kwargs: Any) -> None:
        pass

    def wait_for_layer_load(self, layer_name: str) -> None:
        pass

    def save_kv_layer(self, layer_name: str, *arguments: Any, **kwargs: Any) -> None:
        pass

    def wait_for_save(self) -> None:
        pass

    def get_num_new_matched_tokens(self, request: Any, num_computed: int) -> tuple[int, bool]:
        return 0, False

    def update_state_after_alloc(self, request: Any, blocks: Any, tokens: int) -> None:
        pass

    def build_connector_meta(self, scheduler_output: Any) -> KVConnectorMetadata:
        return KVConnectorMetadata()

    def request_finished_all_groups(self, request: Any, block_ids: Any) -> tuple[bool, None]:
        return False, None


def take_arm(engine: Any, arm: str) -> str:
    """Give an idle engine the arm's connector, in scheduler and worker; return the arm."""
    core = engine.llm_engine.engine_core.engine_core
    scheduler = core.scheduler
    if not _KEPT:
        ours = scheduler.connector
        _KEPT["ours"] = ours, kv_transfer_state._KV_CONNECTOR_AGENT
        _KEPT["null"] = tuple(
            NullConnector(ours._vllm_config, role, ours._kv_cache_config)
            for role in (KVConnectorRole.SCHEDULER, KVConnectorRole.WORKER)
        )
        _count_steps(scheduler)
    if arm in ("ask", "store"):
        _KEPT["ours"][0]._scheduler._stores = arm == "store"
    pair = {"off": (None, None), "null": _KEPT["null"]}.get(arm, _KEPT["ours"])
    scheduler.connector, kv_transfer_state._KV_CONNECTOR_AGENT = pair
    return arm


def _count_steps(scheduler: Any) -> None:
    plan = scheduler.schedule

    def schedule(*arguments: Any, **named: Any) -> Any:
        output = plan(*arguments, **named)
        _STEPS["computed" if output.total_num_scheduled_tokens else "empty"] += 1
        return output

    scheduler.schedule = schedule


def closed_loop(
    engine: Any, prompts: list[list[int]], replies: list[int], clients: int
) -> dict[str, Any]:
    """Serve the prompts, `clients` at a time, each client sending its next when one is answered.

    Returns seconds until all is answered and stored, the steps of the engine, and CPU seconds of
    this process by what its threads do.
    """
    llm = engine.llm_engine
    core = llm.engine_core.engine_core
    waiting = list(zip(prompts, replies, strict=True))[::-1]
    _STEPS.clear()
    before, began = thread_seconds(), time.perf_counter()
    out = 0
    while waiting or out:
        while waiting and out < clients:
            tokens, reply = waiting.pop()
            sampling = SamplingParams(temperature=0.0, max_tokens=reply, ignore_eos=True)
            llm.add_request(f"r{len(waiting)}", {"prompt_token_ids": tokens}, sampling)
            out += 1
        out -= sum(one.finished for one in llm.step())
    ends = time.perf_counter() + DRAIN_S
    while core.scheduler.has_requests() and time.perf_counter() < ends:
        llm.step()
    seconds = time.perf_counter() - began
    spent = {kind: s - before.get(kind, 0.0) for kind, s in thread_seconds().items()}
    return {"s": seconds, "cpu_s": spent, "steps": dict(_STEPS)}


def thread_seconds() -> dict[str, float]:
    """Return the CPU seconds of this process's threads: engine, connector, its copies, gRPC."""
    ours = {thread.native_id: thread.name for thread in threading.enumerate()}
    spent: dict[str, float] = dict.fromkeys(("engine", "connector", "copies", "grpc"), 0.0)
    for task in Path("/proc/self/task").iterdir():
        try:
            nanoseconds = int((task / "schedstat").read_text().split()[0])
            command = (task / "comm").read_text()
        except FileNotFoundError:  # it ended meanwhile
            continue
        name = ours.get(int(task.name), "")
        if name.startswith(("kvstore-store", "kvstore-load")):
            kind = "copies"
        elif name.startswith(("kvstore", "asyncio")):
            kind = "connector"
        elif command.startswith(("event_engine", "grpc", "lifeguard")) or "poll_wrapper" in name:
            kind = "grpc"
        else:
            kind = "engine"
        spent[kind] += nanoseconds / 1e9
    return spent
