"""Replay and optimum (`kvstore.simulate.replay`, `opt`, `policies`): calls and figures."""

import dataclasses
import itertools
import random
from collections.abc import Callable, Sequence

import pytest

from kvstore.core.errors import BadInput
from kvstore.directory.lru import Lru
from kvstore.directory.policies import make_policy
from kvstore.directory.policy import BlockKey, Prompt
from kvstore.simulate.formats import read_trace
from kvstore.simulate.opt import replay_optimum
from kvstore.simulate.policies import policy_names, replay_named
from kvstore.simulate.replay import BYTES_PER_TOKEN, PolicyTier, replay
from kvstore.simulate.trace import Trace, TraceRequest
from tests.sim.traces import sample, shared, trace_of

FRACTIONS = (0.001, 0.01, 0.05, 0.1, 0.25)

# Token hit rates in % of two independent simulators, LRU above and the optimum below.
PUBLISHED = {
    "mooncake_conversation": ((4.0, 4.4, 11.5, 21.2, 30.7), (7.0, 19.2, 33.5, 35.2, 35.2)),
    "mooncake_synthetic": ((0.1, 1.0, 2.9, 6.2, 14.5), (1.7, 8.9, 20.3, 27.0, 33.8)),
    "weka_cc_a": ((0.6, 10.5, 80.2, 92.5, 95.3), (8.2, 45.9, 89.3, 95.0, 95.8)),
    "lmcache_agent": ((1.7, 15.0, 55.3, 76.7, 91.3), (3.0, 23.0, 61.9, 79.8, 91.4)),
    "ragpulse": ((27.1, 31.2, 31.6, 31.6, 31.6), (31.6, 31.6, 31.6, 31.6, 31.6)),
}
WRITES_AT_5_PERCENT = {
    "mooncake_conversation": (22.6, 3.9),
    "mooncake_synthetic": (24.1, 4.7),
    "weka_cc_a": (43.7, 20.1),
    "lmcache_agent": (8.9, 2.6),
    "ragpulse": (31.6, 0.1),
}


class Diary(Lru):
    """LRU that writes down what it is told and keeps some newcomers out."""

    def __init__(self, refuse: frozenset[int] = frozenset()) -> None:
        super().__init__()
        self.refuse = refuse
        self.told: list[tuple[str, list[int]]] = []
        self.prompts: list[Prompt] = []

    def request(self, prompt: Prompt) -> None:
        self.told.append(("request", list(prompt.keys)))
        self.prompts.append(prompt)
        super().request(prompt)

    def insert(self, blocks: Sequence[BlockKey], *, parent: BlockKey | None, now_ms: float) -> None:
        self.told.append(("insert", [parent or 0, *blocks]))
        super().insert(blocks, parent=parent, now_ms=now_ms)

    def remove(self, block: BlockKey) -> None:
        self.told.append(("remove", [block]))
        super().remove(block)

    def victims(
        self,
        count: int,
        *,
        now_ms: float,
        may_evict: Callable[[BlockKey], bool],
        newcomers: Sequence[BlockKey] = (),
    ) -> list[BlockKey]:
        welcome = itertools.takewhile(lambda block: block not in self.refuse, newcomers)
        return super().victims(len(list(welcome)), now_ms=now_ms, may_evict=may_evict)


def test_a_policy_is_told_of_the_request_then_of_what_came() -> None:
    diary = Diary()
    replay(trace_of([[1, 2], [1, 2, 3, 4]]), diary, 10)
    assert diary.told == [
        ("request", [1, 2]), ("insert", [0, 1, 2]),
        ("request", [1, 2, 3, 4]), ("insert", [2, 3, 4]),
    ]  # fmt: skip


def test_a_full_tier_stops_at_the_first_newcomer_that_is_not_worth_it() -> None:
    diary = Diary(refuse=frozenset({7}))
    result = replay(trace_of([[1, 2, 3], [5, 6, 7, 8]]), diary, 3)
    assert diary.told[3:] == [("remove", [3]), ("remove", [2]), ("insert", [0, 5, 6])]
    assert result.writes_per_request == (3 + 2) / 2


def test_nobody_is_kept_out_while_there_is_room() -> None:
    diary = Diary(refuse=frozenset({1, 2, 3}))
    replay(trace_of([[1, 2, 3]]), diary, 3)
    assert diary.told[1:] == [("insert", [0, 1, 2, 3])]


def test_what_comes_on_both_sides_of_a_hole_is_told_apart() -> None:
    diary = Diary()
    tier = PolicyTier(diary, 9, block_bytes=1)
    held = TraceRequest(0.0, 16, 1, [BlockKey(2)], first_block=1)
    tier.serve(held, [0])
    whole = TraceRequest(1.0, 64, 1, [BlockKey(key) for key in (1, 2, 3, 4)])
    tier.serve(whole, [0, 2, 3])
    assert diary.told[3:] == [("insert", [0, 1]), ("insert", [2, 3, 4])]
    assert tier.held == {1, 2, 3, 4}


def test_blocks_of_the_request_itself_are_never_dropped_for_it() -> None:
    diary = Diary()
    result = replay(trace_of([[1, 2, 3], [1, 2, 3, 4, 5]]), diary, 3)
    assert ("remove", [1]) not in diary.told
    assert result.block_hit == pytest.approx(3 / 8)
    assert result.writes_per_request == 3 / 2


