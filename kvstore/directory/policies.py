"""Every eviction policy by the name that command lines and configurations use."""

from collections.abc import Callable, Mapping
from typing import Final

from kvstore.core.errors import BadInput
from kvstore.directory.arc import Arc
from kvstore.directory.lru import Lru
from kvstore.directory.lru_k import Lru2
from kvstore.directory.policy import Policy
from kvstore.directory.s3fifo import S3Fifo
from kvstore.directory.ttl import Ttl
from kvstore.directory.value_density import ValueDensity

POLICIES: Final[Mapping[str, Callable[[], Policy]]] = {
    "ours": ValueDensity,
    "lru": Lru,
    "arc": Arc,
    "s3fifo": S3Fifo,
    "lru2": Lru2,
    "ttl": Ttl,
}

DEFAULT_POLICY: Final = "ours"


def make_policy(name: str) -> Policy:
    """Return an empty policy; raises `BadInput` naming the ones there are."""
    make = POLICIES.get(name)
    if make is None:
        raise BadInput(f"no eviction policy {name!r}; there are {', '.join(POLICIES)}")
    return make()
