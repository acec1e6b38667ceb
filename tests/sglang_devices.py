"""SGLang's device pools without its package, and its scheduler's calls of a `DirectStore`."""

import hashlib
from collections.abc import Callable, Sequence
from typing import Any

import torch

from kvstore.adapters.opaque import OpaqueBlocks
from kvstore.adapters.sglang.device import DevicePages
from kvstore.adapters.sglang.direct import DirectStore, Part, Pool
from kvstore.adapters.sglang.identity import (
    Ranks,
    Settings,
    device_namespace_of,
    name_of,
    settings_of,
)
from kvstore.client.blocking import Client
from kvstore.core.names import BlockName, Namespace
from kvstore.testing.node import RunningNode
from tests.patience import PATIENCE_MS, PATIENT, until_so

PAGE, LAYERS, TOKENS = 16, 3, 320
RANKS = Ranks(tp="0/1", pp="0/1", cp="0/1", dcp="0/1", replicated=False)


def now() -> None:
    """The forward wrote its pages already."""


class Entry:
    """A device pool's entry as SGLang's linkers have it: K and V of a layer in buffers apart."""

    def __init__(self, name: str = "kv", *, page: int = PAGE, dim: int = 8) -> None:
        self.name, self.page_size = name, page
        buffers = [torch.zeros(TOKENS, 2, dim, dtype=torch.bfloat16) for _ in range(2 * LAYERS)]
        self.components = [buffers]
        self.layer_mapping = {at: (at, LAYERS + at) for at in range(LAYERS)}
        row = 2 * dim * 2
        self.buffer_meta = [[(one.data_ptr(), row, row * page) for one in buffers]]

    def prepare_locations(self, indices: Sequence[int]) -> list[int]:
        if len(indices) % self.page_size:
            raise ValueError("no whole pages")
        return list(indices[:: self.page_size])

    def fill(self, seed: int) -> None:
        dice = torch.Generator().manual_seed(seed)
        for buffer in self.components[0]:
            buffer.normal_(generator=dice)

    def page(self, first_row: int) -> list[torch.Tensor]:
        return [one[first_row : first_row + self.page_size].clone() for one in self.components[0]]


def settings(node: RunningNode, **more: Any) -> Settings:
    times = {"call_ms": PATIENCE_MS, "pause_ms": 50, "transfer_ms": PATIENCE_MS}
    extra = {"run_dir": str(node.run_dir), "weights_digest": "w" * 64, **times, **more}
    return settings_of(extra)


def pool_of(node: RunningNode, entry: Entry, ranks: Ranks = RANKS, **more: Any) -> Pool:
    pages, chosen = DevicePages(entry), settings(node, **more)
    namespace = device_namespace_of(
        chosen, ranks, model="m", pool=pages.name, page=pages.page, dtype=pages.dtype,
        form=pages.form,
    )  # fmt: skip
    return Pool(pages, OpaqueBlocks(chosen.address, namespace, pages.page_bytes))


def opened(
    node: RunningNode, *entries: Entry, writes: bool = True, wait_ms: int = 20,
    stall_ms: int = 10_000, **more: Any,
) -> DirectStore:  # fmt: skip
    pools = {entry.name: pool_of(node, entry, **more) for entry in entries}
    return DirectStore(pools, layers=LAYERS, writes=writes, wait_ms=wait_ms, stall_ms=stall_ms)


def names(label: str, count: int) -> list[BlockName]:
    return [
        name_of(hashlib.sha256(f"direct {label} {at}".encode()).hexdigest()) for at in range(count)
    ]


def rows(*pages: int) -> list[int]:
    return [page * PAGE for page in pages]


def offloaded(store: DirectStore, *parts: Part, ready: Callable[[], None] = now) -> bool:
    assert store.offload(parts, ready)
    until_so(lambda: store.completed() == 1)
    return store.pop()


def loaded(store: DirectStore, rid: str, *parts: Part) -> bool:
    """Load as the scheduler does, with a forward that waits for each layer."""
    assert store.queue(rid, parts)
    index = store.start(now)
    assert index >= 0
    store.counter.set_consumer(index)
    for layer in range(LAYERS):
        store.counter.wait_until(layer)
    return store.finish(index)


def leases(node: RunningNode) -> int:
    model = Namespace(weights_digest="s", kv_dtype="float32", layers=1, kv_heads=1, head_dim=8)
    with Client.connect(
        node.run_dir, namespace=model, payload_bytes=4096, shares=1, config=PATIENT
    ) as client:
        return client.stats().leases
