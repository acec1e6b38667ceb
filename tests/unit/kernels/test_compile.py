"""Kernels compile to machine code for the GPUs we name, with none of them here."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).resolve().parents[2] / "compile_kernels.py"


def compiled(cache: Path, *capabilities: int) -> dict[str, int]:
    """Return (generation and shape) → bytes of the binary, from a process without interpreter."""
    environment = {**os.environ, "TRITON_CACHE_DIR": str(cache), "TRITON_INTERPRET": "0"}
    done = subprocess.run(
        [sys.executable, str(SCRIPT), *map(str, capabilities)],
        env=environment, capture_output=True, text=True, check=False, timeout=300,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-2_000:]
    lines = [line.rpartition(" ") for line in done.stdout.splitlines()]
    return {name: int(size) for name, _, size in lines}


@pytest.mark.slow
def test_kernels_compile_for_hopper(tmp_path: Path) -> None:
    sizes = compiled(tmp_path, 90)
    shapes = ("llama", "append", "window", "shared", "fp8", "int8", "int4")
    rows = ("norm", "rotation", "activation", "choice")
    latents = ("mla 16 heads", "mla 128 heads", "mla gluon")
    movements = ("copy", "load int4", "load fp8", "store int4", "store fp8")
    assert set(sizes) == {
        f"sm_90 {shape}" for shape in (*shapes, *latents, "mla merge", *rows, *movements)
    }
    assert all(sizes[f"sm_90 {shape}"] > 10_000 for shape in (*shapes, *latents))


@pytest.mark.slow
def test_kernels_compile_for_ampere_and_blackwell(tmp_path: Path) -> None:
    sizes = compiled(tmp_path, 80, 100)
    assert len(sizes) == 16 + 19 and all(size > 3_000 for size in sizes.values())
