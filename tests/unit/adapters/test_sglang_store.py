"""HiCache's storage calls, in SGLang's order, over a real node and without SGLang's package.

`tests/engines` holds the class that SGLang loads against SGLang's own.
"""

import ctypes
import hashlib
import signal
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

import pytest

from kvstore.adapters.sglang.identity import name_of, namespace_of, settings_of
from kvstore.adapters.sglang.pools import SidePool, hit_of
from kvstore.adapters.sglang.store import SglangStore
from kvstore.core.errors import BadInput
from kvstore.testing.node import RunningNode, start_node
from tests.patience import PATIENCE_S

PAGE = 16
ROW_BYTES = 256


@pytest.fixture(scope="module")
def node() -> Iterator[RunningNode]:
    with start_node(arena_bytes=64 << 20) as running:
        yield running


@dataclass
class HostPool:
    """A host pool's face: memory for K and V apart, rows of every page together."""

    pages: int = 16
    layout: str = "page_first"
    dtype: str = "torch.bfloat16"
    page_size: int = PAGE
    layer_num: int = 2
    halves: list[Any] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.halves = [ctypes.create_string_buffer(self._each * self.pages) for _ in range(2)]

    @property
    def _each(self) -> int:
        return self.page_size * ROW_BYTES

    def get_page_buffer_meta(self, indices: Any) -> tuple[list[int], list[int]]:
        addresses = [
            ctypes.addressof(half) + indices[at] * ROW_BYTES
            for at in range(0, len(indices), self.page_size)
            for half in self.halves
        ]
        return addresses, [self._each] * len(addresses)

    def page(self, number: int) -> bytes:
        span = slice(number * self._each, (number + 1) * self._each)
        return b"".join(half.raw[span] for half in self.halves)

    def fill(self, number: int, seed: str) -> bytes:
        content = hashlib.shake_128(seed.encode()).digest(2 * self._each)
        for at, half in enumerate(self.halves):
            start = number * self._each
            half[start : start + self._each] = content[at * self._each : (at + 1) * self._each]
        return content

    def rows(self, *pages: int) -> list[int]:
        size = self.page_size
        return [page * size + row for page in pages for row in range(size)]


def config(node: RunningNode, **more: Any) -> SimpleNamespace:
    extra = {"run_dir": str(node.run_dir), "weights_digest": "w" * 64, "interface_v1": 1}
    facts = {
        "tp_rank": 0, "tp_size": 1, "pp_rank": 0, "pp_size": 1, "attn_cp_rank": 0,
        "attn_cp_size": 1, "is_mla_model": False, "model_name": "m", "extra_config": extra,
    }  # fmt: skip
    return SimpleNamespace(**{**facts, **more})


def keys(label: str, count: int) -> list[str]:
    return [hashlib.sha256(f"{label} {at}".encode()).hexdigest() for at in range(count)]


def opened(node: RunningNode, pool: HostPool, **more: Any) -> SglangStore:
    store = SglangStore(config(node, **more))
    store.register(pool, "kv", pool.rows(0))
    return store


def test_backup_then_query_then_prefetch_in_another_engine(node: RunningNode) -> None:
    ours, theirs = HostPool(), HostPool()
    pages = keys("round", 4)
    contents = [ours.fill(at, f"round {at}") for at in range(4)]
    writer, reader = opened(node, ours), opened(node, theirs)
    assert reader.exists(pages) == 0
    assert writer.set("kv", pages, ours.rows(0, 1, 2, 3)) == [True] * 4
    assert reader.exists([*pages, *keys("other", 1)]) == 4
    assert reader.get("kv", pages, theirs.rows(9, 3, 5, 7)) == [True] * 4
    assert [theirs.page(at) for at in (9, 3, 5, 7)] == contents
    assert writer.set("kv", pages, ours.rows(0, 1, 2, 3)) == [True] * 4
    writer.close()
    reader.close()


