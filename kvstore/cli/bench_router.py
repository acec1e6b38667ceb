"""`kvstore bench router`: what a decision costs in process, beside what it cannot go below.

The cluster is a view of `blocks` entries over 16 workers of two hosts and the hosts' nodes, fed by
the events that real publishers send. Prompts have 32,768 tokens: the first 8,192 lie on every
worker (a system prompt and documents), two thirds on one. Nothing is cached between decisions but
what the router itself remembers.
"""

import hashlib
import os
import tracemalloc
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Final

import click

from kvstore.cli.bench_row import PAIRS, QUICK_PAIRS, Row, pairs
from kvstore.core.limits import BLOCK_TOKENS, NAME_BYTES
from kvstore.core.names import BlockName, Root, chain
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
PROMPTS: Final = 12
"""Different prompts of one run, so that no probe finds the last one's entries in the CPU's cache
because of the benchmark alone."""

SHARED_TOKENS: Final = 8_192
HELD_TOKENS: Final = TOKENS * 2 // 3 // BLOCK_TOKENS * BLOCK_TOKENS
TURN_TOKENS: Final = 1_024
"""What a conversation's next turn adds."""

EVENT_NAMES: Final = 32
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

    def __init__(self, blocks: int) -> None:
        self.view = ClusterView()
        self.bookings = Bookings(lifetime_ms=1e9)
        self.placement = Placement(self.view, self.bookings)
        shared = os.urandom(SHARED_TOKENS * 4)
        self.tokens = [shared + os.urandom((TOKENS - SHARED_TOKENS) * 4) for _ in range(PROMPTS)]
        self.names = [list(chain(ROOT, tokens)) for tokens in self.tokens]
        self.prompts = [Prompt(ROOT, names, TOKENS) for names in self.names]
        members: list[Member] = []
        for number in range(WORKERS):
            host = f"host-{number % HOSTS}"
            members.append(Member("worker", f"worker-{number}", f"{host}:{number}", host))
        members += [Member("node", f"node-{n}", f"host-{n}:1", f"host-{n}") for n in range(HOSTS)]
        self.placement.members = Members.of(members)
        each = blocks // (WORKERS + HOSTS)
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


@dataclass(frozen=True, slots=True)
class Setting:
    """What a case may use."""

    cluster: Cluster
    runs: int

    def row(
        self, case: str, ours: Callable[[], object], other: Callable[[], object], limit_name: str
    ) -> Row:
        """Return a row in microseconds per prompt: both run over every prompt."""
        mine, limit, ratio = pairs(ours, other, runs=self.runs)
        scale = 1e6 / PROMPTS
        return Row(
            bench="router", case=case, value=mine * scale, unit="us", limit=limit * scale,
            limit_name=limit_name, ratio_to_limit=ratio, runs=self.runs,
        )  # fmt: skip

    def hash_all(self) -> None:
        """Do what naming every prompt costs at least."""
        for tokens in self.cluster.tokens:
            bare_chain(tokens)


def from_names(setting: Setting) -> Row:
    """Decide for prompts that come named."""
    cluster = setting.cluster

    def ours() -> None:
        for prompt in cluster.prompts:
            cluster.decide(prompt)

    return setting.row("decide from names", ours, setting.hash_all, SHA)


def booked(setting: Setting) -> Row:
    """Decide, book and complete for prompts that come named."""
    cluster = setting.cluster

    def ours() -> None:
        for prompt in cluster.prompts:
            cluster.decide_and_book(prompt)

    return setting.row("decide, book and complete from names", ours, setting.hash_all, SHA)


def from_tokens(setting: Setting) -> Row:
    """Decide for prompts never seen: all of each is named."""
    cluster = setting.cluster

    def ours() -> None:
        for tokens in cluster.tokens:
            cluster.decide(Prompt(ROOT, NameCache().names(ROOT, tokens), TOKENS))

    return setting.row("decide from tokens, never seen", ours, setting.hash_all, SHA)


def next_turn(setting: Setting) -> Row:
    """Decide for the next turn of conversations: the last `TURN_TOKENS` are new."""
    cluster, known = setting.cluster, NameCache()
    for tokens in cluster.tokens:
        known.names(ROOT, tokens)
    kept = (TOKENS - TURN_TOKENS) * 4

    def ours() -> None:
        for tokens in cluster.tokens:
            turn = tokens[:kept] + os.urandom(TURN_TOKENS * 4)
            cluster.decide(Prompt(ROOT, known.names(ROOT, turn), TOKENS))

    return setting.row("decide from tokens, next turn", ours, setting.hash_all, SHA)


