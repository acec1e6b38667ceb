"""`kvstore plan --trace`: the tiers that a hit rate needs, by its command line, and its plots."""

import json
import re
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest

from kvstore.cli.main import run
from kvstore.cli.plan_plot import Chart, Line, write_charts
from kvstore.cli.planning import Question
from kvstore.cli.tier_plan import Machine, plan_tiers, replay_prices, sizes
from kvstore.core.capacity import Budget, prefill_seconds
from kvstore.core.catalogue import GPUS, MODELS
from kvstore.core.model_shape import read_config
from kvstore.core.money import Prices
from kvstore.simulate.formats import read_trace
from tests.sim.traces import sample, trace_of

TRACE = str(sample("mooncake_conversation"))
GIVEN = ("--trace", TRACE, "--limit", "300", "--policy", "lru")
SMALL = ("plan", "--model", "llama-3-8b", *GIVEN)
"""52 GiB of HBM for 488 GiB of blocks; the least recently used goes, which is quick to replay."""


def rows(capsys: pytest.CaptureFixture[str], *arguments: str) -> list[dict[str, Any]]:
    assert run([*SMALL, "--json", *arguments]) == 0
    return [json.loads(line) for line in capsys.readouterr().out.splitlines()]


def question(name: str = "llama-3-8b", **changes: Any) -> Question:
    gpu = GPUS["h100"]
    budget = Budget(gpu_bytes=gpu.memory_bytes, ranks=1, usable=0.9, weight_bytes=2.0)
    fields: dict[str, Any] = {
        "model": read_config(name, MODELS[name]), "users": 1, "gpu_name": "h100", "gpu": gpu,
        "budget": budget, "fidelity": "exact", "mfu": 0.5, "bandwidths": {}, "prices": Prices(),
    }  # fmt: skip
    return Question(**(fields | changes))


def test_a_higher_hit_rate_needs_more_and_dram_comes_before_nvme(
    capsys: pytest.CaptureFixture[str],
) -> None:
    low, high = rows(capsys, "--hit-rate", "0.04", "--hit-rate", "0.075", "--dram", "192GiB",
                     "--price", "nvme-gib-month=0.5")  # fmt: skip
    for row in (low, high):
        assert row["reached"] and row["hit_rate"] >= row["target"]
        assert row["hit_rate"] == pytest.approx(sum(row["hit"].values()))
        assert row["money_month"] == {"nvme": pytest.approx(row["nvme_bytes"] / (1 << 30) / 2)}
    assert 0 < low["dram_bytes"] <= 192 << 30 and low["nvme_bytes"] == 0
    assert high["dram_bytes"] > low["dram_bytes"] and high["nvme_bytes"] > 0
    assert high["hit"]["nvme"] > 0 == low["hit"]["nvme"]
    assert high["saved_s"] > low["saved_s"] > 0


def test_the_answer_is_the_smallest_of_the_scale() -> None:
    trace = read_trace(sample("mooncake_conversation"), limit=300)
    machine = Machine(copies=1, dram_bytes=1 << 40, policy="lru")
    found = plan_tiers(question(), machine, trace, [0.06])
    (plan,) = found.plans
    by_size = {one.dram_bytes: one.result.token_hit for one in found.looked_at}
    assert by_size[plan.dram_bytes] == plan.hit_rate >= 0.06
    smaller = max(size for size in by_size if size < plan.dram_bytes)
    assert by_size[smaller] < 0.06 and plan.dram_bytes / smaller < 1.25, "its neighbour was tried"


def test_a_tier_too_slow_to_help_is_not_counted_on(capsys: pytest.CaptureFixture[str]) -> None:
    slow = ("--hit-rate", "0.075", "--dram", "192GiB", "--bandwidth", "nvme=0.1")
    (row,) = rows(capsys, *slow)
    assert not row["reached"] and row["declined"] > 0.02 and row["hit"]["nvme"] == 0
    assert run([*SMALL, *slow]) == 0
    shown = capsys.readouterr().out
    assert "7.5%  never" in shown and "slower to load than to compute" in shown


