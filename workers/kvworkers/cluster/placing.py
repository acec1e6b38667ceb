"""Asks Ray for places: actors, placement groups, hosts, and a few bytes that outlive a controller.

Every call to Ray that may block is made in a thread and has a deadline: while Ray's control store
is away, a look-up blocks, and the controller's loop must not.
"""

import asyncio
from collections.abc import Callable, Collection
from typing import Any, Final, TypeVar

from kvstore.core.errors import Refused, Unreachable
from kvworkers.cluster.config import ClusterConfig
from kvworkers.cluster.orders import Orders, Seat
from kvworkers.cluster.parts import SHELLS
from kvworkers.cluster.plan import Role

PLACE_SECONDS: Final = 60.0
"""How long a placement group may wait for its bundles."""

_CALL_SECONDS: Final = 10.0
_KEY: Final = b"orders"
_Result = TypeVar("_Result")


class Placer:
    """Makes and ends actors of one cluster, in the Ray namespace of whoever uses it."""

    def __init__(self, config: ClusterConfig) -> None:
        self._config = config

    async def orders(self) -> Orders | None:
        """Return what an earlier life of the controller has kept; None: there was none."""
        from ray.experimental.internal_kv import _internal_kv_get

        raw = await _called(lambda: _internal_kv_get(_KEY, namespace=_kv_namespace()))
        return Orders.from_json(raw.decode()) if raw else None

    async def keep(self, orders: Orders) -> None:
        """Remember the orders beside Ray's own state."""
        from ray.experimental.internal_kv import _internal_kv_put

        value = orders.to_json().encode()
        await _called(
            lambda: _internal_kv_put(_KEY, value, overwrite=True, namespace=_kv_namespace())
        )

    async def forget(self) -> None:
        """Remove what was remembered: the next cluster of this name begins anew."""
        from ray.experimental.internal_kv import _internal_kv_del

        await _called(lambda: _internal_kv_del(_KEY, namespace=_kv_namespace()))

    async def hosts(self) -> set[str]:
        """Return Ray's living nodes."""
        import ray

        nodes = await _called(ray.nodes)
        return {str(node["NodeID"]) for node in nodes if node["Alive"]}

    async def group(self, name: str, count: int, *, avoid: Collection[str] = ()) -> None:
        """Make, or find, a group of `count` workers' places; `Refused` when there is no room.

        A place is a bundle with a device for each of the worker's ranks: so they share a host.
        None of them is on a host of `avoid`, by Ray's ids of nodes.
        """
        from ray.util.placement_group import (
            get_placement_group,
            placement_group,
            remove_placement_group,
        )

        device = {k: n * self._config.tensor_parallel for k, n in (await self._device()).items()}
        selector = {"ray.io/node-id": f"!in({','.join(sorted(avoid))})"} if avoid else {}
        elsewhere = [dict(selector) for _ in range(count)]

        def make() -> Any:
            try:
                return get_placement_group(name)
            except ValueError:  # not yet
                return placement_group(
                    [dict(device) for _ in range(count)],
                    strategy="SPREAD", name=name, lifetime="detached",
                    bundle_label_selector=elsewhere,
                )  # fmt: skip

        made = await _called(make)
        try:
            async with asyncio.timeout(PLACE_SECONDS):
                await made.ready()
        except TimeoutError:
            await _called(lambda: remove_placement_group(made))
            raise Refused(f"Ray has no room for {count} workers, each with {device}") from None

    async def drop_group(self, name: str) -> None:
        """Give a group's places back."""
        from ray.util.placement_group import get_placement_group, remove_placement_group

        def drop() -> None:
            try:
                remove_placement_group(get_placement_group(name))
            except ValueError:
                return  # gone already

        await _called(drop)

    def node(self, name: str, host: str) -> Any:
        """Return the actor of a host's cache node."""
        from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

        return self._actor(name, Role.NODE, NodeAffinitySchedulingStrategy(host, soft=False))

    async def worker(self, name: str, seat: Seat) -> Any:
        """Return the actor of a worker in its seat."""
        from ray.util.placement_group import get_placement_group
        from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

        group = await _called(lambda: get_placement_group(seat.group))
        place = PlacementGroupSchedulingStrategy(group, placement_group_bundle_index=seat.bundle)
        device = await self._device()
        return self._actor(
            name, Role.WORKER, place, seat.bundle,
            CPU=device.get("CPU", 0), GPU=device.get("GPU", 0),
        )  # fmt: skip

    def frontend(self, name: str, host: str = "") -> Any:
        """Return the actor of a frontend: on this host, or on whichever has the fewest parts."""
        from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

        place = NodeAffinitySchedulingStrategy(host, soft=False) if host else "SPREAD"
        return self._actor(name, Role.FRONTEND, place)

    async def end(self, actor: Any, *, restart: bool) -> None:
        """Kill an actor's process; with `restart` Ray brings it back empty."""
        import ray

        await _called(lambda: ray.kill(actor, no_restart=not restart))

    async def _device(self) -> dict[str, float]:
        import ray

        resources = await _called(ray.cluster_resources)
        return {"GPU": 1.0} if resources.get("GPU", 0) >= 1 else {"CPU": 1.0}

    def _actor(
        self, name: str, role: Role, place: Any, *told: Any, CPU: float = 0, GPU: float = 0
    ) -> Any:
        import ray

        return (
            ray.remote(SHELLS[role])
            .options(
                name=name,
                lifetime="detached",  # lives on when the controller dies
                get_if_exists=True,
                max_restarts=-1,
                max_task_retries=0,
                num_cpus=CPU,
                num_gpus=GPU,
                scheduling_strategy=place,
            )
            .remote(name, self._config, *told)
        )


def _kv_namespace() -> str:
    import ray

    return f"kvstore:{ray.get_runtime_context().namespace}"


async def _called(work: Callable[[], _Result]) -> _Result:
    try:
        async with asyncio.timeout(_CALL_SECONDS):
            return await asyncio.to_thread(work)
    except TimeoutError:
        raise Unreachable(f"Ray did not answer in {_CALL_SECONDS:.0f} s") from None
