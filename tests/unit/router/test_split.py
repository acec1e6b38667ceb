"""When a prompt goes to two workers: prices, roles, hosts, and what must stay whole."""

from dataclasses import replace

import pytest

from kvstore.core.names import BlockName, Root
from kvstore.directory.events import Began, Changed, Ended, Loaded, LoadRate, TierKind, WorkerRole
from kvstore.directory.view import ClusterView
from kvstore.router.booking import Bookings
from kvstore.router.members import Member, Members
from kvstore.router.placement import Decision, Placement, Prompt
from kvstore.router.ranking import rank
from kvstore.router.score import DECODE, Candidate, Pace, Score, Source, Work
from kvstore.router.seats import KEPT_FREE, delayed
from kvstore.router.split import CALLS_S, Side, Split, Whole, choose

PACE = Pace(1e-3, measured=True)
ARENA = Source("dram", 0, 2e-5)
TOKENS = 1_600


def side(
    name: str, role: WorkerRole, host: str = "h", *, arena: Source | None = ARENA, **rest: object
) -> Side:
    return Side(Candidate(name, pace=PACE, **rest), role, host, arena)  # type: ignore[arg-type]


def prefill(name: str = "p", host: str = "h", **rest: object) -> Side:
    return side(name, WorkerRole.PREFILL, host, **rest)  # type: ignore[arg-type]


def decode(name: str = "d", host: str = "h", running: int = KEPT_FREE, **rest: object) -> Side:
    return side(name, WorkerRole.DECODE, host, running=running, **rest)  # type: ignore[arg-type]


def alone(sides: list[Side], tokens: int = TOKENS) -> Score:
    return rank([one.candidate for one in sides if one.role is not WorkerRole.PREFILL], tokens)[0]


def chosen(sides: list[Side], tokens: int = TOKENS) -> Split | Whole:
    return choose(sides, tokens, alone(sides, tokens))


def test_a_long_prompt_pays_for_its_way() -> None:
    split = chosen([decode(), prefill()])
    assert isinstance(split, Split)
    assert (split.prefill, split.scores[0].name, split.takers) == (1, "p", ("d",))
    # A block is computed while the others load, and then the first token of the reply.
    assert split.hand_over_s == pytest.approx(CALLS_S + (TOKENS - 16) * 2e-5 + 1e-3)
    harm_s = DECODE * KEPT_FREE * 17e-3
    assert split.total_s == pytest.approx(TOKENS * 1e-3 + split.hand_over_s + harm_s)
    assert split.alone.cost_s == pytest.approx(TOKENS * 1e-3 * (1 + DECODE * KEPT_FREE))
    assert "p computes the prompt, then d takes over in 42.7 ms" in split.explain()


def test_a_short_remainder_is_computed_where_the_answer_is() -> None:
    assert chosen([decode(), prefill()], 32) is Whole.DEARER
    held = decode(own_tokens=1_584)
    assert chosen([held, prefill()]) is Whole.DEARER
    assert chosen([decode(sources=[ARENA._replace(until_tokens=1_584)]), prefill()]) is Whole.DEARER


def test_a_queue_of_prompts_is_worse_than_a_delayed_answer() -> None:
    busy = prefill(queued=Work.of(2_000, 0))
    assert chosen([decode(), busy]) is Whole.DEARER
    split = chosen([decode(), busy, prefill("q")])
    assert isinstance(split, Split)
    assert split.scores[0].name == "q"


def test_the_way_between_hosts_is_never_taken() -> None:
    assert chosen([decode(), prefill(host="g")]) is Whole.OTHER_HOST
    assert chosen([decode(host=""), prefill(host="")]) is Whole.OTHER_HOST
    assert chosen([decode(arena=None), prefill()]) is Whole.OTHER_HOST
    split = chosen([decode("far", "g"), decode("near", running=4 * KEPT_FREE), prefill()])
    assert isinstance(split, Split)
    assert split.takers == ("near",)


def test_roles_say_who_does_what() -> None:
    both = side("b", WorkerRole.BOTH, running=KEPT_FREE)
    assert chosen([both, decode()]) is Whole.NO_PREFILL
    split = chosen([both, prefill()])
    assert isinstance(split, Split)
    assert split.takers == ("b",)


def test_what_a_slow_arena_brings_is_computed_instead() -> None:
    slow = ARENA._replace(s_per_token=5e-3)
    split = chosen([decode(arena=slow), prefill()])
    assert split is Whole.DEARER  # computed twice it costs more than once


def test_a_prompt_without_a_block_has_nothing_to_hand_over() -> None:
    assert chosen([decode(), prefill()], 15) is Whole.SHORT


