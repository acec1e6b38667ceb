"""vLLM's own tensors as `EnginePages`: asks the engine's kernel where it puts a key.

Which layout a CPU's attention uses depends on its instruction set. The kernel that writes the
cache is run once on known values, so that a layout that we do not know is refused, not misread.
"""

# vLLM lives in another environment than the tools that read this.
# pyright: reportMissingImports=false, reportAttributeAccessIssue=false

from collections.abc import Mapping
from typing import Any, Final

import numpy as np
import torch

from kvstore.adapters.vllm.pages import EnginePages
from kvstore.core.errors import Unsupported
from kvstore.core.layout import BlockLayout

_TILES: Final = (1, 32, 16, 64, 128)
_INTEGERS: Final = {2: torch.int16, 4: torch.int32}


def engine_pages(kv_caches: Mapping[str, torch.Tensor], layout: BlockLayout) -> EnginePages:
    """Return pages over vLLM's tensors, layers in the model's order.

    Raises `Unsupported` for a device or an arrangement in memory that is not served.
    """
    tensors = list(kv_caches.values())
    first = tensors[0]
    if first.device.type != "cpu":
        raise Unsupported(f"KV cache on {first.device.type}: only vLLM on CPU is served yet")
    if first.dim() != 4:
        raise Unsupported(f"KV cache of shape {tuple(first.shape)}")
    integers = _INTEGERS.get(first.element_size())
    if integers is None:
        raise Unsupported(f"KV cache of {first.dtype}")
    arrays = [tensor.view(integers).numpy() for tensor in tensors]
    return EnginePages(arrays, layout, tile=_probe(first, layout, arrays[0].dtype))


def _probe(like: torch.Tensor, layout: BlockLayout, element: Any) -> int:
    """Return the tile of K that the engine's kernel writes, found by reading back known values."""
    from vllm import _custom_ops as operations
    from vllm.v1.attention.backends.cpu_attn import _get_attn_isa

    _, heads, block_tokens, width = like.shape
    scratch = torch.zeros((2, heads, block_tokens, width), dtype=like.dtype)
    generator = torch.Generator().manual_seed(0)
    shape = (2 * block_tokens, heads, layout.head_dim)
    key, value = (torch.randn(shape, generator=generator).to(like.dtype) for _ in range(2))
    halves = scratch.view(2, heads, 2 * block_tokens, -1).chunk(2, dim=2)
    isa = _get_attn_isa(like.dtype, block_tokens, layout.head_dim)
    operations.cpu_attn_reshape_and_cache(
        key, value, halves[0], halves[1], torch.arange(2 * block_tokens), isa
    )
    one = BlockLayout(layers=1, kv_heads=heads, head_dim=layout.head_dim, codec=layout.codec)
    integers = _INTEGERS[like.element_size()]
    pages = [scratch.view(integers).numpy()]
    wanted = torch.stack([key, value]).view(integers).numpy()
    for tile in _TILES:
        if block_tokens % tile == 0 and _reads(EnginePages(pages, one, tile=tile), wanted, element):
            return tile
    raise Unsupported(f"vLLM's CPU attention {isa!r} keeps keys in an order that is not served")


def _reads(pages: EnginePages, wanted: Any, element: Any) -> bool:
    """Say whether pages read with this tile give the keys and values that were written."""
    layout = pages.layout
    for place in range(pages.blocks * pages.ratio):
        block = bytearray(layout.block_bytes)
        pages.store(place // pages.ratio, place % pages.ratio, memoryview(block))
        got = np.frombuffer(block, element, layout.payload_bytes // element.itemsize)
        got = got.reshape(layout.kv_heads, 2, 16, layout.head_dim).transpose(1, 2, 0, 3)
        if not np.array_equal(got, wanted[:, place * 16 : place * 16 + 16]):
            return False
    return True
