"""`kvstore bench router` on a small view; `bench_router_stream` runs over real gRPC."""

import json

import click
import pytest

from kvstore.cli import bench_router
from kvstore.cli.bench import bench
from kvstore.cli.bench_router_start import measure_start, percentile_ms
from kvstore.cli.bench_router_stream import seconds_until_visible
from kvstore.cli.bench_rows import Bench, Work
from kvstore.cli.main import run

FIELDS = [
    "bench", "case", "value", "unit", "limit", "limit_name", "ratio_to_limit", "peer",
    "peer_name", "ratio_to_peer", "runs",
]  # fmt: skip


def test_every_case_prints_its_row(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(bench_router, "MANY_WORKERS", 24)
    assert (
        run(["bench", "router", "--quick", "--blocks", "2000", "--start-blocks", "20000", "--json"])
        == 0
    )
    rows = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert len(rows) == 14
    for row in rows:
        assert list(row) == FIELDS
        assert row["bench"] == "router" and row["value"] >= 0
        if not row["case"].startswith(("start:", "event published to visible")):
            assert row["limit"] > 0 and row["ratio_to_limit"] > 0 and row["limit_name"]


def test_a_pattern_without_a_case_is_wrong_usage(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["bench", "router", "--blocks", "1000", "--case", "nothing*"]) == 2
    assert "is like no case" in capsys.readouterr().err


def test_the_group_lists_the_router() -> None:
    context = click.Context(bench)
    assert "router" in bench.list_commands(context)
    assert bench.get_command(context, "nothing") is None


async def test_pairs_are_interleaved_and_oriented_so_that_more_is_better(
    capsys: pytest.CaptureFixture[str],
) -> None:
    order: list[str] = []

    async def slow() -> float:
        order.append("slow")
        return 2e-6

    async def fast() -> float:
        order.append("fast")
        return 1e-6

    await Bench("b", pairs=7, as_json=True).against("c", slow, fast, limit_name="fast")
    assert order == ["slow", "fast"] * 8
    row = json.loads(capsys.readouterr().out)
    assert (row["value"], row["limit"], row["ratio_to_limit"], row["runs"]) == (2.0, 1.0, 0.5, 7)


async def test_a_peer_takes_its_turn_in_every_pair(capsys: pytest.CaptureFixture[str]) -> None:
    order: list[str] = []

    def taking(name: str, seconds: float) -> Work:
        async def work() -> float:
            order.append(name)
            return seconds

        return work

    bench = Bench("b", pairs=3)
    await bench.against(
        "c", taking("ours", 2e-6), taking("limit", 1e-6), limit_name="l",
        peer=taking("peer", 5e-6), peer_name="p",
    )  # fmt: skip
    assert order == ["ours", "limit", "peer"] * 4
    (row,) = bench.rows
    assert (row["peer"], row["peer_name"], row["ratio_to_peer"]) == (5.0, "p", 2.5)
    bench.row("alone", 1.0, "s")
    bench.finish()
    out = capsys.readouterr().out
    assert "of the peer" in out and "2.50" in out


async def test_an_event_is_seen_by_a_router_s_view() -> None:
    times = await seconds_until_visible(3)
    assert len(times) == 3 and min(times) > 0


async def test_a_new_router_learns_everything_and_decides_meanwhile() -> None:
    start = await measure_start(90_000)
    assert start.blocks >= 90_000 - 18 and start.ready_s > 0
    assert percentile_ms(start.decisions_s, 99) >= percentile_ms(start.decisions_s, 50) >= 0
    assert percentile_ms([], 50) == 0.0
