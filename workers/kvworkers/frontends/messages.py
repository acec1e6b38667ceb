"""What a conversation is made of: turns, and the functions that may be called in it."""

from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True, slots=True)
class Tool:
    """A function that a model may ask for."""

    name: str
    description: str
    parameters: dict[str, Any]
    """A JSON schema of its arguments."""

    def as_json(self) -> dict[str, Any]:
        """Return it as templates that take tools know it."""
        function = {
            "name": self.name, "description": self.description, "parameters": self.parameters
        }  # fmt: skip
        return {"type": "function", "function": function}


@dataclass(frozen=True, slots=True)
class ToolCall:
    """A function that an assistant asked for in an earlier turn."""

    name: str
    arguments: dict[str, Any]


@dataclass(frozen=True, slots=True)
class Message:
    """One turn of a conversation."""

    role: str
    content: str
    calls: tuple[ToolCall, ...] = ()
    """What an assistant asked for besides."""
