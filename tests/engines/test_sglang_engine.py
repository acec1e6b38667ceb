"""The class that SGLang loads, made by SGLang's own factory. Skipped where SGLang is absent.

Needs the modules `srt/mem_cache` and `srt/environ.py` of sglang 0.5.23 on the path, and torch; no
GPU. SGLang's host pools import CUDA kernels, so the pool here is ours with tensors in it.
"""

import hashlib
from collections.abc import Iterator
from typing import Any

import pytest

from kvstore.core.errors import BadInput
from kvstore.testing.node import RunningNode, start_node

torch = pytest.importorskip("torch")
hicache = pytest.importorskip("sglang.srt.mem_cache.hicache_storage")
factory = pytest.importorskip("sglang.srt.mem_cache.storage.backend_factory")

PAGE, LAYERS, HEADS, DIM = 16, 3, 2, 8


class Pool:
    """`page_first` memory (2, tokens, layers, heads, dim), addressed as SGLang's MHA pool is."""

    layout, page_size, dtype = "page_first", PAGE, torch.bfloat16
    layer_num, head_num, head_dim = LAYERS, HEADS, DIM

    def __init__(self, pages: int) -> None:
        self.kv = torch.zeros(2, pages * PAGE, LAYERS, HEADS, DIM, dtype=torch.bfloat16)

    def get_page_buffer_meta(self, indices: Any) -> tuple[list[int], list[int]]:
        row = LAYERS * HEADS * DIM * 2
        starts = [int(indices[at]) for at in range(0, len(indices), PAGE)]
        addresses = [self.kv[half].data_ptr() + at * row for at in starts for half in (0, 1)]
        return addresses, [row * PAGE] * len(addresses)


@pytest.fixture(scope="module")
def node() -> Iterator[RunningNode]:
    with start_node(arena_bytes=64 << 20) as running:
        yield running


def made(node: RunningNode, pool: Pool, **more: Any) -> Any:
    extra = {
        "backend_name": "kvstore", "module_path": "kvstore.adapters.sglang.backend",
        "class_name": "KvStoreBackend", "interface_v1": 1, "run_dir": str(node.run_dir),
        "weights_digest": "w" * 64, **more,
    }  # fmt: skip
    config = hicache.HiCacheStorageConfig(
        tp_rank=0, tp_size=1, pp_rank=0, pp_size=1, attn_cp_rank=0, attn_cp_size=1,
        is_mla_model=False, enable_storage_metrics=True, is_page_first_layout=True,
        model_name="m", extra_config=extra,
    )  # fmt: skip
    backend = factory.StorageBackendFactory.create_backend("dynamic", config, pool)
    backend.register_mem_pool_host(pool)
    backend.register_mem_host_pool_v2(pool, hicache.PoolName.KV)
    backend.on_host_pools_registered()
    return backend


def test_sglangs_factory_makes_it_and_pages_come_back_bit_for_bit(node: RunningNode) -> None:
    ours, theirs = Pool(8), Pool(8)
    ours.kv.normal_()
    keys = [hashlib.sha256(bytes([at])).hexdigest() for at in range(4)]
    writer, reader = made(node, ours), made(node, theirs)
    assert isinstance(writer, hicache.HiCacheStorage)
    rows = torch.arange(4 * PAGE)
    info = hicache.HiCacheStorageExtraInfo()
    assert writer.batch_exists(keys, info) == 0
    assert writer.batch_set_v1(keys, rows, info) == [True] * 4
    assert reader.batch_exists(keys, info) == 4
    assert reader.exists(keys[0])
    assert reader.batch_get_v1(keys, rows + 2 * PAGE, info) == [True] * 4
    assert torch.equal(theirs.kv[:, 2 * PAGE : 6 * PAGE], ours.kv[:, : 4 * PAGE])
    writer.close()
    reader.close()


def test_pools_by_sglangs_own_transfers(node: RunningNode) -> None:
    pool, state = Pool(8), Pool(8)
    backend = made(node, pool)
    backend.register_mem_host_pool_v2(state, hicache.PoolName.MAMBA)
    keys = [hashlib.sha256(b"v2 %d" % at).hexdigest() for at in range(4)]
    assert backend.batch_set_v1(keys, torch.arange(4 * PAGE)) == [True] * 4
    transfer = hicache.PoolTransfer(
        name=hicache.PoolName.MAMBA, host_indices=torch.arange(PAGE), keys=keys[1:2],
        hit_policy=hicache.PoolHitPolicy.TRAILING_PAGES,
    )  # fmt: skip
    stored = backend.batch_set_v2([transfer])
    assert hicache.count_pool_hits(stored) == {"mamba": 1}
    hit = backend.batch_exists_v2(keys, [transfer])
    assert (hit.kv_hit_pages, hit.restorable_prefix_pages) == (2, [2])
    assert hit.extra_pool_hit_pages[hicache.PoolName.MAMBA] == 2
    assert backend.batch_get_v2([transfer])[hicache.PoolName.MAMBA] == [True]
    backend.close()


def test_the_engine_hears_what_is_wrong_with_its_settings(node: RunningNode) -> None:
    with pytest.raises(BadInput, match="interface_v1"):
        made(node, Pool(2), interface_v1=0)
    with pytest.raises(BadInput, match="weights_digest"):
        made(node, Pool(2), weights_digest="")
