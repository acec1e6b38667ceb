"""Replays conversations of a trace on one engine, with every cache and without any.

A trace says how long prompts are and which of them begin alike, not what they say: tokens are drawn
for each of its blocks, the same for the same seed. Lengths are scaled so that the longest prompts
fit. Sessions run beside each other in the order of their arrival, and within each the next turn
is asked when the one before it has ended: what is measured is the worker, not the trace's clock.
"""

import asyncio
import random
import statistics
import time
from collections import Counter, deque
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Final

import click

from kvstore.core.errors import BadInput, Corrupt
from kvstore.core.limits import BLOCK_TOKENS
from kvstore.directory.events import TierKind
from kvstore.simulate.trace import Trace, TraceRequest
from kvworkers.bench.rig import Reply, Rig

_WARM: Final = 3
"""Prompts of nobody's before either pass: what is made at first use is made then."""


@dataclass(frozen=True, slots=True)
class Ask:
    """One request of a replay."""

    tokens: list[int]
    out: int


@dataclass(frozen=True, slots=True)
class Plan:
    """What is replayed: each session's requests in their order."""

    sessions: list[list[Ask]]
    block_tokens: int
    """Tokens that a full block of the trace has here."""
    cut: int
    """Prompts that were longer than what fits, and have lost their ends."""

    @property
    def requests(self) -> int:
        """How many there are."""
        return sum(len(session) for session in self.sessions)


@dataclass(frozen=True, slots=True)
class Pass:
    """What one pass over a plan gave."""

    ttft_ms: list[float]
    tokens_per_s: float
    """Generated tokens."""
    shares: dict[str, float]
    """Of all prompt tokens, by where they came from; `recomputed` with them."""
    replies: list[list[int]]

    def ttft(self, percent: int) -> float:
        """Return a percentile of the times to the first token."""
        return statistics.quantiles(self.ttft_ms, n=100, method="inclusive")[percent - 1]


