"""The node's neighbours: a list that a file holds, and what each of them has, by watching.

The file says who they are: `{"peers": [{"name": "node-1", "address": "10.0.0.2:7070"}, …]}`. It is
read again whenever it changes, so whoever places nodes (an operator, the cluster's controller)
replaces it and nobody is restarted; while it is missing or unreadable the last list stays. An
entry with the node's own name is left out, so that all nodes can share one file.
"""

import asyncio
import json
import logging
from collections.abc import Sequence
from contextlib import aclosing
from pathlib import Path
from typing import Final

from kvstore.core.errors import BadInput
from kvstore.core.limits import MAX_ID_BYTES
from kvstore.core.names import BlockName, Root
from kvstore.directory.events import Lost, TierKind
from kvstore.directory.view import ClusterView, Health
from kvstore.observe.metrics import PeerMetrics
from kvstore.rpc.watch_client import WatchClient, WatchConfig
from kvstore.tiers.peer import Neighbour

MAX_PEERS: Final = 1_024
_FILE_BYTES: Final = 1 << 20
_LOOK_S: Final = 0.25
_RESYNC_S: Final = 0.25
_LIVE_MS: Final = 20
"""How old the answer to who is heard of may be; an Acquire asks it for every block."""
_SWEEP_BLOCKS: Final = 20_000
_LENT: Final = (TierKind.DRAM, TierKind.NVME)
"""What a neighbour lends: its own tiers."""
_log = logging.getLogger(__name__)


def parse_peers(text: str, own_name: str) -> list[Neighbour]:
    """Return the neighbours of a list; raises `BadInput` naming what is wrong in it."""
    try:
        listed = json.loads(text)
    except ValueError as error:
        raise BadInput(f"the list of peers is no JSON: {error}") from error
    entries = listed.get("peers") if isinstance(listed, dict) else None
    if not isinstance(entries, list) or len(entries) > MAX_PEERS:
        raise BadInput(f"the list of peers wants 'peers', a list of at most {MAX_PEERS}")
    found: dict[str, Neighbour] = {}
    for entry in entries:
        name = entry.get("name") if isinstance(entry, dict) else None
        address = entry.get("address") if isinstance(entry, dict) else None
        if not isinstance(name, str) or not 0 < len(name.encode()) <= MAX_ID_BYTES:
            raise BadInput(f"a peer wants a name of 1 to {MAX_ID_BYTES} bytes: {entry!r:.200}")
        if not isinstance(address, str) or not address.rpartition(":")[2].isdigit():
            raise BadInput(f"peer {name!r:.80} wants an address host:port, has {address!r:.200}")
        if name in found:
            raise BadInput(f"peer {name!r:.80} is listed twice")
        found[name] = Neighbour(name, address)
    found.pop(own_name, None)
    return list(found.values())


