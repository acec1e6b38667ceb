"""Which event source follows a member: the one place where implementations are chosen."""

from collections.abc import Callable

from kvstore.observe.metrics import RouterMetrics
from kvstore.router.members import Member
from kvstore.router.source import EventSource
from kvstore.router.watch_source import WatchSource


def source_maker(metrics: RouterMetrics, *, redis: str = "") -> Callable[[Member], EventSource]:
    """Return what follows members: by `Watch`, or through the Redis at that URL and `Watch` while
    it is away. Raises `BadInput` for a URL that is none.
    """
    if not redis:
        return WatchSource
    # The package is needed by those alone who ask for it.
    from kvstore.router.redis_source import RedisSource
    from kvstore.rpc.redis_stream import RedisConfig

    config = RedisConfig(url=redis)
    return lambda member: RedisSource(member, config, metrics, WatchSource(member))
