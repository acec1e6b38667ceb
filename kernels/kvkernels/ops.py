"""Typed, checked entries to attention and movement over pages in the one layout.

A *page* is a block (`kvstore.core.layout`) that sits in a worker's pool: 16 tokens, all layers,
heads outermost. Callers use these functions only; which code runs is decided by the device of
the tensors, so another implementation drops in without a change above:

    ops (shapes, checks) ── implementation(device) ──▶ kvkernels.reference   cpu: vectorised torch
                                                       kvkernels.triton.device  cuda: Triton kernels

The reference is also the oracle that every later kernel is compared with. Shapes are checked on
every call; values of index tensors are checked once per step by whoever builds the step
(`kvworkers.models.step`), because looking at values costs a synchronisation on a GPU.
"""

import torch
from torch import Tensor

from kvkernels.checks import check, check_pages, say
from kvkernels.movement import UNIT_BYTES, Movement, check_layouts
from kvkernels.plans import AttentionPlan, Implementation, Rules
from kvkernels.quantised import QuantisedPages, view_cells
from kvstore.core.errors import BadInput, Unsupported
from kvstore.core.layout import BlockLayout, Codec
from kvstore.core.limits import BLOCK_TOKENS

_ELEMENT_TYPES = {
    Codec.RAW32: (torch.float32,),
    Codec.RAW16: (torch.bfloat16, torch.float16),
}
_QUERY_TYPES = tuple(kind for kinds in _ELEMENT_TYPES.values() for kind in kinds)

_CAUSAL = Rules()


def implementation(device_type: str) -> Implementation:
    """Return the code that serves tensors on `device_type` (`cpu`, `cuda` …).

    Raises `Unsupported` naming the device where there is none.
    """
    if device_type == "cpu":
        from kvkernels import reference

        return reference
    if device_type == "cuda":
        try:
            from kvkernels.triton import device
        except ModuleNotFoundError as missing:
            raise Unsupported(f"kernels for 'cuda' need the package {missing.name!r}") from missing
        return device
    raise Unsupported(f"no kernels for device {device_type!r}; there are 'cpu' and 'cuda'")


def page_view(pool: Tensor, layout: BlockLayout, dtype: torch.dtype | None = None) -> Tensor:
    """Return `pool` seen as K and V elements, without a copy and without the padding.

    pool uint8 [pages, block_bytes], rows contiguous; the result is
    [pages, kv_heads, layers, 2 (K, V), 16, head_dim] of `dtype`, by default float32 for RAW32
    and bfloat16 for RAW16. Raises `Unsupported` for quantised codecs (their cells hold scales),
    `BadInput` for a pool that does not fit the layout.
    """
    types = _ELEMENT_TYPES.get(layout.codec)
    if types is None:
        raise Unsupported(f"pages of codec {layout.codec.name} cannot be viewed as raw K and V")
    element = types[0] if dtype is None else dtype
    if element not in types:
        raise BadInput(f"codec {layout.codec.name} does not hold {element}")
    _check_pool(pool, layout)
    elements = pool.view(element)
    size = element.itemsize
    return elements.as_strided(
        (pool.shape[0], layout.kv_heads, layout.layers, 2, BLOCK_TOKENS, layout.head_dim),
        (
            elements.stride(0),
            layout.share_bytes // size,
            layout.cell_bytes // size,
            layout.codes_bytes // size,
            layout.head_dim,
            1,
        ),
    )


def quantised_view(pool: Tensor, layout: BlockLayout) -> QuantisedPages:
    """Return `pool`, uint8 [pages, block_bytes], seen as cells of a quantised codec; no copy.

    Raises `BadInput` for a raw codec and for a pool that does not fit the layout.
    """
    _check_pool(pool, layout)
    return view_cells(pool, layout)


def write_pages(
    key: Tensor, value: Tensor, pages: Tensor | QuantisedPages, slots: Tensor, layer: int
) -> None:
    """Write the K and V of new tokens into their places, quantised where the pages are.

    key, value [tokens, kv_heads, head_dim]; pages as `page_view` or `quantised_view` gives them
    (the latter take any floating type); slots int64 [tokens] = page * 16 + offset, unique and
    inside the pool.
    """
    heads, dim = check_pages(pages, layer)
    dtype = key.dtype if isinstance(pages, QuantisedPages) else pages.dtype
    expected = (slots.shape[0], heads, dim)
    check(
        slots.dim() == 1 and slots.dtype == torch.int64,
        f"slots must be int64 [tokens], got {say(slots)}",
    )
    check(
        tuple(key.shape) == expected and key.dtype == dtype and dtype.is_floating_point,
        f"key must be {expected} of {dtype}, got {say(key)}",
    )
    check(
        value.shape == key.shape and value.dtype == key.dtype,
        f"value must be like key, got {say(value)}",
    )
    implementation(_device(pages)).write_pages(key, value, pages, slots, layer)


