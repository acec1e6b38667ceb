"""Which of an engine's chunks the node holds, told once each way, without a package of vLLM's.

Removals are the node's to decide, so a thread follows its `Watch`, for this engine's root alone. A
chunk is told as stored when the node lists it (sealed by then), and as removed when no tier of the
node has it any more. What cannot be followed is not told at all: whoever routes by these events may
miss a hit, and does not count on what is gone.
"""

import asyncio
import contextlib
import logging
import threading
from collections.abc import Callable, Iterable, Sequence
from contextlib import aclosing
from typing import Final, NamedTuple

from kvstore.adapters.opaque import adapter_metrics
from kvstore.adapters.vllm.tier_settings import tier_name
from kvstore.core.names import BlockName, Root
from kvstore.directory.events import Began, Changed, Ended, Event, Lost
from kvstore.rpc.watch_client import WatchClient, WatchConfig

_LOG: Final = logging.getLogger(__name__)
MAX_FOLLOWED: Final = 1 << 18
"""Chunks of a root that are followed: half a terabyte in chunks of 2 MiB. About 200 bytes each."""
MAX_AWAITED: Final = 1 << 16
"""Chunks stored that the node has not listed yet."""
MAX_TOLD: Final = 2 * MAX_FOLLOWED
"""Words that wait for vLLM, which takes them after each step."""
_CLOSE_S: Final = 5.0


class Told(NamedTuple):
    """Chunks that changed together, by vLLM's keys."""

    keys: tuple[bytes, ...]
    removed: bool


