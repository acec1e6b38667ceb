"""Dynamo's router beside ours, where its package `ai-dynamo-runtime` is importable.

It gets the same prompts, the same workers and as many entries: its radix tree by its own events,
its selection service over ZeroMQ as vLLM engines would feed it. Tiers below the workers' own pages
are left out, which only makes its work less.
"""

import asyncio
import json
import os
import time
from array import array
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AsyncExitStack
from dataclasses import dataclass
from importlib import import_module
from itertools import accumulate
from typing import TYPE_CHECKING, Any, Final

from kvstore.core.errors import Unreachable
from kvstore.core.limits import BLOCK_TOKENS

if TYPE_CHECKING:
    import zmq.asyncio

NAME: Final = "Dynamo (ai-dynamo-runtime)"
MODEL: Final = "bench"
EVENT_BLOCKS: Final = 32
DEADLINE_S: Final = 120.0
"""For its service to apply a million entries: it takes about a tenth of that."""

_FILLER_BLOCKS: Final = 512
"""Length of the prompts that make up the other entries."""


@dataclass(frozen=True, slots=True)
class Holdings:
    """What one worker holds: beginnings of prompts as packed tokens, and others besides."""

    prefixes: Sequence[bytes]
    """Not empty: the last one tells when everything has arrived."""
    others: int
    """Blocks of prompts that nobody asks for."""


def load_dynamo() -> Any | None:
    """Return its native module; None where the package is not installed."""
    os.environ.setdefault("DYN_LOG", "error")  # else every decision is logged to the terminal
    try:
        return import_module("dynamo._core")
    except ImportError:
        return None


def _listed(tokens: bytes) -> list[int]:
    return array("I", tokens).tolist()