def test_answers_are_delayed_by_role() -> None:
    load = Loaded(running=3, waiting=1)
    assert delayed(load) == 4
    assert delayed(replace(load, role=WorkerRole.PREFILL)) == 0
    assert delayed(replace(load, role=WorkerRole.DECODE)) == 4 + KEPT_FREE


ROOT = Root(bytes(32))
NAMES = [BlockName(number.to_bytes(32, "big")) for number in range(1, 101)]


class Cluster:
    """Workers by role on hosts with a cache node each, seen through a real view."""

    def __init__(self, **roles: str) -> None:
        """Each keyword is a worker: `ROLE@HOST`."""
        self.view = ClusterView()
        self.placement = Placement(self.view, Bookings(lifetime_ms=1e9))
        members = []
        for name, text in roles.items():
            role, _, host = text.partition("@")
            members.append(Member("worker", name, "a:1", host))
            self.follow(name, TierKind.HBM, host)
            self.say(name, WorkerRole(role))
        for host in sorted({member.host for member in members}):
            members.append(Member("node", f"node-{host}", "a:2", host))
            self.follow(f"node-{host}", TierKind.DRAM, host)
        self.placement.members = Members.of(members)

    def follow(self, name: str, tier: TierKind, host: str) -> None:
        self.view.follow(name, host=host, now_ms=0.0)
        for event in (Began(name, 1, 0, (tier,), host), Changed(ROOT, tier, []), Ended(0)):
            self.view.apply(name, event, 0.0)

    def say(self, name: str, role: WorkerRole, **load: object) -> None:
        rates = (LoadRate(TierKind.DRAM, 2e-5),)
        said = Loaded(prefill_tokens_per_s=1_000, load_rates=rates, role=role, **load)  # type: ignore[arg-type]
        self.view.apply(name, said, 0.0)

    def decide(self, whole: Whole | None = None, **fields: object) -> Decision | None:
        prompt = Prompt(ROOT, NAMES, TOKENS, whole=whole, **fields)  # type: ignore[arg-type]
        return self.placement.decide(prompt, 0.0)


def test_a_decision_names_both_workers_and_says_why() -> None:
    decision = Cluster(d="decode@h", p="prefill@h").decide()
    assert decision is not None
    assert decision.split is not None
    assert (decision.worker, decision.split.takers) == ("p", ("d",))
    assert decision.whole is None
    assert decision.excluded == {}
    lines = decision.explanation.splitlines()
    assert lines[0].startswith("p: 1600.0 ms")
    assert lines[1].startswith("d: 1600.0 ms")
    assert lines[2].startswith("split: p computes the prompt, then d takes over")


@pytest.mark.parametrize("whole", [Whole.CALLER, Whole.NO_STORE, Whole.NO_READ, Whole.HAND_OVER])
def test_what_must_stay_whole_goes_to_one_that_answers(whole: Whole) -> None:
    decision = Cluster(d="decode@h", p="prefill@h").decide(whole)
    assert decision is not None
    assert (decision.worker, decision.split, decision.whole) == ("d", None, whole)
    assert decision.excluded == {"p": "gives first tokens only"}
    assert f"not split: {whole}" in decision.explanation


def test_blocks_that_are_not_kept_are_never_handed_over() -> None:
    decision = Cluster(d="decode@h", p="prefill@h").decide(keeps=False)
    assert decision is not None
    assert (decision.worker, decision.whole) == ("d", Whole.NO_STORE)


def test_a_single_token_is_the_prefill_workers() -> None:
    decision = Cluster(d="decode@h", p="prefill@h").decide(Whole.FIRST_TOKEN)
    assert decision is not None
    assert (decision.worker, decision.split) == ("p", None)


def test_who_only_computes_prompts_never_answers() -> None:
    assert Cluster(p="prefill@h").decide() is None
    assert Cluster(p="prefill@h").decide(Whole.FIRST_TOKEN) is not None


def test_whoever_is_left_serves() -> None:
    cluster = Cluster(d="decode@h", p="prefill@h")
    decision = cluster.decide(exclude={"p"})
    assert decision is not None
    assert (decision.worker, decision.whole) == ("d", Whole.NO_PREFILL)
    cluster = Cluster(d="decode@h", p="prefill@g")
    decision = cluster.decide()
    assert decision is not None
    assert (decision.worker, decision.whole) == ("d", Whole.OTHER_HOST)


def test_an_arena_whose_node_is_gone_carries_nothing() -> None:
    cluster = Cluster(d="decode@h", p="prefill@h")
    cluster.view.forget("node-h")
    decision = cluster.decide()
    assert decision is not None
    assert (decision.worker, decision.whole) == ("d", Whole.OTHER_HOST)


def test_without_roles_nothing_is_said_of_splits() -> None:
    decision = Cluster(a="both@h", b="both@h").decide()
    assert decision is not None
    assert (decision.split, decision.whole) == (None, None)
    assert "split" not in decision.explanation
