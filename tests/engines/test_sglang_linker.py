"""SGLang's own tree, allocator, pools and factory drive our linker on a CPU, over a real node.

Skipped where SGLang is absent; `make test-engines` unpacks it. What the scheduler does around a
forward is replayed here: match, load back, start, a forward that waits for each layer, finish,
and insert. No model runs: the bytes are random.
"""

import signal
import types
import warnings
from array import array
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from kvstore.core.errors import BadInput, Unsupported
from kvstore.testing.node import RunningNode, start_node
from tests.engines.sglang_modules import sglang
from tests.patience import until_so

pytestmark = [pytest.mark.timeout(180), pytest.mark.filterwarnings("ignore")]
torch = pytest.importorskip("torch")
with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    factory = sglang("srt.mem_cache.unified_cache.linker_factory")
    linkers = sglang("srt.mem_cache.unified_cache.unified_cache_linker")
    trees = sglang("srt.mem_cache.unified_radix_cache")
    prefix = sglang("srt.mem_cache.base_prefix_cache")
    radix = sglang("srt.mem_cache.radix_cache")
    memory = sglang("srt.mem_cache.memory_pool")
    allocators = sglang("srt.mem_cache.allocator")
    init = sglang("srt.mem_cache.cache_init_params")
    component = sglang("srt.mem_cache.unified_cache.component_type")
    runtime = sglang("srt.runtime_context")

PAGE, LAYERS, ROWS = 16, 3, 512
FULL = component.ComponentType.FULL


@pytest.fixture(scope="module", autouse=True)
def _published() -> Iterator[None]:
    """SGLang's parts read its command line; a plain one is published for them."""
    with runtime.get_context().override_server_args(device="cpu"):
        yield


@pytest.fixture(scope="module")
def node() -> Iterator[RunningNode]:
    with start_node(arena_bytes=64 << 20) as running:
        yield running


class Request:
    """What the tree asks of a request."""

    def __init__(self, rid: str) -> None:
        self.rid = rid
        self.session = self.kv = self.swa_branching_seqlen = self.last_node = None
        self.swa_host_hit_length = self.mamba_host_hit_length = 0
        self.skip_radix_cache_insert = False
        self.discard_output_reason: Any = None


class Scheduler:
    """One rank's pools, allocator and tree, with our linker behind them."""

    def __init__(self, node: RunningNode, kind: str = "mha", **extra: Any) -> None:
        shared = {
            "size": ROWS, "page_size": PAGE, "dtype": torch.bfloat16, "layer_num": LAYERS,
            "device": "cpu", "enable_memory_saver": False,
        }  # fmt: skip
        if kind == "mha":
            self.pool = memory.MHATokenToKVPool(head_num=2, head_dim=8, **shared)
            self.buffers = [*self.pool.k_buffer, *self.pool.v_buffer]
        else:
            self.pool = memory.MLATokenToKVPool(kv_lora_rank=16, qk_rope_head_dim=8, **shared)
            self.buffers = list(self.pool.kv_buffer)
        self.allocator = allocators.PagedTokenToKVPoolAllocator(
            ROWS, PAGE, torch.bfloat16, "cpu", self.pool, False
        )
        self.params = init.CacheInitParams(
            disable=False, token_to_kv_pool_allocator=self.allocator, page_size=PAGE,
            req_to_token_pool=memory.ReqToTokenPool(
                size=8, max_context_len=ROWS, device="cpu", enable_memory_saver=False
            ),
            tree_components=(FULL,), tree_core_backend="python",
        )  # fmt: skip
        self.tree = trees.UnifiedRadixCache(self.params)
        self.linker = made(node, self.params, set(self.tree.components), **extra)
        self.tree.init_cache_linker(self.linker)
        self.pool.register_layer_transfer_counter(self.tree.linker.layer_done_counter)

    def computed(self, tokens: range, seed: int) -> Any:
        """Insert a finished prompt whose pages hold random values; return its rows."""
        rows = self.allocator.alloc(len(tokens))
        dice = torch.Generator().manual_seed(seed)
        for buffer in self.buffers:
            values = torch.randn(len(rows), *buffer.shape[1:], generator=dice)
            buffer[rows] = values.to(buffer.dtype)
        self.tree.insert(prefix.InsertParams(key=key(tokens), value=rows))
        return rows

    def settled(self) -> list[bool]:
        """Wait for the offloads in flight and give them back to the tree; return their results."""
        wrapper, results = self.tree.linker, list[bool]()
        until_so(lambda: wrapper.num_completed_offloads() == len(wrapper.pending_offloads))
        commit = wrapper.commit_completed_offloads

        def noted(successes: list[bool]) -> None:
            results.extend(successes)
            commit(successes)

        wrapper.commit_completed_offloads = noted
        self.tree.check_hicache_events()
        wrapper.commit_completed_offloads = commit
        return results

    def matched(self, tokens: range, rid: str) -> tuple[Request, Any]:
        request = Request(rid)
        found = self.tree.match_prefix(prefix.MatchPrefixParams(key=key(tokens), req=request))
        request.last_node = found.last_device_node
        return request, found

    def loaded(
        self, request: Request, found: Any, before: Callable[[], None] = lambda: None
    ) -> tuple[Any, list[Any]]:
        """Load a find as a batch of one; return its rows and what failed."""
        params = prefix.InitLoadBackParams(
            best_match_node=found.best_match_node, host_hit_length=found.host_hit_length,
            req=request,
        )  # fmt: skip
        tokens, _ = self.tree.init_load_back(params)
        assert tokens == found.host_hit_length
        rows = self.tree.linker.private_load_indices[request.rid]
        before()
        self.tree.linker.layer_done_counter.set_consumer(self.tree.ready_to_load_host_cache())
        for layer in range(LAYERS):
            self.pool.get_key_buffer(layer)  # as attention does: waits for the layer
        return rows, self.tree.finish_external_linker_loads([request])

    def close(self) -> None:
        self.linker.close()


