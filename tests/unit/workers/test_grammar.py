"""Where a reply stands in its grammar: what may come next, what is remembered, what is refused.

Reaches `kvworkers.few_threads`.
"""

import asyncio
import json
import threading
from pathlib import Path
from typing import Any

import pytest
import torch
from kvworkers.engine import grammar as module
from kvworkers.engine.grammar import Following, Grammars
from kvworkers.engine.sampling import Sampler, SamplingParams
from kvworkers.frontends.grammars import json_shape
from kvworkers.frontends.messages import Tool
from kvworkers.frontends.toolcalls import calls_shape

from kvstore.core.errors import BadInput, Refused, TooLarge, Unsupported
from tests.byte_tokenizer import END, make_byte_tokenizer
from tests.patience import PATIENCE_S

VOCAB = 272
CITY = {
    "type": "object",
    "properties": {"city": {"type": "string"}},
    "required": ["city"],
    "additionalProperties": False,
}
TOOLS = [Tool("weather", "", CITY), Tool("clock", "", {})]
WEATHER = '<tool_call>\n{"name": "weather", "arguments": {"city": "Lyon"}}\n</tool_call>'
CLOCK = '<tool_call>\n{"name": "clock", "arguments": {}}\n</tool_call>'


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_byte_tokenizer(tmp_path_factory.mktemp("grammar"))


@pytest.fixture
def grammars(model: Path) -> Grammars:
    return Grammars(model, vocab_size=VOCAB, eos_token_ids=[END])


def allowed(following: Following) -> set[int]:
    masked = following.allow(torch.zeros(VOCAB))
    return set(torch.nonzero(masked.isfinite()).flatten().tolist())


def follow_text(following: Following, text: str) -> int:
    """Return how many bytes of `text` may be said, one after the other."""
    for at, byte in enumerate(text.encode()):
        if byte not in allowed(following):
            return at
        following.take(byte)
    return len(text.encode())


async def test_only_what_follows_may_come_next(grammars: Grammars) -> None:
    following = await grammars.follow('start: "ja" | "nein" | "jo"', [])
    assert allowed(following) == {ord("j"), ord("n")}
    following.take(ord("j"))
    assert allowed(following) == {ord("a"), ord("o")}
    following.take(ord("o"))
    assert allowed(following) == {END}
    assert not following.error
    later = await grammars.follow('start: "ja" | "nein" | "jo"', list(b"nei"))
    assert allowed(later) == {ord("n")}, "each reply has a place of its own"


async def test_the_sampler_chooses_among_what_may_come(grammars: Grammars) -> None:
    logits = torch.zeros(VOCAB)
    logits[ord("n")], logits[ord("x")] = 5.0, 50.0
    ways: list[dict[str, Any]] = [
        {},
        {"temperature": 1.0, "seed": 1, "top_k": 1},
        {"temperature": 1, "top_p": 1e-6},
    ]
    for how in ways:
        following = await grammars.follow('start: "ja" | "nein"', [])
        params = SamplingParams(max_tokens=9, constraint=following, logprobs=1, **how)
        assert not params.only_id
        sampler = Sampler(params)
        sampled = sampler.sample(logits, position=0)
        assert sampled.token == ord("n") and sampled.logprobs is not None
        assert sampled.logprobs.token_ids[1] == ord("x"), "the model's own, before any form"
        assert sampler.sample(logits, position=1).token == ord("e"), "it went on behind its choice"


@pytest.mark.parametrize(
    ("text", "good"),
    [
        ("Hello, <b>you</b>!", None),
        (WEATHER, None),
        (f"Let me see.\n{WEATHER}\n{CLOCK}\nDone", None),
        (WEATHER.replace("weather", "whether"), 23),
        (WEATHER.replace('"city"', '"town"'), 47),
        (WEATHER.replace('"Lyon"', "7"), 54),
        (CLOCK.replace("{}", "[]"), CLOCK.index("{}")),
    ],
)
async def test_a_call_has_its_form_wherever_it_begins(
    grammars: Grammars, text: str, good: int | None
) -> None:
    shape = calls_shape(TOOLS, required=False, parallel=True)
    following = await grammars.follow(shape.grammar, [])
    assert follow_text(following, text) == (len(text.encode()) if good is None else good)
    assert good is not None or END in allowed(following)


