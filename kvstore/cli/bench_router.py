"""`kvstore bench router`: what a decision costs in process, beside what it cannot go below.

The cluster is a view of `blocks` entries over 16 workers of two hosts and the hosts' nodes, fed by
the events that real publishers send. Prompts have 32,768 tokens: the first 8,192 lie on every
worker (a system prompt and documents), two thirds on one. Nothing is cached between decisions but
what the router itself remembers.
"""

import asyncio
import hashlib
import os
import random
import statistics
import time
import tracemalloc
from collections.abc import Callable
from typing import Final

import click

from kvstore.cli.bench_router_peer import NAME, Holdings, RadixPeer, SelectPeer, load_dynamo
from kvstore.cli.bench_router_start import measure_start, percentile_ms
from kvstore.cli.bench_router_stream import seconds_until_visible
from kvstore.cli.bench_rows import Bench, Work
from kvstore.core.errors import BadInput
from kvstore.core.limits import BLOCK_TOKENS, NAME_BYTES
from kvstore.core.names import BlockName, PackedNames, Root, chain
from kvstore.directory.events import Began, Changed, Ended, Loaded, TierKind
from kvstore.directory.places import BlockIndex
from kvstore.directory.view import ClusterView, reach_over
from kvstore.router.booking import Bookings
from kvstore.router.members import Member, Members
from kvstore.router.naming import NameCache
from kvstore.router.placement import Placement, Prompt

TOKENS: Final = 32_768
WORKERS: Final = 16
HOSTS: Final = 2
MANY_WORKERS: Final = 1_000
PROMPTS: Final = 12
"""Different prompts of one run, so that no probe finds the last one's entries in the CPU's cache
because of the benchmark alone."""

ROUNDS: Final = 10
"""Over all prompts in each turn, where a turn is short: the first one after other work finds its
data in no cache and takes half as long again, and a busy router decides on end."""

SHARED_TOKENS: Final = 8_192
HELD_TOKENS: Final = TOKENS * 2 // 3 // BLOCK_TOKENS * BLOCK_TOKENS
TURN_TOKENS: Final = 1_024
"""What a conversation's next turn adds."""

EVENT_NAMES: Final = 32
RUN_NAMES: Final = 512
ROOT: Final = Root(b"bench root of kvstore".ljust(NAME_BYTES, b"."))
SHA: Final = "SHA-256 chain over the same tokens, bare loop"


def random_names(count: int) -> list[BlockName]:
    """Return names that nobody computed: an index sees no difference."""
    raw = os.urandom(count * NAME_BYTES)
    return [BlockName(raw[at : at + NAME_BYTES]) for at in range(0, len(raw), NAME_BYTES)]


def bare_chain(tokens: bytes) -> None:
    """Hash what naming has to hash, and nothing else: the floor of naming in this language."""
    parent, sha256 = bytes(ROOT), hashlib.sha256
    for start in range(0, len(tokens), BLOCK_TOKENS * 4):
        parent = sha256(parent + tokens[start : start + BLOCK_TOKENS * 4]).digest()