def plan_replay(
    trace: Trace, *, requests: int, block_tokens: int, most_tokens: int, vocab: int, seed: int
) -> Plan:
    """Choose sessions of a trace until `requests` are chosen, and give them tokens. Pure.

    `block_tokens` is what a full block of the trace becomes; partial ones and replies shrink alike.
    A prompt with its reply has at most `most_tokens`: it loses its end, and a reply has at most an
    eighth of that. Raises `BadInput` for sizes
    that give no prompt.
    """
    if requests < 2:
        raise BadInput(f"a replay needs two requests at least, got {requests}")
    if block_tokens <= 0 or block_tokens % BLOCK_TOKENS:
        raise BadInput(f"block tokens {block_tokens} are not a multiple of {BLOCK_TOKENS}")
    if most_tokens < 2 * BLOCK_TOKENS:
        raise BadInput(f"prompts of {most_tokens} tokens at most: {2 * BLOCK_TOKENS} are needed")
    scale = block_tokens / trace.block_tokens
    cut = 0
    sessions: list[list[Ask]] = []
    for chosen in _sessions(trace, requests, random.Random(seed)):
        asks = []
        for request in chosen:
            out = min(max(1, round(request.output_tokens * scale)), most_tokens // 8)
            length = max(2, round(request.input_tokens * scale))
            cut += length > most_tokens - out
            length = min(length, most_tokens - out)
            asks.append(Ask(_tokens(request, length, block_tokens, vocab, seed), out))
        sessions.append(asks)
    return Plan(sessions, block_tokens, cut)


def _sessions(trace: Trace, count: int, draw: random.Random) -> list[list[TraceRequest]]:
    """Return sessions drawn until they have `count` requests, by the time of their beginnings.

    None gives more than an eighth of them: one long session would be all there is.
    """
    most = -(-count // 8)
    by_session: dict[str, list[TraceRequest]] = {}
    for number, request in enumerate(trace.requests):
        by_session.setdefault(request.session or f"request {number}", []).append(request)
    names = list(by_session)
    draw.shuffle(names)
    chosen: list[list[TraceRequest]] = []
    for name in names:
        if count <= 0:
            break
        chosen.append(by_session[name][: min(count, most)])
        count -= len(chosen[-1])
    return sorted(chosen, key=lambda session: session[0].timestamp_ms)


def _tokens(
    request: TraceRequest, length: int, block_tokens: int, vocab: int, seed: int
) -> list[int]:
    """Return a prompt: a block's tokens follow from its key, and equal keys are equal prefixes."""
    tokens: list[int] = []
    for key in request.blocks:
        if len(tokens) >= length:
            break
        draw = random.Random(f"{seed} {key}")
        tokens += draw.choices(range(vocab), k=block_tokens)
    # Where rounding left the prompt longer than its blocks its last one goes on.
    draw = random.Random(f"{seed} {request.blocks[-1]} end")
    tokens += draw.choices(range(vocab), k=max(0, length - len(tokens)))
    return tokens[:length]


async def replay(rig: Rig, plan: Plan, *, streams: int) -> tuple[Pass, Pass]:
    """Return what the plan gave with every cache, and without any; `streams` sessions at a time.

    Raises `Corrupt` where a reply is cut short or an account does not add up.
    """
    found = []
    for cached in (True, False):
        for number in range(_WARM):
            await rig.ask(rig.prompt(number, 64), out=2, no_read=True, no_store=True)
        found.append(await _pass(rig, plan, streams, cached=cached))
        await rig.stored()
    return found[0], found[1]


async def _pass(rig: Rig, plan: Plan, streams: int, *, cached: bool) -> Pass:
    waiting = deque(enumerate(plan.sessions))
    replies: dict[tuple[int, int], Reply] = {}

    async def stream() -> None:
        while waiting:
            session, asks = waiting.popleft()
            for turn, one in enumerate(asks):
                reply = await rig.ask(
                    one.tokens, out=one.out, no_read=not cached, no_store=not cached
                )
                replies[session, turn] = reply
                _check(one, reply, cached=cached)

    began = time.monotonic()
    async with asyncio.TaskGroup() as group:
        for _ in range(streams):
            group.create_task(stream())
    seconds = time.monotonic() - began
    ordered = [reply for _, reply in sorted(replies.items(), key=lambda item: item[0])]
    return Pass(
        ttft_ms=[reply.first.ttft_ms for reply in ordered],
        tokens_per_s=sum(len(reply.tokens) for reply in ordered) / seconds,
        shares=_shares(ordered),
        replies=[reply.tokens for reply in ordered],
    )


def _check(ask: Ask, reply: Reply, *, cached: bool) -> None:
    use = reply.first.cache
    if len(reply.tokens) != ask.out:
        raise Corrupt(f"a reply has {len(reply.tokens)} tokens, {ask.out} were asked for")
    if use.prompt_tokens != len(ask.tokens) or (use.cached_tokens and not cached):
        raise Corrupt(f"a prompt of {len(ask.tokens)} tokens, {cached=}, was served as {use}")


def _shares(replies: Iterable[Reply]) -> dict[str, float]:
    """Return where the prompts' tokens came from, as shares of all of them."""
    tokens: Counter[str] = Counter()
    for reply in replies:
        use = reply.first.cache
        tokens["own pages"] += use.hbm_tokens
        for tier, count in use.loaded_tokens.items():
            tokens[_NAMES[tier]] += count
        tokens["recomputed"] += use.computed_tokens
    total = tokens.total()
    return {name: tokens[name] / total for name in (*_PLACES, "recomputed")}


_NAMES: Final = {
    TierKind.HBM: "own pages",
    TierKind.DRAM: "arena",
    TierKind.NVME: "nvme",
    TierKind.PEER: "peer",
    TierKind.FILES: "files",
}
_PLACES: Final = ("own pages", "arena", "nvme")
"""What a rig has: no peers, and no shared files."""


async def replay_trace(
    trace: Trace, rig: Rig, emit: Callable[..., None], *,
    requests: int, streams: int, block_tokens: int, seed: int, scale: int,
) -> None:  # fmt: skip
    """Replay a part of a trace and give its rows to `emit`.

    `block_tokens` as `plan_replay` has it; 0: the trace's own over `scale`, in whole pages.
    """
    pages = max(1, trace.block_tokens // scale // BLOCK_TOKENS)
    spec = rig.model.spec
    plan = plan_replay(
        trace,
        requests=requests,
        block_tokens=block_tokens or pages * BLOCK_TOKENS,
        # Each stream has room for the longest at once: what is measured is no storm.
        most_tokens=min(spec.max_model_tokens, rig.pool.pages // streams * BLOCK_TOKENS),
        vocab=spec.vocab_size,
        seed=seed,
    )
    tokens = sum(len(one.tokens) for session in plan.sessions for one in session)
    click.echo(
        f"{plan.requests} requests of {len(plan.sessions)} sessions, {tokens} prompt tokens, "
        f"{plan.block_tokens} tokens for a block of {trace.block_tokens}, {plan.cut} prompts cut",
        err=True,
    )
    on, off = await replay(rig, plan, streams=streams)
    report(emit, trace.name, plan, on, off)


def report(emit: Callable[..., None], name: str, plan: Plan, on: Pass, off: Pass) -> None:
    """Give a replay's rows to `emit`."""
    case = f"replay {name}"
    more = {"runs": plan.requests, "peer_name": "the same requests without any cache"}
    for percent in (50, 90):
        emit(f"{case}: TTFT p{percent}", on.ttft(percent), "ms", peer=off.ttft(percent), **more)
    emit(f"{case}: throughput", on.tokens_per_s, "tokens/s", peer=off.tokens_per_s, **more)
    for place, share in on.shares.items():
        emit(f"{case}: from {place}", share, "share of prompt tokens", runs=plan.requests)
    equal = _equal(on.replies, off.replies)
    emit(f"{case}: replies equal", equal, "share of replies", runs=plan.requests)


def _equal(ours: Sequence[list[int]], theirs: Sequence[list[int]]) -> float:
    pairs = zip(ours, theirs, strict=True)
    return sum(one == other for one, other in pairs) / len(ours)