def test_a_prompt_larger_than_the_tier_keeps_its_first_blocks() -> None:
    diary = Diary()
    replay(trace_of([[1, 2, 3, 4, 5]]), diary, 3)
    assert sorted(block for block in range(9) if block in diary) == [1, 2, 3]


def test_a_gap_ends_the_hit() -> None:
    """Block 2 is missing: 3 is held and cannot be used."""
    trace = trace_of([[1, 2, 3], [9, 8], [1, 2, 3]])
    diary = Diary()
    replay(trace_of([[1, 2, 3]]), diary, 3)
    diary.remove(BlockKey(2))
    assert replay(trace, Lru(), 100).block_hit == pytest.approx(3 / 8)


def test_evidence_reaches_the_policy_and_hints_can_be_kept_from_it() -> None:
    request = TraceRequest(5.0, 30, 1, [BlockKey(1), BlockKey(2)], "chat-7", 2, "tool", 4)
    trace = Trace("one", 16, [request])
    told, silent = Diary(), Diary()
    replay(trace, told, 4)
    replay(trace, silent, 4, hints=False)
    (prompt,), (hidden,) = told.prompts, silent.prompts
    assert (prompt.now_ms, prompt.first_block, prompt.kind) == (5.0, 4, "tool")
    assert prompt.partial, "six blocks of 16 tokens are 96, the request has 30"
    assert prompt.block_bytes == 16 * BYTES_PER_TOKEN
    assert hidden == dataclasses.replace(prompt, kind="")


def test_a_partial_last_block_counts_its_own_tokens() -> None:
    request = TraceRequest(0.0, 20, 1, [BlockKey(1), BlockKey(2)])
    result = replay(Trace("partial", 16, [request, request]), Lru(), 4)
    assert (result.token_hit, result.block_hit) == (20 / 40, 2 / 4)


def _best_block_hits(prompts: list[list[int]], capacity: int) -> int:
    """Return the most hits that any choice of contents reaches, by trying all of them."""
    states: dict[frozenset[int], int] = {frozenset(): 0}
    for prompt in prompts:
        following: dict[frozenset[int], int] = {}
        for held, hits in states.items():
            found = next((i for i, b in enumerate(prompt) if b not in held), len(prompt))
            pool = held | set(prompt)
            for kept in itertools.combinations(sorted(pool), min(capacity, len(pool))):
                state = frozenset(kept)
                following[state] = max(following.get(state, 0), hits + found)
        states = following
    return max(states.values())


@pytest.mark.parametrize("seed", range(12))
def test_the_optimum_equals_the_best_of_all_choices(seed: int) -> None:
    dice = random.Random(seed)
    # Prefix nodes: a tree in which a node's number tells its path.
    prompts = []
    for _ in range(7):
        path, node = [], 1
        for _ in range(dice.randint(1, 3)):
            node = node * 2 + dice.randint(0, 1)
            path.append(node)
        prompts.append(path)
    for capacity in (1, 2, 3):
        trace = trace_of(prompts)
        expected = _best_block_hits(prompts, capacity)
        assert replay_optimum(trace, capacity).block_hit == expected / trace.block_refs


def test_the_optimum_never_writes_what_is_not_used_again() -> None:
    result = replay_optimum(trace_of([[1, 2], [3, 4], [1, 2]]), 10)
    assert result.writes_per_request == 2 / 3


@pytest.mark.parametrize("name", ["mooncake_conversation", "weka_cc_a"])
def test_no_policy_beats_the_optimum(name: str) -> None:
    trace = read_trace(sample(name), limit=300)
    for fraction in (0.01, 0.1):
        capacity = trace.capacity(fraction)
        best = replay_optimum(trace, capacity).block_hit
        for policy in policy_names():
            assert replay_named(trace, policy, capacity).block_hit <= best + 1e-12


def test_hit_rates_equal_the_published_ones() -> None:
    """This sample is the whole trace, so its figures are known."""
    _compare(read_trace(sample("lmcache_agent")), "lmcache_agent")


@pytest.mark.slow
@pytest.mark.parametrize("name", PUBLISHED)
def test_hit_rates_of_full_traces_equal_the_published_ones(name: str) -> None:
    path = shared(name)
    if path is None:
        pytest.skip("the full traces are not beside this checkout")
    _compare(read_trace(path), name)


def _compare(trace: Trace, name: str) -> None:
    for at, fraction in enumerate(FRACTIONS):
        capacity = trace.capacity(fraction)
        results = replay(trace, Lru(), capacity), replay_optimum(trace, capacity)
        for result, row in zip(results, PUBLISHED[name], strict=True):
            assert 100 * result.token_hit == pytest.approx(row[at], abs=0.1)
        if fraction == 0.05:
            written = [result.writes_per_request for result in results]
            assert written == pytest.approx(WRITES_AT_5_PERCENT[name], abs=0.1)


def test_every_policy_has_a_name_and_others_have_none() -> None:
    trace = trace_of([[1, 2], [1, 2]])
    for name in policy_names():
        assert replay_named(trace, name, 4).policy == name
    with pytest.raises(BadInput, match="no eviction policy 'best'"):
        make_policy("best")


def test_every_request_is_reported() -> None:
    steps: list[None] = []
    trace = trace_of([[1], [2], [3]])
    for name in policy_names():
        replay_named(trace, name, 2, on_request=lambda: steps.append(None))
    assert len(steps) == 3 * len(policy_names())
