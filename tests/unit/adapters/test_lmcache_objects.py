"""LMCache's tasks in LMCache's order, over a real node and without LMCache's package."""

import ctypes
import hashlib
import os
import select
import signal
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import pytest

from kvstore.adapters.lmcache import objects as module
from kvstore.adapters.lmcache.identity import name_of, settings_of
from kvstore.adapters.lmcache.objects import Objects, Result, Tasks
from kvstore.core.errors import BadInput
from kvstore.testing.node import RunningNode, start_node
from tests.patience import PATIENCE_S


@pytest.fixture(scope="module")
def node() -> Iterator[RunningNode]:
    with start_node(arena_bytes=64 << 20) as running:
        yield running


@dataclass(frozen=True)
class Key:
    """The fields of LMCache's `ObjectKey`."""

    chunk_hash: bytes
    model_name: str = "m"
    kv_rank: int = 0
    object_group_id: int = 0
    cache_salt: str = ""


@dataclass
class Memory:
    """A face of LMCache's `MemoryObj`."""

    content: bytes
    buffer: Any = field(init=False)

    def __post_init__(self) -> None:
        self.buffer = ctypes.create_string_buffer(self.content, len(self.content))

    @property
    def data_ptr(self) -> int:
        return ctypes.addressof(self.buffer)

    def get_size(self) -> int:
        return len(self.content)


def opened(node: RunningNode, **more: Any) -> Objects:
    params = {"run_dir": str(node.run_dir), "weights_digest": "w", "layout": "bf16 256", **more}
    return Objects(settings_of(params))


def keys(label: str, count: int, **more: Any) -> list[Key]:
    return [Key(hashlib.sha256(f"{label} {at}".encode()).digest(), **more) for at in range(count)]


def memories(label: str, count: int, size: int = 9_000) -> list[Memory]:
    return [Memory(hashlib.shake_128(f"{label}{at}".encode()).digest(size)) for at in range(count)]


def ended(tasks: Tasks, task: int) -> Result:
    """Wait on the descriptor as LMCache does, and return the result."""
    while (result := tasks.pop(task)) is None:
        ready, _, _ = select.select([tasks.event_fd], [], [], PATIENCE_S)
        assert ready, "nothing was signalled"
        os.eventfd_read(tasks.event_fd)
    assert tasks.pop(task) is None, "a result is given once"
    return result


def test_store_look_up_and_load_of_several_sizes_with_holes(node: RunningNode) -> None:
    cache = opened(node)
    stored = [*memories("a", 2), *memories("b", 2, 5_000)]
    named = [*keys("a", 2), *keys("b", 2, object_group_id=1)]
    assert ended(cache.stores, cache.store(named, stored)) == Result([True] * 4, 28_000)
    asked = [keys("absent", 1)[0], *named]
    sizes = [9_000, 9_000, 9_000, 5_000, 5_000]
    found = ended(cache.lookups, cache.lookup(asked, sizes)).done
    assert found == [False, True, True, True, True]
    assert ended(cache.lookups, cache.lookup(asked, [0] * 5)).done == found
    into = [Memory(bytes(size)) for size in sizes]
    assert ended(cache.loads, cache.load(asked, into)) == Result(found, 28_000)
    assert [one.buffer.raw for one in into[1:]] == [one.content for one in stored]
    assert into[0].buffer.raw == bytes(9_000)
    assert len({cache.stores.event_fd, cache.lookups.event_fd, cache.loads.event_fd}) == 3
    cache.close()
    cache.close()


def test_every_field_of_a_key_and_every_setting_keeps_objects_apart(node: RunningNode) -> None:
    digest = bytes(32)
    variants = [
        Key(digest), Key(digest, "n"), Key(digest, kv_rank=1), Key(digest, object_group_id=1),
        Key(digest, cache_salt="s"), Key(bytes(31)), Key(digest, "m1", 0), Key(digest, "m", 10),
    ]  # fmt: skip
    assert len({name_of(key) for key in variants}) == len(variants)
    plain, key = opened(node), keys("apart", 1)
    assert ended(plain.stores, plain.store(key, memories("apart", 1))).done == [True]
    for other in (opened(node, layout="fp8 256"), opened(node, weights_digest="v")):
        assert ended(other.lookups, other.lookup(key, [9_000])).done == [False]
        other.close()
    plain.close()


@pytest.mark.slow
def test_every_task_ends_whatever_the_node_does(monkeypatch: pytest.MonkeyPatch) -> None:
    with start_node(arena_bytes=16 << 20) as node:
        cache = opened(node, pause_ms=50)
        key, stored = keys("fault", 3), memories("fault", 3)
        assert all(ended(cache.stores, cache.store(key, stored)).done)
        node.signal_node(signal.SIGSTOP)
        assert ended(cache.lookups, cache.lookup(key, [9_000] * 3)).done == [False] * 3
        assert ended(cache.loads, cache.load(key, stored)).done == [False] * 3
        assert ended(cache.stores, cache.store(key, stored)) == Result([False] * 3, 0)
        node.signal_node(signal.SIGCONT)
        node.kill_keeper()
        assert ended(cache.loads, cache.load(key, stored)).done == [False] * 3
        assert ended(cache.stores, cache.store(key, stored[:1])).done == [False] * 3
        assert cache.failed == 1, "keys and objects of different number"
        monkeypatch.setattr(module, "MAX_WAITING", 0)
        assert ended(cache.loads, cache.load(key, stored)).done == [False] * 3
        assert cache.failed == 2
        cache.close()


@pytest.mark.parametrize(
    ("params", "named"),
    [
        ({}, "run_dir"), ({"run_dir": "/r", "weights_digest": "w"}, "layout"),
        ({"run_dir": "/r", "weights_digest": "w", "layout": "l", "threads": 0}, "threads"),
        ({"run_dir": "/r", "weights_digest": "w", "layout": "l", "threads": "2"}, "threads"),
        ({"run_dir": "/r", "weights_digest": "w", "layout": "l", "wheights": 1}, "wheights"),
    ],
)  # fmt: skip
def test_bad_settings_are_named(params: dict[str, Any], named: str) -> None:
    with pytest.raises(BadInput, match=named):
        settings_of(params)
