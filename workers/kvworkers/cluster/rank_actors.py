"""The other ranks of a worker as Ray actors: each on a device of its own, in the worker's bundle.

They belong to the actor of rank 0, which makes them when it is told to start: Ray ends them when
that process dies, and a restarted one makes new ones.
"""

import asyncio
from typing import Any, Final

from kvstore.core.errors import Unreachable

_CALL_S: Final = 60.0
"""How long Ray may take to have an actor made, and to say where we are."""


class RankShell:
    """One rank. Its process ends with it."""

    async def follow(self, path: str, rank: int) -> None:
        """Be rank `rank` of the worker whose rank 0 listens on `path`; never returns."""
        from kvworkers.ranks.follower import obey

        await obey(path, rank)


class RankActors:
    """Starts ranks as actors, with what the actor of rank 0 was given of the bundle."""

    def __init__(self, bundle: int) -> None:
        self._bundle = bundle
        self._actors: list[Any] = []
        self._ends: dict[Any, int] = {}
        """What Ray answers when a rank has ended."""

    async def launch(self, path: str, rank: int) -> None:
        """Make one actor and tell it to follow. Raises `Unreachable` where Ray does not answer."""
        try:
            async with asyncio.timeout(_CALL_S):
                await asyncio.to_thread(self._launch, path, rank)
        except TimeoutError:
            raise Unreachable(f"Ray made no actor for rank {rank} in {_CALL_S:g} s") from None

    def _launch(self, path: str, rank: int) -> None:
        import ray
        from ray.util.placement_group import get_current_placement_group
        from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

        given = ray.get_runtime_context().get_assigned_resources()
        group = get_current_placement_group()
        if group is None:
            raise Unreachable("the worker of several ranks lives in no placement group")
        shell: Any = RankShell
        actor = (
            ray.remote(shell)
            .options(
                max_restarts=0,
                max_task_retries=0,
                num_cpus=given.get("CPU", 0),
                num_gpus=given.get("GPU", 0),
                scheduling_strategy=PlacementGroupSchedulingStrategy(
                    group, placement_group_bundle_index=self._bundle
                ),
            )
            .remote()
        )
        self._actors.append(actor)
        self._ends[actor.follow.remote(path, rank)] = rank

    def dead(self) -> str:
        """Say which one has ended."""
        import ray

        ended, _ = ray.wait(list(self._ends), timeout=0)
        return f"the actor of rank {self._ends[ended[0]]} has ended" if ended else ""

    def close(self) -> None:
        """Kill those that are left."""
        import ray

        for actor in self._actors:
            ray.kill(actor)


def rank_actors(bundle: int, ranks: int) -> RankActors | None:
    """Return who starts the other ranks; None where there are none, and outside of Ray."""
    import ray

    return RankActors(bundle) if ranks > 1 and ray.is_initialized() else None
