"""Plans whose work is cut again on the device: each replay answers for what lies there then."""

import os

os.environ.setdefault("TRITON_INTERPRET", "1")  # the kernels' modules decide at their import

import pytest
import torch
from kvkernels import ops
from kvkernels.plans import Rules
from kvkernels.triton import device
from kvkernels.triton.replayed import ReplayedAppend, ReplayedDecode
from torch import Tensor

from kvstore.core.layout import BlockLayout, Codec

LAYOUT = BlockLayout(layers=1, kv_heads=2, head_dim=32, codec=Codec.RAW32)
GROUP, PAGES, WIDTH = 2, 40, 10
CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def pages() -> Tensor:
    generator = torch.Generator().manual_seed(1)
    pool = torch.zeros(PAGES, LAYOUT.block_bytes, dtype=torch.uint8)
    view = ops.page_view(pool, LAYOUT)
    view.copy_(torch.randn(view.shape, generator=generator))
    return view


def tables_of(seed: int, rows: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.stack([torch.randperm(PAGES, generator=generator)[:WIDTH] for _ in range(rows)])


def replayed(plan: ReplayedDecode | ReplayedAppend, query: Tensor, pages: Tensor) -> Tensor:
    """Attend as a captured graph does: the work cut in an earlier call, and once more for now."""
    plan.cut()
    return device.paged_attention(query, pages, layer=0, plan=plan, scale=0.3, rules=Rules())


def query_of(seed: int, tokens: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(tokens, GROUP * LAYOUT.kv_heads, LAYOUT.head_dim, generator=generator)


@pytest.mark.parametrize("contexts", [[1, 16, 17], [150, 33, 5], [64, 0, 160]], ids=str)
def test_a_decode_step_sees_the_lengths_and_tables_of_its_replay(
    pages: Tensor, contexts: list[int]
) -> None:
    plan = ReplayedDecode(3, WIDTH + 3, CPU)
    replayed(plan, query_of(1, 3), pages)  # makes the work list, as capturing does
    tables = tables_of(len(contexts) + contexts[0], 3)
    plan.tables[:, :WIDTH] = tables
    plan.contexts.copy_(torch.tensor(contexts))
    query = query_of(2, 3)
    got = replayed(plan, query, pages)
    live = [row for row in range(3) if contexts[row]]
    wanted = ops.paged_attention(
        query[live], pages, layer=0, block_tables=tables[live].int(),
        context_lengths=torch.tensor([contexts[row] for row in live], dtype=torch.int32),
        query_starts=torch.arange(len(live) + 1, dtype=torch.int32), scale=0.3,
    )  # fmt: skip
    torch.testing.assert_close(got[live], wanted, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(("context", "new"), [(5, 5), (150, 1), (150, 7), (97, 40)])
def test_an_append_sees_how_many_tokens_are_new(pages: Tensor, context: int, new: int) -> None:
    plan = ReplayedAppend(40, WIDTH + 3, CPU)
    replayed(plan, query_of(1, 40), pages)
    tables = tables_of(context, 1)
    plan.tables[:, :WIDTH] = tables
    plan.contexts.copy_(torch.tensor([context, new]))
    query = query_of(3, 40)
    got = replayed(plan, query, pages)
    wanted = ops.paged_attention(
        query[:new], pages, layer=0, block_tables=tables.int(),
        context_lengths=torch.tensor([context], dtype=torch.int32),
        query_starts=torch.tensor([0, new], dtype=torch.int32), scale=0.3,
    )  # fmt: skip
    torch.testing.assert_close(got[:new], wanted, rtol=1e-4, atol=1e-5)
