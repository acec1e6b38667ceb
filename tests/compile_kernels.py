"""Compile every kernel for GPUs that this machine does not have; print one line each.

Run as `python tests/compile_kernels.py 90 …`, a process of its own: under TRITON_INTERPRET kernels
are Python functions.
"""

import sys
from typing import Any

import triton
from kvkernels.triton.decode import attend_pages
from kvkernels.triton.fused import (
    add_and_norm,
    best_of_parts,
    gate_and_multiply,
    rotate_and_write,
)
from kvkernels.triton.latent import attend_latents, merge_latents
from kvkernels.triton.movement import copy_runs, decode_cells, encode_cells
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
    "members": "*i32",
    "state": "*fp32",
    "masses": "*fp32",
}
NUMBERS = {
    **dict.fromkeys(("query_token", "query_head", "page_stride", "head_stride"), "i32"),
    **dict.fromkeys(("value_offset",), "i32"),
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
    "shared": {
        "HEADS": 8,
        "GROUP": 4,
        "DIM": 128,
        "WINDOW": 0,
        "SINKS": 0,
        "SOFTCAP": False,
        "BLOCK_M": 128,
        "FROM": True,
        "TO": True,
    },
    "append": {
        "HEADS": 8,
        "GROUP": 4,
        "DIM": 128,
        "WINDOW": 0,
        "SINKS": 0,
        "SOFTCAP": False,
        "BLOCK_M": 128,
    },
    "window": {"HEADS": 8, "GROUP": 3, "DIM": 64, "WINDOW": 4096, "SINKS": 4, "SOFTCAP": True},
}


def compiled(
    kernel: Any,
    signature: dict[str, str],
    constants: dict[str, Any],
    capability: int,
    **options: Any,
) -> int:
    """Return the bytes of the binary; raises what the compiler raises."""
    places = {(kernel.arg_names.index(name),): value for name, value in constants.items()}
    source = ASTSource(fn=kernel, signature=signature, constexprs=places)
    target = GPUTarget("cuda", capability, 32)
    return len(triton.compile(source, target=target, options=options).asm["cubin"])


def compile_for(capability: int, shape: dict[str, Any]) -> int:
    """Return the bytes of the binary; raises what the compiler raises."""
    quantised = "CODEC" in shape
    constants = {
        "CODEC": 0, "FROM": False, "TO": False, "BLOCK_M": 16, **shape, "BLOCK_N": 64, "PAGE": 16,
        "PRECISION": "ieee",
        "DOT": triton.language.float16 if quantised else triton.language.bfloat16,
    }  # fmt: skip
    pointers = {**POINTERS, "layer_pages": "*u8" if quantised else "*bf16"}
    names = attend_pages.arg_names
    signature = {name: {**pointers, **NUMBERS}.get(name, "constexpr") for name in names}
    return compiled(attend_pages, signature, constants, capability, num_warps=4, num_stages=3)


MOVEMENTS: dict[str, tuple[Any, str, str, dict[str, int]]] = {
    "copy": (copy_runs, "*u8", "*u8", {"UNITS": 256}),
    "load int4": (decode_cells, "*u8", "*bf16", {"CODEC": 4, "DIM": 128, "CELLS": 8}),
    "load fp8": (decode_cells, "*u8", "*bf16", {"CODEC": 2, "DIM": 128, "CELLS": 8}),
    "store int4": (encode_cells, "*bf16", "*u8", {"CODEC": 4, "DIM": 64, "CELLS": 16}),
    "store fp8": (encode_cells, "*bf16", "*u8", {"CODEC": 2, "DIM": 64, "CELLS": 16}),
}


def compile_movement(capability: int, name: str) -> int:
    """Return the bytes of the binary; raises what the compiler raises."""
    kernel, source, target, shape = MOVEMENTS[name]
    constants = {**shape, "STAGES": 1}
    names = kernel.arg_names
    kinds = {"source": source, "target": target, "source_units": "*i64", "target_units": "*i64"}
    signature = {
        each: "constexpr" if each in constants else kinds.get(each, "i32") for each in names
    }
    return compiled(kernel, signature, constants, capability, num_warps=16)


ROWS: dict[str, tuple[Any, dict[str, str], dict[str, Any]]] = {
    "norm": (add_and_norm, {}, {"ADD": True, "BLOCK": 4096}),
    "rotation": (
        rotate_and_write,
        {"slots": "*i64"},
        {
            "QUERY_HEADS": 32, "KV_HEADS": 8, "HALF": 64, "PAGE": 16, "HEADS": 8, "NORM": True,
        },
    ),
    "activation": (gate_and_multiply, {}, {"BLOCK": 1024}),
    "choice": (
        best_of_parts,
        {"logits": "*fp32", "tops": "*fp32", "places": "*i32", "finite": "*i32"},
        {"BLOCK": 4096},
    ),
}  # fmt: skip
_INTEGERS = (
    *("width", "vocab", "parts", "token_stride", "page_stride", "head_stride", "value_offset"),
)


