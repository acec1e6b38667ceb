"""A real vLLM in a process of its own, in its own environment: one JSON object a line each way.

python vllm_process.py MODEL CONNECTOR_CONFIG_OR_- KV_ROLE ENGINE_ARGUMENTS
→ {"arm": "off"}                                   ← {"arm": "off"}
→ {"loop": [[token, …], …], "replies", "clients"}  ← {"s", "cpu_s", "steps"}
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
    model, connector, role, arguments = sys.argv[1:5]
    from vllm import LLM

    extra: dict[str, Any] = json.loads(arguments)
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
    if "arm" in order or "loop" in order:
        from tests.engines import vllm_arms

        if "arm" in order:
            return {"arm": vllm_arms.take_arm(engine, order["arm"])}
        return vllm_arms.closed_loop(engine, order["loop"], order["replies"], order["clients"])
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
