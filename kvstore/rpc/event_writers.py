"""What else carries a publisher's events besides `Watch`: chosen by configuration, in one place."""

import asyncio
from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager

from prometheus_client import CollectorRegistry

from kvstore.core.errors import BadInput
from kvstore.directory.publisher import Publisher
from kvstore.observe.metrics import RedisMetrics


def check_redis(flag: str, url: str) -> None:
    """Raise `BadInput` naming the flag when events cannot go by this URL; "" means: not at all."""
    if not url:
        return
    try:
        from kvstore.rpc.redis_stream import RedisConfig
    except ModuleNotFoundError as error:
        raise BadInput(
            f"{flag} needs a package that is not installed ({error.name}): "
            "pip install kvstore-llm[redis]"
        ) from None
    try:
        RedisConfig(url=url)
    except BadInput as error:
        raise BadInput(f"{flag}: {error}") from None


@asynccontextmanager
async def written_to_redis(
    publisher: Publisher, url: str, registry: CollectorRegistry
) -> AsyncGenerator[None, None]:
    """Keep a publisher's stream written at `url` until the block ends; "" writes nowhere."""
    if not url:
        yield
        return
    from kvstore.rpc.redis_publisher import RedisPublisher
    from kvstore.rpc.redis_stream import RedisConfig

    writer = RedisPublisher(publisher, RedisConfig(url=url), RedisMetrics(registry))
    task = asyncio.create_task(writer.run(), name="events to redis")
    try:
        yield
    finally:
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)
