"""What a peer's router is fed in the benchmark; the peer itself only where it is installed."""

import json
import os
from typing import Any

import pytest

from kvstore.cli.bench_router_peer import (
    Holdings,
    RadixPeer,
    SelectPeer,
    batches,
    load_dynamo,
)
from kvstore.core.names import Root, chain
from kvstore.router.vllm_events import VllmIndex

ROOT = Root(bytes(range(32)))
TOKENS = os.urandom(80 * 64)
"""80 blocks: three events."""
needs_dynamo = pytest.mark.skipif(load_dynamo() is None, reason="needs ai-dynamo-runtime")


def test_batches_are_what_an_engine_would_send() -> None:
    index, sent = VllmIndex(ROOT), list(batches(Holdings([TOKENS], others=0)))
    assert len(sent) == 3
    for payload in sent:
        index.apply(payload)
    assert {name for part in index.held() for name in part.names} == set(chain(ROOT, TOKENS))


class _Recorded:
    """Stands where the peer's module is: keeps what it is told."""

    def __init__(self) -> None:
        self.events: list[dict[str, Any]] = []

    def RadixTree(self) -> "_Recorded":
        return self

    def compute_block_hash_for_seq(self, tokens: list[int], size: int) -> list[int]:
        return [hash(tuple(tokens[at : at + size])) for at in range(0, len(tokens), size)]

    def apply_event(self, worker: int, event: bytes) -> None:
        self.events.append({"worker": worker, **json.loads(event)["data"]})


def test_chains_hang_together_and_equal_prefixes_have_equal_names() -> None:
    core = _Recorded()
    half = TOKENS[: 40 * 64]
    peer = RadixPeer(core, [TOKENS], [Holdings([TOKENS], 0), Holdings([half], 0)])
    stored = [event["stored"] for event in core.events]
    assert [event["worker"] for event in core.events] == [0, 0, 0, 1, 1]
    names = [[block["block_hash"] for block in part["blocks"]] for part in stored]
    assert [part["parent_hash"] for part in stored] == [
        None, names[0][-1], names[1][-1], None, names[0][-1],
    ]  # fmt: skip
    assert names[3] == names[0] and names[4] == names[1][:8]
    events, made = peer.stored(peer.prompts[0], each=100)
    assert len(events) == 1 and made[:32] == names[0]
    assert json.loads(peer.removed(made[:2]))["data"] == {"removed": {"block_hashes": made[:2]}}


@needs_dynamo
async def test_the_peer_finds_what_it_was_fed() -> None:
    core = load_dynamo()
    workers = [Holdings([TOKENS], 600), Holdings([TOKENS[: 16 * 64]], 600)]
    radix = RadixPeer(core, [TOKENS], workers)
    assert radix.tree.find_matches(radix.prompts[0]).scores == {(0, 0): 80, (1, 0): 16}
    async with SelectPeer(core, [TOKENS], workers) as peer:
        assert await peer.select(peer.requests[0]) == 0
