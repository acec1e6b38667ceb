"""How the class that Ray Serve loads ends. Ray Serve itself is not needed here: its seam is a base
class and two kinds of metrics; `tests/engines/test_ray_serve.py` has the real ones.
"""

import asyncio
import gc
import importlib
import sys
import weakref
from collections.abc import Iterator
from types import ModuleType, SimpleNamespace
from typing import Any, ClassVar

import pytest

from tests.patience import PATIENCE_S, until

MODULE = "kvstore.adapters.ray_serve.request_router"


class Base:
    """What Ray's base class keeps for ours."""

    def __init__(self) -> None:
        self._deployment_id = SimpleNamespace(app_name="app", name="deployment")
        self._replicas_list: list[object] = []

    def update_replicas(self, replicas: list[object]) -> None:
        self._replicas_list = replicas


class Metric:
    """A metric that takes what it is told."""

    told: ClassVar[list[str]] = []

    def __init__(self, name: str, text: str, tag_keys: tuple[str, ...]) -> None:
        self.name = name

    def set_default_tags(self, tags: dict[str, str]) -> None:
        assert set(tags) == {"application", "deployment"}

    def set(self, value: float = 1.0, tags: dict[str, str] | None = None) -> None:
        self.told.append(self.name)

    inc = set


@pytest.fixture
def module(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    seam: dict[str, dict[str, Any]] = {
        "ray": {},
        "ray.serve": {},
        "ray.util": {},
        "ray.serve.request_router": {
            "RequestRouter": Base, "PendingRequest": object, "ReplicaID": str,
            "RunningReplica": object,
        },
        "ray.util.metrics": {"Counter": Metric, "Gauge": Metric},
    }  # fmt: skip
    for name, kept in seam.items():
        made = ModuleType(name)
        vars(made).update(kept)
        monkeypatch.setitem(sys.modules, name, made)
    sys.modules.pop(MODULE, None)
    monkeypatch.setattr(Metric, "told", [])
    loaded = importlib.import_module(MODULE)
    monkeypatch.setattr(loaded, "_EXPORT_S", 0.001)
    yield loaded
    sys.modules.pop(MODULE, None)


async def test_a_router_that_ray_dropped_exports_and_follows_no_more(module: Any) -> None:
    router = module.KvStoreRequestRouter()
    router.initialize_state()
    router.update_replicas([])
    exports, placer, gone = router._kv_exports, router._kv_placer, weakref.ref(router)
    await until(lambda: "kvstore_view_blocks" in Metric.told)
    assert not exports.done(), "it goes on as long as the router lives"
    del router
    gc.collect()
    assert gone() is None, "the exports do not keep it"
    async with asyncio.timeout(PATIENCE_S):
        await exports
    assert placer._router._closed


async def test_an_export_that_fails_is_counted_and_tried_again(
    module: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(exporter: object) -> None:
        raise RuntimeError("Ray is ending")

    monkeypatch.setattr(module.Exporter, "export", fail)
    router = module.KvStoreRequestRouter()
    router.initialize_state()
    router.update_replicas([])
    await until(lambda: Metric.told.count("kvstore_serve_export_failures") > 1)
    exports = router._kv_exports
    del router
    gc.collect()
    async with asyncio.timeout(PATIENCE_S):
        await exports
