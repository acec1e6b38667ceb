"""The class that LMCache's server loads, made by LMCache's own factory. Skipped without LMCache.

Runs on a CPU: `pip install --no-deps lmcache==0.5.6` beside torch and what it imports.
"""

import os
import select
from collections.abc import Iterator
from typing import Any

import pytest

from kvstore.core.errors import BadInput
from kvstore.testing.node import RunningNode, start_node

pytestmark = pytest.mark.filterwarnings("ignore")
torch = pytest.importorskip("torch")
base = pytest.importorskip("lmcache.v1.distributed.l2_adapters.base")
plugin = pytest.importorskip("lmcache.v1.distributed.l2_adapters.plugin_l2_adapter")
api = pytest.importorskip("lmcache.v1.distributed.api")
memory = pytest.importorskip("lmcache.v1.memory_management")

SHAPE = torch.Size([2, 4, 16, 32])


@pytest.fixture(scope="module")
def node() -> Iterator[RunningNode]:
    with start_node(arena_bytes=64 << 20) as running:
        yield running


def made(node: RunningNode, **more: Any) -> Any:
    params = {"run_dir": str(node.run_dir), "weights_digest": "w", "layout": "bf16", **more}
    config = plugin.PluginL2AdapterConfig.from_dict({
        "module_path": "kvstore.adapters.lmcache.adapter", "class_name": "KvStoreL2Adapter",
        "adapter_params": params,
    })  # fmt: skip
    return plugin._create_plugin_adapter(config, None)


def objects(count: int) -> list[Any]:
    """Return LMCache's own memory objects over tensors."""
    made = []
    for _ in range(count):
        raw = torch.zeros(SHAPE.numel() * 2, dtype=torch.uint8)
        meta = memory.MemoryObjMetadata(
            shape=SHAPE, dtype=torch.bfloat16, address=0, phy_size=raw.numel(), ref_count=1,
            shapes=[SHAPE], dtypes=[torch.bfloat16],
        )  # fmt: skip
        made.append(memory.TensorMemoryObj(raw, meta, None))
    return made


def waited(descriptor: int, query: Any) -> Any:
    while not (result := query()):
        ready, _, _ = select.select([descriptor], [], [], 10)
        assert ready, "nothing was signalled"
        os.eventfd_read(descriptor)
    return result


def test_lmcaches_factory_makes_it_and_objects_come_back_bit_for_bit(node: RunningNode) -> None:
    writer, reader = made(node), made(node)
    assert isinstance(writer, base.L2AdapterInterface)
    keys = [api.ObjectKey(bytes([at]) * 32, "m", 0, cache_salt="s") for at in range(4)]
    stored, loaded = objects(3), objects(4)
    for one in stored:
        one.raw_data.random_(0, 255)
    task = writer.submit_store_task(keys[:3], stored)
    done = waited(writer.get_store_event_fd(), writer.pop_completed_store_tasks)
    assert done[task].is_successful()
    assert done[task].bytes_transferred() == 3 * SHAPE.numel() * 2

    layouts = {0: api.MemoryLayoutDesc([SHAPE], [torch.bfloat16])}
    task = reader.submit_lookup_and_lock_task(keys, layouts)
    found = waited(
        reader.get_lookup_and_lock_event_fd(), lambda: reader.query_lookup_and_lock_result(task)
    )
    assert [found.test(at) for at in range(4)] == [True, True, True, False]
    task = reader.submit_load_task(keys, loaded)
    got = waited(reader.get_load_event_fd(), lambda: reader.query_load_result(task))
    assert [got.test(at) for at in range(4)] == [True, True, True, False]
    assert reader.query_load_result(task) is None
    for ours, theirs in zip(stored, loaded, strict=False):
        assert torch.equal(ours.raw_data, theirs.raw_data)
    reader.submit_unlock(keys)
    assert reader.report_status()["is_healthy"]
    assert reader.get_usage() is not None
    writer.close()
    reader.close()


def test_the_server_hears_what_is_wrong_with_its_settings(node: RunningNode) -> None:
    with pytest.raises(BadInput, match="weights_digest"):
        made(node, weights_digest="")
