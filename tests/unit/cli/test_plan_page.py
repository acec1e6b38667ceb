"""docs/plan.md shows what `kvstore plan` prints: every command of the page is run."""

import shlex
from itertools import takewhile
from pathlib import Path
from typing import NamedTuple

import pytest

from kvstore.cli.main import run

ROOT = Path(__file__).resolve().parents[3]
PAGE = ROOT / "docs" / "plan.md"


class Example(NamedTuple):
    """A command, and what the page says that it prints; nothing where it does not say."""

    words: list[str]
    printed: str


def examples() -> list[Example]:
    found = []
    lines = PAGE.read_text(encoding="utf-8").splitlines()
    for at, line in enumerate(lines):
        if line.startswith("    kvstore plan "):
            rest = takewhile(lambda one: not one or one.startswith("    "), lines[at + 1 :])
            shown = [one.removeprefix("    ") for one in rest]
            if any(one.startswith("kvstore ") for one in shown):
                shown = []
            found.append(Example(shlex.split(line)[1:], "\n".join(shown).strip()))
    return found


@pytest.mark.parametrize(
    "example",
    [
        pytest.param(one, marks=[pytest.mark.slow] if "--trace" in one.words else [])
        for one in examples()
    ],
    ids=lambda one: " ".join(one.words[2:5]),
)
def test_a_command_of_the_page_prints_what_stands_there(
    example: Example, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    monkeypatch.chdir(tmp_path)
    words = [str(ROOT / word) if word.startswith("tests/") else word for word in example.words]
    assert run(words) == 0
    printed = capsys.readouterr().out.strip()
    assert printed
    if example.printed:
        assert printed == example.printed
    if "--plot" in words:
        assert (tmp_path / "plan.html").stat().st_size > 1_000


def test_the_page_has_commands_with_and_without_output() -> None:
    shown = [bool(one.printed) for one in examples()]
    assert len(shown) >= 6 and shown.count(True) >= 3
