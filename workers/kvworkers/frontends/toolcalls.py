"""Calls of functions in a reply's text: how a prompt tells of them, how they are read out again.

    <tool_call>
    {"name": "get_weather", "arguments": {"city": "Lyon"}}
    </tool_call>

The grammar holds a model to exactly this form once it has written the opening tag, so that reading
needs no guessing. Pure.
"""

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Final

from kvworkers.frontends.generation import Shape
from kvworkers.frontends.grammars import check_length, embedded
from kvworkers.frontends.messages import Message, Tool, ToolCall
from kvworkers.frontends.text import beginning

OPENING: Final = "<tool_call>"
CLOSING: Final = "</tool_call>"
_END: Final = "}\n" + CLOSING
"""Ends the arguments: in JSON's strings no line ends, so it stands nowhere else."""
_HEAD: Final = re.compile(r'\n\{"name": "([a-zA-Z0-9_-]{1,64})", "arguments": ')
_ANY_TEXT: Final = r"/(.|\n)*/"
_TEXT_WITHOUT_CALL: Final = rf"{_ANY_TEXT} & ~/(.|\n)*{OPENING}(.|\n)*/"


def calls_shape(tools: Sequence[Tool], *, required: bool, parallel: bool, only: str = "") -> Shape:
    """Return the shape of replies that call these tools; `required`: of nothing but calls.

    Without `parallel` there is one call at most; `only` names the one tool that may be called.
    Raises `FieldError` where they are too long.
    """
    places = [f"tools.{at}.function.parameters" for at in range(len(tools))]
    forms = [
        embedded({"type": "object", **tool.parameters}, place)
        for tool, place in zip(tools, places, strict=True)
    ]
    # All of them are checked, those that must not be called as well.
    check_length(sum(len(form) for form in forms), "tools")
    may = [at for at, tool in enumerate(tools) if only in ("", tool.name)]
    rules = []
    for at in may:
        head = json.dumps(f'{{"name": "{tools[at].name}", "arguments": ')
        rules.append(f'call{at}: {head} {forms[at]} "}}"')
    names = " | ".join(f"call{at}" for at in may)
    body = f'"\\n" ( {names} ) "\\n{CLOSING}"'
    if required:
        more = f' ( "\\n{OPENING}" {body} )*' if parallel else ""
        rules.append(f'start: "{OPENING}" {body}{more}')
    else:
        rules.append(f"start: tool{'*' if parallel else '?'} tail")
        rules.append(f"tail: TAIL\nTAIL: {_TEXT_WITHOUT_CALL}")
        rules.append(f'tool: opened {body}\nopened[lazy]: {_ANY_TEXT} "{OPENING}"')
    schemas = tuple((place, tool.parameters) for place, tool in zip(places, tools, strict=True))
    return Shape(grammar="\n".join(["%llguidance {}", *rules]), schemas=schemas, place="tools")


def instructions(tools: Sequence[Tool]) -> str:
    """Return what a system message says of the tools where the model's template does not."""
    functions = "\n".join(json.dumps(tool.as_json()["function"]) for tool in tools)
    return (
        "These functions are there to be called, each described in one line of JSON:\n"
        f"{functions}\n"
        "To call one, answer with its name and its arguments in exactly this form, and wait:\n"
        f'{OPENING}\n{{"name": "NAME", "arguments": {{"ARGUMENT": "VALUE"}}}}\n{CLOSING}\n'
        "What it returns is given to you between <tool_response> and </tool_response>."
    )


def as_turns(messages: Sequence[Message]) -> list[dict[str, Any]]:
    """Return a conversation for a template that takes calls in the form above by itself."""
    turns: list[dict[str, Any]] = []
    for one in messages:
        turns.append({"role": one.role, "content": one.content})
        if one.calls:
            turns[-1]["tool_calls"] = [
                {"type": "function", "function": {"name": call.name, "arguments": call.arguments}}
                for call in one.calls
            ]
    return turns


def as_text(messages: Sequence[Message], tools: Sequence[Tool]) -> list[dict[str, Any]]:
    """Return a conversation for a template that knows turns of text and nothing of tools.

    The system message, a new one where there is none, ends with the instructions.
    """
    if not tools and not any(one.calls for one in messages):
        return [{"role": one.role, "content": one.content} for one in messages]
    turns: list[dict[str, Any]] = []
    for one in messages:
        role, content = one.role, one.content
        if role == "tool":
            role, content = "user", f"<tool_response>\n{content}\n</tool_response>"
        parts = [content] * bool(content) + [_written(call) for call in one.calls]
        turns.append({"role": role, "content": "\n".join(parts)})
    if tools and turns[0]["role"] == "system":
        turns[0]["content"] += "\n\n" + instructions(tools)
    elif tools:
        turns.insert(0, {"role": "system", "content": instructions(tools)})
    return turns


def _written(call: ToolCall) -> str:
    """Return a call as a model writes it."""
    inside = json.dumps({"name": call.name, "arguments": call.arguments}, ensure_ascii=False)
    return f"{OPENING}\n{inside}\n{CLOSING}"


@dataclass(slots=True)
class Heard:
    """What one piece of a reply's text says."""

    text: str = ""
    """Said to the user."""
    calls: list[tuple[int, str, str]] = field(default_factory=list)
    """Of calls, in order: which one it is, its name where it begins here, else more arguments."""


class CallReader:
    """Splits a reply's text, as it comes, into what is said and what is called."""

    def __init__(self) -> None:
        self._held = ""
        self._place = "text"
        self.calls = 0
        """Calls that were begun."""

    def push(self, piece: str) -> Heard:
        """Return what this piece makes known; what could still become a tag is held back."""
        heard, self._held = Heard(), self._held + piece
        while self._step(heard):
            continue
        return heard

    def finish(self) -> Heard:
        """Return what was held back at the end of a reply."""
        held, self._held = self._held, ""
        if self._place == "arguments":
            return Heard(calls=[(self.calls - 1, "", held)] if held else [])
        if self._place == "head":
            return Heard(text=OPENING + held)  # cut off before it was a call
        return Heard(text="" if self.calls and not held.strip() else held)

    def _step(self, heard: Heard) -> bool:
        """Read on to the next tag; False when more text has to come first."""
        if self._place == "text":
            return self._read_text(heard)
        if self._place == "head":
            return self._read_head(heard)
        return self._read_arguments(heard)

    def _read_text(self, heard: Heard) -> bool:
        before, tag, after = self._held.partition(OPENING)
        if tag:
            heard.text += before.rstrip()
            self._place, self._held = "head", after
            return True
        keep = beginning(before, OPENING)
        said = before[: len(before) - keep].rstrip()  # white space may stand before a call
        heard.text += said
        self._held = before[len(said) :]
        return False

    def _read_head(self, heard: Heard) -> bool:
        found = _HEAD.match(self._held)
        if not found:
            return False
        heard.calls.append((self.calls, found[1], ""))
        self.calls += 1
        self._place, self._held = "arguments", self._held[found.end() :]
        return True

    def _read_arguments(self, heard: Heard) -> bool:
        arguments, tag, after = self._held.partition(_END)
        keep = 0 if tag else beginning(arguments, _END)
        more = arguments[: len(arguments) - keep]
        if more:
            heard.calls.append((self.calls - 1, "", more))
        self._held = after if tag else arguments[len(more) :]
        self._place = "text" if tag else "arguments"
        return bool(tag)
