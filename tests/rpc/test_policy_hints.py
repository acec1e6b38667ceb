"""What a caller tells of its requests changes what a real node gives up."""

import time
from collections.abc import Sequence

import pytest

from kvstore.client import Client
from kvstore.core.names import BlockName
from kvstore.testing.node import start_node
from tests.patience import PATIENCE_S
from tests.session_process import PAYLOAD, connect, names_of

_ARENA = 8 << 20
_SLOTS = _ARENA // PAYLOAD
_DEEP, _SHALLOW, _NEW = 64, 16, 32
"""Blocks of the one long prompt, of each short one, and of the one that needs room."""


def _ask(
    client: Client, names: Sequence[BlockName], kind: str = "", depth_cost: float = 0.0
) -> None:
    """Ask for blocks as a worker does: in one call, and without storing those that are missing."""
    acquired = client.acquire(names, kind=kind, depth_cost=depth_cost)
    client.settle(release=[acquired.lease])


def _store(
    client: Client, names: Sequence[BlockName], kind: str = "", depth_cost: float = 0.0
) -> None:
    """Ask for blocks, compute what is missing, and wait until it may be evicted."""
    acquired = client.acquire(names, reserve=len(names), kind=kind, depth_cost=depth_cost)
    for item in acquired.reserved:
        client.view(item.slot)[:] = bytes(PAYLOAD)
    client.settle(commit=[item.slot for item in acquired.reserved], release=[acquired.lease])
    deadline = time.monotonic() + PATIENCE_S
    while client.stats().slots.get("committed"):
        assert time.monotonic() < deadline, client.stats()
        time.sleep(0.001)


@pytest.mark.parametrize("depth_cost", [0.0, 2.0], ids=["not measured", "measured"])
def test_where_depth_costs_the_end_of_a_long_prompt_stays(depth_cost: float) -> None:
    """A long prompt, then short ones; room for one more has to come from the end of one."""
    with start_node(arena_bytes=_ARENA) as node, connect(node.run_dir, "depth") as client:
        long = names_of(client, 1, _DEEP)
        _store(client, long)
        # Four: so few that nothing but depth tells them apart.
        short = [names_of(client, 2 + n, _SHALLOW) for n in range((_SLOTS - _DEEP) // _SHALLOW)]
        for names in short:
            _store(client, names)
        for names in (long, *short):  # the long one is the oldest
            _ask(client, names, depth_cost=depth_cost)
        _store(client, names_of(client, 99, _NEW), depth_cost=depth_cost)
        left = [client.lookup(names).prefix for names in (long, *short)]
        assert sum(left) == _SLOTS - _NEW
        assert (left[0] == _DEEP) == (depth_cost > 0), left


def test_a_node_learns_which_kind_of_request_comes_back() -> None:
    """Requests of kind `tool` return after a moment, those of kind `batch` never do.

    The moment is as long as the machine makes it, so the node may need more than one round.
    """
    with start_node(arena_bytes=_ARENA) as node, connect(node.run_dir, "kind") as client:
        left: list[int] = []
        for attempt in range(10):
            first = 10_000 * attempt
            for round_ in range(2):
                for number in range(60):
                    _ask(client, names_of(client, first + number, 1), "tool")
                    once = first + 1_000 * (1 + round_) + number
                    _ask(client, names_of(client, once, 1), "batch")
            tool, batch = (names_of(client, first + 5_000 + n, 64) for n in range(2))
            _store(client, tool, "tool")
            _store(client, batch, "batch")
            _store(client, names_of(client, first + 6_000, 8))
            left = [client.lookup(names).prefix for names in (tool, batch)]
            client.clear()
            if left[0] == 64 and left[1] < 64:
                return  # the younger one went
        pytest.fail(f"held of `tool` and `batch`: {left}")
