"""What identifies a model's weights, whatever its directory is called.

Reading gigabytes at every start would be slow, so each file's SHA-256 is remembered in a
sidecar in the user's cache, keyed by (device, inode, size, mtime in ns): a file that was
replaced or rewritten has another key. A sidecar that cannot be read or written costs one more
hashing, never a wrong digest.
"""

import hashlib
import json
import os
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Final

from kvstore.core.errors import BadInput

WEIGHT_PATTERNS: Final = ("*.safetensors", "pytorch_model*.bin")
"""Files that hold weights; the second only where there is none of the first."""

_IRRELEVANT: Final = frozenset(
    {
        "_name_or_path", "_model_name_or_path", "transformers_version", "torch_dtype", "dtype",
        "use_cache",
        "bos_token_id", "eos_token_id", "pad_token_id", "architectures", "id2label", "label2id",
        "output_attentions", "output_hidden_states", "return_dict", "chunk_size_feed_forward",
        "is_encoder_decoder", "problem_type", "initializer_range", "pretraining_tp",
    }
)  # fmt: skip
"""Entries of config.json that change neither K nor V: they follow versions and habits."""

_CHUNK_BYTES: Final = 8 << 20

Hashed = Callable[[int, int], None]
"""Called with (bytes done, bytes in all) while files are hashed."""


def cache_directory() -> Path:
    """Return this project's user cache: `$XDG_CACHE_HOME/kvstore` or `~/.cache/kvstore`."""
    base = os.environ.get("XDG_CACHE_HOME")
    return (Path(base) if base else Path.home() / ".cache") / "kvstore"


def weight_files(model: Path) -> list[Path]:
    """Return the files that hold the weights of a Hugging Face directory, sorted by name.

    Raises `BadInput` naming the directory when there are none.
    """
    for pattern in WEIGHT_PATTERNS:
        if found := sorted(model.glob(pattern)):
            return found
    raise BadInput(f"{model} holds no weights (looked for {', '.join(WEIGHT_PATTERNS)})")


def file_digest(path: Path, *, cache: Path | None = None, hashed: Hashed | None = None) -> str:
    """Return the SHA-256 of a file in hex, from its sidecar where the key still fits."""
    stat = path.stat()
    key = [stat.st_dev, stat.st_ino, stat.st_size, stat.st_mtime_ns]
    place = hashlib.sha256(os.fsencode(path.resolve())).hexdigest()[:32]
    sidecar = (cache or cache_directory()) / "digests" / f"{place}.json"
    known = _read_sidecar(sidecar)
    if known.get("key") == key and isinstance(known.get("sha256"), str):
        return str(known["sha256"])
    digest = _hash_file(path, stat.st_size, hashed)
    _write_sidecar(sidecar, {"file": str(path), "key": key, "sha256": digest})
    return digest


def weights_digest(model: Path, config: Mapping[str, Any], *, cache: Path | None = None) -> str:
    """Return the SHA-256 in hex over weights and the entries of the config that bear on K and V.

    File names take part only by their order: the same bytes in a directory of another name
    are the same model.
    """
    state = hashlib.sha256(b"kvstore.weights.v1")
    for path in weight_files(model):
        state.update(bytes.fromhex(file_digest(path, cache=cache)))
    relevant = {name: value for name, value in config.items() if name not in _IRRELEVANT}
    state.update(canonical(relevant).encode())
    return state.hexdigest()


def canonical(value: Any) -> str:
    """Render nested plain data as the one JSON text that equal data have in common."""
    return json.dumps(value, sort_keys=True, separators=(",", ":"), allow_nan=False)


def _hash_file(path: Path, size: int, hashed: Hashed | None) -> str:
    state = hashlib.sha256()
    done = 0
    with path.open("rb") as file:
        while chunk := file.read(_CHUNK_BYTES):
            state.update(chunk)
            done += len(chunk)
            if hashed is not None:
                hashed(done, size)
    return state.hexdigest()


def _read_sidecar(path: Path) -> dict[str, Any]:
    try:
        known = json.loads(path.read_text())
    except (OSError, ValueError):
        return {}
    return known if isinstance(known, dict) else {}


def _write_sidecar(path: Path, known: Mapping[str, Any]) -> None:
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        descriptor, temporary = tempfile.mkstemp(dir=path.parent, prefix=".sidecar-")
        with os.fdopen(descriptor, "w") as file:
            json.dump(known, file)
        os.replace(temporary, path)
    except OSError:
        return  # a full or read-only cache: the next start hashes again
