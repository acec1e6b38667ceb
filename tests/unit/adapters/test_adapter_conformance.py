"""What SGLang and LMCache load, held against the suite, over a node whose disk can be spoilt."""

import ctypes
import select
import signal
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any, ClassVar

import pytest
from prometheus_client import REGISTRY

from kvstore import Client, Namespace
from kvstore.adapters.lmcache.identity import settings_of
from kvstore.adapters.lmcache.objects import Objects, Tasks
from kvstore.adapters.opaque import leading
from kvstore.adapters.sglang.store import SglangStore
from kvstore.core.names import BlockName
from kvstore.directory.events import TierKind
from kvstore.testing.conformance import ByteStore, StoreConformance
from kvstore.testing.node import RunningNode, new_run_dir, start_node
from tests.patience import PATIENCE_S, until_so

PAYLOAD = 40_000
TIMES = {"call_ms": 250, "pause_ms": 50}


def buffers(payloads: Sequence[bytes]) -> list[Any]:
    return [ctypes.create_string_buffer(payload, len(payload)) for payload in payloads]


class Sglang:
    """SGLang's calls over pages of one run, as the suite calls a store."""

    page_size, layout, dtype, layer_num = 1, "page_first", "torch.bfloat16", 1

    def __init__(self, where: str) -> None:
        extra = {"run_dir": where, "weights_digest": "w", "interface_v1": 1, **TIMES}
        config = SimpleNamespace(
            tp_rank=0, tp_size=1, pp_rank=0, pp_size=1, attn_cp_rank=0, attn_cp_size=1,
            is_mla_model=False, model_name="m", extra_config=extra,
        )  # fmt: skip
        self._pages = buffers([bytes(PAYLOAD)])
        self._store = SglangStore(config)
        self._store.register(self, "kv", [0])

    def get_page_buffer_meta(self, indices: Sequence[int]) -> tuple[list[int], list[int]]:
        return [ctypes.addressof(self._pages[at]) for at in indices], [PAYLOAD] * len(indices)

    def store(self, names: Sequence[BlockName], payloads: Sequence[bytes]) -> list[bool]:
        self._pages = buffers(payloads)
        keys = [name.hex() for name in names]
        return self._store.set("kv", keys, range(len(names))) if names else []

    def load(self, names: Sequence[BlockName]) -> list[bytes | None]:
        self._pages = buffers([bytes(PAYLOAD)] * len(names))
        keys = [name.hex() for name in names]
        done = self._store.get("kv", keys, range(len(names))) if names else []
        return [page.raw if here else None for page, here in zip(self._pages, done, strict=True)]

    def prefix(self, names: Sequence[BlockName]) -> int:
        return self._store.exists([name.hex() for name in names])

    def close(self) -> None:
        self._store.close()


class LmCache:
    """LMCache's tasks, as the suite calls a store: it loads prefixes, they load what is there."""

    def __init__(self, where: str) -> None:
        params = {"run_dir": where, "weights_digest": "w", "layout": "bf16", **TIMES}
        self._objects = Objects(settings_of(params))

    def store(self, names: Sequence[BlockName], payloads: Sequence[bytes]) -> list[bool]:
        memory = buffers(payloads)
        task = self._objects.store(_keys(names), _objects(memory))
        return _ended(self._objects.stores, task)

    def load(self, names: Sequence[BlockName]) -> list[bytes | None]:
        memory = buffers([bytes(PAYLOAD)] * len(names))
        task = self._objects.load(_keys(names), _objects(memory))
        first = leading(_ended(self._objects.loads, task))
        return [one.raw if at < first else None for at, one in enumerate(memory)]

    def prefix(self, names: Sequence[BlockName]) -> int:
        task = self._objects.lookup(_keys(names), [PAYLOAD] * len(names))
        return leading(_ended(self._objects.lookups, task))

    def close(self) -> None:
        self._objects.close()


def _keys(names: Sequence[BlockName]) -> list[Any]:
    more = {"model_name": "m", "kv_rank": 0, "object_group_id": 0, "cache_salt": ""}
    return [SimpleNamespace(chunk_hash=name, **more) for name in names]


