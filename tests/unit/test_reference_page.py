"""docs/reference.md is what `make reference` writes from definitions and docstrings now."""

import importlib.util
from pathlib import Path
from types import ModuleType

import pytest

import kvstore

ROOT = Path(__file__).resolve().parents[2]
PAGE = ROOT / "docs" / "reference.md"


@pytest.fixture(scope="module")
def made() -> ModuleType:
    spec = importlib.util.spec_from_file_location("make_reference", ROOT / "docs/make_reference.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_page_is_current(made: ModuleType) -> None:
    assert PAGE.read_text(encoding="utf-8") == made.page(), "run `make reference`"


def test_every_public_name_and_every_call_stands_there() -> None:
    text = PAGE.read_text(encoding="utf-8")
    assert [name for name in kvstore.__all__ if f"### `{name}" not in text] == []
    for call in ("Acquire", "Settle", "Watch", "Generate", "Route", "Run", "Drain", "Restart"):
        assert f"| `{call}` | `" in text, call
    assert "0x" not in text.replace("0x0", ""), "an address of this process is in a signature"
