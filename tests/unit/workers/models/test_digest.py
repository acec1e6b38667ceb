"""Weights are identified by content, and hashed no more often than they change."""

import hashlib
import os
from pathlib import Path

import pytest
from kvworkers.models.digest import cache_directory, canonical, file_digest, weights_digest

from kvstore.core.errors import BadInput

CONFIG = {"hidden_size": 8, "rope_parameters": {"rope_theta": 1e4}}


def _model(path: Path, *contents: bytes) -> Path:
    path.mkdir()
    for index, content in enumerate(contents):
        (path / f"model-{index}.safetensors").write_bytes(content)
    return path


def test_a_file_is_hashed_once_until_it_changes(tmp_path: Path) -> None:
    file = tmp_path / "weights"
    file.write_bytes(b"one")
    calls: list[tuple[int, int]] = []

    def digest() -> str:
        return file_digest(file, cache=tmp_path / "cache", hashed=lambda *at: calls.append(at))

    assert digest() == hashlib.sha256(b"one").hexdigest() and calls == [(3, 3)]
    assert digest() == hashlib.sha256(b"one").hexdigest() and len(calls) == 1
    before = file.stat()
    file.write_bytes(b"two")  # same size; another mtime
    os.utime(file, ns=(before.st_atime_ns, before.st_mtime_ns + 1))
    assert digest() == hashlib.sha256(b"two").hexdigest() and len(calls) == 2


def test_a_file_put_in_anothers_place_is_hashed_though_size_and_time_agree(tmp_path: Path) -> None:
    file, other = tmp_path / "weights", tmp_path / "other"
    file.write_bytes(b"one")
    first = file_digest(file, cache=tmp_path)
    other.write_bytes(b"two")
    stat = file.stat()
    os.utime(other, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    other.rename(file)
    assert file_digest(file, cache=tmp_path) != first


@pytest.mark.parametrize(
    "damage", [b"", b"not json", b"[]", b'{"key": [1], "sha256": "x"}', b"\xff"]
)
def test_a_damaged_sidecar_costs_a_hashing_and_is_replaced(tmp_path: Path, damage: bytes) -> None:
    file = tmp_path / "weights"
    file.write_bytes(b"one")
    wanted = file_digest(file, cache=tmp_path)
    (sidecar,) = (tmp_path / "digests").glob("*.json")
    whole = sidecar.read_bytes()
    sidecar.write_bytes(damage)
    assert file_digest(file, cache=tmp_path) == wanted
    assert sidecar.read_bytes() == whole


def test_a_cache_that_cannot_be_written_is_no_error(tmp_path: Path) -> None:
    file = tmp_path / "weights"
    file.write_bytes(b"one")
    assert file_digest(file, cache=file) == hashlib.sha256(b"one").hexdigest()


def test_the_same_bytes_elsewhere_are_the_same_model(tmp_path: Path) -> None:
    one = _model(tmp_path / "a", b"x", b"y")
    two = _model(tmp_path / "b", b"x", b"y")
    assert weights_digest(one, CONFIG, cache=tmp_path) == weights_digest(
        two, CONFIG, cache=tmp_path
    )


def test_bytes_their_split_and_the_relevant_config_all_count(tmp_path: Path) -> None:
    model = _model(tmp_path / "a", b"x", b"y")
    digests = {
        weights_digest(model, CONFIG, cache=tmp_path),
        weights_digest(_model(tmp_path / "b", b"x", b"z"), CONFIG, cache=tmp_path),
        weights_digest(_model(tmp_path / "c", b"y", b"x"), CONFIG, cache=tmp_path),
        weights_digest(_model(tmp_path / "d", b"xy"), CONFIG, cache=tmp_path),
        weights_digest(model, CONFIG | {"hidden_size": 16}, cache=tmp_path),
        weights_digest(model, CONFIG | {"rope_parameters": {"rope_theta": 1e5}}, cache=tmp_path),
    }
    assert len(digests) == 6
    habit = CONFIG | {"transformers_version": "9", "dtype": "float32", "use_cache": False}
    assert weights_digest(model, habit, cache=tmp_path) in digests


def test_a_directory_without_weights_is_named(tmp_path: Path) -> None:
    with pytest.raises(BadInput, match=str(tmp_path)):
        weights_digest(tmp_path, CONFIG, cache=tmp_path)


def test_equal_data_have_one_rendering() -> None:
    assert canonical({"b": 1, "a": [1.5, None]}) == canonical({"a": [1.5, None], "b": 1})
    with pytest.raises(ValueError, match="JSON"):
        canonical(float("nan"))


def test_the_cache_follows_the_users_environment(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert cache_directory() == tmp_path / "kvstore"
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert cache_directory() == Path.home() / ".cache" / "kvstore"
