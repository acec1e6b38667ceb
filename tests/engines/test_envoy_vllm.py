"""The whole way: a client, a real Envoy, `kvstore router --ext-proc`, and a real vLLM behind it.

Needs KVSTORE_VLLM_PYTHON and an Envoy (`make test-engines`); skipped without.
"""

import json
import os
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from kvworkers.models.provision import ensure_model

from tests.engines.envoy_process import BINARY, envoy, free_port
from tests.patience import until_so
from tests.processes import started

PYTHON = os.environ.get("KVSTORE_VLLM_PYTHON", "")
pytestmark = [
    pytest.mark.skipif(not (PYTHON and BINARY), reason="no environment with vLLM, or no Envoy"),
    pytest.mark.timeout(900),
]
SYSTEM = "You are the librarian of a cache of keys and values. Answer in one short sentence. " * 12


class Vllm:
    """A vLLM server that publishes its events on Unix sockets."""

    def __init__(self, model: Path, folder: str) -> None:
        self.address = f"127.0.0.1:{free_port()}"
        self.events, self.replay = f"ipc://{folder}/events", f"ipc://{folder}/replay"
        events = {
            "enable_kv_cache_events": True, "publisher": "zmq",
            "endpoint": self.events, "replay_endpoint": self.replay,
        }  # fmt: skip
        command = [
            PYTHON, "-m", "vllm.entrypoints.openai.api_server", "--model", str(model),
            "--served-model-name", "smol", "--dtype", "float32", "--block-size", "32",
            "--enforce-eager", "--max-model-len", "2048", "--host", "127.0.0.1",
            "--port", self.address.rpartition(":")[2], "--enable-prompt-tokens-details",
            "--prefix-caching-hash-algo", "sha256_cbor", "--kv-events-config", json.dumps(events),
        ]  # fmt: skip
        quiet = {
            "HF_HUB_OFFLINE": "1", "VLLM_NO_USAGE_STATS": "1", "VLLM_CPU_KVCACHE_SPACE": "1",
        }  # fmt: skip
        with Path(folder, "log").open("wb") as log:
            self.process = subprocess.Popen(
                command, stdout=log, stderr=log, env=os.environ | quiet, cwd=folder
            )

    def serves(self) -> bool:
        assert self.process.poll() is None, "vLLM ended"
        try:
            return httpx.get(f"http://{self.address}/health", trust_env=False).status_code == 200
        except httpx.TransportError:
            return False


@pytest.fixture
def vllm() -> Iterator[Vllm]:
    with tempfile.TemporaryDirectory(prefix="kv", dir="/tmp") as folder:  # sockets' names are long
        engine = Vllm(ensure_model(), folder)
        try:
            until_so(engine.serves, seconds=600)
            yield engine
        finally:
            engine.process.terminate()
            engine.process.wait(60)


def test_the_picker_sees_conversations_as_the_engine_does(vllm: Vllm, tmp_path: Path) -> None:
    arguments = [
        "-m", "kvstore.cli.main", "router", "--json", "--metrics", "127.0.0.1:0",
        "--ext-proc", "127.0.0.1:0", "--tokenizer", str(ensure_model()), "--base-model", "smol",
        "--vllm", f"engine={vllm.address},{vllm.events},{vllm.replay}",
        "--vllm-hash", "sha256_cbor",
    ]  # fmt: skip
    mode = "FULL_DUPLEX_STREAMED"
    with (
        started(arguments) as router,
        envoy(tmp_path, router.ready["ext_proc"], mode) as url,
        httpx.Client(trust_env=False, timeout=180) as http,
    ):

        def metric(line: str) -> float:
            text = http.get(f"http://{router.ready['metrics']}/metrics").text
            rows = [row for row in text.splitlines() if row.startswith(line + " ")]
            return float(rows[0].rpartition(" ")[2]) if rows else 0.0

        until_so(lambda: metric('kvstore_workers{state="live"}') == 1, seconds=30)
        until_so(lambda: _up(http, url), seconds=30)
        cached = 0
        for question in ("Name a river.", "Name a colour.", "Name a city."):
            cached = _cached(http, url, question)
            until_so(lambda: metric("kvstore_view_blocks") >= 14, seconds=30)
        assert cached >= 192  # of 235: whole blocks of 32
        actual = 'kvstore_routed_hit_tokens_total{kind="actual"}'
        until_so(lambda: metric(actual) == 2 * cached, seconds=30)
        # Every hash is that of our tokens, and what was predicted is what was found.
        assert metric('kvstore_event_source_faults_total{error="hash",source="vllm"}') == 0
        assert metric('kvstore_routed_hit_tokens_total{kind="predicted"}') == 2 * cached


def _up(http: httpx.Client, url: str) -> bool:
    try:
        return http.get(f"{url}/v1/models").status_code == 200
    except httpx.TransportError:
        return False


def _cached(http: httpx.Client, url: str, question: str) -> int:
    turns = [{"role": "system", "content": SYSTEM}, {"role": "user", "content": question}]
    body = {"model": "smol", "messages": turns, "max_tokens": 4, "temperature": 0}
    answer = http.post(f"{url}/v1/chat/completions", json=body)
    assert answer.status_code == 200, answer.text
    details: dict[str, Any] = answer.json()["usage"]["prompt_tokens_details"]
    return int(details["cached_tokens"])
