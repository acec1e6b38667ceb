"""Calls in text: told of in prompts, held to by a grammar, read out again in any pieces."""

import json
import random

import pytest
from kvworkers.frontends.messages import Message, Tool, ToolCall
from kvworkers.frontends.toolcalls import (
    CallReader,
    as_text,
    as_turns,
    calls_shape,
    instructions,
)

CITY = Tool(
    "get_weather",
    "Says how the weather is.",
    {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]},
)
CLOCK = Tool("clock", "", {"type": "object", "properties": {}, "additionalProperties": False})
CALL = """<tool_call>
{"name": "get_weather", "arguments": {"city": "Ly}\\n</tool_call>on"}}
</tool_call>"""
OTHER = '<tool_call>\n{"name": "clock", "arguments": {}}\n</tool_call>'


def read(text: str, cuts: list[int]) -> tuple[str, list[tuple[str, str]]]:
    """Return what a reply says and calls when it comes in pieces that end at `cuts`."""
    reader, said, calls = CallReader(), "", list[tuple[str, str]]()
    ends = [*sorted(cuts), len(text)]
    pieces = [text[a:b] for a, b in zip([0, *ends], ends, strict=False)]
    for heard in [*map(reader.push, pieces), reader.finish()]:
        said += heard.text
        for index, name, arguments in heard.calls:
            if name:
                assert index == len(calls)
                calls.append((name, ""))
            else:
                calls[index] = (calls[index][0], calls[index][1] + arguments)
    assert reader.calls == len(calls)
    return said, calls


LYON = ("get_weather", '{"city": "Ly}\\n</tool_call>on"}')


@pytest.mark.parametrize(
    ("text", "said", "calls"),
    [
        ("Hello <b>there</b>\n", "Hello <b>there</b>\n", []),
        ("", "", []),
        ("  \n", "  \n", []),
        (CALL, "", [LYON]),
        (f"Let me see.\n{CALL}\n{OTHER}\n", "Let me see.", [LYON, ("clock", "{}")]),
        (f"{CALL}\nThat is it.", "\nThat is it.", [LYON]),
        ("a <tool_cal", "a <tool_cal", []),
        ('<tool_call>\n{"name": "clo', '<tool_call>\n{"name": "clo', []),
        (CALL[:-15], "", [(LYON[0], LYON[1][:-1])]),
    ],
)
def test_text_and_calls_are_told_apart_however_they_come(
    text: str, said: str, calls: list[tuple[str, str]]
) -> None:
    dice = random.Random(7)
    for count in (0, 1, 3, 10, len(text)):
        cuts = [dice.randint(0, len(text)) for _ in range(count)]
        assert read(text, cuts) == (said, calls)
    assert read(text, list(range(len(text)))) == (said, calls)


def test_a_system_message_tells_of_tools_where_the_template_does_not() -> None:
    messages = [
        Message("user", "Weather?"),
        Message("assistant", "", (ToolCall("get_weather", {"city": "Köln"}),)),
        Message("tool", "rain"),
    ]
    turns = as_text(messages, [CITY])
    assert [turn["role"] for turn in turns] == ["system", "user", "assistant", "user"]
    assert turns[0]["content"] == instructions([CITY])
    assert json.dumps(CITY.parameters) in turns[0]["content"]
    assert turns[2]["content"] == (
        '<tool_call>\n{"name": "get_weather", "arguments": {"city": "Köln"}}\n</tool_call>'
    )
    assert turns[3]["content"] == "<tool_response>\nrain\n</tool_response>"
    said, calls = read(turns[2]["content"], [])
    assert (said, calls) == ("", [("get_weather", '{"city": "Köln"}')])
    kept = as_text([Message("system", "Be brief."), *messages], [CITY])
    assert kept[0]["content"] == "Be brief.\n\n" + instructions([CITY])
    assert len(kept) == 4
    plain = as_text([Message("tool", "rain")], [])
    assert plain == [{"role": "tool", "content": "rain"}], "without tools nothing is changed"


def test_a_template_that_knows_tools_gets_the_calls_themselves() -> None:
    turns = as_turns([Message("assistant", "a", (ToolCall("f", {"x": 1}),)), Message("tool", "b")])
    assert turns == [
        {
            "role": "assistant", "content": "a",
            "tool_calls": [{"type": "function", "function": {"name": "f", "arguments": {"x": 1}}}],
        },
        {"role": "tool", "content": "b"},
    ]  # fmt: skip


def test_the_shape_names_each_tool_s_schema() -> None:
    shape = calls_shape([CITY, CLOCK], required=False, parallel=True)
    assert shape.schemas == (
        ("tools.0.function.parameters", CITY.parameters),
        ("tools.1.function.parameters", CLOCK.parameters),
    )
    only = calls_shape([CITY, CLOCK], required=True, parallel=False, only="clock")
    assert "get_weather" not in only.grammar and "clock" in only.grammar
