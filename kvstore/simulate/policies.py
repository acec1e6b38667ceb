"""Policies by name, for commands that compare them: every production one, and the optimum."""

from collections.abc import Callable
from typing import Final

from kvstore.directory.policies import POLICIES, make_policy
from kvstore.simulate.opt import replay_optimum
from kvstore.simulate.replay import ReplayResult, replay
from kvstore.simulate.trace import Trace

OPTIMUM: Final = "opt"
"""Knows the future, so it is no `Policy`: it exists in replays only."""


def policy_names() -> list[str]:
    """Return every name that `replay_named` takes, the optimum last."""
    return [*POLICIES, OPTIMUM]


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
    return replay(trace, make_policy(name), capacity_blocks, hints=hints, on_request=on_request)
