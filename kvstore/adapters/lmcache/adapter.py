"""The class that LMCache's server loads: docs/engines/lmcache.md has the command line."""

from collections.abc import Mapping, Sequence
from math import prod
from typing import Any

from lmcache.lmcache_native import Bitmap  # pyright: ignore[reportMissingImports]
from lmcache.v1.distributed.internal_api import L2StoreResult  # pyright: ignore[reportMissingImports]
from lmcache.v1.distributed.l2_adapters.base import L2AdapterInterface  # pyright: ignore[reportMissingImports]

from kvstore.adapters.lmcache.identity import settings_of
from kvstore.adapters.lmcache.objects import Objects


class KvStoreL2Adapter(L2AdapterInterface):  # type: ignore[misc]  # untyped where not installed
    """LMCache's second level in a kvstore node of this host.

    The node bounds and evicts by itself, so LMCache is given no capacity to manage.
    """

    def __init__(self, params: Mapping[str, Any], l1_memory_desc: Any = None) -> None:
        """`params` is `adapter_params`; raises `BadInput` naming a setting at fault."""
        super().__init__()
        self._objects = Objects(settings_of(params))

    def get_store_event_fd(self) -> int:
        """Return the descriptor that is signalled when a store task ended."""
        return self._objects.stores.event_fd

    def get_lookup_and_lock_event_fd(self) -> int:
        """Return the descriptor that is signalled when a lookup ended."""
        return self._objects.lookups.event_fd

    def get_load_event_fd(self) -> int:
        """Return the descriptor that is signalled when a load ended."""
        return self._objects.loads.event_fd

    def submit_store_task(self, keys: Sequence[Any], objects: Sequence[Any]) -> int:
        """Store objects from their memory, which the caller keeps until the task ended."""
        return self._objects.store(keys, objects)

    def pop_completed_store_tasks(self) -> dict[int, Any]:
        """Return what became of each store task: whether all of its objects are there."""
        done = self._objects.stores.pop_all()
        return {task: L2StoreResult(all(one.done), one.moved_bytes) for task, one in done.items()}

    def submit_lookup_and_lock_task(
        self, keys: Sequence[Any], group_layout_descs: Mapping[int, Any]
    ) -> int:
        """Look objects up. Nothing is locked: one that goes before its load is a miss then."""
        sizes = {group: size_of(layout) for group, layout in group_layout_descs.items()}
        return self._objects.lookup(keys, [sizes.get(key.object_group_id, 0) for key in keys])

    def query_lookup_and_lock_result(self, task_id: int) -> Any:
        """Return which objects are there, once; None while the task runs."""
        return _bitmap(self._objects.lookups.pop(task_id))

    def submit_unlock(self, keys: Sequence[Any]) -> None:
        """Do nothing: nothing was locked."""

    def submit_load_task(self, keys: Sequence[Any], objects: Sequence[Any]) -> int:
        """Load into the objects' memory, which the caller keeps until the task ended."""
        return self._objects.load(keys, objects)

    def query_load_result(self, task_id: int) -> Any:
        """Return which objects' bytes are whole, once; None while the task runs."""
        return _bitmap(self._objects.loads.pop(task_id))

    def report_status(self) -> dict[str, Any]:
        """Return what LMCache's /status shows."""
        return {
            "is_healthy": True, "type": "KvStoreL2Adapter", "failed_tasks": self._objects.failed,
        }  # fmt: skip

    def close(self) -> None:
        """Wait for running tasks and end the sessions and descriptors."""
        self._objects.close()


def size_of(layout: Any) -> int:
    """Return the bytes of an object of a `MemoryLayoutDesc`."""
    return sum(
        prod(shape) * dtype.itemsize
        for shape, dtype in zip(layout.shapes, layout.dtypes, strict=True)
    )


def _bitmap(done: Any) -> Any:
    if done is None:
        return None
    bitmap = Bitmap(len(done.done))
    for at, here in enumerate(done.done):
        if here:
            bitmap.set(at)
    return bitmap