def plan_attention(
    block_tables: Tensor, context_lengths: Tensor, query_starts: Tensor, *, device_type: str = "cpu"
) -> AttentionPlan:
    """Prepare what every layer of one step shares; the arguments are `paged_attention`'s.

    Give `block_tables` on the host: for a GPU they are copied, and sequences that begin with the
    same pages have those read once for all of them. Tables on the device are taken as they are
    and never looked at.
    """
    sequences = context_lengths.shape[0]
    check(
        block_tables.dim() == 2 and block_tables.shape[0] == sequences,
        f"block_tables must be [{sequences}, max_pages], got {say(block_tables)}",
    )
    check(
        query_starts.shape == (sequences + 1,),
        f"query_starts must be [{sequences + 1}], got {say(query_starts)}",
    )
    for name, tensor in (
        ("block_tables", block_tables),
        ("context_lengths", context_lengths),
        ("query_starts", query_starts),
    ):
        check(tensor.dtype == torch.int32, f"{name} must be int32, got {say(tensor)}")
    return implementation(device_type).plan_attention(block_tables, context_lengths, query_starts)


def paged_attention(
    query: Tensor,
    pages: Tensor | QuantisedPages,
    *,
    layer: int,
    block_tables: Tensor,
    context_lengths: Tensor,
    query_starts: Tensor,
    scale: float,
    plan: AttentionPlan | None = None,
    rules: Rules = _CAUSAL,
) -> Tensor:
    """Attend causally from new tokens to everything their sequence holds in its pages.

    query [tokens, query_heads, head_dim], the sequences' rows one after another; block_tables
    int32 [sequences, max_pages] (entries past a sequence's pages are ignored); context_lengths
    int32 [sequences], the new tokens included; query_starts int32 [sequences + 1]. The last row
    of a sequence is its last token. K and V of the new tokens have been written already.
    Query heads are a multiple of KV heads (MHA, GQA and MQA alike). Returns a tensor like
    query. `plan` is `plan_attention`'s for the same three tensors: pass it where several layers
    share them, or it is made anew. `rules` adds a window, sinks or a soft cap. Quantised pages take
    a query of any type in `page_view`'s list; all pages of a call have one codec.
    """
    heads, dim = check_pages(pages, layer)
    check(
        query.dim() == 3 and query.shape[2] == dim,
        f"query must be [tokens, heads, {dim}], got {say(query)}",
    )
    check(
        query.shape[1] % heads == 0,
        f"{query.shape[1]} query heads are no multiple of {heads} KV heads",
    )
    if isinstance(pages, QuantisedPages):
        check(query.dtype in _QUERY_TYPES, f"query is {query.dtype}, not one of {_QUERY_TYPES}")
    else:
        check(query.dtype == pages.dtype, f"query is {query.dtype}, pages are {pages.dtype}")
    if plan is None:
        plan = plan_attention(
            block_tables, context_lengths, query_starts, device_type=_device(pages)
        )
    check(
        plan.query_tokens == query.shape[0],
        f"query has {query.shape[0]} tokens, its starts say {plan.query_tokens}",
    )
    return implementation(_device(pages)).paged_attention(
        query, pages, layer=layer, plan=plan, scale=scale, rules=rules
    )


def load_blocks(arena: Tensor, offsets: Tensor, pool: Tensor, pages: Tensor) -> None:
    """Copy whole blocks from arena memory into pages of a pool.

    arena uint8 [bytes] (`torch.frombuffer` of the mapping); offsets int64 [n] in bytes; pool
    uint8 [pages, block_bytes]; pages int64 [n], unique. On the CPU the copies release the GIL.
    Raises `BadInput` before anything is written when a block lies outside arena or pool.
    """
    _check_places(arena, offsets, pool.shape[1], pool, pages)
    implementation(pool.device.type).load_blocks(arena, offsets, pool, pages)


def store_blocks(pool: Tensor, pages: Tensor, arena: Tensor, offsets: Tensor) -> None:
    """Copy whole pages of a pool to arena memory; shapes, errors and GIL as `load_blocks`."""
    _check_places(arena, offsets, pool.shape[1], pool, pages)
    implementation(pool.device.type).store_blocks(pool, pages, arena, offsets)


