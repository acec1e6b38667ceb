"""Commands that the pages name exist, with the options that they are given there."""

import re
from pathlib import Path

import click
import pytest

from kvstore.cli.main import cli

DOCS = Path(__file__).resolve().parents[3] / "docs"
PAGES = ["../README.md", *sorted(path.name for path in DOCS.glob("*.md"))]


def commands(page: str) -> list[list[str]]:
    """Return the words of every `kvstore …` in code, on lines of their own or inside a sentence."""
    text = (DOCS / page).read_text(encoding="utf-8")
    blocks = re.findall(r"```(?:sh)?\n(.*?)```", text, re.DOTALL)
    lines = [line for block in blocks for line in block.splitlines()]
    lines += [line.strip().removeprefix("$ ") for line in text.splitlines() if line[:4] == "    "]
    prose = re.sub(r"```.*?```", "", text, flags=re.DOTALL)
    spans = [" ".join(span.split()) for span in re.findall(r"`([^`]+)`", prose)]
    found = [line.split("#")[0].split() for line in [*lines, *spans]]
    return [words[1:] for words in found if words[:1] == ["kvstore"] and len(words) > 1]


@pytest.mark.parametrize("page", PAGES)
def test_documented_commands_exist(page: str) -> None:
    for words in commands(page):
        command: click.Command = cli
        context = click.Context(cli)
        options: set[str] = set()
        for word in words:
            if isinstance(command, click.Group) and not word.startswith("-"):
                inner = command.get_command(context, word)
                assert inner is not None or command.params, f"{page}: kvstore {' '.join(words)}"
                if inner is not None:
                    command = inner
                    options |= {name for one in inner.params for name in one.opts}
            elif word.startswith("--"):
                assert word in options, f"{page}: {word} of kvstore {' '.join(words)}"


def test_pages_are_read() -> None:
    assert sum(len(commands(page)) for page in PAGES) > 60
