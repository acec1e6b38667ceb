"""`kvstore simulate route` (`kvstore.cli.simulate_route`, `kvstore.simulate.route_routers`)."""

import json
import re
from collections.abc import Sequence

import pytest

from kvstore.cli.main import run
from kvstore.core.errors import BadInput
from kvstore.simulate.route_routers import make_router, router_names
from tests.sim.traces import sample

TRACE = str(sample("lmcache_agent"))
QUICK = ("--policy", "lru", "--limit", "400")


def _rows(capsys: pytest.CaptureFixture[str], arguments: Sequence[str]) -> list[dict[str, object]]:
    assert run(["simulate", "route", *arguments, "--json"]) == 0
    out, err = capsys.readouterr()
    assert err == ""  # no terminal: no bar
    return [json.loads(line) for line in out.splitlines()]


def test_route_prints_a_row_per_router(capsys: pytest.CaptureFixture[str]) -> None:
    rows = _rows(capsys, [TRACE, "--workers", "4", *QUICK])
    assert [row["router"] for row in rows] == router_names()
    assert list(rows[0]) == [
        "trace", "router", "workers", "pool", "token_hit", "imbalance",
        "ttft_mean_s", "ttft_p50_s", "ttft_p99_s",
    ]  # fmt: skip
    assert {(row["trace"], row["workers"], row["pool"]) for row in rows} == {
        ("lmcache_agent", 4, 0.0)
    }
    by_name = {row["router"]: row for row in rows}
    hits = {name: float(str(row["token_hit"])) for name, row in by_name.items()}
    assert hits["round_robin"] < hits["dynamo"] < hits["longest_prefix"]
    # Without a pool Mooncake's rule with a perfect queue is the reference.
    assert by_name["mooncake"] | {"router": ""} == by_name["exact"] | {"router": ""}


def test_route_takes_several_sizes_and_pools(capsys: pytest.CaptureFixture[str]) -> None:
    rows = _rows(
        capsys,
        [TRACE, "--router", "ours", "--workers", "2", "--workers", "3",
         "--pool", "0", "--pool", "0.5", *QUICK],
    )  # fmt: skip
    assert [(row["workers"], row["pool"]) for row in rows] == [
        (2, 0.0), (2, 0.5), (3, 0.0), (3, 0.5)
    ]  # fmt: skip
    assert float(str(rows[1]["ttft_mean_s"])) < float(str(rows[0]["ttft_mean_s"]))


def test_a_utilisation_is_met_by_the_router_it_speaks_of(
    capsys: pytest.CaptureFixture[str],
) -> None:
    arguments = ["simulate", "route", TRACE, "--router", "sticky", "--at", "sticky", *QUICK]
    assert run([*arguments, "--utilisation", "0.5"]) == 0
    assert re.search(r"sticky .* 50 │", capsys.readouterr().out)


def test_a_slowdown_says_the_rates(capsys: pytest.CaptureFixture[str]) -> None:
    arguments = [TRACE, "--router", "round_robin", "--workers", "1", *QUICK]
    (fast,) = _rows(capsys, [*arguments, "--slowdown", "0.001"])
    (slow,) = _rows(capsys, [*arguments, "--slowdown", "0.002"])
    # Nobody waits for anybody: twice as slow takes twice as long.
    assert float(str(slow["ttft_p50_s"])) == pytest.approx(2 * float(str(fast["ttft_p50_s"])), 0.1)


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (["--workers", "0"], "--workers"),
        (["--router", "fortune"], "--router"),
        (["--pool", "1.5"], "--pool"),
        (["--utilisation", "0"], "--utilisation"),
    ],
)
def test_wrong_usage_names_the_flag(
    arguments: list[str], named: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(["simulate", "route", TRACE, *arguments]) == 2
    assert named in capsys.readouterr().err


def test_a_malformed_trace_is_named(
    tmp_path_factory: pytest.TempPathFactory, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path_factory.mktemp("traces") / "bad.jsonl"
    path.write_text('{"timestamp": 0}\n')
    assert run(["simulate", "route", str(path)]) == 2
    assert "bad.jsonl" in capsys.readouterr().err


def test_an_unknown_router_is_named_with_those_there_are() -> None:
    with pytest.raises(BadInput, match=r"no router 'fortune'.*ours.*exact"):
        make_router("fortune")