def compile_rows(capability: int, name: str) -> int:
    """Return the bytes of the binary of a small kernel; raises what the compiler raises."""
    kernel, kinds, constants = ROWS[name]
    numbers = {**dict.fromkeys(_INTEGERS, "i32"), "epsilon": "fp32"}
    names = kernel.arg_names
    signature = {
        each: "constexpr" if each in constants else {**numbers, **kinds}.get(each, "*bf16")
        for each in names
    }
    options = {"num_warps": 4, "enable_fp_fusion": False}
    return compiled(kernel, signature, constants, capability, **options)


LATENTS: dict[str, dict[str, Any]] = {
    "mla 16 heads": {"HEADS": 16, "BLOCKS": 1, "BLOCK_M": 16, "BLOCK_N": 64},
    "mla 128 heads": {"HEADS": 128, "BLOCKS": 2, "BLOCK_M": 64, "BLOCK_N": 64},
}
_LATENT_STRIDES = ("query_token", "query_head", "rotary_token", "rotary_head", "page_stride")


def compile_latents(capability: int, name: str) -> int:
    """Return the bytes of the binary of attention over MLA pages."""
    constants = {
        "LATENT": 512, "ROPE": 64, "PAGE": 16, "DOT": triton.language.bfloat16, "PRECISION": "ieee",
        **LATENTS[name],
    }  # fmt: skip
    kinds = {**POINTERS, **dict.fromkeys(_LATENT_STRIDES, "i32"), "scale": "fp32"}
    kinds |= {"rotary": "*bf16", "cells": "*bf16"}
    names = attend_latents.arg_names
    signature = {each: "constexpr" if each in constants else kinds[each] for each in names}
    tall = constants["BLOCK_M"] == 64
    options = {"num_warps": 8 if tall else 4, "num_stages": 2 if tall else 3}
    return compiled(attend_latents, signature, constants, capability, **options)


def compile_latent_merge(capability: int) -> int:
    """Return the bytes of the binary of the launch that merges parts."""
    constants = {"HEADS": 128, "ROWS": 128, "LATENT": 512, "PARTS": 32, "COLUMNS": 128}
    kinds = {**POINTERS, "firsts": "*i32"}
    names = merge_latents.arg_names
    signature = {each: "constexpr" if each in constants else kinds[each] for each in names}
    return compiled(merge_latents, signature, constants, capability, num_warps=4)


def compile_latents_for_hopper() -> int:
    """Return the bytes of the binary of the kernel in Gluon."""
    # Gluon keeps its sources apart; what it needs is not in every version that has the rest.
    from kvkernels.triton.latent_hopper import attend_latents_hopper as kernel
    from triton.experimental.gluon._runtime import GluonASTSource

    constants = {
        "HEADS": 128, "BLOCKS": 2, "LATENT": 512, "ROPE": 64, "BLOCK_M": 64, "BLOCK_N": 64,
        "PAGE": 16,
    }  # fmt: skip
    kinds = {**POINTERS, **dict.fromkeys(_LATENT_STRIDES, "i32"), "scale": "fp32"}
    kinds |= {"rotary": "*bf16", "cells": "*bf16"}
    names = kernel.arg_names
    places = {(names.index(name),): value for name, value in constants.items()}
    signature = {each: "constexpr" if each in constants else kinds[each] for each in names}
    # Without it copies are of single elements, which `cp.async` does not have.
    aligned = {(at,): [["tt.divisibility", 16]] for at, each in enumerate(names) if each in kinds}
    aligned.pop((names.index("scale"),))
    source = GluonASTSource(kernel, signature, places, aligned)
    target = GPUTarget("cuda", 90, 32)
    return len(triton.compile(source, target=target, options={"num_warps": 8}).asm["cubin"])


def main() -> None:
    """Compile each shape for each generation."""
    for capability in map(int, sys.argv[1:]):
        for name, shape in SHAPES.items():
            if shape.get("CODEC") == 2 and capability < 89:
                continue  # no conversion from fp8 there
            size = compile_for(capability, shape)
            sys.stdout.write(f"sm_{capability} {name} {size}\n")
        for name in LATENTS:
            sys.stdout.write(f"sm_{capability} {name} {compile_latents(capability, name)}\n")
        sys.stdout.write(f"sm_{capability} mla merge {compile_latent_merge(capability)}\n")
        if capability == 90:
            sys.stdout.write(f"sm_90 mla gluon {compile_latents_for_hopper()}\n")
        for name in ROWS:
            sys.stdout.write(f"sm_{capability} {name} {compile_rows(capability, name)}\n")
        for name in MOVEMENTS:
            if "fp8" not in name or capability >= 89:
                size = compile_movement(capability, name)
                sys.stdout.write(f"sm_{capability} {name} {size}\n")


if __name__ == "__main__":
    main()
