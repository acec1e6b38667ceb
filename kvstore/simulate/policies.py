"""Policies by name, for commands that compare them: every production one, and the optimum."""

from collections.abc import Callable
from typing import Final

from kvstore.core.errors import BadInput
from kvstore.directory.lru import Lru
from kvstore.directory.policy import Policy
from kvstore.simulate.opt import replay_optimum
from kvstore.simulate.replay import ReplayResult, replay
from kvstore.simulate.trace import Trace

OPTIMUM: Final = "opt"
"""Knows the future, so it is no `Policy`: it exists in replays only."""

_MAKERS: Final[dict[str, Callable[[int], Policy]]] = {"lru": lambda _: Lru()}


def policy_names() -> list[str]:
    """Return every name that `replay_named` takes, the optimum last."""
    return [*_MAKERS, OPTIMUM]


def make_policy(name: str, capacity_blocks: int) -> Policy:
    """Return an empty production policy; raises `BadInput` for a name that is none."""
    maker = _MAKERS.get(name)
    if maker is None:
        raise BadInput(f"policy {name!r:.40} is none of {', '.join(policy_names())}")
    return maker(capacity_blocks)


def replay_named(
    trace: Trace,
    name: str,
    capacity_blocks: int,
    *,
    hints: bool = True,
    on_request: Callable[[], None] | None = None,
) -> ReplayResult:
    """Replay `trace` through the policy (or the optimum) called `name`."""
    if name == OPTIMUM:
        return replay_optimum(trace, capacity_blocks, on_request=on_request)
    policy = make_policy(name, capacity_blocks)
    return replay(trace, policy, capacity_blocks, hints=hints, on_request=on_request)
