"""LMCache's own storage manager over our adapter and a real node: its threads, its memory, faults.

What its multiprocess server keeps chunks in, without the engine in front: chunks written go to the
node by LMCache's store controller, and come back by its prefetch controller. Skipped without
LMCache; runs on a CPU.
"""

import os
import signal
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from prometheus_client import REGISTRY

from kvstore.core.errors import KvStoreError
from tests.engines.disk_damage import damage
from tests.engines.host import Host

os.environ.setdefault("LMCACHE_TRACK_USAGE", "false")
pytestmark = [pytest.mark.filterwarnings("ignore"), pytest.mark.timeout(300)]
torch = pytest.importorskip("torch")
api = pytest.importorskip("lmcache.v1.distributed.api")
configs = pytest.importorskip("lmcache.v1.distributed.config")
l2_config = pytest.importorskip("lmcache.v1.distributed.l2_adapters.config")
plugin = pytest.importorskip("lmcache.v1.distributed.l2_adapters.plugin_l2_adapter")
storage = pytest.importorskip("lmcache.v1.distributed.storage_manager")

SHAPE = torch.Size([2, 8, 128, 64])
CHUNK = SHAPE.numel() * 2
"""256 KiB."""
LAYOUT = api.MemoryLayoutDesc([SHAPE], [torch.bfloat16])
ANSWER_S = 30.0


class Manager:
    """LMCache's storage manager, which knows of the node by configuration alone."""

    def __init__(self, run_dir: Path) -> None:
        adapter = plugin.PluginL2AdapterConfig.from_dict({
            "module_path": "kvstore.adapters.lmcache.adapter", "class_name": "KvStoreL2Adapter",
            "adapter_params": {"run_dir": str(run_dir), "weights_digest": "w", "layout": "bf16",
                               "pause_ms": 200},
        })  # fmt: skip
        memory = configs.L1MemoryManagerConfig(
            size_in_bytes=64 << 20, use_lazy=False, init_size_in_bytes=64 << 20, shm_name=""
        )
        self.inner = storage.StorageManager(
            configs.StorageManagerConfig(
                configs.L1ManagerConfig(memory),
                configs.EvictionConfig("LRU"),
                l2_config.L2AdaptersConfig([adapter]),
            )
        )

    def write(self, keys: list[Any]) -> dict[Any, Any]:
        """Write chunks of random bytes, wait for their stores to end; return copies."""
        before = offered()
        reserved = self.inner.reserve_write(keys, LAYOUT)
        for one in reserved.values():
            one.raw_data.random_(0, 255)
        copies = {key: one.raw_data.clone() for key, one in reserved.items()}
        self.inner.finish_write(keys)
        until(lambda: offered() >= before + len(keys), "LMCache's stores do not end")
        return copies

    def forget(self, keys: list[Any]) -> None:
        """Drop chunks from LMCache's own memory, once its stores let go of them."""
        until(lambda: self.inner.delete_l1_keys(keys)[1] == 0, "chunks stay locked")

    def read(self, keys: list[Any]) -> dict[Any, Any]:
        """Prefetch chunks; return those that came, unless the answer is too late."""
        row = api.GroupedObjectKeys(keys=keys, object_group_id=0, layout_desc=LAYOUT)
        handle = self.inner.submit_prefetch_task(api.PrefetchTaskSpec([row]))
        assert self.inner.wait_prefetch_status(handle, ANSWER_S), "LMCache would wait for ever"
        result = self.inner.query_prefetch_status(handle)
        here = [key for at, key in enumerate(keys) if result.hit_cells[0].test(at)]
        found: dict[Any, Any] = {}
        if here:
            with self.inner.read_prefetched_results(here, result.l1_owners) as objects:
                found = {key: o.raw_data.clone() for key, o in zip(here, objects, strict=True)}
            self.inner.finish_read_prefetched(here, l1_owners=result.l1_owners)
        return found

    def close(self) -> None:
        self.inner.close()


