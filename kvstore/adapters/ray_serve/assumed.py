"""What a replica probably holds that says nothing about it: the prompts that were sent there.

The `EventSource` of replicas without KV events. It tells no more than was computed there and no
longer than `max_blocks` newer ones; an engine that evicts sooner is promised more than it holds.
"""

import asyncio
from collections import OrderedDict
from collections.abc import AsyncGenerator, Sequence
from itertools import islice
from typing import Final

from kvstore.core.limits import MARK_PERIOD_MS
from kvstore.core.names import BlockName, Root
from kvstore.directory.events import Changed, Event, TierKind
from kvstore.directory.publisher import Publisher

_KIND: Final = TierKind.HBM
_Key = tuple[Root, BlockName]


class _Shelf:
    """The blocks, least recently used first."""

    def __init__(self) -> None:
        self.keys: OrderedDict[_Key, None] = OrderedDict()

    def scan(self, cursor: int, limit: int) -> tuple[list[Changed], int | None]:
        part = list(islice(self.keys, cursor, cursor + limit))
        by_root: dict[Root, list[BlockName]] = {}
        for root, name in part:
            by_root.setdefault(root, []).append(name)
        found = [Changed(root, _KIND, names) for root, names in by_root.items()]
        return found, cursor + limit if len(part) == limit else None


class AssumedSource:
    """Follows one replica by what was sent to it. Of one event loop."""

    def __init__(self, publisher: str, *, max_blocks: int) -> None:
        assert max_blocks > 0
        self.publisher = publisher
        self._max_blocks = max_blocks
        self._shelf = _Shelf()
        self._log = Publisher(publisher, 1, [_KIND], self._shelf)

    def __len__(self) -> int:
        """Return how many blocks are assumed to lie there."""
        return len(self._shelf.keys)

    def assume(self, root: Root, names: Sequence[BlockName]) -> None:
        """Note that the replica has computed a prompt."""
        keys, new = self._shelf.keys, list[BlockName]()
        # Last block first: of a prompt that is forgotten little by little the end goes first.
        for name in reversed(names[: self._max_blocks]):
            if (root, name) in keys:
                keys.move_to_end((root, name))
            else:
                keys[root, name] = None
                new.append(name)
        self._log.set(root, _KIND, new[::-1])
        gone: dict[Root, list[BlockName]] = {}
        while len(keys) > self._max_blocks:
            (old, name), _ = keys.popitem(last=False)
            gone.setdefault(old, []).append(name)
        for old, forgotten in gone.items():
            self._log.delete(old, _KIND, forgotten)

    async def events(self) -> AsyncGenerator[Event, None]:
        """Yield what is assumed; never ends by itself: whether the replica lives, Ray says."""
        wake = asyncio.Event()
        subscription = self._log.subscribe(wake.set)
        try:
            while True:
                wake.clear()
                while (events := subscription.take()) is not None:
                    for event in events:
                        yield event
                for event in subscription.mark():
                    yield event
                try:
                    async with asyncio.timeout(MARK_PERIOD_MS / 1_000):
                        await wake.wait()
                except TimeoutError:
                    pass  # time for the next mark
        finally:
            subscription.close()
