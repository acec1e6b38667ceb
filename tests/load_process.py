"""A client that puts and gets without end and believes nothing: contents follow from names.

Run as `python -m tests.load_process WHERE SEED`; WHERE is a run directory (the arena is mapped) or
`host:port` (the bulk port is used). Ends when its standard input does, with one line of JSON.
"""

import asyncio
import hashlib
import json
import random
import sys
import time
from collections import Counter
from pathlib import Path
from typing import Any

from kvstore.client import AsyncClient, AsyncRemoteClient, ClientConfig
from kvstore.core.errors import KvStoreError
from kvstore.core.names import BlockName, Root, chain, pack_tokens
from tests.patience import PATIENCE_MS
from tests.session_process import PAYLOAD, SHARES, namespace

PROMPTS = 200
LONGEST = 20
DEADLINE_MS = 1_500
CONFIG = ClientConfig(call_ms=DEADLINE_MS, connect_ms=PATIENCE_MS, transfer_ms=DEADLINE_MS)


def content(name: bytes) -> bytes:
    """Return the payload that belongs to a name, and to no other."""
    return hashlib.shake_128(name).digest(1_024) * (PAYLOAD // 1_024)


class Load:
    """One client's life."""

    def __init__(self, where: str, seed: int) -> None:
        self._where = where
        self._mapped = Path(where).is_dir()
        self._dice = random.Random(seed)
        self.counts: Counter[str] = Counter()
        self.longest_ms = 0.0

    async def run(self, ended: asyncio.Event) -> None:
        """Connect, again and again, and work until told to end."""
        while not ended.is_set():
            try:
                client = await self._connect()
            except KvStoreError:
                self.counts["not connected"] += 1
                await asyncio.sleep(0.1)
                continue
            async with client:
                while not ended.is_set() and await self._turn(client):
                    pass

    async def _connect(self) -> AsyncClient | AsyncRemoteClient:
        options: dict[str, Any] = {
            "namespace": namespace("load"), "payload_bytes": PAYLOAD, "shares": SHARES,
            "config": CONFIG,
        }  # fmt: skip
        if self._mapped:
            return await AsyncClient.connect(self._where, **options)
        return await AsyncRemoteClient.connect(self._where, **options)

    async def _turn(self, client: AsyncClient | AsyncRemoteClient) -> bool:
        """Get a prompt, check every byte, put the rest; False to connect anew."""
        names = self._prompt(client.root)
        started = time.monotonic()
        try:
            blocks = await client.get(names, deadline_ms=DEADLINE_MS)
            self._check(names, [bytes(block) for block in blocks])
            if len(blocks) < len(names):
                rest = names[len(blocks) :]
                await client.put(rest, [content(name) for name in rest], first_block=len(blocks))
                self.counts["puts"] += 1
        except KvStoreError as error:
            self.counts[type(error).__name__] += 1
            await asyncio.sleep(0.02)
            return isinstance(client, AsyncClient)
        finally:
            self.longest_ms = max(self.longest_ms, (time.monotonic() - started) * 1_000)
        return True

    def _prompt(self, root: Root) -> list[BlockName]:
        prompt, length = self._dice.randrange(PROMPTS), self._dice.randrange(1, LONGEST)
        return list(chain(root, pack_tokens([prompt] * 16 * length)))

    def _check(self, names: list[BlockName], blocks: list[bytes]) -> None:
        self.counts["gets"] += 1
        self.counts["hit blocks"] += len(blocks)
        for name, block in zip(names, blocks, strict=False):
            self.counts["wrong"] += block != content(name)


async def main() -> None:
    """Run until standard input ends."""
    where, seed = sys.argv[1:]
    load, ended = Load(where, int(seed)), asyncio.Event()
    running = asyncio.create_task(load.run(ended))
    sys.stdout.write("ready\n")
    sys.stdout.flush()
    await asyncio.to_thread(sys.stdin.read)
    ended.set()
    await running
    sys.stdout.write(json.dumps({**load.counts, "longest_ms": round(load.longest_ms)}) + "\n")
    sys.stdout.flush()


if __name__ == "__main__":
    asyncio.run(main())