def test_a_hit_query_is_one_round_trip(node: RunningNode, monkeypatch: pytest.MonkeyPatch) -> None:
    from kvstore.client.session import Session

    store, calls, inner = opened(node, HostPool()), list[str](), Session.call

    async def counted(self: Session, method: str, request: Any, *, deadline_ms: int) -> Any:
        calls.append(method)
        return await inner(self, method, request, deadline_ms=deadline_ms)

    monkeypatch.setattr(Session, "call", counted)
    store.exists(keys("long", 5_000))
    assert calls == ["Lookup"]
    store.close()


@pytest.mark.parametrize(
    "more",
    [
        {"tp_rank": 1, "tp_size": 2}, {"tp_size": 2}, {"pp_rank": 1, "pp_size": 2},
        {"attn_cp_rank": 1, "attn_cp_size": 2}, {"model_name": "n"}, {"is_mla_model": True},
    ],
)  # fmt: skip
def test_what_sglangs_keys_omit_keeps_pages_apart(node: RunningNode, more: dict[str, Any]) -> None:
    pool = HostPool()
    pages = keys("apart", 1)
    writer, reader = opened(node, pool), opened(node, HostPool(), **more)
    assert writer.set("kv", pages, pool.rows(0)) == [True]
    assert reader.exists(pages) == 0
    writer.close()
    reader.close()


def test_dtype_layout_page_and_weights_keep_pages_apart_and_replicas_share(
    node: RunningNode,
) -> None:
    settings = settings_of(config(node).extra_config)
    other = settings_of({**config(node).extra_config, "weights_digest": "v"})

    def digest(pool: HostPool, name: str = "kv", given: Any = settings, **more: Any) -> bytes:
        return namespace_of(given, config(node, **more), pool, name, (4096, 4096)).digest()

    plain = digest(HostPool())
    differing = [
        digest(HostPool(dtype="torch.float8_e4m3fn")), digest(HostPool(layout="page_head")),
        digest(HostPool(page_size=32)), digest(HostPool(layer_num=3)),
        digest(HostPool(), "draft"), digest(HostPool(), given=other),
    ]  # fmt: skip
    assert len({plain, *differing}) == 7
    assert digest(HostPool(), dp_rank=3) == plain
    mla: dict[str, Any] = {"is_mla_model": True, "tp_size": 2}
    assert digest(HostPool(), **mla) == digest(HostPool(), tp_rank=1, **mla)
    assert digest(HostPool(), "mamba", **mla) != digest(HostPool(), "mamba", tp_rank=1, **mla)


def test_side_pools_ride_along(node: RunningNode) -> None:
    kv, state = HostPool(), HostPool(page_size=1, pages=64)
    store = opened(node, kv)
    store.register(state, "mamba", [0])
    pages = keys("side", 4)
    assert store.set("kv", pages, kv.rows(0, 1, 2, 3)) == [True] * 4
    saved = state.fill(7, "state after page 2")
    assert store.set("mamba", pages[2:3], [7]) == [True]
    trailing = SimpleNamespace(name="mamba", hit_policy="trailing_pages", keys=["x"])
    hit = store.hit(pages, [trailing])
    assert (hit.pages, hit.by_pool, hit.restorable) == (3, {"kv": 4, "mamba": 3}, [3])
    assert store.get("mamba", pages[2:3], [50]) == [True]
    assert state.page(50) == saved
    assert store.get("mamba", pages[2:3], [1, 2]) == [False], "indices of two pages for one key"
    assert store.get("unknown", pages, kv.rows(0)) == [False] * 4
    store.close()


