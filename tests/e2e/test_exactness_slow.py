"""At least forty real prompts, each held against `transformers.generate`, in five situations.

cold            the first time a cluster sees the prompt
cached          the same prompt again
other worker    straight at the worker that did not compute it
evicted         in a cluster whose arena and pages are far too small
after a restart the node was killed in between
"""

import os
import signal
from collections.abc import Iterator

import pytest
from kvworkers.demo.script import QUESTIONS, document

from tests.cluster_process import ClusterProcess, cluster_process, eventually
from tests.exactness import Exactness, Reference
from tests.inference_client import Said, generate, run_worker

pytestmark = [pytest.mark.e2e, pytest.mark.slow, pytest.mark.timeout(900)]

REPLY_TOKENS = 12
OPENING_WORDS = 80

SCRIPTS = (
    "Wie heißt der Fluß, der durch Köln fließt?",
    "東京はどこにありますか。",
    "Где находится Москва?",
    "Où se rencontrent le Rhône et la Saône ? Réponds brièvement.",
    "🌊🌙 → what do these two signs stand for?",
    "ما هو المد والجزر؟",
)


def forty_prompts(reference: Reference) -> dict[str, list[int]]:
    """Return prompts with shared openings, branches, block edges, other scripts and tiny ones."""
    found: dict[str, list[int]] = {}
    for name, questions in QUESTIONS.items():
        system = ("system", " ".join(document(name).split()[:OPENING_WORDS]))
        for number, question in enumerate(questions):
            found[f"{name} {number}"] = reference.chat(system, ("user", question))
        first = ("user", questions[0])
        for number, answer in enumerate(("Yes.", "No.", "Yes, and more than once.")):
            found[f"{name} branch {number}"] = reference.chat(
                system, first, ("assistant", answer), ("user", questions[1])
            )
    base = found["tides 0"]
    for tokens in (16, 17, 31, 32, 33, 48, 64):
        found[f"{tokens} tokens"] = base[:tokens]
    for text in SCRIPTS:
        found[text] = reference.chat(("user", text))
    for text in ("Hi", "Rivers run", "The sea rises because"):
        found[text] = reference.tokenizer(text, add_special_tokens=False)["input_ids"]
    return found


@pytest.fixture(scope="module")
def expected(reference: Reference) -> dict[str, tuple[list[int], list[int]]]:
    """Every prompt with the plain model's reply."""
    found = forty_prompts(reference)
    assert len(found) >= 40
    return {name: (tokens, reference.reply(tokens, REPLY_TOKENS)) for name, tokens in found.items()}


@pytest.fixture(scope="module")
def tiny() -> Iterator[ClusterProcess]:
    """A cluster that forgets: 90 blocks in the arena, 45 pages in each worker."""
    with cluster_process("--arena", "64MiB", "--pool", "32MiB") as running:
        yield running


Expected = dict[str, tuple[list[int], list[int]]]


def check_all(
    situation: str, expected: Expected, exactness: Exactness, said: dict[str, Said]
) -> None:
    for name, (prompt, reply) in expected.items():
        tokens = [t for t in said[name].tokens if t not in exactness.reference.ends]
        exactness.check(f"{situation}: {name}", prompt, reply, tokens)


def ask_all(cluster: ClusterProcess, expected: Expected, *, cache: bool = True) -> dict[str, Said]:
    return {
        name: generate(cluster.grpc, prompt, max_tokens=REPLY_TOKENS, cache=cache)
        for name, (prompt, _) in expected.items()
    }


def cached_tokens(said: dict[str, Said]) -> int:
    return sum(s.cache.hbm_tokens + s.cache.dram_tokens for s in said.values())


def test_cold_and_cached(cluster: ClusterProcess, expected: Expected, exactness: Exactness) -> None:
    without = ask_all(cluster, expected, cache=False)
    assert cached_tokens(without) == 0
    check_all("without a cache", expected, exactness, without)
    check_all("cold", expected, exactness, ask_all(cluster, expected))
    cached = ask_all(cluster, expected)
    check_all("cached", expected, exactness, cached)
    whole = sum((len(prompt) - 1) // 16 * 16 for prompt, _ in expected.values())
    assert cached_tokens(cached) >= 0.95 * whole


def test_on_the_other_worker(
    cluster: ClusterProcess, expected: Expected, exactness: Exactness
) -> None:
    """Each prompt straight at both workers: one of them has not computed it."""
    from_arena = 0
    for worker in ("worker-0", "worker-1"):
        said = {
            name: run_worker(cluster.address(worker), prompt, max_tokens=REPLY_TOKENS)
            for name, (prompt, _) in expected.items()
        }
        check_all(worker, expected, exactness, said)
        from_arena += sum(s.cache.dram_tokens for s in said.values())
    assert from_arena > 0


def test_after_eviction(tiny: ClusterProcess, expected: Expected, exactness: Exactness) -> None:
    for round_number in range(2):
        check_all(f"evicted {round_number}", expected, exactness, ask_all(tiny, expected))


def test_after_the_node_was_killed(
    tiny: ClusterProcess, expected: Expected, exactness: Exactness
) -> None:
    (node,) = tiny.pids("kvstore.service.node")
    os.kill(node, signal.SIGKILL)
    during = dict(list(expected.items())[:4])
    check_all("node away", during, exactness, ask_all(tiny, during))
    eventually(
        lambda: [pid for pid in tiny.pids("kvstore.service.node") if pid != node],
        what="the keeper starts another node",
    )
    check_all("after a restart", expected, exactness, ask_all(tiny, expected))
