"""One real cluster: chat, exactness, hits across workers, and faults under load.

The tests run in this order on purpose: the faults come last, and each leaves a cluster that serves.
"""

import os
import signal
import threading
from ipaddress import ip_address
from typing import Any

import httpx
import openai
import pytest
from kvworkers.demo.script import document

from tests.cluster_process import (
    ClusterProcess,
    command_line,
    eventually,
    listening_addresses,
    marked_processes,
)
from tests.exactness import Exactness, Reference
from tests.inference_client import Said, generate, run_worker
from tests.patience import PATIENCE_S

pytestmark = pytest.mark.e2e

REPLY_TOKENS = 12


def opening(name: str, words: int) -> str:
    """Return the first words of one of our documents."""
    return " ".join(document(name).split()[:words])


def without_end(reference: Reference, said: Said) -> list[int]:
    return [token for token in said.tokens if token not in reference.ends]


def live_workers(cluster: ClusterProcess) -> int:
    text = httpx.get(f"{cluster.http}/metrics", timeout=PATIENCE_S).text
    found = [line for line in text.splitlines() if line.startswith('kvstore_workers{state="live"}')]
    return int(float(found[0].split()[-1]))


@pytest.fixture(scope="module")
def client(cluster: ClusterProcess) -> Any:
    with openai.OpenAI(base_url=f"{cluster.http}/v1", api_key="none", timeout=120) as client:
        yield client


def test_the_openai_client_chats_and_sees_what_was_cached(
    cluster: ClusterProcess, client: openai.OpenAI
) -> None:
    assert [model.id for model in client.models.list()] == [cluster.model]
    messages: Any = [
        {"role": "system", "content": opening("moka", 150)},
        {"role": "user", "content": "Who presented the moka pot?"},
    ]
    first = client.chat.completions.create(
        model=cluster.model, messages=messages, max_tokens=12, temperature=0
    )
    reply = first.choices[0].message.content
    assert reply and first.usage is not None
    messages += [
        {"role": "assistant", "content": reply},
        {"role": "user", "content": "And when?"},
    ]
    stream = client.chat.completions.create(
        model=cluster.model,
        messages=messages,
        max_tokens=12,
        temperature=0,
        stream=True,
        stream_options={"include_usage": True},
    )
    chunks = list(stream)
    assert "".join(c.choices[0].delta.content or "" for c in chunks if c.choices)
    usage = chunks[-1].usage
    assert usage is not None and usage.prompt_tokens_details is not None
    cached = usage.prompt_tokens_details.cached_tokens
    assert cached is not None and cached >= (first.usage.prompt_tokens - 1) // 16 * 16


def test_a_default_start_listens_on_loopback_only(cluster: ClusterProcess) -> None:
    listening = listening_addresses(marked_processes(cluster.mark))
    ports = {port for _, port in listening}
    assert {int(cluster.http.rpartition(":")[2]), int(cluster.grpc.rpartition(":")[2])} <= ports
    assert len(ports) > 6, "Ray's own ports are looked at too"
    beyond = {(host, port) for host, port in listening if not ip_address(host).is_loopback}
    assert not beyond


SITUATIONS = (
    "long",
    "same opening",
    "second turn",
    "branch",
    "exactly at a block",
    "one beyond a block",
    "under a block",
    "other scripts",
)