def made(node: RunningNode, params: Any, components: set[Any], **extra: Any) -> Any:
    config = {
        "linker": "KvStoreLinker", "linker_module_path": "kvstore.adapters.sglang.linker",
        "linker_extra_config": {
            "run_dir": str(node.run_dir), "weights_digest": "w" * 64, "pause_ms": 50, **extra,
        },
    }  # fmt: skip
    arguments = types.SimpleNamespace(model_path="m")
    return factory.create_unified_cache_linker(
        arguments, params, backend="dynamic", config=config, components=components
    )


def key(tokens: range) -> Any:
    return radix.RadixKey(token_ids=array("q", tokens), extra_key=None)


def same(ours: Scheduler, our_rows: Any, theirs: Scheduler, their_rows: Any) -> bool:
    return all(
        torch.equal(mine[our_rows], other[their_rows])
        for mine, other in zip(ours.buffers, theirs.buffers, strict=True)
    )


@pytest.mark.parametrize("kind", ["mha", "mla"])
def test_one_engine_computes_and_another_restores_behind_its_own_prefix(
    node: RunningNode, kind: str
) -> None:
    first, second = Scheduler(node, kind), Scheduler(node, kind)
    assert isinstance(first.linker, linkers.UnifiedCacheLinker)
    rows = first.computed(range(96), 1)
    assert first.settled() == [True]
    request, found = second.matched(range(110), "all")
    assert (found.device_prefix_len, found.host_hit_length) == (0, 96)
    loaded, failed = second.loaded(request, found)
    assert failed == [] and same(second, loaded, first, rows)

    second.tree.insert(prefix.InsertParams(key=key(range(32)), value=loaded[:32]))
    second.settled()
    request, found = second.matched(range(110), "tail")
    assert (found.device_prefix_len, found.host_hit_length) == (32, 64)
    tail, failed = second.loaded(request, found)
    assert failed == [] and same(second, tail, first, rows[32:])
    first.close()
    second.close()


def test_a_failed_layer_aborts_its_request_and_nothing_else(node: RunningNode) -> None:
    first, second = Scheduler(node), Scheduler(node)
    first.computed(range(1000, 1064), 2)
    first.settled()
    request, found = second.matched(range(1000, 1070), "lost")
    assert found.host_hit_length == 64

    def spoil() -> None:
        pages = second.linker._pages["kv"]
        pages.scatter = lambda layer, rows, fetch: 1 / 0

    _, failed = second.loaded(request, found, spoil)
    assert failed == [request]
    assert request.skip_radix_cache_insert and request.discard_output_reason is not None
    del second.linker._pages["kv"].scatter
    request, found = second.matched(range(1000, 1070), "again")
    assert second.loaded(request, found)[1] == []
    first.close()
    second.close()


def test_a_request_that_ends_before_its_load_starts(node: RunningNode) -> None:
    first, second = Scheduler(node), Scheduler(node)
    first.computed(range(2000, 2032), 3)
    first.settled()
    request, found = second.matched(range(2000, 2050), "gone")
    params = prefix.InitLoadBackParams(
        best_match_node=found.best_match_node, host_hit_length=32, req=request
    )
    assert second.tree.init_load_back(params)[0] == 32
    second.tree.linker.release_request("gone")
    assert second.tree.ready_to_load_host_cache() == -1
    assert second.tree.finish_external_linker_loads([request]) == []
    second.tree.reset()
    first.close()
    second.close()


def test_a_node_that_hangs_dies_and_comes_back() -> None:
    with start_node(arena_bytes=16 << 20) as node:
        first, second = Scheduler(node), Scheduler(node)
        rows = first.computed(range(64), 4)
        assert first.settled() == [True]
        request, found = second.matched(range(70), "leased")
        node.signal_node(signal.SIGSTOP)
        assert second.matched(range(70), "hung")[1].host_hit_length == 0
        first.computed(range(5000, 5032), 5)
        assert first.settled() == [False]
        loaded, failed = second.loaded(request, found)
        assert failed == [] and same(second, loaded, first, rows), "it was leased before"
        node.signal_node(signal.SIGCONT)
        node.wait_restarted(node.kill_node())
        until_so(lambda: second.matched(range(70), "back")[1].host_hit_length == 64)
        request, found = second.matched(range(70), "again")
        loaded, failed = second.loaded(request, found)
        assert failed == [] and same(second, loaded, first, rows)
        request, found = second.matched(range(70), "dead")
        node.kill_keeper()
        loaded, failed = second.loaded(request, found)
        assert failed == [request] or same(second, loaded, first, rows)
        assert second.matched(range(70), "none")[1].host_hit_length == 0
        first.close()
        second.close()


def test_the_engine_hears_what_is_wrong_with_its_settings(node: RunningNode) -> None:
    params = Scheduler(node).params
    for extra, named in (
        ({"weights_digest": ""}, "weights_digest"), ({"wait_ms": -1}, "wait_ms"),
        ({"stall_ms": 0}, "stall_ms"), ({"unheard_of": 1}, "unheard_of"),
    ):  # fmt: skip
        with pytest.raises(BadInput, match=named):
            made(node, params, {FULL}, **extra)
    with pytest.raises(Unsupported, match="MHATokenToKVPool"):
        made(node, params, {FULL, component.ComponentType.MAMBA})