def _chains(holdings: Holdings) -> Iterator[bytes]:
    """Yield what a worker holds as token chains."""
    for _ in range(holdings.others // _FILLER_BLOCKS):
        yield os.urandom(_FILLER_BLOCKS * BLOCK_TOKENS * 4)
    yield from holdings.prefixes


def _name(parent: int, block: object) -> int:
    """Return what stands for a block and all before it, as an engine's hash would."""
    return hash((parent, block)) & (1 << 63) - 1


def batches(holdings: Holdings) -> Iterator[bytes]:
    """Yield what a worker holds as vLLM writes it, `EVENT_BLOCKS` blocks a batch."""
    import msgspec.msgpack  # an extra of the store, as ZeroMQ is

    each = BLOCK_TOKENS * 4
    for tokens in _chains(holdings):
        blocks = [tokens[start : start + each] for start in range(0, len(tokens), each)]
        names = list(accumulate(blocks, _name, initial=0))[1:]
        for start in range(0, len(blocks), EVENT_BLOCKS):
            part = slice(start, start + EVENT_BLOCKS)
            listed = _listed(b"".join(blocks[part]))
            parent = names[start - 1] if start else None
            stored = {
                "type": "BlockStored", "block_hashes": names[part], "parent_block_hash": parent,
                "token_ids": listed, "block_size": BLOCK_TOKENS, "medium": "GPU",
            }  # fmt: skip
            yield msgspec.msgpack.encode([time.time(), [stored], 0])


class RadixPeer:
    """Its radix tree alone: matches by block hashes, and events as JSON, which is what it takes."""

    def __init__(self, core: Any, prompts: Sequence[bytes], workers: Sequence[Holdings]) -> None:
        self._core = core
        self.tree = core.RadixTree()
        self.prompts = [self.hashes(tokens) for tokens in prompts]
        self._events = 0
        for worker, holdings in enumerate(workers):
            for tokens in _chains(holdings):
                for event in self.stored(self.hashes(tokens))[0]:
                    self.tree.apply_event(worker, event)

    def hashes(self, tokens: bytes) -> list[int]:
        """Return its hashes of the blocks of packed tokens."""
        hashes: list[int] = self._core.compute_block_hash_for_seq(_listed(tokens), BLOCK_TOKENS)
        return hashes

    def stored(
        self, hashes: Sequence[int], each: int = EVENT_BLOCKS
    ) -> tuple[list[bytes], list[int]]:
        """Return the events of a chain of blocks, `each` blocks in one, and the blocks' names."""
        names = list(accumulate(hashes, _name, initial=0))[1:]
        events = []
        for start in range(0, len(hashes), each):
            part = slice(start, start + each)
            blocks = [
                {"block_hash": name, "tokens_hash": tokens_hash}
                for name, tokens_hash in zip(names[part], hashes[part], strict=True)
            ]
            parent = names[start - 1] if start else None
            events.append(self._event({"stored": {"parent_hash": parent, "blocks": blocks}}))
        return events, names

    def removed(self, names: Sequence[int]) -> bytes:
        """Return the event that takes blocks out."""
        return self._event({"removed": {"block_hashes": list(names)}})

    def _event(self, data: object) -> bytes:
        self._events += 1
        return json.dumps({"event_id": self._events, "data": data, "dp_rank": 0}).encode()


class SelectPeer:
    """Its whole decision: tokens in, worker out. Use as an async context manager."""

    def __init__(self, core: Any, prompts: Sequence[bytes], workers: Sequence[Holdings]) -> None:
        self._core = core
        self._workers = workers
        self.requests = [{"model_name": MODEL, "token_ids": _listed(one)} for one in prompts]
        self._stack = AsyncExitStack()

    async def __aenter__(self) -> "SelectPeer":
        import zmq.asyncio

        self._service = self._core.SelectionService()
        self._stack.push_async_callback(self._service.shutdown_async)
        context = self._stack.enter_context(zmq.asyncio.Context())
        for number, holdings in enumerate(self._workers):
            await self._feed(context, number, holdings)
        await self._settle()
        return self

    async def __aexit__(self, *_: object) -> None:
        await self._stack.aclose()

    async def select(self, request: Mapping[str, object]) -> int:
        """Choose a worker and return its number."""
        chosen = await self._service.select(request)
        return int(chosen["worker_id"])

    async def _feed(self, context: "zmq.asyncio.Context", number: int, holdings: Holdings) -> None:
        """Register a worker and send what it holds, as vLLM writes it."""
        import zmq

        socket = self._stack.enter_context(context.socket(zmq.XPUB))
        socket.set(zmq.SNDHWM, 0)
        socket.set(zmq.LINGER, 0)
        port = socket.bind_to_random_port("tcp://127.0.0.1")
        await self._service.upsert_worker(
            {
                "worker_id": number, "model_name": MODEL, "endpoint": f"http://worker-{number}",
                "block_size": BLOCK_TOKENS, "max_num_batched_tokens": 8_192,
                "total_kv_blocks": 1_000_000, "kv_events_endpoint": f"tcp://127.0.0.1:{port}",
            }
        )  # fmt: skip
        await asyncio.wait_for(socket.recv(), DEADLINE_S)  # its subscription
        for sequence, batch in enumerate(batches(holdings)):
            await socket.send_multipart([b"", sequence.to_bytes(8, "big"), batch])

    async def _settle(self) -> None:
        """Wait until what was sent last by each worker is found; raises `Unreachable`."""
        deadline_s = time.monotonic() + DEADLINE_S
        for number, holdings in enumerate(self._workers):
            last = _listed(holdings.prefixes[-1])
            request = {"model_name": MODEL, "token_ids": last}
            while await self._held(number, request) < len(last) // BLOCK_TOKENS:
                if time.monotonic() > deadline_s:
                    raise Unreachable(f"{NAME} did not apply the events in {DEADLINE_S} s")
                await asyncio.sleep(0.05)

    async def _held(self, number: int, request: Mapping[str, object]) -> int:
        """Return how many leading blocks of a prompt it finds at a worker."""
        found = await self._service.overlap_scores(request)
        held = {one["worker_id"]: one["device_blocks"] for one in found["workers"]}
        return int(held.get(number, 0))
