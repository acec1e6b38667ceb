"""From one GGUF file to a Hugging Face directory, once.

Parsing a GGUF takes transformers half a minute, so its weights are unpacked to bfloat16
safetensors in the user's cache. Two starts at once share one conversion: the second waits for
the lock and finds the result. A directory appears by rename, hence whole or not at all.
"""

import json
import shutil
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from importlib import import_module
from pathlib import Path
from typing import Any, Final

from filelock import FileLock, Timeout

from kvstore.core.errors import BadInput, Unreachable
from kvworkers.models.digest import file_digest
from kvworkers.models.spec import DESCRIPTION_FILE

CONVERTER_VERSION: Final = 1
"""Part of a converted directory's name: raise it when the result would differ."""

LOCK_SECONDS: Final = 900.0
"""Longest wait for another process's conversion or download; both end far sooner."""

_MAGIC: Final = b"GGUF"

Progress = Callable[[str, int, int], None]
"""Called with (step, done, total); total 0 means that the step's length is not known."""


def no_progress(step: str, done: int, total: int) -> None:
    """Show nothing."""


def converted_directory(gguf: Path, *, cache: Path, progress: Progress = no_progress) -> Path:
    """Return the converted form of `gguf` under `cache`, making it where it is missing.

    Raises `BadInput` naming the file when it is no GGUF, cut short or of an architecture that
    transformers cannot convert; `Unreachable` when another process holds the lock too long.
    """
    _check_magic(gguf)
    digest = file_digest(
        gguf, cache=cache, hashed=lambda done, size: progress("Checking model file", done, size)
    )
    target = cache / "models" / f"{gguf.stem}-{digest[:16]}-v{CONVERTER_VERSION}"
    if (target / DESCRIPTION_FILE).exists():
        return target
    with locked(target):
        if (target / DESCRIPTION_FILE).exists():
            return target
        partial = target.with_name(f".{target.name}.partial")
        shutil.rmtree(partial, ignore_errors=True)  # a conversion that was killed
        try:
            _convert(gguf, partial, progress)
            _describe(gguf, digest, partial)
            partial.rename(target)
        finally:
            shutil.rmtree(partial, ignore_errors=True)
    return target


@contextmanager
def locked(target: Path) -> Iterator[None]:
    """Hold the lock beside `target`; its file stays, so that nobody locks a deleted one."""
    target.parent.mkdir(parents=True, exist_ok=True)
    path = target.with_name(f".{target.name}.lock")
    try:
        with FileLock(path, timeout=LOCK_SECONDS):
            yield
    except Timeout:
        raise Unreachable(f"another process has held {path} for {LOCK_SECONDS:.0f} s") from None


def _check_magic(gguf: Path) -> None:
    try:
        with gguf.open("rb") as file:
            magic = file.read(len(_MAGIC))
    except OSError as error:
        raise BadInput(f"{gguf}: {error.strerror}") from None
    if magic != _MAGIC:
        raise BadInput(f"{gguf} is not a GGUF file: it starts with {magic!r}")


def _convert(gguf: Path, target: Path, progress: Progress) -> None:
    """Write tokenizer, config and bfloat16 weights of `gguf` to `target`."""
    steps = 4
    progress("Converting: loading transformers", 0, steps)
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from kvworkers.models.loading import quiet_loading

    with quiet_loading(), _counted_tensors(progress):
        try:
            progress("Converting: reading tokenizer", 1, steps)
            tokenizer = AutoTokenizer.from_pretrained(
                gguf.parent, gguf_file=gguf.name, local_files_only=True
            )
            progress("Converting: unpacking weights", 2, steps)
            model = AutoModelForCausalLM.from_pretrained(
                gguf.parent,
                gguf_file=gguf.name,
                dtype=torch.bfloat16,
                local_files_only=True,
                **_unpacked(),
            )
        except (ValueError, IndexError, KeyError, OSError, NotImplementedError) as error:
            # gguf reads through numpy, which reports a file cut short as a shape that does not fit.
            raise BadInput(f"{gguf} is cut short or cannot be converted: {error}") from error
        progress("Converting: saving", 3, steps)
        # Saved weights are plain; what they were packed in before would only be refused.
        if hasattr(model.config, "quantization_config"):
            del model.config.quantization_config  # pyright: ignore[reportAttributeAccessIssue]
        model.save_pretrained(target)
        tokenizer.save_pretrained(target)
    progress("Converting: saving", steps, steps)


@contextmanager
def _counted_tensors(progress: Progress) -> Iterator[None]:
    """Turn the bar that transformers draws over a GGUF's tensors into steps of ours."""
    module: Any = import_module("transformers.modeling_gguf_pytorch_utils")
    theirs = getattr(module, "tqdm", None)

    def counted(tensors: Collection[Any], **_: Any) -> Iterator[Any]:
        for done, tensor in enumerate(tensors, 1):
            yield tensor
            progress("Unpacking tensors", done, len(tensors))

    module.tqdm = counted
    try:
        yield
    finally:
        module.tqdm = theirs


def _unpacked() -> dict[str, Any]:
    """Return the argument that asks for plain weights: older transformers know nothing else."""
    try:
        from transformers import GgufConfig
    except ImportError:
        return {}
    return {"quantization_config": GgufConfig(dequantize=True)}


def _describe(gguf: Path, digest: str, target: Path) -> None:
    description = {
        "name": gguf.stem.rsplit(".", 1)[0],  # without the quantisation: `X.Q4_1` is model X
        "source": gguf.name,
        "source_sha256": digest,
        "converter_version": CONVERTER_VERSION,
    }
    (target / DESCRIPTION_FILE).write_text(json.dumps(description, indent=2) + "\n")
