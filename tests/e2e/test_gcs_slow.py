"""Ray's control store is lost and comes back out of a real Redis: requests never notice."""

import json
import os
import secrets
import shutil
import signal
import socket
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from tests.cluster_process import KVSTORE, MARK, eventually
from tests.exactness import Reference
from tests.inference_client import generate
from tests.patience import PATIENCE_S
from tests.raylets import Raylets, raylets

pytestmark = [
    pytest.mark.e2e, pytest.mark.slow, pytest.mark.timeout(600),
    pytest.mark.skipif(shutil.which("redis-server") is None, reason="no redis-server here"),
]  # fmt: skip

GRPC = 21_840


@contextmanager
def redis(directory: Path) -> Iterator[str]:
    """Run a Redis on loopback that keeps nothing on disk; yields its address."""
    with socket.create_server(("127.0.0.1", 0)) as probe:
        port = probe.getsockname()[1]
    process = subprocess.Popen(
        ["redis-server", "--bind", "127.0.0.1", "--port", str(port), "--save", "", "--dir",
         str(directory)], stdout=subprocess.DEVNULL,
    )  # fmt: skip
    try:

        def answers() -> bool:
            with socket.socket() as probe:
                return probe.connect_ex(("127.0.0.1", port)) == 0

        eventually(answers, what="redis answers")
        yield f"127.0.0.1:{port}"
    finally:
        process.terminate()
        process.wait(PATIENCE_S)


def status(ray: Raylets, name: str) -> dict[str, Any]:
    done = subprocess.run(
        [*KVSTORE, "status", "--json", "--name", name], env=ray.environment,
        capture_output=True, text=True, timeout=PATIENCE_S, check=False,
    )  # fmt: skip
    found: dict[str, Any] = json.loads(done.stdout) if done.stdout else {"ready": False}
    return found


def test_requests_go_on_without_the_control_store_and_healing_with_it(
    tmp_path: Path, reference: Reference
) -> None:
    name = f"test-{secrets.token_hex(4)}"
    mark = {MARK: secrets.token_hex(8)}
    with redis(tmp_path) as address, raylets(1, mark=mark, redis=address) as ray:
        up = subprocess.run(
            [*KVSTORE, "up", "--detach", "--json", "--name", name, "--address", ray.address,
             "--http", f"127.0.0.1:{GRPC + 1}", "--grpc", f"127.0.0.1:{GRPC}", "--workers", "1",
             "--arena", "128MiB", "--pool", "128MiB"],
            env=ray.environment, capture_output=True, text=True, timeout=300, check=False,
        )  # fmt: skip
        assert up.returncode == 0, up.stderr
        facts = json.loads(up.stdout)
        try:
            check(ray, name, f"127.0.0.1:{GRPC}", reference)
        finally:
            subprocess.run(
                [*KVSTORE, "down", "--name", name], env=ray.environment, timeout=120, check=False,
            )  # fmt: skip
            Path(facts["log"]).unlink()


def check(ray: Raylets, name: str, address: str, reference: Reference) -> None:
    prompt = reference.chat(("user", "Name a river."))
    expected = generate(address, prompt, max_tokens=8).tokens
    before = {part["name"]: part["pid"] for part in status(ray, name)["parts"]}
    ray.order("gcs-down")
    began = time.monotonic()
    while time.monotonic() - began < 15:  # longer than a look for hosts waits for its answer
        assert generate(address, prompt, max_tokens=8).tokens == expected
    ray.order("gcs-up")
    assert generate(address, prompt, max_tokens=8).tokens == expected
    eventually(lambda: status(ray, name)["ready"], what="the controller goes on")
    os.kill(before["worker-0"], signal.SIGKILL)

    def healed() -> bool:
        found = status(ray, name)
        pids = {part["name"]: part["pid"] for part in found.get("parts", [])}
        return bool(found["ready"]) and pids["worker-0"] != before["worker-0"]

    eventually(healed, seconds=180, what="a worker that dies later is brought back")
    assert generate(address, prompt, max_tokens=8).tokens == expected
