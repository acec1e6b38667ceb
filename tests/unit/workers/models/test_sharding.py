"""Parts of a model, computed side by side in threads, against the whole one."""

import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from kvworkers.models.loading import LoadedModel, load_model
from kvworkers.models.sharding import WHOLE, Part, SummedLinear, cut, only_one
from torch import Tensor, nn

from kvstore.core.errors import BadInput, Unsupported
from kvstore.core.layout import BlockLayout, Codec
from tests.model_fixture import make_step, plain_model, write_tiny_model
from tests.patience import PATIENCE_S

PROMPT = [(place * 31) % 190 + 3 for place in range(40)]


class Meeting:
    """Sums over threads, each of which is a rank."""

    def __init__(self, ranks: int) -> None:
        self._parts: list[Tensor] = []
        self._gathered = threading.Barrier(ranks, timeout=PATIENCE_S)
        self._lock = threading.Lock()

    def total(self, tensor: Tensor) -> Tensor:
        with self._lock:
            self._parts.append(tensor)
        self._gathered.wait()
        whole = torch.stack(self._parts).sum(0)
        if self._gathered.wait() == 0:
            self._parts.clear()
        self._gathered.wait()
        return whole


@pytest.mark.parametrize("kind", ["llama", "llama-mha", "qwen2", "qwen3"])
def test_ranks_compute_together_what_the_whole_model_does(tmp_path: Path, kind: str) -> None:
    path = write_tiny_model(tmp_path / kind, kind)
    meeting = Meeting(2)
    ranks = [
        load_model(path, cache_dir=tmp_path, part=Part(rank, 2), total=meeting.total)
        for rank in range(2)
    ]
    pools = [model.new_pool(4) for model in ranks]

    def compute(rank: int) -> Tensor:
        step = make_step((PROMPT, 0, [2, 0, 3]))
        return ranks[rank].forward(step, ranks[rank].page_view(pools[rank]))

    with ThreadPoolExecutor(2) as threads:
        logits, nothing = threads.map(compute, range(2))
    whole = load_model(path, cache_dir=tmp_path)
    pages = whole.new_pool(4)
    expected = whole.forward(make_step((PROMPT, 0, [2, 0, 3])), whole.page_view(pages))
    with torch.inference_mode():
        plain = plain_model(path)(torch.tensor([PROMPT])).logits[0, -1]
    assert torch.allclose(logits, expected, atol=1e-4)
    assert torch.allclose(logits[0], plain, atol=1e-4)
    assert nothing.shape == (1, 0), "logits are rank 0's alone"
    check_pages(whole, pages, ranks, pools)


def check_pages(
    whole: LoadedModel, pages: Tensor, ranks: list[LoadedModel], pools: list[Tensor]
) -> None:
    """A rank's page is its range of the whole model's page, up to rounding."""
    for model, pool in zip(ranks, pools, strict=True):
        start = model.part.offset(whole.spec.layout)
        mine = pages[:, start : start + model.page_bytes].contiguous().view(torch.float32)
        assert mine.shape == pool.view(torch.float32).shape
        assert torch.allclose(mine, pool.view(torch.float32), atol=1e-4)
        assert bool(mine[[0, 2, 3]].any())
        assert not bool(mine[1].any()), "a page that is nobody's"


def test_a_bias_behind_a_row_product_is_added_once() -> None:
    torch.manual_seed(1)
    whole = nn.Linear(6, 4)
    rows = torch.randn(3, 6)
    total = torch.zeros(3, 4)
    for rank in range(3):
        part = nn.Linear(2, 4)
        part.weight = nn.Parameter(whole.weight[:, 2 * rank : 2 * rank + 2].detach())
        part.bias = whole.bias if rank == 0 else None  # type: ignore[assignment]
        total += SummedLinear(part, only_one)(rows[:, 2 * rank : 2 * rank + 2]).detach()
    assert torch.allclose(total, whole(rows), atol=1e-6)


def test_a_part_of_a_block_lies_behind_the_others_without_padding() -> None:
    layout = BlockLayout(layers=3, kv_heads=6, head_dim=8, codec=Codec.RAW32)
    assert layout.block_bytes % 4096 == 0 and layout.share_bytes == 3 * 1024
    ranges = []
    for rank in range(3):
        part = Part(rank, 3)
        mine = part.layout(layout)
        assert mine.block_bytes == mine.payload_bytes == 2 * layout.share_bytes
        ranges.append((part.offset(layout), part.offset(layout) + mine.block_bytes))
    assert ranges == [(0, 6144), (6144, 12288), (12288, 18432)]
    assert ranges[-1][1] == layout.payload_bytes
    assert WHOLE.layout(layout) is layout


def test_what_does_not_divide_is_refused_by_name(tmp_path: Path) -> None:
    path = write_tiny_model(tmp_path / "tiny")
    with pytest.raises(Unsupported, match="KV heads 2 does not divide into 4"):
        load_model(path, cache_dir=tmp_path, part=Part(0, 4))
    odd = write_tiny_model(tmp_path / "odd", intermediate_size=97)
    with pytest.raises(Unsupported, match="intermediate size 97"):
        load_model(odd, cache_dir=tmp_path, part=Part(0, 2))
    with pytest.raises(Unsupported, match="2 KV heads do not divide into 3"):
        Part(0, 3).layout(BlockLayout(layers=1, kv_heads=2, head_dim=8, codec=Codec.RAW32))
    for rank, ranks in ((2, 2), (-1, 2)):
        with pytest.raises(BadInput, match=f"rank {rank} of {ranks}"):
            Part(rank, ranks)


def test_layers_of_another_kind_are_refused_and_left_whole(tmp_path: Path) -> None:
    module = load_model(write_tiny_model(tmp_path / "tiny"), cache_dir=tmp_path).module
    before = module.model.layers[0].self_attn.q_proj.weight.shape
    module.model.layers[1].mlp.router = nn.Linear(64, 4)
    with pytest.raises(Unsupported, match=r"llama: .* mlp\.router"):
        cut(module, Part(0, 2), only_one, kv_heads=2)
    del module.model.layers[1].mlp.router
    module.model.layers[1].self_attn.q_norm = nn.LayerNorm(64)
    with pytest.raises(Unsupported, match="q_norm over all heads"):
        cut(module, Part(0, 2), only_one, kv_heads=2)
    module.model.layers = None
    with pytest.raises(Unsupported, match="layers are not where"):
        cut(module, Part(0, 2), only_one, kv_heads=2)
    assert before[0] == 64
