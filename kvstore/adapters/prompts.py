"""What a request of the OpenAI API asks a model to read: the tokens that its engine will see.

An engine names blocks by token ids, so a router before it has to make the same ones: from the
model's own tokenizer and chat template. Where they differ (images, an engine's own template), the
names differ from there on, and the router sees fewer hits than there are; never others.

Without a tokenizer the text itself stands in, four bytes a token: nothing that engines publish is
named so, but prompts that begin alike are still seen to, while they are in flight.
"""

import asyncio
import inspect
import json
from array import array
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, Protocol

from kvstore.core.errors import BadInput
from kvstore.core.limits import MAX_EXTRA_KEY_BYTES, MAX_PROMPT_TOKENS
from kvstore.core.names import pack_tokens

INLINE_CHARACTERS: Final = 2_048
"""Up to this length a text is tokenised in place (under a millisecond); longer in a thread."""

Turn = Mapping[str, Any]


class Tokenizer(Protocol):
    """Makes token ids as the engine does. Both may take long; both raise `BadInput`."""

    def text(self, text: str) -> Sequence[int]:
        """Return the ids of a text, with the special tokens that the model begins with."""
        ...

    def conversation(self, turns: Sequence[Turn], options: Mapping[str, Any]) -> Sequence[int]:
        """Return the ids of a conversation up to where the assistant speaks."""
        ...


class ModelTokenizer:
    """The tokenizer and chat template in a model's directory; raises `BadInput` naming it."""

    def __init__(self, path: Path) -> None:
        try:
            # Slow to import, and only who reads text needs it.
            from transformers import AutoTokenizer
        except ImportError as error:
            raise BadInput(
                f"--tokenizer needs {error.name}: pip install kvstore-llm[gateway]"
            ) from error
        try:
            self._tokenizer: Any = AutoTokenizer.from_pretrained(str(path), local_files_only=True)
        except (OSError, ValueError, KeyError) as error:
            raise BadInput(f"{path}: no readable tokenizer: {error}") from error
        # A request may set variables of the template, and never arguments of the call.
        self._own = set(inspect.signature(self._tokenizer.apply_chat_template).parameters)

    def text(self, text: str) -> Sequence[int]:
        try:
            ids: list[int] = self._tokenizer.encode(text)
        except (TypeError, ValueError) as error:  # half a character is no text to it
            raise BadInput(f"prompt: the tokenizer refuses it: {error}") from error
        return ids

    def conversation(self, turns: Sequence[Turn], options: Mapping[str, Any]) -> Sequence[int]:
        from jinja2 import TemplateError

        tools = options.get("tools")
        chosen = options.get("chat_template_kwargs")
        variables = {
            name: value
            for name, value in (chosen.items() if isinstance(chosen, dict) else ())
            if name not in self._own and isinstance(value, bool | int | float | str)
        }
        try:
            rendered = self._tokenizer.apply_chat_template(
                [dict(turn) for turn in turns],
                tools=tools if isinstance(tools, list) and tools else None,
                tokenize=False,
                add_generation_prompt=options.get("add_generation_prompt") is not False,
                **variables,
            )
            ids: list[int] = self._tokenizer.encode(rendered, add_special_tokens=False)
        except (
            TemplateError,
            ArithmeticError,
            AttributeError,
            LookupError,
            RecursionError,
            TypeError,
            ValueError,
        ) as error:  # templates are programs of others, and get what anybody sends
            raise BadInput(f"messages: the chat template refuses them: {error}") from error
        return ids


@dataclass(frozen=True, slots=True)
class Reading:
    """A prompt, as far as it could be read."""

    tokens: bytes
    """Packed u32: the model's ids, or bytes of the text four at a time."""
    exact: bool
    """Whether they are ids that an engine sees."""
    model: str = ""
    salt: str = ""
    """vLLM's `cache_salt`: goes into the first block's name."""

    @property
    def count(self) -> int:
        """Return how many tokens there are, or are likely to be."""
        return len(self.tokens) // 4


class PromptReader:
    """Reads bodies of requests. Bodies come from anybody: nothing in them is an error here."""

    def __init__(self, tokenizer: Tokenizer | None = None) -> None:
        self._tokenizer = tokenizer

    async def read_body(self, body: bytes) -> Reading | None:
        """Return the prompt in a JSON body; None where there is none that can be read."""
        try:
            request = json.loads(body)
        except (ValueError, RecursionError):
            return None
        return await self.read(request) if isinstance(request, dict) else None

    async def read(self, request: Mapping[str, Any]) -> Reading | None:
        """Return the prompt of a decoded request; None where there is none.

        Of a batch of prompts it is the first: one request goes to one place.
        """
        prompt = request.get("messages", request.get("prompt", request.get("input")))
        if isinstance(prompt, list) and prompt and isinstance(prompt[0], list | str):
            prompt = prompt[0]
        try:
            tokens, exact = await self._tokens(prompt, request)
        except BadInput:  # the engine will refuse it too, and knows better why
            return None
        if not tokens:
            return None
        return Reading(
            tokens[: MAX_PROMPT_TOKENS * 4], exact, _text(request, "model"),
            _text(request, "cache_salt"),
        )  # fmt: skip

    async def _tokens(self, prompt: object, request: Mapping[str, Any]) -> tuple[bytes, bool]:
        if isinstance(prompt, str):
            if self._tokenizer is None:
                return _as_text(prompt), False
            ids = await _somewhere(len(prompt), self._tokenizer.text, prompt)
            return _packed(ids), True
        if not isinstance(prompt, list) or not prompt:
            return b"", False
        if isinstance(prompt[0], int):
            return pack_tokens(prompt), True
        turns = [_turn(one) for one in prompt if isinstance(one, dict)]
        if self._tokenizer is None:
            return _as_text("".join(f"{t['role']}\n{t['content']}\n" for t in turns)), False
        size = sum(len(turn["content"]) for turn in turns)
        ids = await _somewhere(size, self._tokenizer.conversation, turns, request)
        return _packed(ids), True


async def _somewhere(size: int, work: Any, *arguments: Any) -> Sequence[int]:
    if size <= INLINE_CHARACTERS:
        return work(*arguments)  # type: ignore[no-any-return]
    return await asyncio.to_thread(work, *arguments)


def _turn(message: dict[str, Any]) -> dict[str, Any]:
    """Return a message whose content is text; parts that are none (images) are left out."""
    content = message.get("content")
    if isinstance(content, list):
        parts = [part.get("text") for part in content if isinstance(part, dict)]
        content = "".join(part for part in parts if isinstance(part, str))
    return message | {
        "role": str(message.get("role", "")), "content": content if isinstance(content, str) else ""
    }  # fmt: skip


def _packed(ids: Sequence[int]) -> bytes:
    return array("I", ids).tobytes()


def _as_text(text: str) -> bytes:
    data = text.encode("utf-8", "replace")
    return data + bytes(-len(data) % 4)


def _text(request: Mapping[str, Any], field: str) -> str:
    value = request.get(field)
    if not isinstance(value, str):
        return ""
    try:
        return value if len(value.encode()) <= MAX_EXTRA_KEY_BYTES else ""
    except UnicodeEncodeError:  # JSON can escape half a character
        return ""
