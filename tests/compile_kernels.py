"""Compile every kernel for GPUs that this machine does not have; print one line each.

Run as `python tests/compile_kernels.py 90 …`, a process of its own: under TRITON_INTERPRET kernels
are Python functions.
"""

import sys
from typing import Any

import triton
from kvkernels.triton.decode import attend_pages
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

POINTERS = {
    "query": "*bf16",
    "out": "*bf16",
    "layer_pages": "*bf16",
    "tables": "*i32",
    "items": "*i32",
    "partial": "*fp32",
    "stats": "*fp32",
    "counters": "*i32",
}
NUMBERS = {
    **dict.fromkeys(("query_token", "query_head", "page_stride", "head_stride"), "i32"),
    **dict.fromkeys(("value_offset", "table_stride"), "i32"),
    **dict.fromkeys(("scale", "softcap"), "fp32"),
}
SHAPES: dict[str, dict[str, Any]] = {
    "llama": {"HEADS": 8, "GROUP": 4, "DIM": 128, "WINDOW": 0, "SINKS": 0, "SOFTCAP": False},
    "fp8": {
        "HEADS": 8,
        "GROUP": 4,
        "DIM": 128,
        "WINDOW": 0,
        "SINKS": 0,
        "SOFTCAP": False,
        "CODEC": 2,
    },
    "int8": {
        "HEADS": 8,
        "GROUP": 4,
        "DIM": 128,
        "WINDOW": 0,
        "SINKS": 0,
        "SOFTCAP": False,
        "CODEC": 3,
    },
    "int4": {
        "HEADS": 8,
        "GROUP": 3,
        "DIM": 64,
        "WINDOW": 0,
        "SINKS": 0,
        "SOFTCAP": False,
        "CODEC": 4,
    },
    "window": {"HEADS": 8, "GROUP": 3, "DIM": 64, "WINDOW": 4096, "SINKS": 4, "SOFTCAP": True},
}


def compile_for(capability: int, shape: dict[str, Any]) -> int:
    """Return the bytes of the binary; raises what the compiler raises."""
    quantised = "CODEC" in shape
    constants = {
        "CODEC": 0, **shape, "BLOCK_M": 16, "BLOCK_N": 64, "PAGE": 16, "PRECISION": "ieee",
        "DOT": triton.language.float16 if quantised else triton.language.bfloat16,
    }  # fmt: skip
    pointers = {**POINTERS, "layer_pages": "*u8" if quantised else "*bf16"}
    names = attend_pages.arg_names
    signature = {name: {**pointers, **NUMBERS}.get(name, "constexpr") for name in names}
    source = ASTSource(
        fn=attend_pages,
        signature=signature,
        constexprs={(names.index(name),): value for name, value in constants.items()},
    )
    options = {"num_warps": 4, "num_stages": 3}
    compiled = triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options)
    return len(compiled.asm["cubin"])


def main() -> None:
    """Compile each shape for each generation."""
    for capability in map(int, sys.argv[1:]):
        for name, shape in SHAPES.items():
            if shape.get("CODEC") == 2 and capability < 89:
                continue  # no conversion from fp8 there
            size = compile_for(capability, shape)
            sys.stdout.write(f"sm_{capability} {name} {size}\n")


if __name__ == "__main__":
    main()
