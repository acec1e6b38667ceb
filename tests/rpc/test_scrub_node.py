"""A real node finds what a client wrote where it may not."""

import time

from kvstore.core.outcomes import MissReason, SettleOutcome
from kvstore.testing.node import start_node
from tests.patience import PATIENCE_S
from tests.session_process import PAYLOAD, connect, names_of


def test_bytes_that_somebody_spoilt_are_found_without_a_reader() -> None:
    options = ("--scrub-bytes-per-s", "256MiB")
    with (
        start_node(arena_bytes=64 * PAYLOAD, options=options) as node,
        connect(node.run_dir, "scrub") as client,
    ):
        names = names_of(client, 1, 8)
        payloads = [bytes([i]) * PAYLOAD for i in range(8)]
        assert client.put(names, payloads) == [SettleOutcome.DONE] * 8
        acquired = client.acquire(names)
        client.view(acquired.ready[3])[100] ^= 1
        client.settle(release=[acquired.lease])
        ends = time.monotonic() + PATIENCE_S
        while client.lookup(names).prefix != 3:
            assert time.monotonic() < ends, "not found"
            time.sleep(0.02)
        assert client.get(names) == payloads[:3]
        assert client.acquire(names).reason in (MissReason.CORRUPT, MissReason.ABSENT)
