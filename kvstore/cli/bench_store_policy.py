"""Cases of `bench store` about eviction policies: what they cost where the node calls them.

An arena in this process serves made-up conversations through the steps that a client's calls go
through, full from the first tenth on, so that every turn evicts. A clock round the policy's methods
counts the processor time spent in it (other programs on the core do not count), the node's own
answers to "may this one go" included.
"""

import gc
import hashlib
import os
import random
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Final

from prometheus_client import CollectorRegistry

from kvstore.cli.bench_rows import Bench
from kvstore.core.limits import GRANULE_BYTES, NAME_BYTES
from kvstore.core.names import Root
from kvstore.directory.policies import make_policy
from kvstore.directory.policy import BlockKey, Policy, Prompt
from kvstore.observe.metrics import NodeMetrics
from kvstore.service.roots import BlockShape, RootInfo
from kvstore.service.slots import SlotTable
from kvstore.service.store import ArenaStore
from kvstore.service.store_limits import StoreLimits
from kvstore.transport.arena import ArenaMapping, ArenaSize, create_arena

_NAMES: Final = ("ours", "lru")
CASES: Final = tuple(f"policy {name}, per block touched" for name in _NAMES)
_LIMIT_US: Final = 4.0
_SLOTS: Final = 16_384
_SESSIONS: Final = 64
_TURNS: Final = 2_000
_QUICK_TURNS: Final = 600
_TURN_BLOCKS: Final = 32
"""New blocks a turn: 512 tokens in blocks of 16."""
_LONGEST: Final = 1_024
_TURN_MS: Final = 250.0
_ROOT: Final = Root(hashlib.sha256(b"bench policy").digest())


@dataclass(slots=True)
class ClockedPolicy:
    """A policy with a clock round what the node calls. Implements `Policy`."""

    inner: Policy
    name: str = "clocked"
    seconds: float = 0.0
    touched: int = 0
    """Blocks that requests asked for: held, new or neither."""
    removed: int = 0

    def request(self, prompt: Prompt) -> None:
        """Pass on, and count the blocks."""
        began = time.thread_time()
        self.inner.request(prompt)
        self.seconds += time.thread_time() - began
        self.touched += len(prompt.keys)

    def insert(self, blocks: Sequence[BlockKey], *, parent: BlockKey | None, now_ms: float) -> None:
        """Pass on."""
        began = time.thread_time()
        self.inner.insert(blocks, parent=parent, now_ms=now_ms)
        self.seconds += time.thread_time() - began

    def remove(self, block: BlockKey) -> None:
        """Pass on."""
        began = time.thread_time()
        self.inner.remove(block)
        self.seconds += time.thread_time() - began
        self.removed += 1

    def victims(
        self,
        count: int,
        *,
        now_ms: float,
        may_evict: Callable[[BlockKey], bool],
        newcomers: Sequence[BlockKey] = (),
    ) -> list[BlockKey]:
        """Pass on; what the node answers to `may_evict` counts as the policy's."""
        began = time.thread_time()
        chosen = self.inner.victims(count, now_ms=now_ms, may_evict=may_evict, newcomers=newcomers)
        self.seconds += time.thread_time() - began
        return chosen

    def __len__(self) -> int:
        return len(self.inner)

    def __contains__(self, block: object) -> bool:
        return block in self.inner


@dataclass(slots=True)
class _Conversations:
    """Made-up sessions whose prompts grow by a turn each, and are new ones in the end."""

    dice: random.Random = field(default_factory=lambda: random.Random(11))
    packed: list[bytes] = field(default_factory=lambda: [b""] * _SESSIONS)

    def turn(self) -> bytes:
        """Return the names of the next prompt; some sessions speak far more often than others."""
        number = min(int(self.dice.paretovariate(0.7)) - 1, _SESSIONS - 1)
        before = self.packed[number]
        if len(before) >= _LONGEST * NAME_BYTES:
            before = b""
        self.packed[number] = before + self.dice.randbytes(_TURN_BLOCKS * NAME_BYTES)
        return self.packed[number]


def bench_policies(bench: Bench) -> None:
    """Serve the same conversations under our policy and under LRU."""
    turns = _QUICK_TURNS if bench.quick else _TURNS
    for name, case in zip(_NAMES, CASES, strict=True):
        if bench.wants(case):
            policy = served(name, turns)
            spent_us = 1e6 * policy.seconds / policy.touched
            bench.row(case, spent_us, "us", limit=_LIMIT_US, limit_name="the bound",
                      ratio=_LIMIT_US / spent_us, runs=1)  # fmt: skip


def served(name: str, turns: int, *, slots: int = _SLOTS) -> ClockedPolicy:
    """Serve `turns` prompts from `slots` slots; returns the policy called `name` with its times."""
    fd = create_arena(ArenaSize(slots * GRANULE_BYTES, slots))
    policy = ClockedPolicy(make_policy(name))
    try:
        arena = ArenaMapping(fd, owner=True)
        table = SlotTable(arena, policy, NodeMetrics(CollectorRegistry()), node="bench")
        store = ArenaStore(table, StoreLimits(reserve_quota_bytes=arena.size.data_bytes))
        info = table.roots.open(_ROOT, BlockShape(GRANULE_BYTES, GRANULE_BYTES, 1), domain="bench")
        conversations = _Conversations()
        gc.collect()
        for number in range(turns):
            _serve(store, info, conversations.turn(), number * _TURN_MS)
    finally:
        os.close(fd)
    return policy


def _serve(store: ArenaStore, info: RootInfo, packed: bytes, now_ms: float) -> None:
    """Take one prompt through the calls of a worker: acquire, commit, seal, release."""
    session = store.sessions.by_number(1) or store.sessions.open(1, bytes(16))
    count = len(packed) // NAME_BYTES
    answer = store.acquire(session, info, packed, reserve=count, first_block=0, now_ms=now_ms)
    store.flush_requests()
    slots = answer.reserved_slots
    refs = [(slot, store.table.generation[slot]) for slot in slots]
    store.commit(session, info, refs, now_ms)
    store.flush_requests()
    if slots:
        store.table.seal(slots, [bytes(16)] * len(slots))
    store.to_seal.clear()
    store.release(session, [answer.lease])
