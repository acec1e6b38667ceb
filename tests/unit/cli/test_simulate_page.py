"""docs/simulate.md shows what `kvstore simulate` prints: commands on committed traces are run."""

import json
import re
import shlex
from pathlib import Path

import pytest

from kvstore.cli.main import run

ROOT = Path(__file__).resolve().parents[3]
PAGE = (ROOT / "docs" / "simulate.md").read_text(encoding="utf-8")
SHOWN = re.findall(r"^    \$ kvstore (.*tests/data.*)\n((?:    .*\n)+)", PAGE, re.MULTILINE)
pytestmark = pytest.mark.slow


@pytest.mark.parametrize(("command", "shown"), SHOWN, ids=[command[:60] for command, _ in SHOWN])
def test_a_command_prints_what_stands_there(
    command: str, shown: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(ROOT)
    monkeypatch.setenv("COLUMNS", "120")
    assert run(shlex.split(command)) == 0
    printed = [line.rstrip() for line in capsys.readouterr().out.splitlines()]
    expected = [line[4:].rstrip() for line in shown.splitlines()]
    if "--json" in command:
        assert [without_time(line) for line in printed] == [without_time(e) for e in expected]
    else:
        assert printed == expected


def without_time(line: str) -> dict[str, object]:
    row: dict[str, object] = json.loads(line)
    del row["seconds"]
    return row


def test_there_are_commands_to_run() -> None:
    assert len(SHOWN) >= 3
