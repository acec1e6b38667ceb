"""A real vLLM in a process of its own, in its own environment: one JSON object a line each way.

python vllm_process.py MODEL CONNECTOR_CONFIG_OR_- KV_ROLE
→ {"connector": false}                             ← {"connector": false}
→ {"prompts": [[token, …], …], "max_tokens": 8}    ← {"replies": [{"tokens", "cached", "s"}, …]}
"""

# pyright: reportMissingImports=false
import json
import os
import sys
import time
from typing import Any, TextIO


def main() -> None:
    replies = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what vLLM prints is no reply
    model, connector, role = sys.argv[1:4]
    from vllm import LLM

    extra: dict[str, Any] = {}
    if connector != "-":
        extra["kv_transfer_config"] = {
            "kv_connector": "KvStoreConnector",
            "kv_connector_module_path": "kvstore.adapters.vllm.connector",
            "kv_role": role,
            "kv_load_failure_policy": "recompute",
            "kv_connector_extra_config": json.loads(connector),
        }
    engine = LLM(
        model, dtype="float32", block_size=32, enforce_eager=True, max_model_len=4096,
        disable_log_stats=False, seed=0, **extra,
    )  # fmt: skip
    say(replies, {"ready": True})
    for line in sys.stdin:
        say(replies, serve(engine, json.loads(line)))


def say(replies: TextIO, answer: dict[str, Any]) -> None:
    replies.write(json.dumps(answer) + "\n")
    replies.flush()


def serve(engine: Any, order: dict[str, Any]) -> dict[str, Any]:
    """Carry out one order."""
    from vllm import SamplingParams

    if order.get("forget"):
        return {"forgot": engine.reset_prefix_cache()}
    if "connector" in order:
        return {"connector": switched(engine, order["connector"])}
    if order.get("metrics"):
        return {"metrics": counted()}
    sampling = SamplingParams(temperature=0.0, max_tokens=order["max_tokens"], ignore_eos=True)
    prompts = [{"prompt_token_ids": tokens} for tokens in order["prompts"]]
    began = time.perf_counter()
    if order.get("together"):
        outputs = engine.generate(prompts, sampling, use_tqdm=False)
        spent = [time.perf_counter() - began] * len(prompts)
    else:
        outputs, spent = [], []
        for prompt in prompts:
            began = time.perf_counter()
            outputs += engine.generate([prompt], sampling, use_tqdm=False)
            spent.append(time.perf_counter() - began)
    return {
        "replies": [
            {"tokens": list(out.outputs[0].token_ids), "cached": out.num_cached_tokens, "s": s}
            for out, s in zip(outputs, spent, strict=True)
        ]
    }


_KEPT: dict[str, Any] = {}


def switched(engine: Any, on: bool) -> bool:
    """Take the connector out of an idle engine, or put it back; say whether it is in.

    Without it scheduler and worker do what they do where none was configured. Needs
    VLLM_ENABLE_V1_MULTIPROCESSING=0: the engine's core has to be in this process.
    """
    core = engine.llm_engine.engine_core.engine_core
    connector = _KEPT.setdefault("scheduler", core.scheduler.connector)
    core.scheduler.connector = connector if on else None
    core.model_executor.collective_rpc(switch_worker, args=(on,))
    return core.scheduler.connector is not None


def switch_worker(worker: Any, on: bool) -> None:
    """Do the same in a worker's process."""
    from vllm.distributed.kv_transfer import kv_transfer_state as state

    if not hasattr(state, "kept_by_test"):
        state.kept_by_test = state._KV_CONNECTOR_AGENT
    state._KV_CONNECTOR_AGENT = state.kept_by_test if on else None


def counted() -> dict[str, float]:
    """Return the connector's counters and vLLM's of external hits, as on its /metrics page."""
    from prometheus_client import REGISTRY

    found = {}
    for family in REGISTRY.collect():
        for sample in family.samples:
            if sample.name.startswith(("kvstore_vllm", "vllm:external_prefix")):
                found[sample.name + sample.labels.get("tier", "")] = sample.value
    return {name: value for name, value in found.items() if not name.endswith("_created")}


if __name__ == "__main__":
    main()
