"""Which event source follows a member: the one place where implementations are chosen."""

from collections.abc import Callable, Mapping

from kvstore.core.errors import BadInput
from kvstore.observe.metrics import RouterMetrics
from kvstore.router.members import Member, VllmEvents
from kvstore.router.source import EventSource
from kvstore.router.watch_source import WatchSource
from kvstore.rpc.credentials import NO_CREDENTIALS, Credentials


def source_maker(
    metrics: RouterMetrics,
    *,
    redis: str = "",
    vllm: Mapping[str, VllmEvents] | None = None,
    credentials: Credentials = NO_CREDENTIALS,
) -> Callable[[Member], EventSource]:
    """Return what follows members: those in `vllm` by their engine's own events, the others by
    `Watch`, or through the Redis at that URL and by `Watch` while it is away.

    Raises `BadInput` for an address that is none and for a package that is not installed.
    """

    def watch(member: Member) -> WatchSource:
        return WatchSource(member, credentials=credentials)

    others = _redis_sources(redis, metrics, watch) if redis else watch
    if not vllm:
        return others
    engines = _vllm_sources(vllm, metrics)
    return lambda member: engines(member) if member.name in vllm else others(member)


# The packages are needed by those alone who ask for them.


def _redis_sources(
    url: str, metrics: RouterMetrics, watch: Callable[[Member], WatchSource]
) -> Callable[[Member], EventSource]:
    from kvstore.router.redis_source import RedisSource
    from kvstore.rpc.redis_stream import RedisConfig

    config = RedisConfig(url=url)
    return lambda member: RedisSource(member, config, metrics, watch(member))


def _vllm_sources(
    engines: Mapping[str, VllmEvents], metrics: RouterMetrics
) -> Callable[[Member], EventSource]:
    try:
        from kvstore.router.vllm_source import VllmConfig, VllmSource
    except ModuleNotFoundError as error:
        raise BadInput(
            f"following vLLM needs a package that is not installed ({error.name}): "
            "pip install kvstore-llm[vllm]"
        ) from None
    configs = {
        name: VllmConfig(endpoint=one.endpoint, replay=one.replay, root=one.root, hashes=one.hashes)
        for name, one in engines.items()
    }
    return lambda member: VllmSource(member.name, configs[member.name], metrics)
