"""Bars of hits by tier (`kvstore.simulate.plot_tiers`), through `kvstore simulate tiers --plot`."""

import json
import re
from pathlib import Path

import pytest

from kvstore.cli.main import run
from kvstore.simulate.plot_tiers import Bar, write_bars
from tests.sim.traces import sample

ARGUMENTS = ("simulate", "tiers", str(sample("lmcache_agent")), "--limit", "300", "--pool", "0.2")


@pytest.mark.parametrize("suffix", [".html", ".png"])
def test_a_bar_is_drawn_for_every_policy(
    suffix: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / f"tiers{suffix}"
    policies = ("--policy", "lru", "--policy", "arc")
    assert run([*ARGUMENTS, *policies, "--json", "--plot", str(path)]) == 0
    rows = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    if suffix == ".png":
        assert path.read_bytes().startswith(b"\x89PNG")
        return
    page = path.read_text()
    assert not re.search(r"https?:|<script|<link|src=", page)
    assert [row["policy"] for row in rows] == ["lru", "arc"]
    for row in rows:
        for tier, share in row["hit"].items():
            assert f"{row['policy']}, {tier}: {share * 100:.2f} %" in page
        assert f">{row['token_hit'] * 100:.1f} %<" in page


def test_a_plot_that_cannot_be_written_is_refused_before_the_replay(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run([*ARGUMENTS, "--plot", str(tmp_path / "a.gif")]) == 2
    out, err = capsys.readouterr()
    assert out == "" and "neither in .html nor in .png" in err


def test_names_are_escaped_in_a_page(tmp_path: Path) -> None:
    path = tmp_path / "a.html"
    write_bars(path, [Bar("<b>'", "p&q", {"hbm": 0.25, "<i>": 0.5})])
    page = path.read_text()
    assert "<b>" not in page and "<i>" not in page
    assert "p&amp;q, hbm: 25.00 %" in page and ">75.0 %<" in page
