"""The examples of docs/client.md and of the README, run against a real node as they stand."""

import re
from collections.abc import Iterator
from pathlib import Path

import pytest

from kvstore.testing.node import RunningNode, start_node

ROOT = Path(__file__).resolve().parents[2]


def examples(page: str) -> list[str]:
    text = (ROOT / page).read_text(encoding="utf-8")
    return re.findall(r"^```python\n(.*?)^```$", text, re.DOTALL | re.MULTILINE)


@pytest.fixture(scope="module")
def node() -> Iterator[RunningNode]:
    with start_node(arena_bytes=32 << 20) as running:
        yield running


def run(example: str, node: RunningNode, *, run_dir: str) -> None:
    assert run_dir in example or "start_node" in example
    exec(compile(example.replace(run_dir, str(node.run_dir)), "example", "exec"), {})


def test_the_page_runs_from_top_to_bottom(
    node: RunningNode, capsys: pytest.CaptureFixture[str]
) -> None:
    found = examples("docs/client.md")
    assert len(found) == 6
    for example in found:
        run(example, node, run_dir="/tmp/kvstore")
    assert capsys.readouterr().out.startswith("2 blocks at [")


def test_the_readme_runs(node: RunningNode) -> None:
    found = [text for text in examples("README.md") if "Client.connect" in text]
    assert found
    for example in found:
        run(example, node, run_dir="/tmp/kvstore")
