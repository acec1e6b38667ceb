"""The model's tokenizer and chat template, off the event loop for long texts."""

import asyncio
import json
from array import array
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Final, ParamSpec, TypeVar

from kvstore.core.errors import BadInput
from kvworkers.frontends.messages import Message, Tool
from kvworkers.frontends.toolcalls import OPENING, as_text, as_turns

INLINE_CHARACTERS: Final = 2_048
"""Up to this length a text is tokenised in place (under a millisecond); longer in a thread."""

Arguments = ParamSpec("Arguments")
Made = TypeVar("Made")


class ChatTokenizer:
    """Renders conversations and turns text into tokens and back.

    Built from the tokenizer files of a model directory; raises `BadInput` naming the directory
    when they cannot be read.
    """

    def __init__(self, path: Path) -> None:
        # Slow to import, and only a process that serves text needs it.
        from transformers import AutoTokenizer

        try:
            self._tokenizer: Any = AutoTokenizer.from_pretrained(str(path), local_files_only=True)
        except (OSError, ValueError, KeyError) as error:
            raise BadInput(f"{path}: no readable tokenizer: {error}") from error
        if not getattr(self._tokenizer, "is_fast", False):
            raise BadInput(f"{path}: needs a tokenizer.json (a fast tokenizer)")
        self._backend: Any = self._tokenizer.backend_tokenizer
        self.eos_token_ids = _eos_token_ids(path) or frozenset(
            token for token in [self._tokenizer.eos_token_id] if token is not None
        )
        """Tokens that end a reply."""
        template = str(getattr(self._tokenizer, "chat_template", None) or "")
        self.takes_tools = "tools" in template and OPENING in template
        """Whether the model's template tells of tools itself, in the form that replies are read in;
        for others their definitions go into the system message."""

    @property
    def vocabulary(self) -> int:
        """Return the number of token ids, added ones included."""
        return int(self._backend.get_vocab_size(with_added_tokens=True))

    async def conversation(
        self, messages: Sequence[Message], tools: Sequence[Tool] = (), *, opened: bool = True
    ) -> "array[int]":
        """Return the prompt of a conversation; `opened`: up to where the assistant speaks.

        Raises `BadInput` when the model's template refuses it.
        """
        size = sum(len(message.content) for message in messages)
        if tools or any(message.calls for message in messages):
            size += INLINE_CHARACTERS + 1  # they are as long as they turn out when written
        return await _somewhere(size, self._conversation, messages, tools, opened)

    async def text(self, text: str, *, special: bool = True) -> "array[int]":
        """Return the tokens of a text; `special`: with the special ones the model starts with."""
        return await _somewhere(len(text), self._text, text, special)

    async def shown(self, tokens: Sequence[int]) -> str:
        """Return the text of token ids, special tokens included."""
        return await _somewhere(len(tokens), self._shown, tokens)

    async def shown_each(self, tokens: Sequence[int]) -> list[str]:
        """Return every token for people, as `show` does."""
        return await asyncio.to_thread(self._shown_each, tokens)

    def decode(self, tokens: Sequence[int]) -> str:
        """Return the text of token ids, special tokens left out."""
        return str(self._backend.decode(list(tokens), skip_special_tokens=True))

    def show(self, token: int) -> str:
        """Return one token for people, special ones included."""
        return str(self._backend.decode([token], skip_special_tokens=False))

    def _conversation(
        self, messages: Sequence[Message], tools: Sequence[Tool], opened: bool
    ) -> "array[int]":
        from jinja2 import TemplateError

        turns = as_turns(messages) if self.takes_tools else as_text(messages, tools)
        given = [tool.as_json() for tool in tools] if self.takes_tools and tools else None
        try:
            rendered = self._tokenizer.apply_chat_template(
                turns, tools=given, tokenize=False, add_generation_prompt=opened
            )
        except TemplateError as error:
            raise BadInput(f"messages: the model's chat template refuses them: {error}") from error
        except ValueError as error:  # the model has no template
            raise BadInput(f"messages: {error}") from error
        # The template wrote the special tokens already.
        return array("I", self._backend.encode(rendered, add_special_tokens=False).ids)

    def _text(self, text: str, special: bool) -> "array[int]":
        return array("I", self._backend.encode(text, add_special_tokens=special).ids)

    def _shown_each(self, tokens: Sequence[int]) -> list[str]:
        shown = {token: self.show(token) for token in set(tokens)}
        return [shown[token] for token in tokens]

    def _shown(self, tokens: Sequence[int]) -> str:
        return str(self._backend.decode(list(tokens), skip_special_tokens=False))


async def _somewhere(
    size: int, work: Callable[Arguments, Made], *args: Arguments.args, **kwargs: Arguments.kwargs
) -> Made:
    """Return what `work` makes of its arguments: here when they are short, else in a thread."""
    if size <= INLINE_CHARACTERS:
        return work(*args, **kwargs)
    return await asyncio.to_thread(work, *args, **kwargs)


def _eos_token_ids(path: Path) -> frozenset[int]:
    """Return what the model's generation settings say ends a reply; empty when they say nothing."""
    for name in ("generation_config.json", "config.json"):
        try:
            said = json.loads((path / name).read_text()).get("eos_token_id")
        except FileNotFoundError:
            continue
        except (OSError, ValueError) as error:
            raise BadInput(f"{path / name}: not readable: {error}") from error
        if said is not None:
            return frozenset(said if isinstance(said, list) else [said])
    return frozenset()
