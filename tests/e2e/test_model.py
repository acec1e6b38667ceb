"""The real default model: paged logits and greedy text against plain transformers."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from kvworkers.models import LoadedModel, load_model

from tests.model_fixture import make_step, model_dir, plain_model, poisoned_pages

__all__ = ["model_dir"]

pytestmark = pytest.mark.e2e

NEAR_TIE = 1e-3
QUESTIONS = [
    "What is the capital of France?",
    "Write one sentence about rivers — in plain words. 🌊 Größe, naïve, 日本語.",
    "Count from one to ten, then backwards.",
]


@pytest.fixture(scope="module")
def loaded(model_dir: Path) -> Iterator[LoadedModel]:
    before = torch.get_num_threads()
    yield load_model(model_dir, threads=1)
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def plain(model_dir: Path) -> Any:
    return plain_model(model_dir)


@pytest.fixture(scope="module")
def tokenizer(model_dir: Path) -> Any:
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(model_dir)


def _prompt(tokenizer: Any, *turns: str) -> list[int]:
    roles = ("user", "assistant")
    messages = [{"role": roles[i % 2], "content": text} for i, text in enumerate(turns)]
    text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    return list(tokenizer(text, add_special_tokens=False).input_ids)


def test_the_provisioned_model_describes_itself(loaded: LoadedModel) -> None:
    spec = loaded.spec
    assert spec.name == "SmolLM2-135M-Instruct"
    assert (spec.layers, spec.query_heads, spec.kv_heads, spec.head_dim) == (30, 9, 3, 64)
    assert spec.eos_token_ids == (2,) and spec.max_model_tokens == 8192
    assert spec.layout.block_bytes == 737_280 == 180 * 4096


def test_chunked_ragged_logits_are_the_plain_forwards(
    loaded: LoadedModel, plain: Any, tokenizer: Any
) -> None:
    long = _prompt(tokenizer, " ".join(f"Rule {n}: keep the {n}th page." for n in range(40)))
    short = _prompt(tokenizer, QUESTIONS[1])
    assert len(long) > 300
    with torch.inference_mode():
        wanted = plain(torch.tensor([long])).logits[0]
        other = plain(torch.tensor([short])).logits[0]
    pages = poisoned_pages(loaded, 80)
    order = torch.randperm(80, generator=torch.Generator().manual_seed(1)).tolist()
    mine, theirs = order[:50], order[50:60]
    cut = 16 * (len(long) // 32)
    first = loaded.forward(make_step((long[:cut], 0, mine)), pages)
    both = loaded.forward(make_step((short[:-1], 0, theirs), (long[cut:-1], cut, mine)), pages)
    end = len(long) - 1
    last = loaded.forward(
        make_step((long[end:], end, mine), (short[-1:], len(short) - 1, theirs)), pages
    )
    for got, expected in (
        (first[0], wanted[cut - 1]),
        (both[0], other[-2]),
        (both[1], wanted[-2]),
        (last[0], wanted[-1]),
        (last[1], other[-1]),
    ):
        assert float((got - expected).abs().max()) < 1e-3


def test_greedy_replies_are_those_of_generate(
    loaded: LoadedModel, plain: Any, tokenizer: Any
) -> None:
    """Three prompts decode together in one ragged batch, as in a worker."""
    prompts = [_prompt(tokenizer, question) for question in QUESTIONS]
    new = 24
    pages = poisoned_pages(loaded, 30)
    tables = [list(range(10 * i, 10 * i + 10)) for i in range(3)]
    logits = loaded.forward(
        make_step(*[(p, 0, t) for p, t in zip(prompts, tables, strict=True)]), pages
    )
    replies: list[list[int]] = [[int(row.argmax())] for row in logits]
    for _ in range(new - 1):
        spans = [
            (reply[-1:], len(prompt) + len(reply) - 1, table)
            for prompt, reply, table in zip(prompts, replies, tables, strict=True)
        ]
        for reply, row in zip(replies, loaded.forward(make_step(*spans), pages), strict=True):
            reply.append(int(row.argmax()))
    for prompt, reply in zip(prompts, replies, strict=True):
        _assert_greedy_equal(plain, prompt, reply, new)


def _assert_greedy_equal(plain: Any, prompt: list[int], reply: list[int], new: int) -> None:
    made = plain.generate(
        torch.tensor([prompt]),
        attention_mask=torch.ones(1, len(prompt), dtype=torch.int64),
        max_new_tokens=new,
        do_sample=False,
        output_logits=True,
        return_dict_in_generate=True,
    )
    wanted = made.sequences[0, len(prompt) :].tolist()
    for at, (got, expected) in enumerate(zip(reply, wanted, strict=False)):
        if got == expected:
            continue
        best, second = made.logits[at][0].topk(2).values.tolist()
        assert best - second < NEAR_TIE, f"token {at}: {got}, not {expected}; gap {best - second}"
        return
    assert len(reply) >= len(wanted)
