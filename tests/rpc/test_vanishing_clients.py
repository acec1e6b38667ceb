"""Clients that are killed, stopped, or lose their node: real processes, real signals.

Two promises are held against all of it: nothing stays held for long, and nobody ever gets bytes
that were not put under the name.
"""

import hashlib
import os
import signal
import threading
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest

from kvstore.client import Client, ClientConfig, Reserved
from kvstore.core.errors import KvStoreError
from kvstore.core.names import BlockName
from kvstore.core.outcomes import MissReason, SettleOutcome
from kvstore.directory.events import TierKind
from kvstore.testing.node import RunningNode, start_node
from tests.patience import PATIENCE_MS, PATIENCE_S, until_so
from tests.session_process import PAYLOAD, connect, names_of, session_process

QUICK = ("--claim-ms", "200", "--lease-ms", "300")


@pytest.fixture(scope="module")
def node() -> Iterator[RunningNode]:
    with start_node(arena_bytes=64 << 20, options=QUICK) as running:
        yield running


@pytest.fixture(scope="module")
def patient_node() -> Iterator[RunningNode]:
    """A node whose claims and leases end with their owner and not by time."""
    for_ever = ("--claim-ms", str(PATIENCE_MS), "--lease-ms", str(PATIENCE_MS))
    with start_node(arena_bytes=64 << 20, options=for_ever) as running:
        yield running


def until_got(client: Client, names: Sequence[BlockName], wanted: list[bytes]) -> None:
    """Get until a short lease was long enough; other bytes must not come in any try."""

    def whole() -> bool:
        blocks = client.get(names)
        assert blocks == wanted[: len(blocks)]
        return len(blocks) == len(wanted)

    until_so(whole)


@pytest.fixture
def client(node: RunningNode, request: pytest.FixtureRequest) -> Iterator[Client]:
    with connect(node.run_dir, request.node.name) as connected:
        yield connected


def stopped(pid: int) -> bool:
    return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "T"


def used(client: Client) -> int:
    return client.stats().tiers[TierKind.DRAM].used_bytes


def payload(value: int) -> bytes:
    return bytes([value]) * PAYLOAD


def test_a_killed_client_gives_back_leases_and_reserved_slots(
    patient_node: RunningNode, request: pytest.FixtureRequest
) -> None:
    with connect(patient_node.run_dir, request.node.name) as client:
        _gives_back_leases_and_slots(patient_node, client, request.node.name)


def _gives_back_leases_and_slots(node: RunningNode, client: Client, label: str) -> None:
    names = names_of(client, 1, 6)
    client.put(names[:2], [payload(1)] * 2)
    before, used_before = client.stats(), used(client)
    with session_process(node.run_dir, label) as other:
        assert other.ask("acquire", prompt=1, count=6, reserve=4) == {"ready": 2, "reserved": 4}
        held = client.stats()
        assert held.reserved_bytes == 4 * client.block_bytes
        assert held.leases == before.leases + 1
        refused = client.acquire(names, reserve=4)
        assert refused.reserved == []
        client.settle(release=[refused.lease])
        other.process.kill()
    until_so(lambda: client.stats().reserved_bytes == 0)
    after = client.stats()
    assert after.slots["reserved"] == 0
    assert after.sessions == before.sessions
    until_so(lambda: client.stats().leases == 0)
    assert client.put(names, [payload(2)] * 6)[2:] == [SettleOutcome.DONE] * 4
    assert client.get(names) == [payload(1)] * 2 + [payload(2)] * 4
    assert used(client) == used_before + 4 * client.block_bytes


