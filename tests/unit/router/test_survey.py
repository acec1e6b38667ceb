from kvstore.core.names import BlockName, Root
from kvstore.directory.events import Began, Changed, Ended, Loaded, TierKind
from kvstore.directory.view import ClusterView, Health
from kvstore.router.members import Member, Members
from kvstore.router.survey import survey

MEMBERS = Members.of([Member("worker", "w", "a:1"), Member("node", "n", "b:2", host="h")])


def test_members_are_shown_as_their_streams_tell() -> None:
    view = ClusterView(suspect_after_ms=1_000)
    view.follow("w", host="", now_ms=0.0)
    name = BlockName(b"x" * 32)
    for event in (
        Began("w", 1, 0, (TierKind.HBM,), "h"),
        Changed(Root(b"r" * 32), TierKind.HBM, [name], block_bytes=4096),
        Ended(0),
        Loaded(running=3),
    ):
        view.apply("w", event, 10.0)
    worker, node = survey(MEMBERS, view, 510.0)
    assert (worker.name, worker.kind, worker.host, worker.health) == (
        "w", "worker", "h", Health.LIVE,
    )  # fmt: skip
    assert worker.silence_ms == 500.0 and worker.blocks == {TierKind.HBM: 1}
    assert worker.load is not None and worker.load.running == 3
    assert (node.host, node.health, node.blocks, node.load) == ("h", Health.LOST, {}, None)
    assert next(iter(survey(MEMBERS, view, 2_000.0))).health is Health.SUSPECT
