"""What `ops` calls for tensors on a CUDA device."""

from dataclasses import dataclass, field

import torch
from torch import Tensor

from kvkernels.movement import Movement
from kvkernels.plans import AttentionPlan, Rules
from kvkernels.quantised import QuantisedPages
from kvkernels.triton.launch import attend, write_quantised
from kvkernels.triton.moving import move
from kvkernels.triton.works import Shape, Work, make_works
from kvstore.core.errors import BadInput
from kvstore.core.limits import BLOCK_TOKENS


@dataclass(slots=True)
class DevicePlan:
    """Block tables on the device, the step's spans, and the work cut from them so far.

    Layers of one shape share the work: it is made by the first of them.
    """

    query_tokens: int
    tables: Tensor
    """int32 [sequences, max_pages]."""
    spans: tuple[tuple[int, int, int], ...]
    """(first row of `query`, new tokens, context) of each sequence."""
    host_tables: Tensor | None = None
    """The tables as they came, if from the host: where sequences share pages is read there."""
    works: dict[tuple[Shape, Rules], tuple[Work, ...]] = field(default_factory=dict)


def plan_attention(
    block_tables: Tensor, context_lengths: Tensor, query_starts: Tensor
) -> DevicePlan:
    """See `kvkernels.ops.plan_attention`. Looks at lengths and starts: once per step."""
    starts: list[int] = query_starts.tolist()
    contexts: list[int] = context_lengths.tolist()
    if starts[0] != 0:
        raise BadInput(f"query_starts begin at {starts[0]}, not 0")
    spans = []
    for index, context in enumerate(contexts):
        new = starts[index + 1] - starts[index]
        if not 0 < new <= context or context > block_tables.shape[1] * BLOCK_TOKENS:
            raise BadInput(
                f"sequence {index}: {new} new tokens, context {context}, "
                f"{block_tables.shape[1]} pages in its table"
            )
        spans.append((starts[index], new, context))
    host = block_tables if block_tables.device.type == "cpu" else None
    return DevicePlan(starts[-1], block_tables, tuple(spans), host)


def paged_attention(
    query: Tensor,
    pages: Tensor | QuantisedPages,
    *,
    layer: int,
    plan: AttentionPlan,
    scale: float,
    rules: Rules,
) -> Tensor:
    """See `kvkernels.ops.paged_attention`."""
    assert isinstance(plan, DevicePlan)
    quantised = isinstance(pages, QuantisedPages)
    cells = pages.cells if isinstance(pages, QuantisedPages) else pages.flatten(3)
    heads, cell_bytes = cells.shape[1], cells.shape[3] * cells.element_size()
    group, dim = query.shape[1] // heads, query.shape[2]
    shape = Shape(heads, group, dim, query.device, quantised, cell_bytes)
    if plan.tables.device != query.device:
        plan.tables = plan.tables.to(query.device, non_blocking=True)
    works = plan.works.get((shape, rules))
    if works is None:
        works = make_works(
            plan.spans,
            shape,
            rules,
            table_stride=plan.tables.stride(0),
            host_tables=plan.host_tables,
        )
        plan.works[shape, rules] = works
    return attend(query, pages, plan.tables, works, layer=layer, scale=scale, rules=rules)


def write_pages(
    key: Tensor, value: Tensor, pages: Tensor | QuantisedPages, slots: Tensor, layer: int
) -> None:
    """See `kvkernels.ops.write_pages`."""
    if isinstance(pages, QuantisedPages):
        write_quantised(key, value, pages, slots, layer)
        return
    page = torch.div(slots, BLOCK_TOKENS, rounding_mode="floor")
    offset = slots % BLOCK_TOKENS
    pages[:, :, layer, 0][page, :, offset] = key
    pages[:, :, layer, 1][page, :, offset] = value


def load_blocks(arena: Tensor, offsets: Tensor, pool: Tensor, pages: Tensor) -> None:
    """See `kvkernels.ops.load_blocks`: one copy a block, in order on the current stream."""
    size = pool.shape[1]
    for offset, page in zip(offsets.tolist(), pages.tolist(), strict=True):
        pool[page].copy_(arena[offset : offset + size], non_blocking=arena.is_pinned())


def store_blocks(pool: Tensor, pages: Tensor, arena: Tensor, offsets: Tensor) -> None:
    """See `kvkernels.ops.store_blocks`. Has finished when it returns: the host reads the arena."""
    size = pool.shape[1]
    for offset, page in zip(offsets.tolist(), pages.tolist(), strict=True):
        arena[offset : offset + size].copy_(pool[page])


def move_layers(
    movement: Movement,
    layers: range | None,
    blocks: range | None,
    *,
    store: bool,
    programs: int,
) -> None:
    """See `kvkernels.ops.load_layers`: launches on the current stream."""
    chosen = range(movement.pool_layout.layers) if layers is None else layers
    if not chosen:
        return
    for part in movement.slices(chosen) if blocks is None else (blocks,):
        if part:
            move(movement, chosen, part, store=store, programs=programs)