class Following:
    """What is known of one root from its node's stream. Pure; whoever calls holds a lock."""

    def __init__(
        self,
        *,
        name_of: Callable[[bytes], BlockName] = tier_name,
        max_followed: int = MAX_FOLLOWED,
        max_awaited: int = MAX_AWAITED,
        max_told: int = MAX_TOLD,
    ) -> None:
        """`name_of` gives the name under which the node has a key's chunk."""
        self._name_of = name_of
        self._max_followed = max_followed
        self._max_awaited = max_awaited
        self._max_told = max_told
        self._tiers: dict[BlockName, int] = {}
        """Of each listed block a bit for each tier that has it."""
        self._keys: dict[BlockName, bytes] = {}
        """vLLM's keys of what was told as stored."""
        self._awaited: dict[BlockName, bytes] = {}
        self._snapshot: dict[BlockName, int] | None = None
        """What a snapshot under way has listed, and what came since it began."""
        self._void = 0
        """Bits of the tiers that the snapshot under way speaks for."""
        self._told: list[tuple[bytes, bool]] = []
        self.dropped = 0
        """Chunks not followed, and words not told, because there were too many."""

    def stored(self, keys: Iterable[bytes]) -> None:
        """Take note that chunks were stored."""
        for key in keys:
            name = self._name_of(key)
            if name in self._keys:
                continue
            if name in self._tiers:
                self._tell_stored(name, key)
                continue
            if len(self._awaited) >= self._max_awaited:
                del self._awaited[next(iter(self._awaited))]
                self.dropped += 1
            self._awaited[name] = key

    def apply(self, event: Event) -> None:
        """Take in what the node says."""
        match event:
            case Changed():
                bit = 1 << event.tier
                for name in event.names:
                    self._lose(name, bit) if event.deleted else self._list(name, bit)
            case Began():
                self._snapshot = {}
                self._void = sum(1 << tier for tier in event.tiers)
            case Ended():
                self._end_snapshot()
            case Lost():
                # The node's blocks outlive it: the next snapshot says which.
                self._snapshot = None
            case _:
                pass

    def take(self) -> list[Told]:
        """Return what changed since the last time, in order."""
        told, self._told = self._told, []
        runs: list[Told] = []
        first = 0
        for at in range(1, len(told) + 1):
            if at == len(told) or told[at][1] != told[first][1]:
                runs.append(Told(tuple(key for key, _ in told[first:at]), told[first][1]))
                first = at
        return runs

    def _list(self, name: BlockName, bit: int) -> None:
        if self._snapshot is not None:
            self._snapshot[name] = self._snapshot.get(name, 0) | bit
        known = self._tiers.get(name, 0)
        if not known and len(self._tiers) >= self._max_followed:
            self._awaited.pop(name, None)
            self.dropped += 1
            return
        self._tiers[name] = known | bit
        key = self._awaited.pop(name, None)
        if key is not None:
            self._tell_stored(name, key)

    def _lose(self, name: BlockName, bit: int) -> None:
        if self._snapshot is not None and name in self._snapshot:
            self._snapshot[name] &= ~bit
        if name in self._tiers:
            self._keep(name, self._tiers[name] & ~bit)

    def _end_snapshot(self) -> None:
        """Let go of what the snapshot's tiers did not list."""
        if self._snapshot is None:
            return
        listed, self._snapshot = self._snapshot, None
        for name, bits in list(self._tiers.items()):
            self._keep(name, bits & (~self._void | listed.get(name, 0)))

    def _keep(self, name: BlockName, bits: int) -> None:
        """Set which tiers have a block; with none of them it is gone."""
        if bits:
            self._tiers[name] = bits
            return
        del self._tiers[name]
        key = self._keys.pop(name, None)
        if key is not None:
            self._tell(key, removed=True)

    def _tell_stored(self, name: BlockName, key: bytes) -> None:
        self._keys[name] = key
        self._tell(key, removed=False)

    def _tell(self, key: bytes, *, removed: bool) -> None:
        if len(self._told) >= self._max_told:
            # Nobody takes them: half goes at once, so that each costs little.
            self.dropped += len(self._told) // 2
            del self._told[: len(self._told) // 2]
        self._told.append((key, removed))


class TierEvents:
    """Follows the node in a thread, from the first stored chunk to `close`."""

    def __init__(
        self,
        publisher: Callable[[], tuple[str, Root] | None],
        following: Following | None = None,
        *,
        engine: str = "vllm-tier",
    ) -> None:
        """`publisher` says where the node is and under which root, once there is a session.

        `engine` is the label under which metrics count what goes wrong.
        """
        self._engine = engine
        self._publisher = publisher
        self._following = following or Following()
        self._lock = threading.Lock()
        self._thread: threading.Thread | None = None
        self._loop: asyncio.AbstractEventLoop | None = None
        self._task: asyncio.Task[None] | None = None
        self._closed = False
        self._counted = 0

    def stored(self, keys: Sequence[bytes]) -> None:
        """Take note that chunks were stored; called from the threads that stored them."""
        if not keys:
            return
        with self._lock:
            self._following.stored(keys)
            self._start()

    def take(self) -> list[Told]:
        """Return what changed since the last time, each chunk's words in order.

        Nothing while a snapshot is being taken in: the scheduler waits for nobody.
        """
        if not self._lock.acquire(blocking=False):
            return []
        try:
            told = self._following.take()
            more = self._following.dropped - self._counted
            self._counted += more
        finally:
            self._lock.release()
        if more:
            adapter_metrics().refused.labels(self._engine).inc(more)
        return told

    def close(self) -> None:
        """Stop following. Harmless when repeated."""
        with self._lock:
            self._closed = True
            thread, loop, task = self._thread, self._loop, self._task
        if loop is not None and task is not None:
            with contextlib.suppress(RuntimeError):  # it ended by itself
                loop.call_soon_threadsafe(task.cancel)
        if thread is not None:
            thread.join(_CLOSE_S)

    def _start(self) -> None:
        """Begin to follow, where it is known whom."""
        where = None if self._thread or self._closed else self._publisher()
        if where is not None:
            self._thread = threading.Thread(
                target=self._run, args=[where], name="kvstore-tier-watch", daemon=True
            )
            self._thread.start()

    def _run(self, where: tuple[str, Root]) -> None:
        try:
            asyncio.run(self._follow(where))
        except asyncio.CancelledError:
            pass
        except Exception:  # task boundary: nobody looks at what this thread raises
            _LOG.exception("following %s failed: nothing is told any more", where[0])
            adapter_metrics().failures.labels(self._engine, "watch").inc()

    async def _follow(self, where: tuple[str, Root]) -> None:
        with self._lock:
            self._loop, self._task = asyncio.get_running_loop(), asyncio.current_task()
        while not self._closed:
            await self._follow_there(*where)
            where = self._publisher() or where

    async def _follow_there(self, address: str, root: Root) -> None:
        """Follow until the session is another one's: a new keeper may give another root."""
        config = WatchConfig(subscriber=self._engine, root=root)
        async with aclosing(WatchClient(address, "node", config).events()) as events:
            async for event in events:
                with self._lock:
                    self._following.apply(event)
                if isinstance(event, Lost):
                    _LOG.warning("%s is not followed: %s", address, event.reason)
                    if self._publisher() not in (None, (address, root)):
                        return
