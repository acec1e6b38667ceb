"""The engine's KV pages and our blocks, one into the other: bytes move, values do not change.

Engine, on a CPU (vLLM 0.32): a layer is `[blocks, kv_heads, block, 2·D]` in name only. In memory
a head of a block is `K | V`; K lies in tiles of `tile` tokens, each transposed to `[D, tile]`,
and V as `[block, D]`. Ours (DESIGN D1): `[kv_heads, layers, K [16, D] | V [16, D]]`.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from kvstore.core.errors import BadInput, Unsupported
from kvstore.core.layout import BlockLayout
from kvstore.core.limits import BLOCK_TOKENS

Array = npt.NDArray[Any]


class EnginePages:
    """Every layer's pages of one engine; `load` and `store` move one block of ours at a time.

    `layers[i]` is `[blocks, kv_heads, block_tokens, 2·head_dim]` of unsigned integers as wide as
    an element, contiguous in a block. `tile` is how many tokens of K are transposed together; 1
    says that K lies as V does. Safe from several threads as long as they name different blocks.
    """

    def __init__(self, layers: Sequence[Array], layout: BlockLayout, *, tile: int) -> None:
        self.layout = layout
        self.block_tokens = _check(layers, layout, tile)
        self.ratio = self.block_tokens // BLOCK_TOKENS
        """Blocks of ours in one of the engine's."""
        self.blocks = int(layers[0].shape[0])
        self._element = layers[0].dtype
        self._shape = (layout.kv_heads, layout.layers, 2, BLOCK_TOKENS, layout.head_dim)
        self._keys = [_keys_by_token(layer, layout.head_dim, tile) for layer in layers]
        self._values = [_values_by_token(layer, layout.head_dim) for layer in layers]

    def load(self, source: memoryview, block: int, part: int) -> None:
        """Copy one block of ours into the `part`-th 16 tokens of the engine's `block`."""
        for layer in range(self.layout.layers):
            self.load_layer(source, block, part, layer)

    def load_layer(self, source: memoryview, block: int, part: int, layer: int) -> None:
        """As `load`, of one layer alone."""
        cells = self._cells(source)
        tokens = slice(part * BLOCK_TOKENS, (part + 1) * BLOCK_TOKENS)
        _part(self._keys[layer], block, tokens)[...] = cells[:, layer, 0]
        self._values[layer][block, :, tokens] = cells[:, layer, 1]

    def store(self, block: int, part: int, target: memoryview) -> None:
        """Copy the `part`-th 16 tokens of the engine's `block` into one of ours, padding zeroed."""
        cells = self._cells(target)
        tokens = slice(part * BLOCK_TOKENS, (part + 1) * BLOCK_TOKENS)
        for layer, (keys, values) in enumerate(zip(self._keys, self._values, strict=True)):
            cells[:, layer, 0] = _part(keys, block, tokens)
            cells[:, layer, 1] = values[block, :, tokens]
        padding = target[self.layout.payload_bytes :]
        padding[:] = bytes(len(padding))

    def _cells(self, block: memoryview) -> Array:
        payload = block[: self.layout.payload_bytes]
        return np.frombuffer(payload, dtype=self._element).reshape(self._shape)


def _check(layers: Sequence[Array], layout: BlockLayout, tile: int) -> int:
    """Return the engine's tokens per block; raises what does not fit, by name."""
    if len(layers) != layout.layers:
        raise BadInput(f"{len(layers)} layers of pages, the model has {layout.layers}")
    shape = layers[0].shape
    block_tokens = int(shape[2])
    if block_tokens % BLOCK_TOKENS:
        raise Unsupported(
            f"block_size {block_tokens} is not a multiple of {BLOCK_TOKENS}: set --block-size"
        )
    if tile != 1 and (tile % BLOCK_TOKENS or block_tokens % tile):
        raise Unsupported(f"keys in tiles of {tile} tokens in blocks of {block_tokens}")
    wanted = (layout.kv_heads, block_tokens, 2 * layout.head_dim)
    for number, layer in enumerate(layers):
        if layer.shape[1:] != wanted or layer.dtype != layers[0].dtype:
            raise Unsupported(f"pages of layer {number} are {layer.shape[1:]}, not {wanted}")
        if not layer[0].flags.c_contiguous:
            raise Unsupported(f"pages of layer {number} are not contiguous inside a block")
    if layout.codes_bytes != BLOCK_TOKENS * layout.head_dim * layers[0].dtype.itemsize:
        raise Unsupported(f"pages of {layers[0].dtype.itemsize}-byte elements, {layout.codec.name}")
    return block_tokens


def _halves(layer: Array) -> Array:
    """Return `[blocks, heads, K or V, elements]` of a layer's pages, without a copy."""
    blocks, heads, block_tokens, width = layer.shape
    view = np.lib.stride_tricks.as_strided(
        layer,
        (blocks, heads, 2, block_tokens * width // 2),
        (*layer.strides[:2], block_tokens * width // 2 * layer.itemsize, layer.itemsize),
    )
    assert np.shares_memory(view, layer)
    return view


def _keys_by_token(layer: Array, head_dim: int, tile: int) -> Array:
    """Return K as `[blocks, heads, tiles, tile, D]`, a view that undoes the transposition."""
    keys = _halves(layer)[:, :, 0]
    blocks, heads, elements = keys.shape
    step = keys.itemsize
    if tile == 1:
        tile = elements // head_dim
        inner = (head_dim * step, step)
    else:
        inner = (step, tile * step)
    tiles = elements // (tile * head_dim)
    return np.lib.stride_tricks.as_strided(
        keys,
        (blocks, heads, tiles, tile, head_dim),
        (*keys.strides[:2], tile * head_dim * step, *inner),
    )


def _values_by_token(layer: Array, head_dim: int) -> Array:
    """Return V as `[blocks, heads, tokens, D]`, a view."""
    values = _halves(layer)[:, :, 1]
    blocks, heads, elements = values.shape
    step = values.itemsize
    return np.lib.stride_tricks.as_strided(
        values,
        (blocks, heads, elements // head_dim, head_dim),
        (*values.strides[:2], head_dim * step, step),
    )


def _part(keys: Array, block: int, tokens: slice) -> Array:
    """Return `[heads, 16, D]` of one block's keys; 16 tokens never cross a tile."""
    tile = keys.shape[3]
    first = tokens.start % tile
    part: Array = keys[block, :, tokens.start // tile, first : first + BLOCK_TOKENS]
    return part