async def test_calls_may_be_required_or_alone(grammars: Grammars) -> None:
    for required, parallel, text, good in (
        (True, True, f"{WEATHER}\n{CLOCK}", None),
        (True, False, f"{WEATHER}\n{CLOCK}", len(WEATHER)),
        (True, True, "Hello", 0),
        (False, False, f"a {WEATHER} b <tool_call>", len(f"a {WEATHER} b <tool_call")),
    ):
        shape = calls_shape(TOOLS, required=required, parallel=parallel)
        following = await grammars.follow(shape.grammar, [])
        assert follow_text(following, text) == (len(text) if good is None else good)


async def test_a_model_cannot_stay_in_white_space(grammars: Grammars) -> None:
    following = await grammars.follow(json_shape(CITY, "x").grammar, [])
    assert follow_text(following, "{\n" + " " * 100) <= 40
    pretty = await grammars.follow(json_shape(CITY, "x").grammar, [])
    text = json.dumps({"city": "Lyon"}, indent=4)
    assert follow_text(pretty, text) == len(text)


async def test_a_reply_that_left_its_grammar_ends_and_says_so(grammars: Grammars) -> None:
    following = await grammars.follow('start: "ja"', [])
    following.take(ord("x"))
    assert allowed(following) == {END}
    assert following.error
    with pytest.raises(BadInput, match="does not follow"):
        await grammars.follow('start: "ja"', list(b"x"))


@pytest.mark.parametrize(
    ("text", "error"),
    [("start: nowhere", BadInput), ("", BadInput), ("x" * (1 << 19), TooLarge)],
    ids=["unknown", "empty", "long"],
)
async def test_what_is_no_grammar_is_refused(
    grammars: Grammars, text: str, error: type[Exception]
) -> None:
    with pytest.raises(error):
        await grammars.follow(text, [])


async def test_a_model_that_cannot_follow_says_so(model: Path, tmp_path: Path) -> None:
    with pytest.raises(Unsupported, match="tokenizer"):
        await Grammars(tmp_path, vocab_size=VOCAB, eos_token_ids=[END]).follow('start: "a"', [])
    with pytest.raises(Unsupported, match="ends a reply"):
        await Grammars(model, vocab_size=VOCAB, eos_token_ids=[]).follow('start: "a"', [])


async def test_a_reply_so_far_is_gone_through_off_the_loop(grammars: Grammars) -> None:
    asked_in = list[int]()

    class Matcher:
        def deep_copy(self) -> "Matcher":
            return self

        def consume_tokens(self, tokens: list[int]) -> bool:
            asked_in.append(threading.get_ident())
            return tokens == [106]

    grammars._compiled["a"] = Matcher()  # type: ignore[assignment]
    await grammars.follow("a", [])
    assert not asked_in
    await grammars.follow("a", [106])
    assert len(asked_in) == 1 and threading.get_ident() not in asked_in


async def test_compiling_is_done_once_off_the_loop_and_for_few_at_a_time(
    grammars: Grammars, monkeypatch: pytest.MonkeyPatch
) -> None:
    compiled, goes_on = list[str](), threading.Event()
    plain = grammars._compile

    def held(text: str) -> Any:
        compiled.append(text)
        assert goes_on.wait(PATIENCE_S)
        return plain(text)

    monkeypatch.setattr(grammars, "_compile", held)
    monkeypatch.setattr(module, "COMPILE_SECONDS", 0.05)
    texts = [f'start: "{letter}"' for letter in "abc"]
    waiting = [asyncio.create_task(grammars.follow(text, [])) for text in texts]
    done, _ = await asyncio.wait(waiting, timeout=PATIENCE_S)  # the loop goes on
    assert len(done) == 3 and len(compiled) == module.COMPILERS
    assert all(isinstance(task.exception(), Refused) for task in done)
    goes_on.set()
    monkeypatch.setattr(module, "COMPILE_SECONDS", 10)
    monkeypatch.setattr(module, "KEPT", 2)
    compiled.clear()
    for text in (texts[0], texts[0], texts[1], texts[0], texts[2], texts[1]):
        await grammars.follow(text, [])
    assert compiled == [texts[0], texts[1], texts[2], texts[1]]
