"""A GGUF becomes a directory once, whole or not at all."""

import json
import threading
from pathlib import Path
from typing import Any

import pytest
from filelock import FileLock
from kvworkers.models import convert
from kvworkers.models.convert import converted_directory
from kvworkers.models.spec import DESCRIPTION_FILE

from kvstore.core.errors import BadInput, Unreachable
from tests.patience import PATIENCE_S


@pytest.fixture
def gguf(tmp_path: Path) -> Path:
    path = tmp_path / "Tiny-1M.Q4_1.gguf"
    path.write_bytes(b"GGUF" + bytes(40))
    return path


@pytest.fixture
def conversions(monkeypatch: pytest.MonkeyPatch) -> list[Path]:
    """Replace the half minute inside transformers; everything around it stays real."""
    made: list[Path] = []

    def write(gguf: Path, target: Path, progress: Any) -> None:
        target.mkdir(parents=True)
        (target / "config.json").write_text("{}")
        made.append(target)

    monkeypatch.setattr(convert, "_convert", write)
    return made


def test_it_is_converted_once_and_found_again(
    gguf: Path, tmp_path: Path, conversions: list[Path]
) -> None:
    first = converted_directory(gguf, cache=tmp_path / "cache")
    assert converted_directory(gguf, cache=tmp_path / "cache") == first
    assert len(conversions) == 1 and not conversions[0].exists()
    description = json.loads((first / DESCRIPTION_FILE).read_text())
    assert description["name"] == "Tiny-1M" and description["source"] == gguf.name
    assert first.name.startswith("Tiny-1M.Q4_1-")


def test_other_content_under_the_same_name_is_another_model(
    gguf: Path, tmp_path: Path, conversions: list[Path]
) -> None:
    first = converted_directory(gguf, cache=tmp_path)
    gguf.write_bytes(b"GGUF" + bytes(41))
    assert converted_directory(gguf, cache=tmp_path) != first
    assert len(conversions) == 2


def test_two_at_once_share_one_conversion(
    gguf: Path, tmp_path: Path, conversions: list[Path]
) -> None:
    barrier = threading.Barrier(4)
    found: list[Path] = []

    def work() -> None:
        barrier.wait(PATIENCE_S)
        found.append(converted_directory(gguf, cache=tmp_path))

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(PATIENCE_S)
    assert len(found) == 4 and len(set(found)) == 1 and len(conversions) == 1


def test_a_failed_conversion_leaves_nothing_and_a_killed_one_is_swept(
    gguf: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(gguf: Path, target: Path, progress: Any) -> None:
        assert not target.exists(), "the leavings of a killed conversion were kept"
        target.mkdir(parents=True)
        (target / "half").write_text("x")
        raise BadInput("cut short")

    monkeypatch.setattr(convert, "_convert", fail)
    for _ in range(2):
        with pytest.raises(BadInput, match="cut short"):
            converted_directory(gguf, cache=tmp_path)
        models = tmp_path / "models"
        assert [path.suffix for path in models.iterdir()] == [".lock"]
        (partial,) = [p.with_suffix(".partial") for p in models.iterdir()]
        partial.mkdir()


def test_a_lock_held_too_long_is_named(
    gguf: Path, tmp_path: Path, conversions: list[Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(convert, "LOCK_SECONDS", 0.05)
    target = converted_directory(gguf, cache=tmp_path)
    (target / DESCRIPTION_FILE).unlink()
    with (
        FileLock(target.with_name(f".{target.name}.lock")),
        pytest.raises(Unreachable, match="lock"),
    ):
        converted_directory(gguf, cache=tmp_path)


@pytest.mark.parametrize("content", [b"", b"GG", b"PK\x03\x04 a zip"])
def test_what_is_no_gguf_is_named(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "model.gguf"
    path.write_bytes(content)
    with pytest.raises(BadInput, match=r"model\.gguf is not a GGUF"):
        converted_directory(path, cache=tmp_path)
    with pytest.raises(BadInput, match="No such file"):
        converted_directory(tmp_path / "missing.gguf", cache=tmp_path)


def test_a_gguf_cut_short_is_named(gguf: Path, tmp_path: Path) -> None:
    with pytest.raises(BadInput, match=r"Tiny-1M\.Q4_1\.gguf is cut short"):
        converted_directory(gguf, cache=tmp_path)
    assert not [p for p in (tmp_path / "models").iterdir() if p.is_dir()]
