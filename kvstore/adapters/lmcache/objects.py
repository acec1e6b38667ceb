"""LMCache's store, lookup and load tasks on threads, without a package of LMCache's.

A task is submitted, runs on a thread, leaves its result, and its kind's event descriptor is
signalled. Whatever happens, a task has a result: LMCache waits for each without a deadline.
"""

import logging
import os
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, Final, NamedTuple

from kvstore.adapters.lmcache.identity import Settings, name_of, namespace_of
from kvstore.adapters.opaque import OpaqueBlocks, Piece, adapter_metrics, load_scattered
from kvstore.core.errors import BadInput, KvStoreError

_LOG: Final = logging.getLogger(__name__)
MAX_SIZES: Final = 32
"""Sizes of objects, each with a session: one for each object group and partial chunk."""
MAX_WAITING: Final = 1_024
"""Tasks that may wait for a thread; later ones fail at once."""


class Result(NamedTuple):
    """What became of one task."""

    done: list[bool]
    """For each object."""
    moved_bytes: int
    """Bytes of those that are done; 0 for a lookup."""


class Tasks:
    """Results of one kind of task, and the descriptor that tells of them."""

    def __init__(self) -> None:
        self.event_fd = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)
        self._done: dict[int, Result] = {}
        self._lock = threading.Lock()
        self._open = True

    def finish(self, task: int, result: Result) -> None:
        """Leave a result and signal it."""
        with self._lock:
            self._done[task] = result
            if self._open:
                os.eventfd_write(self.event_fd, 1)

    def pop(self, task: int) -> Result | None:
        """Return one result, once; None while it is not there."""
        with self._lock:
            return self._done.pop(task, None)

    def pop_all(self) -> dict[int, Result]:
        """Return all results that nobody fetched yet."""
        with self._lock:
            done, self._done = self._done, {}
            return done

    def close(self) -> None:
        """Close the descriptor."""
        with self._lock:
            if self._open:
                self._open = False
                os.close(self.event_fd)


class Objects:
    """Objects of every size, by LMCache's keys. All methods return at once but `close`."""

    def __init__(self, settings: Settings) -> None:
        self.stores, self.lookups, self.loads = Tasks(), Tasks(), Tasks()
        self._settings = settings
        self._by_size: dict[int, OpaqueBlocks] = {}
        self._lock = threading.Lock()
        self._next = 0
        self._waiting = 0
        self._threads = ThreadPoolExecutor(settings.threads, thread_name_prefix="kvstore-lmcache")
        self.failed = 0
        """Tasks that ended with nothing done because of an error or of too many waiting."""

    def store(self, keys: Sequence[Any], objects: Sequence[Any]) -> int:
        """Store objects; the result is, for each, whether it is there now."""
        return self._submit(self.stores, len(keys), lambda: self._stored(keys, objects))

    def load(self, keys: Sequence[Any], objects: Sequence[Any]) -> int:
        """Load into the objects' memory; the result is, for each, whether its bytes are whole."""
        return self._submit(self.loads, len(keys), lambda: self._loaded(keys, objects))

    def lookup(self, keys: Sequence[Any], sizes: Sequence[int]) -> int:
        """Look up objects; the result is, for each, whether it is there.

        A size of 0 is one that the caller does not know: those seen before are tried.
        """
        return self._submit(self.lookups, len(keys), lambda: self._held(keys, sizes))

    def close(self) -> None:
        """Wait for what runs, drop what waits, end the sessions. Harmless when repeated."""
        self._threads.shutdown(wait=True, cancel_futures=True)
        for one in self._known():
            one.close()
        for tasks in (self.stores, self.lookups, self.loads):
            tasks.close()

    def _submit(self, tasks: Tasks, count: int, work: Callable[[], Result]) -> int:
        with self._lock:
            self._next += 1
            task, room = self._next, self._waiting < MAX_WAITING
            self._waiting += room
            self.failed += not room
        if not room:
            metrics = adapter_metrics()
            metrics.refused.labels("lmcache").inc()
            tasks.finish(task, Result([False] * count, 0))
            return task

        def run() -> None:
            result, failure = Result([False] * count, 0), "of a bug"
            try:
                result, failure = work(), ""
            except KvStoreError as error:
                failure = str(error)
            finally:  # a task without a result would be waited for for ever
                with self._lock:
                    self._waiting -= 1
                    self.failed += bool(failure)
                if failure:
                    _LOG.warning("a task of %d objects failed because %s", count, failure)
                tasks.finish(task, result)

        self._threads.submit(run)
        return task

    def _stored(self, keys: Sequence[Any], objects: Sequence[Any]) -> Result:
        done = [False] * len(keys)
        for size, places in _places(keys, objects).items():
            names = [name_of(keys[at]) for at in places]
            stored = self._blocks(size).store(names, [_memory(objects[at]) for at in places])
            for at, here in zip(places, stored, strict=True):
                done[at] = here
        return Result(done, _bytes_of(objects, done))

    def _loaded(self, keys: Sequence[Any], objects: Sequence[Any]) -> Result:
        done = [False] * len(keys)
        for size, places in _places(keys, objects).items():
            # The keys of a task are no prefix: those that are there are gone for.
            names = [name_of(keys[at]) for at in places]
            memory = [_memory(objects[at]) for at in places]
            loaded = load_scattered(self._blocks(size), names, memory)
            for at, here in zip(places, loaded, strict=True):
                done[at] = here
        return Result(done, _bytes_of(objects, done))

    def _held(self, keys: Sequence[Any], sizes: Sequence[int]) -> Result:
        done = [False] * len(keys)
        for size, places in _by_size(sizes).items():
            names = [name_of(keys[at]) for at in places]
            for blocks in [self._blocks(size)] if size else self._known():
                for at, here in zip(places, blocks.held(names), strict=True):
                    done[at] = done[at] or here
        return Result(done, 0)

    def _known(self) -> list[OpaqueBlocks]:
        with self._lock:
            return list(self._by_size.values())

    def _blocks(self, size: int) -> OpaqueBlocks:
        with self._lock:
            blocks = self._by_size.get(size)
            if blocks is None:
                if len(self._by_size) >= MAX_SIZES:
                    raise BadInput(f"objects of more than {MAX_SIZES} sizes")
                namespace = namespace_of(self._settings, size)
                blocks = OpaqueBlocks(self._settings.address, namespace, size)
                self._by_size[size] = blocks
            return blocks


def _memory(item: Any) -> list[Piece]:
    """Return where the bytes of a `MemoryObj` lie: one run."""
    return [Piece(int(item.data_ptr), int(item.get_size()))]


def _bytes_of(objects: Sequence[Any], done: Sequence[bool]) -> int:
    return sum(int(one.get_size()) for one, here in zip(objects, done, strict=True) if here)


def _places(keys: Sequence[Any], objects: Sequence[Any]) -> dict[int, list[int]]:
    if len(keys) != len(objects):
        raise BadInput(f"{len(objects)} objects for {len(keys)} keys")
    return _by_size([int(one.get_size()) for one in objects])


def _by_size(sizes: Sequence[int]) -> dict[int, list[int]]:
    """Return size → places of the objects that have it."""
    places: dict[int, list[int]] = {}
    for at, size in enumerate(sizes):
        places.setdefault(size, []).append(at)
    return places
