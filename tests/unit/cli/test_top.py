"""`kvstore top` and `kvstore targets` over real metrics pages, and the arithmetic beneath."""

import json
import os
from collections.abc import Iterator
from pathlib import Path

import pytest
from prometheus_client import CollectorRegistry, start_http_server

from kvstore.cli.main import run
from kvstore.cli.scrape import Figures, fetch, parse
from kvstore.cli.targets import Target, find_targets
from kvstore.cli.top_view import draw, summarise
from kvstore.core.errors import BadInput, NotFound, Unreachable
from kvstore.observe.metrics import NodeMetrics, RouterMetrics, WorkerMetrics, exposition
from kvstore.rpc.credentials import Credentials

HERE = Target("part", "node", "127.0.0.1:1")


@pytest.fixture
def registry() -> CollectorRegistry:
    """What a node, a frontend and a worker count after one request."""
    registry = CollectorRegistry()
    node, router, worker = NodeMetrics(registry), RouterMetrics(registry), WorkerMetrics(registry)
    node.info.labels("node-a").set(1)
    node.used_bytes.labels("dram").set(3 << 20)
    node.capacity_bytes.labels("dram").set(4 << 20)
    node.hit_blocks.labels("dram", "acme").inc(30)
    node.missed_blocks.labels("absent", "acme").inc(10)
    router.requests.labels("stop").inc(2)
    router.prompt_tokens.inc(1_000)
    router.cached_tokens.labels("dram").inc(600)
    router.domain_tokens.labels("acme", "prompt").inc(1_000)
    router.domain_tokens.labels("acme", "cached").inc(600)
    router.ttft_seconds.labels("yes").observe(0.25)
    worker.output_tokens.inc(40)
    worker.kv_capacity_bytes.set(1 << 20)
    return registry


@pytest.fixture
def address(registry: CollectorRegistry) -> Iterator[str]:
    server, thread = start_http_server(0, addr="127.0.0.1", registry=registry)
    yield f"127.0.0.1:{server.server_port}"
    server.shutdown()
    server.server_close()
    thread.join()


def page(registry: CollectorRegistry) -> Figures:
    return parse(exposition(registry)().decode(), HERE)


def test_one_look_adds_up_what_pages_say(registry: CollectorRegistry) -> None:
    shown = summarise({HERE: page(registry)}, {}, None)
    assert shown["requests"]["ended"] == {"stop": 2} and shown["requests"]["per_s"] is None
    assert shown["requests"]["hit_rate_by_tier"] == {"dram": 0.6}
    assert shown["requests"]["ttft_s"]["cached"] == 0.25
    (tier,) = shown["nodes"][0]["tiers"]
    assert shown["nodes"][0]["name"] == "node-a" and tier["hit_rate"] == 0.75
    assert shown["nodes"][0]["misses"] == {"absent": 10}
    assert shown["workers"][0]["output_tokens"] == 40
    assert shown["domains"] == [
        {"domain": "acme", "prompt_tokens": 1_000, "hit_rate": 0.6, "output_tokens": 0}
    ]


def test_later_looks_show_what_happened_in_between(registry: CollectorRegistry) -> None:
    before = {HERE: page(registry)}
    nothing = summarise({HERE: page(registry)}, before, 2.0)
    assert nothing["requests"]["prompt_tokens"] == 0 and nothing["requests"]["hit_rate"] is None
    grown = Figures([("kvstore_requests_total", {"outcome": "stop"}, 8.0)])
    assert summarise({HERE: grown}, before, 2.0)["requests"]["per_s"] == 3.0


def test_a_counter_that_fell_counts_from_zero() -> None:
    def figures(value: float) -> Figures:
        return Figures([("n_total", {"a": "b"}, value)])

    assert figures(7).since(figures(5)).total("n_total") == 2
    assert figures(3).since(figures(5)).total("n_total", a="b") == 3
    assert figures(3).since(Figures()).by("a", "n_total") == {"b": 3}


def test_pages_that_are_none_are_named(address: str) -> None:
    with pytest.raises(Unreachable, match="part at 127"):
        parse("<html>\n", HERE)
    with pytest.raises(Unreachable, match=r"part at 127\.0\.0\.1:1"):
        fetch(HERE)
    assert fetch(Target("x", "", address)).total("kvstore_prompt_tokens_total") == 1_000


def test_once_prints_a_table_or_json(address: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["top", "--once", address]) == 0
    shown = capsys.readouterr().out
    assert "hit rate 60.0% of 1000 prompt tokens (dram 60.0%)" in shown
    assert "#########... 75.0%" in shown and "acme" in shown and "\x1b" not in shown
    assert run(["top", "--once", "--json", address, "127.0.0.1:1"]) == 0
    object_ = json.loads(capsys.readouterr().out)
    assert object_["requests"]["hit_rate"] == 0.6
    assert len(object_["unreachable"]) == 1 and "127.0.0.1:1" in object_["unreachable"][0]