def test_a_writer_stopped_past_its_claim_hurts_nobody(
    node: RunningNode, client: Client, request: pytest.FixtureRequest
) -> None:
    names = names_of(client, 1, 2)
    with session_process(node.run_dir, request.node.name) as writer:
        assert writer.ask("acquire", prompt=1, count=2, reserve=2)["reserved"] == 2
        writer.ask("write", value=65)
        os.kill(writer.process.pid, signal.SIGSTOP)
        until_so(lambda: stopped(writer.process.pid))

        def taken_over() -> bool:
            done = client.put(names, [payload(66)] * 2)
            assert client.get(names) in ([], [payload(66)] * 2)
            return done == [SettleOutcome.DONE] * 2

        until_so(taken_over)
        assert client.stats().reserved_bytes == 2 * client.block_bytes, "its slots stay its own"

        os.kill(writer.process.pid, signal.SIGCONT)
        writer.ask("write", value=67)
        until_got(client, names, [payload(66)] * 2)
        assert writer.ask("commit") == {"outcomes": ["DUPLICATE", "DUPLICATE"]}
        until_got(client, names, [payload(66)] * 2)
        assert client.stats().reserved_bytes == 0
    until_got(client, names, [payload(66)] * 2)


def test_a_dead_writers_block_is_given_to_the_next_at_once(
    patient_node: RunningNode, request: pytest.FixtureRequest
) -> None:
    with (
        connect(patient_node.run_dir, request.node.name) as client,
        session_process(patient_node.run_dir, request.node.name) as first,
    ):
        names = names_of(client, 1, 1)
        first.ask("acquire", prompt=1, count=1, reserve=1)
        refused = client.acquire(names, reserve=1)
        assert refused.reserved == []
        assert refused.reason is MissReason.COMPUTING
        assert refused.reserve_reason is MissReason.COMPUTING
        first.process.kill()
        first.process.wait(PATIENCE_S)
        reserved: list[Reserved] = []

        def given() -> bool:
            reserved.extend(client.acquire(names, reserve=1).reserved)
            return bool(reserved)

        until_so(given)
        assert client.settle(abort=[item.slot for item in reserved]).abort == [SettleOutcome.DONE]


def test_a_reader_stopped_past_its_lease_does_not_believe_its_copy(
    request: pytest.FixtureRequest,
) -> None:
    with (
        start_node(arena_bytes=2 << 20, options=[*QUICK, "--policy", "lru"]) as node,
        connect(node.run_dir, request.node.name) as client,
        session_process(node.run_dir, request.node.name) as reader,
    ):
        names = names_of(client, 1, 4)
        client.put(names, [payload(1)] * 4)
        assert reader.ask("acquire", prompt=1, count=4, reserve=0)["ready"] == 4
        believed = reader.ask("copy")["blocks"]
        assert believed == [{"bytes": [1], "still": True}] * 4
        os.kill(reader.process.pid, signal.SIGSTOP)
        until_so(lambda: stopped(reader.process.pid))
        prompts = iter(range(2, 60_000))

        def overwritten() -> bool:
            prompt = next(prompts)
            others = names_of(client, prompt, 8)
            client.put(others, [payload(prompt % 251)] * 8)
            return client.lookup(names).prefix == 0

        until_so(overwritten)
        # Fill whatever is left, so that the slots have other blocks' bytes by now.
        for _ in range(8):
            overwritten()
        os.kill(reader.process.pid, signal.SIGCONT)
        doubted = reader.ask("copy")["blocks"]
        assert [block["still"] for block in doubted] == [False] * 4
        assert all(block["bytes"] != [1] for block in doubted), "else nothing was shown"


