"""A whole cluster on its host's address: mutual TLS and tokens between all of its parts."""

import json
import os
import secrets
import ssl
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import pytest

from tests.cluster_process import KVSTORE
from tests.patience import PATIENCE_S
from tests.security_fixture import TOKENS, Secured, secured

pytestmark = [pytest.mark.e2e, pytest.mark.slow, pytest.mark.timeout(400)]


@dataclass
class Guarded:
    """The cluster, its rules, and files that show one identity each."""

    rules: Secured
    facts: dict[str, Any]

    def shows(self, name: str) -> Path:
        """Return a security file whose token is that of `name`."""
        directory = self.rules.directory
        (directory / f"{name}.token").write_text(TOKENS[name])
        file = directory / f"{name}.toml"
        file.write_text(self.rules.file.read_text().replace("cluster.token", f"{name}.token"))
        return file

    def run(self, *words: str) -> "subprocess.CompletedProcess[str]":
        return subprocess.run(
            [*KVSTORE, *words, "--name", self.facts["name"]],
            capture_output=True, text=True, timeout=300, check=False,
        )  # fmt: skip

    def http(self, name: str) -> httpx.Client:
        directory = self.rules.directory
        trusting = ssl.create_default_context(cafile=str(self.rules.ca))
        trusting.load_cert_chain(directory / "server.pem", directory / "server.key")
        return httpx.Client(
            base_url=self.facts["http"], verify=trusting, trust_env=False, timeout=PATIENCE_S,
            headers={"authorization": f"Bearer {TOKENS[name]}"},
        )  # fmt: skip


@pytest.fixture(scope="module")
def guarded(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Guarded]:
    rules = secured(tmp_path_factory.mktemp("rules"), mutual=True)
    # The certificate does not know this host's address, as few do.
    rules.file.write_text('server_name = "server"\n' + rules.file.read_text())
    name = f"test-{secrets.token_hex(4)}"
    made = Guarded(rules, {"name": name})
    up = subprocess.run(
        [*KVSTORE, "up", "--detach", "--json", "--name", name, "--http", "127.0.0.1:0",
         "--arena", "128MiB", "--pool", "128MiB", "--workers", "1", "--listen", "host",
         "--security", str(rules.file)],
        capture_output=True, text=True, timeout=300, check=False,
    )  # fmt: skip
    assert up.returncode == 0, up.stderr
    made.facts = json.loads(up.stdout)
    yield made
    assert made.run("down").returncode == 0
    Path(made.facts["log"]).unlink()


def test_it_serves_who_it_knows_and_nobody_else(guarded: Guarded) -> None:
    assert guarded.facts["http"].startswith("https://")
    body = {
        "model": guarded.facts["model"], "max_tokens": 4, "temperature": 0,
        "messages": [{"role": "user", "content": "Name a river. " + "word " * 60}],
    }  # fmt: skip

    def cached(name: str) -> int:
        with guarded.http(name) as http:
            reply = http.post("/v1/chat/completions", json=body)
            assert reply.status_code == 200, reply.text
            return sum(reply.json()["kvstore"]["cached_tokens"].values())

    assert cached("team-a") == 0
    assert cached("team-a") > 0, "its own prompt is a hit"
    assert cached("team-b") == 0, "the other tenant's is not"
    with guarded.http("operator") as http:
        assert http.post("/v1/chat/completions", json=body).status_code == 403


def test_orders_need_the_admin_role_and_leave_a_line(guarded: Guarded) -> None:
    assert guarded.run("status").returncode == 1, "without credentials nothing answers"
    shown = guarded.run("status", "--security", str(guarded.rules.file))
    assert shown.returncode == 0, shown.stderr
    refused = guarded.run("restart", "worker-0", "--security", str(guarded.rules.file))
    assert refused.returncode == 1
    assert "cluster lacks the role admin" in refused.stderr
    done = guarded.run("restart", "worker-0", "--security", str(guarded.shows("operator")))
    assert done.returncode == 0, done.stderr
    lines = [json.loads(line) for line in guarded.rules.audit_log.read_text().splitlines()]
    assert [(line["principal"], line["outcome"]) for line in lines] == [
        ("cluster", "Forbidden"),
        ("operator", "ok"),
    ]


def test_top_and_targets_see_every_part_over_mutual_tls(guarded: Guarded) -> None:
    def kvstore(*words: str) -> "subprocess.CompletedProcess[str]":
        return subprocess.run(
            [*KVSTORE, *words, "--cluster", guarded.facts["name"]],
            capture_output=True, text=True, timeout=PATIENCE_S, check=False,
        )  # fmt: skip

    top = kvstore("top", "--once", "--json", "--security", str(guarded.shows("monitor")))
    assert top.returncode == 0, top.stderr
    shown = json.loads(top.stdout)
    assert shown["unreachable"] == [] and shown["requests"]["prompt_tokens"] > 0
    assert len(shown["nodes"]) == len(shown["workers"]) == 1
    listed = json.loads(kvstore("targets", "--security", str(guarded.rules.file)).stdout)
    assert len(listed) == 4 and all(t["labels"]["__scheme__"] == "https" for t in listed)
    without = kvstore("top", "--once")
    assert without.returncode == 2 and "--security FILE" in without.stderr


def test_no_token_is_in_any_log_of_the_cluster(guarded: Guarded) -> None:
    logs = [Path(guarded.facts["log"]), *Path(guarded.facts["run_dir"]).rglob("*.log")]
    assert len(logs) > 3, "Ray's logs are there too"
    for log in logs:
        text = log.read_text(errors="replace")
        assert not any(token in text for token in TOKENS.values()), log
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit() and entry.name != str(os.getpid()):
            try:
                line = (entry / "cmdline").read_text(errors="replace")
            except OSError:
                continue
            assert not any(token in line for token in TOKENS.values())