class Peers:
    """Follows the list and everyone on it. `holders` answers from memory."""

    def __init__(self, own_name: str, file: Path, metrics: PeerMetrics) -> None:
        self._own_name = own_name
        self._file = file
        self._metrics = metrics
        self._view = ClusterView()
        self._known: dict[str, Neighbour] = {}
        self._followers: dict[str, asyncio.Task[None]] = {}
        self._stamp: tuple[int, int, int] | None = None
        self._task: asyncio.Task[None] | None = None
        self._loop = asyncio.get_running_loop()
        self._live_now: list[tuple[Neighbour, int]] = []
        self._live_until_ms = 0.0
        self._live_version = -1

    def start(self) -> None:
        """Begin to follow."""
        self._task = asyncio.create_task(self._keep_up(), name="peers")

    async def close(self) -> None:
        """Stop following."""
        tasks = [*self._followers.values(), *([self._task] if self._task else [])]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    def holders(self, root: Root, name: BlockName) -> Sequence[Neighbour]:
        """Return live neighbours that list a block in a tier of their own."""
        places = self._view.places_of(root, name)
        if not places:
            return ()
        return [one for one, bits in self._live() if places & bits]

    def measure(self) -> None:
        """Set the gauges."""
        now_ms = self._now_ms()
        states = dict.fromkeys(Health, 0)
        for name in self._known:
            states[self._view.health(name, now_ms)] += 1
        for state, count in states.items():
            self._metrics.peers.labels(state.value).set(count)
        self._metrics.known_blocks.set(len(self._view))

    def _live(self) -> list[tuple[Neighbour, int]]:
        """Return the neighbours that are heard of, and their places in the view."""
        now_ms = self._now_ms()
        if now_ms < self._live_until_ms and self._view.version == self._live_version:
            return self._live_now
        live: list[tuple[Neighbour, int]] = []
        for neighbour in self._known.values():
            publisher = self._view.publisher(neighbour.name)
            if publisher is None or self._view.health_of(publisher, now_ms) is not Health.LIVE:
                continue
            bits = 0
            for tier in _LENT:
                bits |= publisher.tier_bits.get(tier, 0)
            live.append((neighbour, bits))
        self._live_now, self._live_version = live, self._view.version
        self._live_until_ms = now_ms + _LIVE_MS
        return live

    async def _keep_up(self) -> None:
        while True:
            await self._read_list()
            swept = self._view.sweep(_SWEEP_BLOCKS)
            await asyncio.sleep(0.01 if swept else _LOOK_S)

    async def _read_list(self) -> None:
        """Read the file if it is another one than before; keep the list where that fails."""
        try:
            text = await asyncio.to_thread(self._changed)
            if text is not None:
                self._set(parse_peers(text, self._own_name))
        except FileNotFoundError:
            return
        except (BadInput, OSError, UnicodeDecodeError) as error:
            self._metrics.list_errors.inc()
            _log.error("%s: %s; the last list of peers stays", self._file, error)

    def _changed(self) -> str | None:
        """Return the file's text, None when it is the same as before."""
        status = self._file.stat()
        stamp = (status.st_mtime_ns, status.st_size, status.st_ino)
        if stamp == self._stamp:
            return None
        self._stamp = stamp
        if status.st_size > _FILE_BYTES:
            raise BadInput(f"{status.st_size} bytes; {_FILE_BYTES} allowed")
        return self._file.read_text()

    def _set(self, neighbours: list[Neighbour]) -> None:
        wanted = {neighbour.name: neighbour for neighbour in neighbours}
        for name, known in list(self._known.items()):
            if wanted.get(name) != known:
                self._followers.pop(name).cancel()
                self._view.forget(name)
                del self._known[name]
        for name, neighbour in wanted.items():
            if name not in self._known:
                self._known[name] = neighbour
                self._view.follow(name, host=name, now_ms=self._now_ms())
                self._followers[name] = asyncio.create_task(
                    self._follow(neighbour), name=f"follow {name}"
                )
        _log.info("%d peers", len(self._known))

    async def _follow(self, neighbour: Neighbour) -> None:
        """Apply one neighbour's events until cancelled, anew after each hole."""
        config = WatchConfig(subscriber=f"node {self._own_name}"[:MAX_ID_BYTES])
        client = WatchClient(neighbour.address, "node", config)
        while True:
            try:
                reason = await self._follow_until_hole(neighbour.name, client)
            except Exception as error:  # task boundary: one neighbour must not end the node
                _log.exception("following %s failed", neighbour.name)
                reason = "failure"
                self._view.apply(neighbour.name, Lost(repr(error)), self._now_ms())
            self._metrics.resyncs.labels(reason).inc()
            await asyncio.sleep(_RESYNC_S)

    async def _follow_until_hole(self, name: str, client: WatchClient) -> str:
        async with aclosing(client.events()) as events:
            async for event in events:
                reason = self._view.apply(name, event, self._now_ms())
                if reason is not None:
                    return str(reason)
        return "ended"

    def _now_ms(self) -> float:
        return self._loop.time() * 1_000
