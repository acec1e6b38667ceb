from prometheus_client import CollectorRegistry

from kvstore.observe.metrics import RouterMetrics
from kvstore.router.members import Member
from kvstore.router.redis_source import RedisSource
from kvstore.router.sources import source_maker
from kvstore.router.watch_source import WatchSource


def test_members_are_watched_unless_a_server_is_named() -> None:
    member, metrics = Member("worker", "w", "127.0.0.1:1"), RouterMetrics(CollectorRegistry())
    assert isinstance(source_maker(metrics)(member), WatchSource)
    through = source_maker(metrics, redis="redis://127.0.0.1:1/0")(member)
    assert isinstance(through, RedisSource) and through.publisher == "w"
