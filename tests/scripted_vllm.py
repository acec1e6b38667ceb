"""Publishes KV events as vLLM does: PUB and replay sockets, numbers, msgpack, int hashes."""

import asyncio
import hashlib
from collections.abc import Sequence
from typing import Any

import msgspec
import zmq
import zmq.asyncio

BLOCK = 16


def hash_of(parent: int | None, tokens: Sequence[int]) -> int:
    """Return some 64-bit hash: consumers may only look it up."""
    text = repr((parent, list(tokens))).encode()
    return int.from_bytes(hashlib.sha256(text).digest()[-8:], "big")


def hashes(tokens: Sequence[int], size: int = BLOCK) -> list[int]:
    found: list[int] = []
    for start in range(0, len(tokens) - size + 1, size):
        found.append(hash_of(found[-1] if found else None, tokens[start : start + size]))
    return found


def stored(tokens: Sequence[int], first: int = 0, size: int = BLOCK, **more: Any) -> dict[str, Any]:
    """Return the event that a prompt's blocks from `first` on are there."""
    known = hashes(tokens, size)
    return {
        "type": "BlockStored",
        "block_hashes": known[first:],
        "parent_block_hash": known[first - 1] if first else None,
        "token_ids": list(tokens[first * size : len(known) * size]),
        "block_size": size,
        "medium": "GPU",
        **more,
    }


def removed(known: Sequence[int | bytes], **more: Any) -> dict[str, Any]:
    return {"type": "BlockRemoved", "block_hashes": list(known), "medium": "GPU", **more}


def batch(*events: dict[str, Any]) -> bytes:
    return msgspec.msgpack.encode([1.5, list(events), 0])


class ScriptedVllm:
    """One engine's publisher thread, on a loop."""

    def __init__(self, buffer_steps: int = 10_000) -> None:
        self.endpoint = self.replay = ""
        self.sent: list[bytes] = []
        self._steps = buffer_steps
        self.replays = 0

    async def start(self, endpoint: str = "tcp://127.0.0.1:*") -> None:
        self._context = zmq.asyncio.Context()
        self._pub = self._context.socket(zmq.PUB)
        self._router = self._context.socket(zmq.ROUTER)
        self._pub.bind(endpoint)
        self._router.bind("tcp://127.0.0.1:*")
        self.endpoint = str(self._pub.get_string(zmq.LAST_ENDPOINT))
        self.replay = str(self._router.get_string(zmq.LAST_ENDPOINT))
        self._task = asyncio.create_task(self._answer())

    async def stop(self) -> None:
        self._task.cancel()
        await asyncio.gather(self._task, return_exceptions=True)
        self._context.destroy(0)

    async def publish(self, *events: dict[str, Any], lost: bool = False) -> None:
        """Send a batch; `lost` ones get a number and reach the replay buffer only."""
        number, payload = len(self.sent), batch(*events)
        self.sent.append(payload)
        if not lost:
            await self._pub.send_multipart([b"", number.to_bytes(8, "big"), payload])

    async def _answer(self) -> None:
        while True:
            who, _, start = await self._router.recv_multipart()
            self.replays += 1
            first = max(int.from_bytes(start, "big"), len(self.sent) - self._steps)
            for number in range(first, len(self.sent)):
                frames = [who, b"", b"", number.to_bytes(8, "big"), self.sent[number]]
                await self._router.send_multipart(frames)
            end = (-1).to_bytes(8, "big", signed=True)
            await self._router.send_multipart([who, b"", b"", end, b""])