def test_threads_share_one_session(node: RunningNode) -> None:
    pool = HostPool(pages=64)
    store, wrong = opened(node, pool), list[str]()
    before = _sessions(node)

    def work(number: int) -> None:
        own = keys(f"thread {number}", 8)
        rows = range(8 * number, 8 * number + 8)
        contents = [pool.fill(at, f"{number} {at}") for at in rows]
        for _ in range(5):
            if not all(store.set("kv", own, pool.rows(*rows))) or store.exists(own) != 8:
                wrong.append(f"{number} not stored")
            done = store.get("kv", own, pool.rows(*rows))
            if not all(done) or [pool.page(at) for at in rows] != contents:
                wrong.append(f"{number} not loaded")

    threads = [threading.Thread(target=work, args=(number,)) for number in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(PATIENCE_S)
    assert not wrong
    assert _sessions(node) == before
    store.close()


def _sessions(node: RunningNode) -> int:
    from kvstore.client.blocking import Client
    from kvstore.core.names import Namespace

    model = Namespace(weights_digest="s", kv_dtype="float32", layers=1, kv_heads=1, head_dim=8)
    with Client.connect(node.run_dir, namespace=model, payload_bytes=4096, shares=1) as client:
        return client.stats().sessions


@pytest.mark.slow
def test_every_call_answers_in_full_whatever_the_node_does() -> None:
    pool, pages = HostPool(), keys("fault", 4)
    with start_node(arena_bytes=16 << 20) as node:
        store = opened(node, pool)
        contents = [pool.fill(at, f"fault {at}") for at in range(4)]
        assert store.set("kv", pages, pool.rows(0, 1, 2, 3)) == [True] * 4
        node.signal_node(signal.SIGSTOP)
        assert store.get("kv", pages, pool.rows(4, 5, 6, 7)) == [False] * 4
        assert store.exists(pages) == 0
        assert store.set("kv", keys("new", 2), pool.rows(0, 1)) == [False] * 2
        node.signal_node(signal.SIGCONT)
        node.wait_restarted(node.kill_node())
        for _ in range(200):
            if all(store.set("kv", pages, pool.rows(0, 1, 2, 3))):
                break
            threading.Event().wait(0.05)
        assert store.get("kv", pages, pool.rows(4, 5, 6, 7)) == [True] * 4
        assert [pool.page(at) for at in (4, 5, 6, 7)] == contents
        node.kill_keeper()
        assert store.get("kv", pages, pool.rows(4, 5, 6, 7)) == [False] * 4
        assert store.hit(pages, []).pages == 0
        store.close()
    assert store.exists(pages) == 0


def test_a_node_that_is_not_there_yet_fails_no_attach(tmp_path: Any) -> None:
    pool = HostPool()
    extra = {"run_dir": str(tmp_path), "weights_digest": "w", "interface_v1": 1, "pause_ms": 0}
    store = SglangStore(config(SimpleNamespace(run_dir=tmp_path), extra_config=extra))  # type: ignore[arg-type]
    store.register(pool, "kv", pool.rows(0))
    assert store.exists(keys("absent", 1)) == 0
    store.close()


@pytest.mark.parametrize(
    ("extra", "named"),
    [
        ({}, "run_dir"), ({"run_dir": "/r"}, "weights_digest"),
        ({"run_dir": "/r", "weights_digest": "w", "call_ms": "1"}, "call_ms"),
        ({"run_dir": "/r", "weights_digest": "w", "call_ms": 0}, "call_ms"),
        ({"run_dir": "/r", "weights_digest": "w", "runn_dir": 1}, "runn_dir"),
    ],
)  # fmt: skip
def test_bad_settings_are_named(extra: dict[str, Any], named: str) -> None:
    with pytest.raises(BadInput, match=named):
        settings_of(extra)


def test_a_layout_without_addresses_fails_the_attach_and_so_does_a_key_that_is_no_digest(
    node: RunningNode,
) -> None:
    store = SglangStore(config(node))
    with pytest.raises(BadInput, match="pool kv"):
        store.register(SimpleNamespace(page_size=PAGE), "kv", [0])
    for bad in ("zz", "00", ""):
        with pytest.raises(BadInput, match="page key"):
            name_of(bad)


def test_restorable_lengths() -> None:
    here = [True, True, False, True, True]
    assert hit_of(0, []).restorable == []
    assert hit_of(5, []).pages == 5
    assert hit_of(5, [SidePool("i", "all_pages", here)]).restorable == [1, 2]
    assert hit_of(5, [SidePool("s", "trailing_pages", here, trailing=2)]).restorable == [1, 2, 5]
    both = [SidePool("i", "all_pages", [True] * 4), SidePool("s", "trailing_pages", here)]
    assert hit_of(5, both).restorable == [1, 2, 4]
    groups = SidePool("g", "block_groups", here, block_pages=4, group_pages=2)
    hit = hit_of(5, [groups])
    assert (hit.pages, hit.by_pool) == (5, {"kv": 5, "g": 4})