def _objects(memory: Sequence[Any]) -> list[Any]:
    return [
        SimpleNamespace(data_ptr=ctypes.addressof(one), get_size=lambda one=one: len(one))
        for one in memory
    ]


def _ended(tasks: Tasks, task: int) -> list[bool]:
    while (result := tasks.pop(task)) is None:
        assert select.select([tasks.event_fd], [], [], PATIENCE_S)[0], "nothing was signalled"
    return result.done


class _OverNode(StoreConformance):
    """One node with a disk for the tests of a class."""

    payload_bytes = PAYLOAD
    faults = True
    damages = True
    engine: ClassVar[str]
    node: ClassVar[RunningNode]
    nvme: ClassVar[Path]
    run_dir: ClassVar[Path]

    @pytest.fixture(scope="class", autouse=True)
    @classmethod
    def _running(cls, tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
        cls.nvme, cls.run_dir = tmp_path_factory.mktemp("nvme"), new_run_dir()
        cls._start()
        yield
        cls.node.stop()

    @classmethod
    def _start(cls) -> None:
        options = ["--nvme", str(cls.nvme), "--nvme-bytes", "64MiB"]
        cls.node = start_node(cls.run_dir, arena_bytes=16 << 20, options=options)

    def kill(self) -> None:
        self.node.kill_node()

    def hang(self) -> None:
        self.node.signal_node(signal.SIGSTOP)

    def resume(self) -> None:
        self.node.signal_node(signal.SIGCONT)

    def damage(self) -> None:
        until_so(lambda: self._on_disk() >= self._before + 4)
        self.node.stop()  # its memory is gone: what is loaded next comes from the disk
        assert sum(map(_flipped, self.nvme.rglob("*.data"))) > 4
        type(self)._start()

    def test_damaged_bytes_are_a_miss_and_never_given(self) -> None:
        self._before = self._on_disk()
        super().test_damaged_bytes_are_a_miss_and_never_given()
        assert self._stats().corrupt > 0, "no damaged block was met"

    def _on_disk(self) -> int:
        return int(self._stats().blocks)

    def _stats(self) -> Any:
        model = Namespace(weights_digest="w", kv_dtype="float32", layers=1, kv_heads=1, head_dim=64)
        with Client.connect(
            self.node.run_dir, namespace=model, payload_bytes=8192, shares=1
        ) as client:
            return client.stats().tiers[TierKind.NVME]

    def test_what_was_asked_is_counted(self) -> None:
        before = _counted(self.engine)
        store = self.open()
        names, payloads = self.blocks("counted", 3)
        store.store(names, payloads)
        store.load(names)
        store.load(self.blocks("uncounted", 2)[0])
        store.close()
        after = _counted(self.engine)
        grown = {key: after[key] - before.get(key, 0.0) for key in after}
        assert grown["store", "held"] == 3 and grown["load", "hit"] == 3
        assert grown["load", "miss"] + grown.get(("lookup", "miss"), 0.0) == 2


def _counted(engine: str) -> dict[tuple[str, str], float]:
    return {
        (sample.labels["call"], sample.labels["outcome"]): sample.value
        for family in REGISTRY.collect()
        for sample in family.samples
        if sample.name == "kvstore_adapter_blocks_total" and sample.labels["engine"] == engine
    }


def _flipped(path: Path) -> int:
    """Flip a byte of every 4 KiB that is not empty; return how many."""
    content, flipped = bytearray(path.read_bytes()), 0
    for at in range(2_000, len(content), 4_096):
        if content[at]:
            content[at] ^= 0xFF
            flipped += 1
    path.write_bytes(content)
    return flipped


class TestSglang(_OverNode):
    engine = "sglang"

    def open(self) -> ByteStore:
        return Sglang(str(self.run_dir))


class TestLmCache(_OverNode):
    engine = "lmcache"

    def open(self) -> ByteStore:
        return LmCache(str(self.run_dir))
