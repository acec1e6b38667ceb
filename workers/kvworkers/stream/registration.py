"""Arena memory made known to CUDA, in steps on a thread of its own.

Registering pins pages and takes about half a second per GiB: a worker serves meanwhile, and what
is not registered yet counts as a miss. Copies from registered memory run at the link's speed
and asynchronously; from other memory they would do neither.
"""

import ctypes
import logging
import threading
from typing import Any, Final

import torch

_log = logging.getLogger(__name__)

STEP_BYTES: Final = 1 << 30


class Registration:
    """One mapping of the arena, registered from its start on."""

    def __init__(self, arena: memoryview) -> None:
        """Begin at once. `arena` stays mapped until `close` has returned."""
        # An address and not the view: a held buffer would keep its owner from unmapping.
        holder = ctypes.c_char.from_buffer(arena)
        self.address = ctypes.addressof(holder)
        self.size = arena.nbytes
        del holder
        self._registered = 0
        self._steps: list[int] = []
        self._ending = threading.Event()
        self._thread = threading.Thread(target=self._run, name="register-arena", daemon=True)
        self._thread.start()

    @property
    def registered_bytes(self) -> int:
        """Bytes from the start of the arena that copies may use."""
        return self._registered

    def is_of(self, arena: memoryview) -> bool:
        """Say whether this is `arena`'s mapping."""
        holder = ctypes.c_char.from_buffer(arena)
        return ctypes.addressof(holder) == self.address and arena.nbytes == self.size

    def wait(self, *, deadline_s: float) -> bool:
        """Wait until all of it is registered; False when it is not at the deadline."""
        self._thread.join(deadline_s)
        return self._registered == self.size

    def close(self) -> None:
        """Stop, and unregister; the caller knows that no copy is running."""
        self._ending.set()
        self._thread.join()
        self._registered = 0
        for start in self._steps:
            _said(_runtime().cudaHostUnregister(self.address + start), "cudaHostUnregister")
        self._steps = []

    def _run(self) -> None:
        while self._registered < self.size and not self._ending.is_set():
            start = self._registered
            count = min(STEP_BYTES, self.size - start)
            code = _runtime().cudaHostRegister(self.address + start, count, 0)
            if not _said(code, "cudaHostRegister"):
                return  # what is registered serves; the rest stays a miss
            self._steps.append(start)
            self._registered = start + count


def _runtime() -> Any:
    return torch.cuda.cudart()  # type: ignore[no-untyped-call]


def _said(code: Any, call: str) -> bool:
    """Say whether a call of the CUDA runtime went well, and log when it did not."""
    if int(code) == 0:
        return True
    _log.error("%s failed with CUDA error %s", call, code)
    return False