def plan_movement(
    arena: Tensor,
    arena_layout: BlockLayout,
    offsets: Tensor,
    pool: Tensor,
    pool_layout: BlockLayout,
    pages: Tensor,
    *,
    element: torch.dtype | None = None,
) -> Movement:
    """Prepare what all loads and stores between the same blocks and pages share.

    arena uint8 [bytes]; for a pool on a GPU it is pinned (or registered) wherever a block lies.
    offsets int64 [n], bytes, multiples of 128; pool uint8 [all pages, block_bytes]; pages int64
    [n], unique. The layouts may differ in their codecs: equal ones move as bytes, and between a raw
    and a quantised one blocks are encoded or decoded on the way. `element` is the type that the
    raw side holds, where that is not `page_view`'s default. Values are looked at here, once: give
    index tensors on the host. Raises `BadInput` for what does not fit, `Unsupported` for two
    different raw or two different quantised codecs.
    """
    check_layouts(arena_layout, pool_layout)
    _check_pool(pool, pool_layout)
    _check_places(arena, offsets, arena_layout.block_bytes, pool, pages)
    check(
        not bool((offsets % UNIT_BYTES).any()) and pool.stride(0) % UNIT_BYTES == 0,
        f"offsets and the pool's rows must be multiples of {UNIT_BYTES} bytes",
    )
    check(
        pool.device.type == "cpu" or arena.is_pinned(),
        "the arena must be pinned or registered memory for a pool on a GPU",
    )
    raw = arena_layout if arena_layout.codec in _ELEMENT_TYPES else pool_layout
    types = _ELEMENT_TYPES.get(raw.codec, ())
    kind = element or (types[0] if types else torch.uint8)
    check(kind in (types or (torch.uint8,)), f"codec {raw.codec.name} does not hold {kind}")
    rows = pool.stride(0) // UNIT_BYTES
    return Movement(
        arena=arena,
        arena_layout=arena_layout,
        pool=pool,
        pool_layout=pool_layout,
        element=kind,
        arena_units=_sent(offsets // UNIT_BYTES, pool.device),
        pool_units=_sent(pages * rows, pool.device),
    )


def _sent(index: Tensor, device: torch.device) -> Tensor:
    """Queue a host tensor's way to `device`: from memory that is not pinned it would wait there."""
    if device.type == "cpu":
        return index
    return index.pin_memory().to(device, non_blocking=True)


def load_layers(
    movement: Movement,
    layers: range | None = None,
    *,
    blocks: range | None = None,
    programs: int = 16,
) -> None:
    """Move blocks' `layers` (all by default) from the arena into the pages, transcoding.

    On a GPU: kernels on the current stream, of `programs` programs each; 16 fill a PCIe 5 bus with
    raw or fp8 bytes, int4 wants 32 to 64, and so do stores that encode. The call returns at once,
    so arena and index tensors stay as they are until an event recorded after it. `blocks` are the
    plan's blocks to move, in one launch: pass those of `movement.slices(layers)` one by one to be
    able to stop in between. By default all are moved, in launches of at most 64 MiB of the arena.
    On the CPU it has happened when the call returns. Raises `BadInput` for layers or blocks that
    are not there.
    """
    _check_layers(movement, layers, blocks, programs)
    implementation(movement.pool.device.type).move_layers(
        movement, layers, blocks, store=False, programs=programs
    )


def store_layers(
    movement: Movement,
    layers: range | None = None,
    *,
    blocks: range | None = None,
    programs: int = 16,
) -> None:
    """Move pages' `layers` to the blocks in the arena; otherwise `load_layers`.

    The host may read the arena when an event recorded after the call has completed. Padding at
    the end of a block is not written.
    """
    _check_layers(movement, layers, blocks, programs)
    implementation(movement.pool.device.type).move_layers(
        movement, layers, blocks, store=True, programs=programs
    )


def _check_layers(
    movement: Movement, layers: range | None, blocks: range | None, programs: int
) -> None:
    for name, chosen, count in (
        ("layers", layers, movement.pool_layout.layers),
        ("blocks", blocks, movement.blocks),
    ):
        if chosen is not None and len(chosen):
            fits = chosen.step == 1 and chosen.start >= 0 and chosen.stop <= count
            check(fits, f"{name} {chosen} of {count}")
    check(programs >= 1, f"programs must be at least 1, got {programs}")


def _device(pages: Tensor | QuantisedPages) -> str:
    return (pages.cells if isinstance(pages, QuantisedPages) else pages).device.type


def _check_pool(pool: Tensor, layout: BlockLayout) -> None:
    check(
        pool.dtype == torch.uint8 and pool.dim() == 2,
        f"pool must be uint8 [n, bytes], got {say(pool)}",
    )
    check(
        pool.shape[1] == layout.block_bytes,
        f"pool rows have {pool.shape[1]} bytes, blocks {layout.block_bytes}",
    )
    check(pool.stride(1) == 1, "pool rows must be contiguous")


def _check_places(
    arena: Tensor, offsets: Tensor, block_bytes: int, pool: Tensor, pages: Tensor
) -> None:
    check(
        arena.dtype == torch.uint8 and arena.dim() == 1 and arena.is_contiguous(),
        f"arena must be contiguous uint8 [bytes], got {say(arena)}",
    )
    check(
        pool.dtype == torch.uint8 and pool.dim() == 2 and pool.stride(1) == 1,
        f"pool must be uint8 [pages, bytes], got {say(pool)}",
    )
    for name, tensor, last in (
        ("offsets", offsets, arena.shape[0] - block_bytes),
        ("pages", pages, pool.shape[0] - 1),
    ):
        check(
            tensor.dtype == torch.int64 and tensor.dim() == 1,
            f"{name} must be int64 [n], got {say(tensor)}",
        )
        if tensor.numel():
            low, high = int(tensor.min()), int(tensor.max())
            check(
                low >= 0 and high <= last, f"{name} reach from {low} to {high}; [0, {last}] allowed"
            )
    check(offsets.shape == pages.shape, f"{offsets.shape[0]} offsets for {pages.shape[0]} pages")
