"""`kvstore model`."""

import io
import json
from pathlib import Path

import pytest
from click.testing import CliRunner
from kvworkers.commands.model import model, model_progress
from rich.console import Console

from kvstore.core.errors import BadInput
from tests.model_fixture import tiny_config


@pytest.fixture
def tiny(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    tiny_config("llama").save_pretrained(tmp_path / "tiny")
    (tmp_path / "tiny" / "model.safetensors").write_bytes(b"weights")
    return tmp_path / "tiny"


def test_prepare_prints_the_directory(tiny: Path) -> None:
    plain = CliRunner().invoke(model, ["prepare", "--model", str(tiny)])
    assert plain.exit_code == 0 and plain.stdout == f"{tiny}\n"
    parsed = CliRunner().invoke(model, ["prepare", "--model", str(tiny), "--json"])
    assert json.loads(parsed.stdout) == {"path": str(tiny)}


def test_show_says_what_the_model_is_to_the_cache(tiny: Path) -> None:
    parsed = CliRunner().invoke(model, ["show", "--model", str(tiny), "--json"])
    facts = json.loads(parsed.stdout)
    assert (facts["name"], facts["kv_heads"], facts["codec"]) == ("tiny", 2, "RAW32")
    assert facts["block_bytes"] == 8192 and len(facts["namespace_digest"]) == 64
    plain = CliRunner().invoke(model, ["show", "--model", str(tiny)])
    assert "block bytes       8192" in plain.stdout
    assert facts["weights_digest"] in plain.stdout


def test_a_bad_path_is_an_error_of_ours(tmp_path: Path) -> None:
    outcome = CliRunner().invoke(model, ["prepare", "--model", str(tmp_path / "nowhere")])
    assert isinstance(outcome.exception, BadInput) and "nowhere" in str(outcome.exception)


@pytest.mark.parametrize("terminal", [True, False])
def test_progress_is_shown_as_bars_or_as_one_line_a_step(terminal: bool) -> None:
    console = Console(file=io.StringIO(), force_terminal=terminal, width=100)
    with model_progress(console) as report:
        for done in range(3):
            report("Unpacking model", done, 2)
        report("Converting: saving", 3, 4)
    assert isinstance(console.file, io.StringIO)
    shown = console.file.getvalue()
    assert "Unpacking model" in shown and "Converting: saving" in shown
    if not terminal:
        assert shown.splitlines() == ["Unpacking model", "Converting: saving"]