def test_without_targets_it_takes_shares_of_what_the_trace_allows(
    capsys: pytest.CaptureFixture[str],
) -> None:
    ceiling = rows(capsys, "--hit-rate", "1")[0]["hit_rate"]
    targets = [row["target"] for row in rows(capsys)]
    assert targets == pytest.approx([ceiling * share for share in (0.5, 0.8, 0.95)], abs=1e-4)


def test_contexts_and_traces_share_one_command_and_one_plot(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    page = tmp_path / "plan.html"
    arguments = [*SMALL, "--context", "32k", "--hit-rate", "0.05", "--plot", str(page)]
    assert run(arguments) == 0
    shown = capsys.readouterr().out
    assert "4.00 GiB" in shown and "300 requests" in shown and "5.0%" in shown
    drawn = page.read_text()
    assert not re.search(r"https?:|<script|<link|src=", drawn)
    for title in (
        "memory for KV",
        "loaded or computed",
        "mooncake_conversation: hit rate by memory",
    ):
        assert title in drawn
    assert drawn.count("<polyline") == 3 + 5 + 1 + 2 + 1, "it never needs an NVMe"
    picture = tmp_path / "plan.png"
    assert run(["plan", "--model", "llama-3-8b", "--context", "8k", "--plot", str(picture)]) == 0
    assert picture.read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (["--model", "llama-3-8b"], "--context"),
        (["--model", "llama-3-70b", *GIVEN], "--gpus 1: the longest prompt"),
        (["--model", "llama-3-8b", "--trace", "/nothing"], "/nothing"),
        (["--model", "llama-3-8b", "--trace", TRACE, "--hit-rate", "50"], "--hit-rate"),
        (["--model", "llama-3-8b", "--context", "4k", "--plot", "plan.gif"], "plan.gif"),
    ],
)
def test_wrong_usage_names_the_flag(
    arguments: list[str], named: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(["plan", *arguments]) == 2
    assert named in capsys.readouterr().err


def test_sizes_go_from_next_to_nothing_to_everything() -> None:
    assert sizes(1) == [1] and sizes(3) == [1, 2, 3]
    many = sizes(100_000)
    assert many[0] == 1 and many[-1] == 100_000 and many == sorted(set(many))
    assert all(after / before < 1.2 for before, after in pairwise(many[1:]))


def test_the_simulator_pays_what_the_plan_says() -> None:
    asked = question(bandwidths={"nvme": 13.0})
    prices = replay_prices(asked, 131_072)
    for tokens in (16, 4_096, 65_536):
        expected = prefill_seconds(asked.model, tokens, 0, asked.flops)
        assert prices.compute_s(tokens, 0) == pytest.approx(expected, rel=1e-6)
    assert (prices.nvme_gb_per_s, prices.dram_gb_per_s) == (13.0, 51.0)


def test_what_fits_hbm_needs_nothing_below() -> None:
    trace = trace_of([range(4), range(4), range(4)])
    told: list[str] = []
    found = plan_tiers(
        question(), Machine(copies=1, dram_bytes=1 << 30, policy="lru"), trace, [0.5],
        on_replay=told.append,
    )  # fmt: skip
    (plan,) = found.plans
    assert plan.reached and plan.hit["hbm"] == pytest.approx(2 / 3)
    assert (plan.dram_bytes, plan.nvme_bytes) == (0, 0)
    assert len(told) == len(found.looked_at), "no size is replayed twice"


def test_names_are_escaped_in_a_page(tmp_path: Path) -> None:
    line = Line("<b>", [(1.0, 1.0), (4.0, 2.0)])
    chart = Chart(title="<i>'", x_name="x", y_name="seconds", lines=[line], log=True)
    write_charts(tmp_path / "a.html", [chart])
    page = (tmp_path / "a.html").read_text()
    assert "<b>" not in page and "<i>" not in page
