"""Every simulated router by the name that the command line uses."""

from collections.abc import Mapping
from typing import Final

from kvstore.core.errors import BadInput
from kvstore.simulate.route import MakeRouter, RouteChooser, Setup
from kvstore.simulate.route_cluster import Cluster
from kvstore.simulate.route_ours import Ours
from kvstore.simulate.route_peers import (
    Aibrix,
    Dynamo,
    DynamoPrefill,
    LlmD,
    LMetric,
    Mooncake,
    Preble,
    ProductionStack,
    Sglang,
)
from kvstore.simulate.route_plain import (
    Affinity,
    Exact,
    LeastLoaded,
    LeastRequests,
    LongestPrefix,
    Plain,
    Random,
    RoundRobin,
    Sticky,
)
from kvstore.simulate.trace import Trace

OURS: Final = "ours"
REFERENCE: Final = "exact"
"""Knows what no router can know."""

_PLAIN: Final[Mapping[str, type[Plain]]] = {
    "round_robin": RoundRobin,
    "random": Random,
    "least_loaded": LeastLoaded,
    "least_requests": LeastRequests,
    "affinity": Affinity,
    "sticky": Sticky,
    "longest_prefix": LongestPrefix,
    "sglang": Sglang,
    "dynamo": Dynamo,
    "dynamo_w4": DynamoPrefill,
    "lmetric": LMetric,
    "llm_d": LlmD,
    "aibrix": Aibrix,
    "production_stack": ProductionStack,
    "preble": Preble,
    "mooncake": Mooncake,
    REFERENCE: Exact,
}


def router_names() -> list[str]:
    """Return every name that `make_router` takes; ours first, the reference last."""
    return [OURS, *_PLAIN]


def make_router(name: str) -> MakeRouter:
    """Return what makes the router called `name`; raises `BadInput` naming those there are."""
    if name == OURS:
        return Ours
    made = _PLAIN.get(name)
    if made is None:
        raise BadInput(f"no router {name!r}; there are {', '.join(router_names())}")

    def make(cluster: Cluster, setup: Setup, trace: Trace) -> RouteChooser:
        return made(cluster)

    return make