def offered() -> float:
    """Return how many chunks the adapter was given to store, by its own count."""
    shown = (
        REGISTRY.get_sample_value(
            "kvstore_adapter_blocks_total",
            {"engine": "lmcache", "call": "store", "outcome": outcome},
        )
        for outcome in ("held", "refused")
    )
    return sum(value or 0.0 for value in shown)


def until(true: Any, said: str) -> None:
    ends = time.monotonic() + ANSWER_S
    while not true():
        assert time.monotonic() < ends, said
        time.sleep(0.02)


@pytest.fixture(scope="module")
def host(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Host]:
    host = Host(tmp_path_factory.mktemp("nvme"), arena_bytes=16 << 20)
    yield host
    host.node.stop()


@pytest.fixture(scope="module")
def manager(host: Host) -> Iterator[Manager]:
    manager = Manager(host.run_dir)
    yield manager
    manager.close()


def keys(label: int, count: int) -> list[Any]:
    return [api.ObjectKey(bytes([label, at]) * 16, "m", 0) for at in range(count)]


def whole(manager: Manager, wanted: dict[Any, Any]) -> int:
    """Read chunks; none may have wrong bytes. Return how many came."""
    manager.forget(list(wanted))
    found = manager.read(list(wanted))
    for key, data in found.items():
        assert torch.equal(data, wanted[key]), "a wrong byte was given"
    return len(found)


def comes_back(manager: Manager, wanted: dict[Any, Any]) -> None:
    """See that the same manager finds chunks again, those stored anew that were lost."""
    until(lambda: whole(manager, wanted) == len(wanted), "the node is not used again")


def test_chunks_of_one_server_come_back_in_another(host: Host, manager: Manager) -> None:
    wanted = manager.write(keys(1, 8))
    assert whole(manager, wanted) == 8
    other = Manager(host.run_dir)
    assert whole(other, wanted) == 8
    assert other.read(keys(99, 4)) == {}
    other.close()


def test_more_than_memory_and_node_hold_is_forgotten_and_never_wrong(manager: Manager) -> None:
    written = {}
    for label in range(10, 18):
        written.update(manager.write(keys(label, 16)))  # 32 MiB over an arena of 16
        manager.forget(keys(label, 16))
    came = sum(
        whole(manager, {key: written[key] for key in keys(label, 16)}) for label in range(10, 18)
    )
    assert came > 0, "nothing was kept"


def test_a_node_that_is_killed_under_loads_and_comes_back(host: Host, manager: Manager) -> None:
    wanted = manager.write(keys(2, 16))
    assert whole(manager, wanted) == 16
    for pause_s in (0.0, 0.005, 0.02):
        incarnation = host.node.incarnation
        killer = threading.Timer(pause_s, host.node.kill_node)
        killer.start()
        whole(manager, wanted)
        killer.join()
        host.node.wait_restarted(incarnation)
    comes_back(manager, wanted)


def test_a_node_that_hangs_costs_a_deadline(host: Host, manager: Manager) -> None:
    wanted = manager.write(keys(3, 4))
    assert whole(manager, wanted) == 4
    manager.forget(list(wanted))
    host.node.signal_node(signal.SIGSTOP)
    try:
        assert manager.read(list(wanted)) == {}
        manager.write(keys(4, 4))  # its store ends, too
    finally:
        host.node.signal_node(signal.SIGCONT)
    comes_back(manager, wanted)


def test_a_new_node_with_damaged_chunks_on_its_disk(host: Host, manager: Manager) -> None:
    """A restart of keeper and node without one of LMCache; what is on disk has lost bytes."""
    wanted = manager.write(keys(5, 16))
    assert whole(manager, wanted) == 16
    host.node.stop()
    assert whole(manager, wanted) == 0
    assert damage(host.nvme) > 0, "nothing was stored on disk"
    host.start()
    ends = time.monotonic() + ANSWER_S
    while host.corrupt_blocks() == 0:
        assert time.monotonic() < ends, "no damaged chunk was met"
        try:
            whole(manager, wanted)
        except KvStoreError as error:
            pytest.fail(f"a fault of the node reached LMCache: {error}")
    anew = manager.write(keys(6, 4))
    comes_back(manager, anew)
