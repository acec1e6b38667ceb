"""Tools in OpenAI's form: definitions and choices in, calls out. Pure."""

import uuid
from collections.abc import Sequence
from typing import Any, Final, Literal

from pydantic import BaseModel, Field
from pydantic_core import from_json

from kvworkers.frontends.generation import FieldError, Shape
from kvworkers.frontends.messages import Tool, ToolCall
from kvworkers.frontends.toolcalls import CallReader, Heard, calls_shape

MAX_TOOLS: Final = 128
_NO_PARAMETERS: Final[dict[str, Any]] = {
    "type": "object", "properties": {}, "additionalProperties": False
}  # fmt: skip


class FunctionDefinition(BaseModel):
    """A function that the model may call."""

    name: str = Field(pattern="^[a-zA-Z0-9_-]{1,64}$")
    description: str = ""
    parameters: dict[str, Any] | None = None


class ToolDefinition(BaseModel):
    """A tool; only functions are served."""

    type: Literal["function"]
    function: FunctionDefinition

    def tool(self) -> Tool:
        """Return it as a conversation has it."""
        function = self.function
        parameters = _NO_PARAMETERS if function.parameters is None else function.parameters
        return Tool(function.name, function.description, parameters)


class FunctionName(BaseModel):
    """Which function has to be called."""

    name: str


class NamedChoice(BaseModel):
    """A `tool_choice` that names one function."""

    type: Literal["function"]
    function: FunctionName


class CalledFunction(BaseModel):
    """What was called in an earlier turn, its arguments as JSON."""

    name: str = Field(pattern="^[a-zA-Z0-9_-]{1,64}$")
    arguments: str = "{}"


class MessageCall(BaseModel):
    """A call in an earlier turn."""

    type: Literal["function"] = "function"
    function: CalledFunction

    def call(self, place: str) -> ToolCall:
        """Return the call; raises `FieldError` where its arguments are no JSON object."""
        try:
            # Unlike `json.loads` it refuses lone surrogates and what is nested without end.
            arguments = from_json(self.function.arguments or "{}", allow_inf_nan=False)
        except ValueError:
            arguments = None
        if not isinstance(arguments, dict):
            raise FieldError(f"{place}: arguments must be a JSON object, as text", place)
        return ToolCall(self.function.name, arguments)


Choice = Literal["none", "auto", "required"] | NamedChoice


def offered(tools: Sequence[ToolDefinition], choice: Choice | None) -> tuple[Tool, ...]:
    """Return the tools that the model may call; raises `FieldError` naming what does not fit."""
    if len(tools) > MAX_TOOLS:
        raise FieldError(f"{len(tools)} tools; {MAX_TOOLS} allowed", "tools")
    made = tuple(one.tool() for one in tools)
    names = [one.name for one in made]
    for at, name in enumerate(names):
        if name in names[:at]:
            raise FieldError(f"tools.{at}.function.name: {name!r} is there twice", "tools")
        if made[at].parameters.get("type", "object") != "object":
            place = f"tools.{at}.function.parameters.type"
            raise FieldError(f"{place}: arguments are an object", place)
    if choice == "none":
        return ()
    if not made and choice not in (None, "auto"):
        raise FieldError("tool_choice asks for a call and there are no tools", "tool_choice")
    if isinstance(choice, NamedChoice) and choice.function.name not in names:
        raise FieldError(
            f"tool_choice: no tool has the name {choice.function.name!r}", "tool_choice"
        )
    return made


def shape_of(tools: Sequence[Tool], choice: Choice | None, *, parallel: bool) -> Shape | None:
    """Return what a reply has to follow so that its calls fit; None without tools."""
    if not tools:
        return None
    if isinstance(choice, NamedChoice):
        return calls_shape(tools, only=choice.function.name, required=True, parallel=False)
    return calls_shape(tools, required=choice == "required", parallel=parallel)


class SaidAndCalled:
    """One choice of a reply, split into text and calls; for a stream or as a whole."""

    def __init__(self) -> None:
        self._reader = CallReader()
        self.text = ""
        self.calls: list[dict[str, Any]] = []

    def push(self, piece: str, *, last: bool) -> list[dict[str, Any]]:
        """Take in the reply's next text; return the deltas of a stream that it makes."""
        deltas = self._deltas(self._reader.push(piece))
        return deltas + (self._deltas(self._reader.finish()) if last else [])

    def ended(self, reason: str) -> str:
        """Return why the reply ended as clients want it: for its calls, when it has any."""
        return "tool_calls" if self.calls and reason == "stop" else reason

    def _deltas(self, heard: Heard) -> list[dict[str, Any]]:
        deltas: list[dict[str, Any]] = []
        if heard.text:
            self.text += heard.text
            deltas.append({"content": heard.text})
        for index, name, arguments in heard.calls:
            if name:
                begun = {"name": name, "arguments": ""}
                made = {
                    "id": f"call_{uuid.uuid4().hex[:24]}",
                    "type": "function",
                    "function": begun,
                }
                self.calls.append(made)
                delta: dict[str, Any] = {"index": index, **made, "function": dict(begun)}
            else:
                self.calls[index]["function"]["arguments"] += arguments
                delta = {"index": index, "function": {"arguments": arguments}}
            deltas.append({"tool_calls": [delta]})
        return deltas
