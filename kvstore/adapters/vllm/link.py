"""A client of the host's node for a process that must not wait for it.

The node may be absent when the engine starts, and come and go later: until it is there, and for
`circuit_ms` after a call failed, nobody asks it and everything is a miss.
"""

import asyncio
import logging
import threading
import time
from collections.abc import Coroutine
from concurrent.futures import Future
from typing import Any, Final, TypeVar

from kvstore.adapters.vllm.settings import Settings
from kvstore.client import AsyncClient
from kvstore.client.config import ClientConfig
from kvstore.core.errors import KvStoreError, Refused
from kvstore.core.layout import BlockLayout
from kvstore.core.names import Namespace, Root

_log = logging.getLogger(__name__)
_Result = TypeVar("_Result")
_RETRY_FIRST_S: Final = 0.1
_RETRY_MOST_S: Final = 2.0
_STOP_S: Final = 3.0


class NodeLink:
    """One session with the node, on an event loop in a thread of its own."""

    def __init__(
        self, settings: Settings, namespace: Namespace, layout: BlockLayout, *, name: str
    ) -> None:
        self.settings = settings
        self.client: AsyncClient | None = None
        """None until the node was there once; afterwards it comes back by itself."""
        self.failures: dict[str, int] = {}
        """Failed calls by error, since the start."""
        self._open_until = 0.0
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._run, name=f"kvstore-{name}", daemon=True)
        self._thread.start()
        self.submit(self._connect(namespace, layout, name))

    @property
    def usable(self) -> bool:
        """Whether asking the node makes sense at this moment."""
        client = self.client
        return client is not None and client.connected and time.monotonic() >= self._open_until

    def publisher(self) -> tuple[str, Root] | None:
        """Return where the node tells what it holds, and under which root; None: no session yet."""
        client = self.client
        return None if client is None else (client.address, client.root)

    def submit(self, work: Coroutine[Any, Any, _Result]) -> "Future[_Result]":
        """Run `work` on the link's loop; never waits."""
        return asyncio.run_coroutine_threadsafe(work, self._loop)

    def failed(self, call: str, error: KvStoreError) -> None:
        """Count a failed call; unless the node merely refused, leave it alone for a while."""
        kind = type(error).__name__
        self.failures[kind] = self.failures.get(kind, 0) + 1
        if not isinstance(error, Refused):
            self._open_until = time.monotonic() + self.settings.circuit_ms / 1000
        _log.warning("kvstore: %s failed: %s", call, error)

    def close(self) -> None:
        """End the session and the thread."""
        if not self._thread.is_alive():
            return
        ending = self.submit(self._close())
        try:
            ending.result(_STOP_S)
        except (TimeoutError, KvStoreError) as error:
            _log.warning("kvstore: closing the session failed: %s", error)
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join(_STOP_S)

    async def _connect(self, namespace: Namespace, layout: BlockLayout, name: str) -> None:
        pause_s = _RETRY_FIRST_S
        while True:
            try:
                self.client = await AsyncClient.connect(
                    self.settings.run_dir,
                    namespace=namespace,
                    payload_bytes=layout.payload_bytes,
                    shares=layout.kv_heads,
                    share_domain=self.settings.share_domain,
                    name=f"vllm {name}",
                    config=ClientConfig(
                        call_ms=self.settings.call_ms, transfer_ms=self.settings.load_ms
                    ),
                )
                _log.info("kvstore: session with %s", self.client.node)
                return
            except KvStoreError as error:
                self.failed("connect", error)
            await asyncio.sleep(pause_s)
            pause_s = min(2 * pause_s, _RETRY_MOST_S)

    async def _close(self) -> None:
        others = [task for task in asyncio.all_tasks() if task is not asyncio.current_task()]
        client, self.client = self.client, None
        if client is not None:
            await client.close()
        for task in others:
            task.cancel()
        await asyncio.gather(*others, return_exceptions=True)

    def _run(self) -> None:
        asyncio.set_event_loop(self._loop)
        try:
            self._loop.run_forever()
        finally:
            self._loop.close()
