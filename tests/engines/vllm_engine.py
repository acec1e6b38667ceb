"""A handle on a real vLLM in a process of its own: what tests and benchmarks ask it through."""

import json
import os
import selectors
import signal
import subprocess
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
START_S = 300.0
REPLY_S = 400.0
STORED_S = 20.0


class Engine:
    """A vLLM process, with our connector where it is given a node's run directory."""

    def __init__(
        self, python: str, model: Path, log: Path, run_dir: Path | None = None,
        role: str = "kv_both", more: Mapping[str, str] | None = None, *,
        settings: Mapping[str, Any] | None = None, arguments: Mapping[str, Any] | None = None,
    ) -> None:  # fmt: skip
        """Start it with `python` of vLLM's environment and `more` in its own; wait.

        `settings` are further ones of the connector, `arguments` further ones of vLLM's `LLM`.
        """
        connector = json.dumps({"run_dir": str(run_dir), **(settings or {})}) if run_dir else "-"
        environment = {
            **os.environ, "PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1",
            "VLLM_NO_USAGE_STATS": "1", "VLLM_CPU_KVCACHE_SPACE": "1", **(more or {}),
        }  # fmt: skip
        script = Path(__file__).with_name("vllm_process.py")
        command = [
            python, str(script), str(model), connector, role, json.dumps(arguments or {})
        ]  # fmt: skip
        with log.open("wb") as errors:
            self._process = subprocess.Popen(
                command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=errors,
                env=environment, start_new_session=True,
            )  # fmt: skip
        self._log = log
        self._read(START_S)

    @property
    def pid(self) -> int:
        """The process that was started; the engine's core is a child of it."""
        return self._process.pid

    def ask(self, **order: Any) -> Any:
        """Give an order (`vllm_process.serve` says which) and return the answer."""
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps(order).encode() + b"\n")
        self._process.stdin.flush()
        return self._read(REPLY_S)

    def replies(self, prompts: list[list[int]], max_tokens: int = 8, **more: Any) -> list[Any]:
        """Return the tokens, cached tokens and seconds of each prompt."""
        answer = self.ask(prompts=prompts, max_tokens=max_tokens, **more)
        found: list[Any] = answer["replies"]
        return found

    def forget(self) -> None:
        """Empty vLLM's own prefix cache: what it knows next comes from the node.

        vLLM refuses while blocks are in use; a finished request's are until its stores have ended.
        """
        ends = time.monotonic() + STORED_S
        while not self.ask(forget=True)["forgot"]:
            assert time.monotonic() < ends, "blocks are still in use: stores do not end"
            time.sleep(0.05)

    def close(self) -> None:
        """End the process; by force where it does not come to an end."""
        assert self._process.stdin is not None and self._process.stdout is not None
        self._process.stdin.close()
        try:
            self._process.wait(60)
        except subprocess.TimeoutExpired:
            os.killpg(self._process.pid, signal.SIGKILL)  # its core is a process of its own
            self._process.wait(10)
        self._process.stdout.close()

    def _read(self, seconds: float) -> Any:
        assert self._process.stdout is not None
        received = b""
        ends = time.monotonic() + seconds
        with selectors.DefaultSelector() as selector:
            selector.register(self._process.stdout, selectors.EVENT_READ)
            while not received.endswith(b"\n"):
                ready = selector.select(max(0.0, ends - time.monotonic()))
                chunk = os.read(self._process.stdout.fileno(), 1 << 16) if ready else b""
                assert chunk, f"no answer from vLLM\n{self._log.read_text()[-4000:]}"
                received += chunk
        return json.loads(received)
