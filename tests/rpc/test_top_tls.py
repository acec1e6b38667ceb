"""`kvstore top` and `kvstore targets` where metrics come over TLS, to who shows what they ask."""

import asyncio
import json
import shutil
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import pytest
import yaml
from kvworkers.frontends.server import FrontendConfig, serving
from prometheus_client import CollectorRegistry

from kvstore.cli.main import run
from kvstore.observe.metrics import NodeMetrics
from kvstore.rpc.metrics_port import serve_metrics
from tests.byte_tokenizer import make_byte_tokenizer
from tests.cluster_process import eventually
from tests.prometheus_process import ask, prometheus_process
from tests.security_fixture import TOKENS, Secured, secured
from tests.watching import PROMETHEUS


@pytest.fixture
def rules(tmp_path: Path) -> Secured:
    return secured(tmp_path, mutual=True)


@pytest.fixture
def node(rules: Secured) -> Iterator[str]:
    """A part's metrics port; yields its address."""
    registry = CollectorRegistry()
    metrics = NodeMetrics(registry)
    metrics.info.labels("node-a").set(1)
    metrics.capacity_bytes.labels("dram").set(4 << 20)
    port = serve_metrics("--metrics", "127.0.0.1:0", registry, rules.config)
    yield port.address
    port.close()


@pytest.fixture
async def frontend(tmp_path: Path, rules: Secured) -> AsyncIterator[str]:
    model = make_byte_tokenizer(tmp_path / "model")
    async with serving(FrontendConfig(model=model, security=rules.file)) as server:
        yield server.http_address


def shows(rules: Secured, name: str) -> str:
    """Return a security file whose token is that of `name`."""
    (rules.directory / f"{name}.token").write_text(TOKENS[name])
    file = rules.directory / f"{name}.toml"
    file.write_text(rules.file.read_text().replace("cluster.token", f"{name}.token"))
    return str(file)


def test_top_looks_over_mutual_tls(
    rules: Secured, node: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(["top", "--once", "--json", "--security", str(rules.file), node]) == 0
    shown = json.loads(capsys.readouterr().out)
    assert [one["name"] for one in shown["nodes"]] == ["node-a"] and not shown["unreachable"]


def test_the_name_in_the_certificate_may_be_another_than_the_address(
    rules: Secured, node: str, capsys: pytest.CaptureFixture[str]
) -> None:
    named = rules.directory / "named.toml"
    for name, status in (("server", 0), ("elsewhere.example", 1)):
        named.write_text(f'server_name = "{name}"\n' + rules.file.read_text())
        assert run(["top", "--once", "--security", str(named), node]) == status
    assert "elsewhere.example" in capsys.readouterr().err


def test_without_what_to_trust_it_says_which_flag_is_missing(
    node: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(["top", "--once", f"https://{node}"]) == 2
    assert "--security FILE" in capsys.readouterr().err
    assert run(["top", "--once", node]) == 1, "and in the clear nothing answers"


async def test_a_frontend_wants_the_watch_role_as_well(
    rules: Secured, frontend: str, capsys: pytest.CaptureFixture[str]
) -> None:
    def top(name: str) -> int:
        return run(["top", "--once", "--json", "--security", shows(rules, name), frontend])

    assert await asyncio.to_thread(top, "monitor") == 0
    assert json.loads(capsys.readouterr().out)["unreachable"] == []
    assert await asyncio.to_thread(top, "team-a") == 1
    said = capsys.readouterr().err
    assert "answered 403" in said and "`watch`" in said
    assert TOKENS["team-a"] not in said


def test_targets_say_that_they_speak_tls(
    rules: Secured, node: str, capsys: pytest.CaptureFixture[str]
) -> None:
    for arguments in (["--security", str(rules.file), node], [f"https://{node}"]):
        assert run(["targets", *arguments]) == 0
        (listed,) = json.loads(capsys.readouterr().out)
        assert listed["labels"]["__scheme__"] == "https" and listed["targets"] == [node]
    assert run(["targets", node]) == 0
    assert "__scheme__" not in json.loads(capsys.readouterr().out)[0]["labels"]


def test_prometheus_scrapes_them_with_our_file(
    rules: Secured, node: str, capsys: pytest.CaptureFixture[str]
) -> None:
    directory = rules.directory
    config = yaml.safe_load((PROMETHEUS / "prometheus-tls.yml").read_text())
    config["global"] = {"scrape_interval": "1s", "evaluation_interval": "1s"}
    del config["rule_files"]
    (directory / "prometheus.yml").write_text(yaml.safe_dump(config))
    (directory / "targets").mkdir()
    assert run(["targets", f"https://{node}"]) == 0
    (directory / "targets" / "kvstore.json").write_text(capsys.readouterr().out)
    (directory / "monitor.token").write_text(TOKENS["monitor"])
    for kind in ("pem", "key"):
        shutil.copy(directory / f"server.{kind}", directory / f"monitor.{kind}")
    with prometheus_process(directory) as address:
        eventually(lambda: ask(address, "up == 1"), what="the part is scraped")
        assert ask(address, "kvstore_tier_capacity_bytes")[0]["metric"]["tier"] == "dram"
