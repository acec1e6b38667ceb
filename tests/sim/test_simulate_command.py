"""`kvstore simulate` and its plots.

`kvstore.cli.simulate_evict`, `kvstore.cli.simulate_tiers`, `kvstore.cli.progress`,
`kvstore.simulate.plot`.
"""

import json
import re
from collections.abc import Sequence
from pathlib import Path

import pytest

from kvstore.cli.main import run
from kvstore.simulate import plot
from kvstore.simulate.policies import policy_names
from tests.sim.traces import sample

TRACE = str(sample("lmcache_agent"))


def _rows(capsys: pytest.CaptureFixture[str], arguments: Sequence[str]) -> list[dict[str, object]]:
    assert run(["simulate", *arguments, "--json"]) == 0
    out, err = capsys.readouterr()
    assert err == ""  # no terminal: no bar
    return [json.loads(line) for line in out.splitlines()]


def test_evict_prints_a_row_per_policy_and_fraction(capsys: pytest.CaptureFixture[str]) -> None:
    rows = _rows(capsys, ["evict", TRACE, "--fraction", "0.05", "--fraction", "0.1"])
    assert [(r["policy"], r["fraction"]) for r in rows] == [
        (name, fraction) for name in policy_names() for fraction in (0.05, 0.1)
    ]
    assert list(rows[0]) == [
        "trace", "policy", "fraction", "capacity_blocks", "token_hit", "block_hit",
        "writes_per_request", "seconds",
    ]  # fmt: skip
    lru = next(r for r in rows if r["policy"] == "lru")
    assert (lru["trace"], lru["capacity_blocks"]) == ("lmcache_agent", 161)
    assert lru["token_hit"] == pytest.approx(0.553, abs=0.001)
    assert lru["writes_per_request"] == pytest.approx(8.9, abs=0.05)


def test_evict_prints_tables_for_people(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["simulate", "evict", TRACE, "--policy", "lru", "--fraction", "0.05"]) == 0
    out = capsys.readouterr().out
    assert "token hit rate" in out and re.search(r"lru\s.*55\.3 \(8\.9\)", out)


def test_tiers_prints_hits_seconds_and_crossings(capsys: pytest.CaptureFixture[str]) -> None:
    (row,) = _rows(
        capsys, ["tiers", TRACE, "--policy", "lru", "--nodes", "2", "--workers", "2", "--peers"]
    )
    assert (row["nodes"], row["workers"]) == (2, 2)
    assert row["capacity_blocks"] == {"hbm": 4, "dram": 64, "nvme": 515, "pool": 0}
    hit = row["hit"]
    assert isinstance(hit, dict) and sum(hit.values()) == pytest.approx(row["token_hit"], abs=1e-5)
    assert hit["nvme"] > 0 and row["moved_bytes"]
    assert 0 < float(str(row["saved_s"])) < float(str(row["compute_s"]))


def test_tiers_prints_tables_for_people(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["simulate", "tiers", TRACE, "--policy", "lru", "--limit", "50"]) == 0
    out = capsys.readouterr().out
    assert "hbm>dram" in out and "without cache" in out


def test_a_malformed_trace_ends_with_status_2_and_its_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    bad = tmp_path / "bad.jsonl"
    bad.write_text('{"timestamp": 1, "input_length": 3}\n')
    for command in ("evict", "tiers"):
        assert run(["simulate", command, str(bad)]) == 2
        assert f"{bad}:1: hash_ids" in capsys.readouterr().err


def test_unknown_commands_and_policies_are_wrong_usage(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["simulate", "dream"]) == 2
    assert run(["simulate", "evict", TRACE, "--policy", "best"]) == 2
    assert "'best' is not one of" in capsys.readouterr().err


@pytest.mark.parametrize("suffix", [".html", ".png"])
def test_a_plot_is_written(suffix: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / f"hit{suffix}"
    arguments = ["simulate", "evict", TRACE, "--policy", "lru", "--policy", "opt", "--json"]
    assert run([*arguments, "--plot", str(path)]) == 0
    rows = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    if suffix == ".png":
        assert path.read_bytes().startswith(b"\x89PNG")
        return
    page = path.read_text()
    assert not re.search(r"https?:|<script|<link|src=", page)
    for row in rows:
        label = f"{row['policy']} at {row['fraction'] * 100:g} %: {row['token_hit'] * 100:.2f} %"
        assert label in page
    assert page.count("<polyline") == 2


def test_a_plot_that_cannot_be_written_is_refused_before_the_replay(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(["simulate", "evict", TRACE, "--plot", str(tmp_path / "a.gif")]) == 2
    assert run(["simulate", "evict", TRACE, "--plot", str(tmp_path / "none" / "a.html")]) == 2
    monkeypatch.setitem(__import__("sys").modules, "matplotlib", None)
    assert run(["simulate", "evict", TRACE, "--plot", str(tmp_path / "a.png")]) == 1
    out, err = capsys.readouterr()
    assert out == ""
    assert "neither in .html nor in .png" in err and "no such directory" in err
    assert "kvstore-llm[plot]" in err


def test_names_are_escaped_in_a_page(tmp_path: Path) -> None:
    path = tmp_path / "a.html"
    points = [plot.Point(0.1, 0.5)]
    plot.write_plot(path, [plot.Curve("<b>'", "p&q", points)])
    page = path.read_text()
    assert "<b>" not in page and "p&amp;q" in page