def expected(name: BlockName) -> bytes:
    """The oracle: what is under a name follows from the name."""
    return (hashlib.sha256(name).digest() * (PAYLOAD // 32 + 1))[:PAYLOAD]


class Traffic:
    """Puts and gets random-looking prompts until told to stop; checks every byte it gets."""

    def __init__(self, client: Client, first_prompt: int) -> None:
        self.wrong: list[str] = []
        self.blocks = 0
        self.errors: dict[str, int] = {}
        self._client = client
        self._prompt = first_prompt
        self._ending = threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def end(self) -> None:
        self._ending.set()
        self._thread.join(PATIENCE_S)
        assert not self._thread.is_alive(), "a call has hung"

    def _run(self) -> None:
        turn = 0
        while not self._ending.is_set():
            turn += 1
            names = names_of(self._client, self._prompt + turn % 7, 1 + turn % 5)
            try:
                self._client.put(names, [expected(name) for name in names])
                got = self._client.get(names)
            except KvStoreError as error:
                kind = type(error).__name__
                self.errors[kind] = self.errors.get(kind, 0) + 1
                continue
            self.blocks += len(got)
            for name, block in zip(names, got, strict=False):
                if block != expected(name):
                    self.wrong.append(f"turn {turn}: {block[:16].hex()}")


@pytest.mark.parametrize(
    ("arena_bytes", "kills"), [(2 << 20, 2), (64 << 20, 1)], ids=["evicting", "roomy"]
)
def test_a_node_killed_amid_traffic_never_gives_wrong_bytes(
    request: pytest.FixtureRequest, arena_bytes: int, kills: int
) -> None:
    config = ClientConfig(call_ms=250, sweep_ms=100)
    with start_node(arena_bytes=arena_bytes, options=QUICK) as node:
        label = request.node.name
        with (
            connect(node.run_dir, label, config) as one,
            connect(node.run_dir, label, config) as two,
            connect(node.run_dir, label) as watcher,
        ):
            traffic = [Traffic(one, 100), Traffic(two, 103)]
            for _ in range(kills):
                seen = [run.blocks for run in traffic]
                until_so(lambda seen=seen: all(  # type: ignore[misc]
                    run.blocks > old + 20 for run, old in zip(traffic, seen, strict=True)
                ))  # fmt: skip
                node.wait_restarted(node.kill_node())
            seen = [run.blocks for run in traffic]
            until_so(lambda: all(run.blocks > old for run, old in zip(traffic, seen, strict=True)))
            for run in traffic:
                run.end()
            assert [run.wrong for run in traffic] == [[], []]
            kinds = {kind for run in traffic for kind in run.errors}
            assert kinds <= {"Unreachable", "Refused"}, kinds
            # Slots whose Acquire was answered by a node that died are found and given back. Before
            # that the names below may be claimed by a call whose answer was lost.
            until_so(lambda: watcher.stats().reserved_bytes == 0)
            until_so(lambda: watcher.stats().leases == 0)
            names = names_of(watcher, 101, 2)
            wanted = [expected(name) for name in names]

            def kept() -> bool:
                watcher.put(names, wanted)  # a writer slower than its short claim puts again
                blocks = watcher.get(names)
                assert blocks == wanted[: len(blocks)]
                return len(blocks) == len(wanted)

            until_so(kept)


def test_a_stopped_node_costs_one_deadline_and_comes_back(
    node: RunningNode, request: pytest.FixtureRequest
) -> None:
    config = ClientConfig(call_ms=250, sweep_ms=100)
    with connect(node.run_dir, request.node.name) as patient:
        patient.put(names_of(patient, 1, 2), [payload(1)] * 2)
    with connect(node.run_dir, request.node.name, config) as client:
        names = names_of(client, 1, 2)
        node.signal_node(signal.SIGSTOP)
        with pytest.raises(KvStoreError):
            client.put(names_of(client, 2, 2), [payload(2)] * 2)
        node.signal_node(signal.SIGCONT)
        until_so(lambda: client.lookup(names).prefix == 2)
        until_got(client, names, [payload(1)] * 2)
        until_so(lambda: client.stats().reserved_bytes == 0)


def test_one_process_may_come_and_go_as_often_as_it_likes() -> None:
    """A closed session with nothing reserved is over; its process need not end for that."""
    few = ("--max-sessions", "3")
    with start_node(arena_bytes=8 << 20, options=few) as node:
        for number in range(10):
            with connect(node.run_dir, f"visit {number}") as client:
                client.put(names_of(client, number, 1), [payload(number)])
        before = node.kill_node()
        node.wait_restarted(before)
        for number in range(10):
            with connect(node.run_dir, f"visit {number}") as client:
                assert client.stats().sessions <= 3


def test_leases_of_a_dead_keepers_node_do_not_hit_new_ones(tmp_path: Path) -> None:
    leases = []
    for _ in range(2):
        with (
            start_node(arena_bytes=8 << 20) as node,
            connect(node.run_dir, "leases") as client,
        ):
            names = names_of(client, 1, 1)
            client.put(names, [payload(1)])
            leases.append(client.acquire(names).lease)
    assert leases[0] < leases[1]