def test_it_follows_until_it_is_interrupted(
    address: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    looks = iter([None, None])

    def sleep(seconds: float) -> None:
        assert seconds == 0.5
        if next(looks, True):
            raise KeyboardInterrupt

    monkeypatch.setattr("time.sleep", sleep)
    assert run(["top", "--json", "--interval", "0.5", address]) == 130
    lines = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [line["requests"]["prompt_tokens"] for line in lines] == [0, 0]
    assert all(line["seconds"] > 0 for line in lines)


def test_it_goes_on_while_nothing_answers(
    registry: CollectorRegistry,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    server, thread = start_http_server(0, addr="127.0.0.1", registry=registry)
    looks = iter([None])

    def sleep(_: float) -> None:
        if next(looks, True):
            raise KeyboardInterrupt
        server.shutdown()
        server.server_close()
        thread.join()

    monkeypatch.setattr("time.sleep", sleep)
    assert run(["top", "--json", f"127.0.0.1:{server.server_port}"]) == 130
    line = json.loads(capsys.readouterr().out)
    assert len(line["unreachable"]) == 1 and line["nodes"] == []


def test_nothing_that_answers_is_a_failure(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["top", "--once", "127.0.0.1:1"]) == 1
    assert "127.0.0.1:1" in capsys.readouterr().err


def test_targets_come_from_addresses_run_directories_and_clusters(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    note = {"name": "node-a", "metrics": "127.0.0.1:9"}
    (tmp_path / "node.json").write_text(json.dumps(note))
    assert find_targets([str(tmp_path), "http://host.example:80/"], "default") == [
        Target("node-a", "node", "127.0.0.1:9", "http"),
        Target("host.example:80", "", "host.example:80", "http"),
    ]
    assert find_targets([str(tmp_path), "http://h:80"], "default", Credentials(ca=b"x")) == [
        Target("node-a", "node", "127.0.0.1:9", "https"), Target("h:80", "", "h:80", "http"),
    ]  # fmt: skip
    assert run(["targets", str(tmp_path)]) == 0
    assert json.loads(capsys.readouterr().out) == [
        {"targets": ["127.0.0.1:9"], "labels": {"role": "node", "part": "node-a"}}
    ]
    for wrong in ("", "host:99999", "host", str(tmp_path / "not-there")):
        with pytest.raises(BadInput, match="neither HOST:PORT"):
            find_targets([wrong], "default")


def test_a_cluster_that_does_not_run_is_named() -> None:
    with pytest.raises(NotFound, match="no cluster named 'never-there'"):
        find_targets([], "never-there")
    with pytest.raises(BadInput, match="--cluster"):
        find_targets([], "../../etc/x")


def test_a_cluster_is_found_by_its_note() -> None:
    name = f"t{os.getpid()}"
    note = Path(f"/tmp/kvstore-{os.getuid()}") / f"up-{name}.json"
    note.parent.mkdir(mode=0o700, exist_ok=True)
    part = {"name": "node-a", "role": "node", "address": "x", "metrics": "127.0.0.1:9", "pid": 1}
    parts = [part, {"name": "no", "role": "x", "metrics": ""}]
    try:
        for scheme in ("http", "https"):
            note.write_text(json.dumps({"parts": parts, "http": f"{scheme}://127.0.0.1:1"}))
            assert find_targets([], name) == [Target("node-a", "node", "127.0.0.1:9", scheme)]
    finally:
        note.unlink()


def test_targets_are_written_again_when_they_change(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    note, file = tmp_path / "node.json", tmp_path / "targets.json"
    seen: list[tuple[str, int]] = []

    def sleep(seconds: float) -> None:
        assert seconds == 2.0
        seen.append((json.loads(file.read_text())[0]["targets"][0], file.stat().st_ino))
        if len(seen) == 3:
            raise KeyboardInterrupt
        note.write_text(json.dumps({"name": "a", "metrics": f"127.0.0.1:{8 + (len(seen) > 1)}"}))

    monkeypatch.setattr("time.sleep", sleep)
    note.write_text(json.dumps({"name": "a", "metrics": "127.0.0.1:8"}))
    follow = ["targets", str(tmp_path), "--follow", str(file), "--interval", "2"]
    assert run(follow) == 130
    assert [address for address, _ in seen] == ["127.0.0.1:8", "127.0.0.1:8", "127.0.0.1:9"]
    assert seen[0][1] == seen[1][1], "what did not change is left alone"
    assert [path.name for path in tmp_path.glob("*new*")] == []
    assert run([*follow[:3], str(tmp_path / "none" / "x")]) == 2


def test_an_open_breaker_and_what_was_not_reached_are_shown() -> None:
    samples = [
        ("kvstore_node_info", {"node": "a"}, 1.0),
        ("kvstore_tier_capacity_bytes", {"tier": "nvme"}, 10.0),
        ("kvstore_tier_breaker", {"tier": "nvme", "operation": "read"}, 2.0),
        ("kvstore_tier_breaker", {"tier": "nvme", "operation": "write"}, 0.0),
    ]
    summary = summarise({HERE: Figures(samples)}, {}, None)
    assert summary["nodes"][0]["tiers"][0]["breaker"] == "OPEN"
    *_, last = draw(summary, ["b is gone"]).renderables
    assert str(last) == "not reached: b is gone"
