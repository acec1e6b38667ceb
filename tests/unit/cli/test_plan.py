"""`kvstore plan` through its command line."""

import json
from pathlib import Path

import pytest
from click.testing import CliRunner

from kvstore.cli.main import run
from kvstore.cli.plan import parse_tokens, plan
from kvstore.cli.plan_report import render
from kvstore.cli.planning import Question, answer
from kvstore.core.capacity import Budget
from kvstore.core.catalogue import GPUS, MODELS
from kvstore.core.model_shape import read_config
from kvstore.core.money import Prices


def _run(*arguments: str) -> str:
    result = CliRunner().invoke(plan, arguments, catch_exceptions=False)
    assert result.exit_code == 0, result.output
    return result.output


def test_llama_70b_as_published() -> None:
    contexts = [part for text in ("4k", "32k", "128k", "1M") for part in ("--context", text)]
    lines = _run("--model", "llama-3-70b", *contexts, "--users", "32", "--json").splitlines()
    rows = [json.loads(line) for line in lines]
    assert [row["bytes_per_token"] for row in rows] == [327_680] * 4
    gib = [row["bytes_per_request"] / (1 << 30) for row in rows]
    assert gib == [1.25, 10, 40, 312.5]
    assert [row["bytes_total"] for row in rows] == [32 * row["bytes_per_request"] for row in rows]
    assert rows[0]["max_batch"] == 0  # the weights alone do not fit one GPU
    assert rows[0]["gpus_for_users"] is None


def test_a_configuration_file_says_the_same_as_its_name(tmp_path: Path) -> None:
    directory = tmp_path / "llama-3-8b"
    directory.mkdir()
    (directory / "config.json").write_text(json.dumps(MODELS["llama-3-8b"]))
    by_name = _run("--model", "llama-3-8b", "--context", "32k", "--json")
    assert _run("--model", str(directory), "--context", "32k", "--json") == by_name
    assert _run("--model", str(directory / "config.json"), "--context", "32k", "--json") == by_name


def test_more_ranks_hold_more_and_measured_bandwidth_counts() -> None:
    base = ("--model", "llama-3-70b", "--context", "8k", "--gpus", "8", "--json")
    row = json.loads(_run(*base))
    assert row["max_batch"] > 0
    faster = json.loads(_run(*base, "--bandwidth", "nvme=12"))
    load = {r: {t["tier"]: t["load_s"] for t in found["tiers"]} for r, found in
            (("base", row), ("faster", faster))}  # fmt: skip
    assert load["faster"]["nvme"] < load["base"]["nvme"] * 0.51
    assert load["faster"]["dram"] == load["base"]["dram"]


def test_prices_give_money_and_idle_times() -> None:
    row = json.loads(
        _run("--model", "llama-3-8b", "--context", "32k", "--users", "40", "--json",
             "--price", "gpu-hour=2", "--price", "dram-gib-month=3")
    )  # fmt: skip
    assert row["money_month"]["gpus"] == 2 * 730 * row["gpus_for_users"]
    assert row["money_month"]["kv_in_dram"] == pytest.approx(40 * 4 * 3)
    worth = {tier["tier"]: tier["worth_holding_s"] for tier in row["tiers"]}
    assert worth["dram"] > 0
    assert worth["nvme"] is None


def test_the_table_names_what_it_shows() -> None:
    text = _run("--model", "deepseek-v3", "--context", "4k", "--context", "128k", "--gpu", "h200",
                "--gpus", "8", "--weights", "fp8", "--price", "gpu-hour=3")  # fmt: skip
    assert "61 latent of 576 values a token" in text
    assert "KV a request" in text
    assert "131,072 tokens" in text
    mistral = _run("--model", "mistral-7b", "--context", "32k")
    assert "(32 sliding over 4,096 tokens), 4 query heads per KV head" in mistral
    assert "512.00 MiB" in mistral


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (["--model", "nothing", "--context", "4k"], "--model nothing"),
        (["--model", "llama-3-8b", "--context", "0"], "'0'"),
        (["--model", "llama-3-8b", "--context", "4k", "--bandwidth", "tape=1"], "tape=1"),
        (["--model", "llama-3-8b", "--context", "4k", "--price", "gpu-hour=-1"], "gpu-hour=-1"),
        (["--model", "llama-3-8b", "--context", "4k", "--usable", "2"], "usable"),
    ],
)
def test_wrong_usage_names_the_flag(
    arguments: list[str], named: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(["plan", *arguments]) == 2
    assert named in capsys.readouterr().err


@pytest.mark.parametrize("content", ["[]", "{", ""])
def test_a_broken_configuration_is_named(
    content: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "config.json"
    path.write_text(content)
    assert run(["plan", "--model", str(path), "--context", "4k"]) == 2
    assert str(path) in capsys.readouterr().err


def test_tokens_are_written_as_people_write_them() -> None:
    assert [parse_tokens(text) for text in ("4096", "32k", "1M", "1Mi", "1.5K")] == [
        4096, 32_768, 1_024_000, 1_048_576, 1536,
    ]  # fmt: skip
    for text in ("", "k", "-4k", "4kb", "0"):
        with pytest.raises(ValueError, match="tokens"):
            parse_tokens(text)


def test_money_that_is_not_known_is_a_dash_in_every_row() -> None:
    """At 1M tokens not even one request fits, so nobody can say what the GPUs cost."""
    question = Question(
        model=read_config("llama-3-8b", MODELS["llama-3-8b"]), users=4, gpu_name="h100",
        gpu=GPUS["h100"], fidelity="exact", mfu=0.5, bandwidths={}, prices=Prices(gpu_hour=2.0),
        budget=Budget(gpu_bytes=GPUS["h100"].memory_bytes, ranks=1, usable=0.9, weight_bytes=2.0),
    )  # fmt: skip
    plans = [answer(question, tokens) for tokens in (1_024_000, 8192)]
    assert [plan.gpus_for_users for plan in plans] == [None, 1]
    money = render(question, plans).splitlines()[-2:]
    assert money[0].split() == ["1,024,000", "–"]
    assert money[1].split() == ["8,192", "1,460.00"]
