"""What bodies of requests say: tokens as engines see them, and nothing that can break a router."""

import json
from pathlib import Path
from typing import Any

import pytest
from prometheus_client import CollectorRegistry

from kvstore.adapters.placing import prompt_to_place, root_of
from kvstore.adapters.prompts import INLINE_CHARACTERS, ModelTokenizer, PromptReader, Reading
from kvstore.core.errors import BadInput
from kvstore.core.limits import MAX_PROMPT_TOKENS
from kvstore.core.names import ExtraKey, Root, chain, pack_tokens
from kvstore.observe.metrics import RouterMetrics
from kvstore.router.router import Router
from tests.byte_tokenizer import make_byte_tokenizer

ROOT = Root(bytes(range(32)))
BEGIN = {"<|end|>": 256, "<|system|>": 257, "<|user|>": 258, "<|assistant|>": 259}


@pytest.fixture(scope="module")
def reader(tmp_path_factory: pytest.TempPathFactory) -> PromptReader:
    return PromptReader(ModelTokenizer(make_byte_tokenizer(tmp_path_factory.mktemp("model"))))


def spoken(role: str, text: str) -> list[int]:
    return [BEGIN[f"<|{role}|>"], *text.encode(), 256]


async def read(reader: PromptReader, **request: Any) -> Reading | None:
    return await reader.read_body(json.dumps(request).encode())


async def ids(reader: PromptReader, **request: Any) -> list[int]:
    found = await read(reader, **request)
    assert found is not None and found.exact
    return list(memoryview(found.tokens).cast("I"))


async def test_every_form_of_a_prompt_gives_the_engines_tokens(reader: PromptReader) -> None:
    text, tokens = "The Rhône", list("The Rhône".encode())
    assert await ids(reader, prompt=text) == tokens
    assert await ids(reader, prompt=[text, "another"]) == tokens
    assert await ids(reader, prompt=tokens) == tokens
    assert await ids(reader, prompt=[tokens, [1]]) == tokens
    assert await ids(reader, input=text) == tokens
    long = "z" * (INLINE_CHARACTERS + 1)  # in a thread
    assert await ids(reader, prompt=long) == list(long.encode())


async def test_conversations_go_through_the_models_template(reader: PromptReader) -> None:
    turns = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Why?"}]
    wanted = [*spoken("system", "Be brief."), *spoken("user", "Why?"), 259]
    assert await ids(reader, messages=turns) == wanted
    parts = [{"type": "text", "text": "Wh"}, {"type": "image_url"}, {"type": "text", "text": "y?"}]
    turns[1] = {"role": "user", "content": parts}  # type: ignore[dict-item]
    assert await ids(reader, messages=turns) == wanted
    assert await ids(reader, messages=turns, add_generation_prompt=False) == wanted[:-1]
    # A request may set what a template reads, not how it is called.
    sly = {"chat_template": "{{ 1 }}", "tokenize": True, "enable_thinking": False}
    assert await ids(reader, messages=turns, chat_template_kwargs=sly) == wanted


@pytest.mark.parametrize(
    "body",
    [
        b"", b"{", b"[1]", b'"x"', b"{}", b'{"prompt": ""}', b'{"prompt": []}', b'{"prompt": 5}',
        b'{"prompt": [1, "x"]}', b'{"prompt": [-1]}', b'{"messages": [{"role": "tool"}]}',
        b'{"messages": {}}', b'{"prompt": "\\ud800"}', b"[" * 100_000,
    ],
    ids=range(14),
)  # fmt: skip
async def test_what_cannot_be_read_is_no_prompt_and_no_error(
    reader: PromptReader, body: bytes
) -> None:
    assert await reader.read_body(body) is None


async def test_without_a_tokenizer_the_text_stands_in(reader: PromptReader) -> None:
    blind = PromptReader()
    short, long = await read(blind, prompt="abcdef"), await read(blind, prompt="abcdefghij")
    assert short is not None and long is not None
    assert not short.exact and (short.count, long.count) == (2, 3)
    assert long.tokens.startswith(short.tokens[:4])
    turns = [{"role": "user", "content": "Why?"}, {"role": "assistant", "content": "So."}]
    first, both = await read(blind, messages=turns[:1]), await read(blind, messages=turns)
    assert first is not None and both is not None and both.tokens[:8] == first.tokens[:8]
    assert not first.exact
    exact = await read(blind, prompt=[1, 2])
    assert exact is not None and exact.exact


async def test_model_and_salt_are_bounded(reader: PromptReader) -> None:
    found = await read(reader, prompt="x", model="m", cache_salt="s")
    assert found is not None and (found.model, found.salt) == ("m", "s")
    for odd in (5, "x" * 5_000, "\ud800", None):
        found = await read(reader, prompt="x", model=odd, cache_salt=odd)
        assert found is not None and (found.model, found.salt) == ("", "")
    huge = await read(reader, prompt=[1] * (MAX_PROMPT_TOKENS + 5))
    assert huge is not None and huge.count == MAX_PROMPT_TOKENS


def test_a_directory_without_a_tokenizer_is_named(tmp_path: Path) -> None:
    with pytest.raises(BadInput, match=str(tmp_path)):
        ModelTokenizer(tmp_path)


def test_roots_tell_models_adapters_and_text_apart() -> None:
    base = Reading(b"", True, model="m")
    adapter, text = Reading(b"", True, model="lora"), Reading(b"", False, model="m")
    assert root_of(ROOT, base, {"m"}) == root_of(ROOT, adapter, ()) == ROOT
    assert root_of(ROOT, Reading(b"", True), {"m"}) == ROOT
    roots = {root_of(ROOT, one, {"m"}) for one in (base, adapter, text)}
    assert len(roots) == 3


async def test_prompts_are_named_as_engines_events_are() -> None:
    async with Router(metrics=RouterMetrics(CollectorRegistry())) as router:
        tokens = pack_tokens(range(40))
        plain = prompt_to_place(router, ROOT, Reading(tokens, True))
        assert list(plain.names) == list(chain(ROOT, tokens)) and plain.tokens == 40
        salted = prompt_to_place(router, ROOT, Reading(tokens, True, salt="s"))
        assert list(salted.names) == list(chain(ROOT, tokens, extra_keys=[ExtraKey(0, b"s")]))
        short = prompt_to_place(router, ROOT, Reading(tokens[:8], True, salt="s"))
        nothing = prompt_to_place(router, ROOT, None)
        assert (list(short.names), short.tokens, nothing.tokens) == ([], 2, 1)