@pytest.fixture(scope="module")
def prompts(reference: Reference) -> dict[str, list[int]]:
    """Eight prompts: shared openings, branches, edges of blocks, other scripts."""
    lyon = ("system", opening("lyon", 120))
    asked = ("user", "What is a traboule?")
    long = reference.chat(lyon, asked)
    short = "Rivers run to the sea"
    found = [
        long,
        reference.chat(lyon, ("user", "Which rivers meet here?")),
        reference.chat(
            lyon, asked, ("assistant", "A covered passage."), ("user", "Who used them?")
        ),
        reference.chat(
            lyon, asked, ("assistant", "A covered passage!"), ("user", "Are there many?")
        ),
        long[: len(long) // 16 * 16],
        long[: len(long) // 16 * 16 + 1][-65:],
        reference.tokenizer(short, add_special_tokens=False)["input_ids"],
        reference.chat(("user", "Grüße aus Köln, 東京, и Москва 🌊! Reply.")),
    ]
    return dict(zip(SITUATIONS, found, strict=True))


@pytest.mark.parametrize("situation", SITUATIONS)
def test_replies_are_exact_cold_and_cached(
    cluster: ClusterProcess,
    reference: Reference,
    exactness: Exactness,
    prompts: dict[str, list[int]],
    situation: str,
) -> None:
    prompt = prompts[situation]
    expected = reference.reply(prompt, REPLY_TOKENS)
    replies = [generate(cluster.grpc, prompt, max_tokens=REPLY_TOKENS) for _ in range(2)]
    for said in replies:
        exactness.check(situation, prompt, expected, without_end(reference, said))
    report = replies[-1].cache
    assert report.hbm_tokens + report.dram_tokens == (len(prompt) - 1) // 16 * 16
    assert report.prompt_tokens == len(prompt)


def test_a_second_worker_takes_the_prefix_out_of_the_arena(
    cluster: ClusterProcess, reference: Reference, exactness: Exactness
) -> None:
    prompt = reference.chat(("system", opening("tides", 120)), ("user", "What is a neap tide?"))
    first = run_worker(cluster.address("worker-0"), prompt, max_tokens=REPLY_TOKENS)
    assert first.cache.computed_tokens == len(prompt)
    whole = (len(prompt) - 1) // 16 * 16

    def second() -> Said | None:
        # Stored off the token path: the other worker may be a moment too early, but never wrong.
        said = run_worker(cluster.address("worker-1"), prompt[: 16 * 4], max_tokens=1)
        return said if said.cache.dram_tokens else None

    eventually(second, what="the first blocks are in the arena")
    said = run_worker(cluster.address("worker-1"), prompt, max_tokens=REPLY_TOKENS)
    assert said.cache.hbm_tokens + said.cache.dram_tokens == whole
    assert said.cache.dram_tokens >= whole - 64
    expected = reference.reply(prompt, REPLY_TOKENS)
    exactness.check("first worker", prompt, expected, without_end(reference, first))
    exactness.check("second worker", prompt, expected, without_end(reference, said))


def test_a_killed_node_costs_no_request_and_gives_its_blocks_back(
    cluster: ClusterProcess, reference: Reference, exactness: Exactness
) -> None:
    asked = [f"Say a word about number {number}." for number in range(6)]
    shared = [
        reference.chat(("system", f"Case {word}. " + opening("handbook", 60)), ("user", word))
        for word in asked
    ]
    for prompt in shared:
        run_worker(cluster.address("worker-0"), prompt, max_tokens=1)
    (node,) = cluster.pids("kvstore.service.node")
    os.kill(node, signal.SIGKILL)
    during = generate(cluster.grpc, shared[0], max_tokens=REPLY_TOKENS)
    expected = reference.reply(shared[0], REPLY_TOKENS)
    exactness.check("while the node is away", shared[0], expected, without_end(reference, during))
    back = eventually(
        lambda: [pid for pid in cluster.pids("kvstore.service.node") if pid != node],
        what="the keeper starts another node",
    )
    assert command_line(back[0])
    remaining = iter(shared[1:])

    def served_again() -> bool:
        prompt = next(remaining, None)
        assert prompt is not None, "no prompt of before was served out of the arena"
        said = run_worker(cluster.address("worker-1"), prompt, max_tokens=REPLY_TOKENS)
        expected = reference.reply(prompt, REPLY_TOKENS)
        exactness.check("after the node", prompt, expected, without_end(reference, said))
        return bool(said.cache.dram_tokens)

    eventually(served_again, what="sealed blocks are served by the next node")


def test_a_worker_killed_in_the_middle_of_a_reply_does_not_change_it(
    cluster: ClusterProcess, reference: Reference, exactness: Exactness
) -> None:
    prompt = reference.chat(("system", opening("lyon", 120)), ("user", "Tell me about Lyon."))
    killed: list[str] = []

    def kill_once(reply: Any, tokens: int) -> None:
        if tokens >= 8 and not killed:
            killed.append(reply.worker)
            os.kill(cluster.first_pid(reply.worker), signal.SIGKILL)

    said = generate(cluster.grpc, prompt, max_tokens=32, heard=kill_once)
    assert killed
    assert said.retries >= 1
    assert said.worker != killed[0]
    expected = reference.reply(prompt, 32)
    exactness.check("killed in the middle", prompt, expected, without_end(reference, said))
    eventually(lambda: live_workers(cluster) == 2, what="Ray brings the worker back")
    controller = next(part["metrics"] for part in cluster.parts if part["name"] == "controller")
    counted = httpx.get(f"http://{controller}/metrics", timeout=PATIENCE_S).text
    assert f'kvstore_cluster_restarts_total{{part="{killed[0]}"}} 1.0' in counted


def test_many_clients_at_once_are_all_answered(
    cluster: ClusterProcess, reference: Reference
) -> None:
    prompt = reference.chat(("system", opening("lyon", 120)), ("user", "Tell me about Lyon."))
    answers: list[list[int]] = []

    def ask() -> None:
        answers.append(generate(cluster.grpc, prompt, max_tokens=8).tokens)

    threads = [threading.Thread(target=ask) for _ in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(PATIENCE_S)
    assert len(answers) == 6
    assert all(answer == answers[0] for answer in answers)
