"""Every fault that this package can inject, by name: what it does, and what has to be seen then.

`kvstore faults` prints it. A test holds the list against the switches that exist, both ways.
"""

from typing import Final, NamedTuple


class FaultPoint(NamedTuple):
    """One fault."""

    name: str
    where: str
    """`module:Class.attribute` that injects it."""
    does: str
    expect: str
    """What a healthy system answers."""


_DISK: Final = "kvstore.testing.devices:FaultyDisk"
_POWER: Final = "kvstore.testing.devices:PowerLossDisk"
_TIER: Final = "kvstore.testing.faults:FaultyTier"
_NODE: Final = "kvstore.testing.node:RunningNode"

FAULT_POINTS: Final = (
    FaultPoint(
        "disk.delay", f"{_DISK}.delay_s", "every read and write takes longer",
        "loads that would outlast recomputing are misses with reason late",
    ),
    FaultPoint(
        "disk.hang", f"{_DISK}.hang", "reads and writes answer nothing until released",
        "waiters leave at their deadline, slots drain, the breaker opens; nobody waits longer",
    ),
    FaultPoint(
        "disk.open", f"{_DISK}.fail_opens", "opening files fails with an errno",
        "the node refuses to start and names the directory, or gives up room it meant to make",
    ),
    FaultPoint(
        "disk.read", f"{_DISK}.fail_reads", "reads fail with an errno",
        "counted misses; the read breaker opens",
    ),
    FaultPoint(
        "disk.write", f"{_DISK}.fail_writes", "writes and syncs fail with an errno",
        "blocks stay in memory only, counted; the write breaker opens",
    ),
    FaultPoint(
        "keeper.kill", f"{_NODE}.kill_keeper", "SIGKILL to the keeper",
        "its node ends with it; workers go on without a cache and come back to the next one",
    ),
    FaultPoint(
        "node.kill", f"{_NODE}.kill_node", "SIGKILL to the cache node",
        "a new incarnation serves the sealed blocks again, once they were verified",
    ),
    FaultPoint(
        "node.signal", f"{_NODE}.signal_node", "any signal to the node; SIGSTOP makes it hang",
        "calls end at their deadline; a node that stays silent is replaced by its keeper",
    ),
    FaultPoint(
        "power.loss", f"{_POWER}.lose_power", "what was not synced is kept in part, or torn",
        "drift between index and files turns into counted misses, never into wrong bytes",
    ),
    FaultPoint(
        "tier.items", f"{_TIER}.fault_rate", "items of a batch miss, come late, corrupt or refused",
        "every outcome is counted and the request goes on",
    ),
)  # fmt: skip
