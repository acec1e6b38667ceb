"""Blocks that stay in a node's arena while an engine takes their bytes piece by piece."""

import ctypes
from collections.abc import Sequence

from kvstore.client.blocking import Client
from kvstore.client.replies import SlotRef


class Held:
    """A leased prefix of names. Used by one thread at a time; to be released, once.

    The node ends a lease that lasts too long: what was copied counts only if `whole` says so
    afterwards.
    """

    def __init__(self, client: Client, refs: Sequence[SlotRef], lease: int) -> None:
        self._client = client
        self._refs = refs
        self._lease = lease

    @property
    def blocks(self) -> int:
        """How many blocks are held, from the first name on."""
        return len(self._refs)

    def copy(self, at: int, offset: int, size: int, address: int) -> None:
        """Copy `size` bytes of the `at`-th block, from `offset` on, to `address`."""
        view = self._client.view(self._refs[at])
        assert offset + size <= len(view), f"{offset} + {size} of {len(view)} bytes"
        anchor = ctypes.c_char.from_buffer(view)
        ctypes.memmove(address, ctypes.addressof(anchor) + offset, size)

    def whole(self, count: int) -> bool:
        """Say whether the first `count` blocks are still what they were when they were leased."""
        return all(map(self._client.still, self._refs[:count]))

    def release(self) -> None:
        """Let the node have its blocks back soon. Harmless when repeated, or without a node.

        Waits for nothing: those who release are an engine's scheduler and its loader, and a node
        that does not answer ends the lease by itself.
        """
        lease, self._lease = self._lease, 0
        if lease:
            self._client.release(lease)