class Cluster:
    """A view of `blocks` entries, a placement over it, and prompts to place."""

    def __init__(self, blocks: int, workers: int = WORKERS, hosts: int = HOSTS) -> None:
        self.view = ClusterView()
        self.bookings = Bookings(lifetime_ms=1e9)
        self.placement = Placement(self.view, self.bookings)
        shared = os.urandom(SHARED_TOKENS * 4)
        self.tokens = [shared + os.urandom((TOKENS - SHARED_TOKENS) * 4) for _ in range(PROMPTS)]
        self.names = [chain(ROOT, tokens) for tokens in self.tokens]
        self.blocks = blocks
        self.prompts = [Prompt(ROOT, names, TOKENS) for names in self.names]
        members: list[Member] = []
        for number in range(workers):
            host = f"host-{number % hosts}"
            members.append(Member("worker", f"worker-{number}", f"{host}:{number}", host))
        members += [Member("node", f"node-{n}", f"host-{n}:1", f"host-{n}") for n in range(hosts)]
        self.placement.members = Members.of(members)
        each = blocks // len(members)
        for number, member in enumerate(members):
            self.view.follow(member.name, host=member.host, now_ms=0.0)
            self._fill(member, number, each)

    def _fill(self, member: Member, number: int, blocks: int) -> None:
        """Send a publisher's snapshot and its load."""
        tier = TierKind.HBM if member.kind == "worker" else TierKind.DRAM
        events = [Began(member.name, 1, 0, (tier,), member.host)]
        held = random_names(blocks)
        held += self.names[0][: SHARED_TOKENS // BLOCK_TOKENS]
        for at, names in enumerate(self.names):
            if at % (WORKERS + HOSTS) == number:
                held += names[: HELD_TOKENS // BLOCK_TOKENS]
        for event in events:
            self.view.apply(member.name, event, 0.0)
        for start in range(0, len(held), 512):
            self.view.apply(member.name, Changed(ROOT, tier, held[start : start + 512]), 0.0)
        self.view.apply(member.name, Ended(0), 0.0)
        if member.kind == "worker":
            load = Loaded(
                running=8, waiting=number % 3, queued_tokens=500 * (number % 3),
                kv_used_bytes=number, kv_capacity_bytes=100, prefill_tokens_per_s=25_000.0,
                prefill_linear_s=4e-5, prefill_quadratic_s=1.3e-9,
            )  # fmt: skip
            self.view.apply(member.name, load, 0.0)

    def workers(self) -> list[Holdings]:
        """Return what every worker holds, for a peer; all entries lie on workers there."""
        others = self.blocks // WORKERS
        shared = self.tokens[0][: SHARED_TOKENS * 4]
        holdings = []
        for number in range(WORKERS):
            own = [
                tokens[: HELD_TOKENS * 4]
                for at, tokens in enumerate(self.tokens)
                if at % (WORKERS + HOSTS) == number
            ]
            holdings.append(Holdings([shared, *own], others))
        return holdings

    def decide(self, prompt: Prompt) -> None:
        """Choose a worker, as `Router.route` does."""
        assert self.placement.decide(prompt, 0.0) is not None

    def decide_and_book(self, prompt: Prompt) -> None:
        """Choose a worker, book it there, and hear of its end: the whole life of a decision."""
        decision = self.placement.decide(prompt, 0.0)
        assert decision is not None
        booking = self.bookings.book(
            decision.worker, ROOT, prompt.names, hit_tokens=decision.hit_tokens,
            uncached_tokens=prompt.tokens - decision.hit_tokens, now_ms=0.0,
            loading=decision.loading, expected=decision.expected,
        )  # fmt: skip
        self.bookings.complete(booking.number)


def per_prompt(run: Callable[[], object]) -> Work:
    """Return work that goes over every prompt and tells the seconds of one."""

    async def work() -> float:
        started = time.perf_counter()
        run()
        return (time.perf_counter() - started) / PROMPTS

    return work


def hashing(cluster: Cluster) -> Work:
    """Return what naming every prompt costs at least."""

    def run() -> None:
        for tokens in cluster.tokens:
            bare_chain(tokens)

    return per_prompt(run)


async def bench_named(bench: Bench, cluster: Cluster) -> None:
    """Decide for prompts that come named."""

    def named() -> None:
        for prompt in cluster.prompts:
            cluster.decide(prompt)

    def booked() -> None:
        for prompt in cluster.prompts:
            cluster.decide_and_book(prompt)

    limit = hashing(cluster)
    for case, run in {
        "decide from names": named,
        "decide, book and complete from names": booked,
    }.items():
        await bench.against(case, per_prompt(run), limit, limit_name=SHA, repeat=ROUNDS)


async def bench_many(bench: Bench, blocks: int) -> None:
    """Decide among many more workers."""
    case = f"decide from names, {MANY_WORKERS:,} workers"
    if bench.wants(case):
        cluster = Cluster(blocks, MANY_WORKERS, MANY_WORKERS // 8)
        run = per_prompt(lambda: [*map(cluster.decide, cluster.prompts)])
        await bench.against(case, run, hashing(cluster), limit_name=SHA)


async def bench_decisions(bench: Bench, cluster: Cluster, peer: SelectPeer | None) -> None:
    """Decide for prompts that were never seen, and that are a next turn."""

    def unseen() -> None:
        for tokens in cluster.tokens:
            cluster.decide(Prompt(ROOT, NameCache().names(ROOT, tokens), TOKENS))

    known, kept = NameCache(), (TOKENS - TURN_TOKENS) * 4
    for tokens in cluster.tokens:
        known.names(ROOT, tokens)

    def turn() -> None:
        for tokens in cluster.tokens:
            longer = tokens[:kept] + os.urandom(TURN_TOKENS * 4)
            cluster.decide(Prompt(ROOT, known.names(ROOT, longer), TOKENS))

    async def select() -> float:
        assert peer is not None
        started = time.perf_counter()
        for request in peer.requests:
            await peer.select(request)
        return (time.perf_counter() - started) / PROMPTS

    limit = hashing(cluster)
    for case, run in {
        "decide from tokens, never seen": unseen,
        "decide from tokens, next turn": turn,
    }.items():
        theirs = select if peer is not None else None
        await bench.against(
            case, per_prompt(run), limit, limit_name=SHA, peer=theirs, peer_name=NAME
        )


async def bench_match(bench: Bench, cluster: Cluster, peer: RadixPeer | None) -> None:
    """Find the prefix of all workers' reaches alone."""
    view = cluster.view
    tiers = {h: view.host_tiers([f"node-{h}"], 0.0) for h in range(HOSTS)}
    reaches = [reach_over(view.publisher(f"worker-{n}"), tiers[n % HOSTS]) for n in range(WORKERS)]

    def ours() -> None:
        for names in cluster.names:
            view.match(ROOT, names, reaches)

    def one() -> None:
        for names in cluster.names:
            view.match(ROOT, names, reaches[:1])

    def one_probe_each() -> None:
        for names in cluster.names:
            for _ in range(WORKERS):
                view.match(ROOT, names[:1], reaches[:1])

    def theirs() -> None:
        assert peer is not None
        for hashes in peer.prompts:
            peer.tree.find_matches(hashes)

    probes = per_prompt(one_probe_each)
    for case, run in {
        "longest prefix of 2,048 blocks, 16 workers and 2 nodes": ours,
        "longest prefix of 2,048 blocks, 1 worker and 1 node": one,
    }.items():
        find = per_prompt(theirs) if peer is not None and "16" in case else None
        await bench.against(
            case, per_prompt(run), probes, limit_name="16 matches of one block",
            peer=find, peer_name=NAME, repeat=ROUNDS,
        )  # fmt: skip


async def bench_events(bench: Bench, cluster: Cluster, peer: RadixPeer | None) -> None:
    """Apply stored and removed events beside a bare dict.

    Of `EVENT_NAMES` blocks, as one step of an engine tells of, and of `RUN_NAMES`: what a publisher
    under load has merged when its stream sends next.
    """
    for size in (EVENT_NAMES, RUN_NAMES):
        await _bench_events_of(bench, cluster, peer, size, 64_000 // size)


async def _bench_events_of(
    bench: Bench, cluster: Cluster, peer: RadixPeer | None, size: int, count: int
) -> None:
    case = f"events of {size} blocks applied, stored and removed"
    if not bench.wants(case):
        return
    batches = [PackedNames(os.urandom(size * NAME_BYTES)) for _ in range(count)]
    stored = [Changed(ROOT, TierKind.HBM, names) for names in batches]
    removed = [Changed(ROOT, TierKind.HBM, names, deleted=True) for names in batches]
    table: dict[int, int] = dict.fromkeys(range(len(cluster.view)), 1)
    listed = [list(names) for names in batches]

    async def ours() -> None:
        for event in [*stored, *removed]:
            cluster.view.apply("worker-0", event, 0.0)

    async def bare() -> None:
        for names in listed:
            for name in names:
                table[int.from_bytes(name[:8], "little")] = 1
        for names in listed:
            for name in names:
                del table[int.from_bytes(name[:8], "little")]

    events: list[bytes] = []
    if peer is not None:
        chains = [peer.stored([random.getrandbits(63) for _ in batch], size) for batch in batches]
        events = [event for told, _ in chains for event in told]
        events += [peer.removed(names) for _, names in chains]

    async def theirs() -> None:
        assert peer is not None
        for event in events:
            peer.tree.apply_event(0, event)

    await bench.against(
        case, ours, bare, limit_name="a dict of as many ints",
        amount=2 * count * size, unit="blocks/s",
        peer=theirs if peer is not None else None, peer_name=NAME,
    )  # fmt: skip


def bench_memory(bench: Bench, cluster: Cluster) -> None:
    """Weigh the index alone: what an entry adds to a view of as many blocks."""
    case, count = "memory of an entry", len(cluster.view)
    if not bench.wants(case):
        return
    tracemalloc.start()
    try:
        index = BlockIndex(max_blocks=count)
        place = index.new_place()
        for start in range(0, count, 512):
            index.add(place, ROOT, random_names(min(512, count - start)))
        each = tracemalloc.get_traced_memory()[0] / count
    finally:
        tracemalloc.stop()
    packed = "a 64-bit key and a 32-bit set number, packed"
    bench.row(case, each, "B", limit=12.0, limit_name=packed, ratio=12.0 / each, runs=1)


async def bench_stream(bench: Bench) -> None:
    """Publish one block and wait until the view of a router over gRPC has it."""
    case = "event published to visible over gRPC"
    if bench.wants(case):
        times = await seconds_until_visible(10 * bench.pairs)
        bench.row(case, statistics.median(times) * 1e3, "ms", runs=len(times))


async def bench_start(bench: Bench, blocks: int) -> None:
    """Start a router that has `blocks` to learn, and ask it for decisions meanwhile."""
    ready = "start: a new router is ready"
    median, late = "start: decisions meanwhile, median", "start: decisions meanwhile, 99th of 100"
    if not bench.wants(ready, median, late):
        return
    start = await measure_start(blocks)
    decisions = len(start.decisions_s)
    if bench.wants(ready):
        bench.row(ready, start.ready_s, "s", runs=1)
    for case, hundredth in ((median, 50), (late, 99)):
        if bench.wants(case):
            value = percentile_ms(start.decisions_s, hundredth)
            limit = percentile_ms(start.later_s, hundredth)
            name, ratio = "the same once all is learnt", limit / value if value else None
            bench.row(case, value, "ms", limit=limit, limit_name=name, ratio=ratio, runs=decisions)


@click.command(short_help="Measure what choosing a worker costs.")
@click.option("--case", "pattern", default="*", metavar="GLOB", help="Only cases like this.")
@click.option("--quick", is_flag=True, help="Fewer pairs.")
@click.option(
    "--blocks", default=1_000_000, show_default=True, type=click.IntRange(1_000, 16_000_000),
    help="Entries of the view.",
)  # fmt: skip
@click.option(
    "--start-blocks", default=2_300_000, show_default=True, type=click.IntRange(1_000, 16_000_000),
    help="Blocks that a new router has to learn.",
)  # fmt: skip
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object per case.")
def router(pattern: str, quick: bool, blocks: int, start_blocks: int, as_json: bool) -> None:
    """Measure decisions, prefix matches, events and memory of the view."""
    bench = Bench("router", pattern, pairs=7 if quick else 25, quick=quick, as_json=as_json)
    asyncio.run(_measure(bench, blocks))
    asyncio.run(bench_start(bench, start_blocks))
    if not bench.rows:
        raise BadInput(f"--case {pattern!r} is like no case")
    bench.finish()


async def _measure(bench: Bench, blocks: int) -> None:
    cluster = Cluster(blocks)
    await bench_named(bench, cluster)
    dynamo = load_dynamo()
    if dynamo is None:
        click.echo("  ai-dynamo-runtime is not installed: no column for the peer", err=True)
        await bench_decisions(bench, cluster, None)
        radix = None
    else:
        async with SelectPeer(dynamo, cluster.tokens, cluster.workers()) as peer:
            await bench_decisions(bench, cluster, peer)
        radix = RadixPeer(dynamo, cluster.tokens, cluster.workers())
    await bench_match(bench, cluster, radix)
    await bench_many(bench, blocks)
    await bench_events(bench, cluster, radix)
    bench_memory(bench, cluster)
    await bench_stream(bench)
