"""The `EventSource` over gRPC: follows one node or worker through its `Watch` call."""

from collections.abc import AsyncGenerator

from kvstore.directory.events import Event
from kvstore.router.members import Member
from kvstore.rpc.watch_client import WatchClient, WatchConfig


class WatchSource:
    """Follows a member; see `kvstore.rpc.watch_client`."""

    def __init__(self, member: Member, config: WatchConfig | None = None) -> None:
        self.publisher = member.name
        self._client = WatchClient(member.address, member.kind, config)

    def events(self) -> AsyncGenerator[Event, None]:
        """Yield what the publisher says; see `EventSource`."""
        return self._client.events()