def longest_prefix(setting: Setting) -> Row:
    """Find the prefix of all reaches of the cluster alone."""
    view = setting.cluster.view
    tiers = {h: view.host_tiers([f"node-{h}"], 0.0) for h in range(HOSTS)}
    reaches = [reach_over(view.publisher(f"worker-{n}"), tiers[n % HOSTS]) for n in range(WORKERS)]

    def ours() -> None:
        for names in setting.cluster.names:
            view.match(ROOT, names, reaches)

    def one_probe_each() -> None:
        for names in setting.cluster.names:
            for _ in range(WORKERS):
                view.match(ROOT, names[:1], reaches[:1])

    return setting.row(
        "longest prefix of 2,048 blocks, 16 workers and 2 nodes", ours, one_probe_each,
        "one probe for each worker",
    )  # fmt: skip


def events(setting: Setting) -> Row:
    """Apply stored and removed events of `EVENT_NAMES` blocks, beside a bare dict."""
    view, member, count = setting.cluster.view, "worker-0", 2_000
    batches = [random_names(EVENT_NAMES) for _ in range(count)]
    stored = [Changed(ROOT, TierKind.HBM, names) for names in batches]
    removed = [Changed(ROOT, TierKind.HBM, names, deleted=True) for names in batches]

    def ours() -> None:
        for event in [*stored, *removed]:
            view.apply(member, event, 0.0)

    table: dict[int, int] = dict.fromkeys(range(1_000_000), 1)

    def bare() -> None:
        for names in batches:
            for name in names:
                table[int.from_bytes(name[:8], "little")] = 1
        for names in batches:
            for name in names:
                del table[int.from_bytes(name[:8], "little")]

    mine, limit, ratio = pairs(ours, bare, runs=setting.runs)
    blocks = 2 * count * EVENT_NAMES
    return Row(
        bench="router", case=f"events of {EVENT_NAMES} blocks applied, stored and removed",
        value=blocks / mine, unit="blocks/s", limit=blocks / limit,
        limit_name="a dict of as many ints", ratio_to_limit=ratio, runs=setting.runs,
    )  # fmt: skip


def memory(setting: Setting) -> Row:
    """Weigh the index alone: what an entry adds to a view of as many blocks."""
    count = len(setting.cluster.view)
    tracemalloc.start()
    try:
        index = BlockIndex(max_blocks=count)
        place = index.new_place()
        for start in range(0, count, 512):
            index.add(place, ROOT, random_names(min(512, count - start)))
        grown, _ = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    packed = 12.0
    return Row(
        bench="router", case="memory of an entry", value=grown / count, unit="B", limit=packed,
        limit_name="a 64-bit key and a 32-bit set number, packed", runs=1,
        ratio_to_limit=packed / (grown / count),
    )  # fmt: skip


CASES: Final[dict[str, Callable[[Setting], Row]]] = {
    "names": from_names,
    "booked": booked,
    "tokens": from_tokens,
    "turn": next_turn,
    "match": longest_prefix,
    "events": events,
    "memory": memory,
}


@click.command(short_help="What choosing a worker costs.")
@click.option("--case", "pattern", default="*", show_default=True, metavar="GLOB")
@click.option("--quick", is_flag=True, help="Fewer pairs.")
@click.option(
    "--blocks", default=1_000_000, show_default=True, type=click.IntRange(1_000, 16_000_000),
    help="Entries of the view.",
)  # fmt: skip
@click.option("--json", "as_json", is_flag=True, help="One JSON row a case.")
def router(pattern: str, quick: bool, blocks: int, as_json: bool) -> None:
    """Measure decisions, prefix matches, event application and memory in process.

    Cases: names, booked, tokens, turn, match, events, memory.
    """
    chosen = [run for name, run in CASES.items() if fnmatchcase(name, pattern)]
    if not chosen:
        raise click.BadParameter(f"no case matches {pattern!r}", param_hint="--case")
    for row in _rows(chosen, blocks, QUICK_PAIRS if quick else PAIRS):
        click.echo(row.to_json() if as_json else str(row))


def _rows(chosen: Sequence[Callable[[Setting], Row]], blocks: int, runs: int) -> list[Row]:
    setting = Setting(Cluster(blocks), runs)
    return [run(setting) for run in chosen]
