"""Tools on their way through a real HTTP server: what a prompt says of them, what a reply calls."""

import json
from array import array
from typing import Any

import openai
import pytest
from kvworkers.frontends.messages import Tool
from kvworkers.frontends.toolcalls import instructions

from tests.byte_tokenizer import END
from tests.frontend_fixture import Shared
from tests.frontend_fixture import model as model
from tests.frontend_fixture import shared as shared

pytestmark = pytest.mark.asyncio(loop_scope="module")

CLOCK: dict[str, Any] = {"name": "clock", "description": "Tells the time.", "parameters": {}}
TOOLS = [{"type": "function", "function": CLOCK}]
CALL = '<tool_call>\n{"name": "clock", "arguments": {"zone": "Köln"}}\n</tool_call>'
LIST = {"type": "array"}
SAID = f"Let me look.\n{CALL}\n{CALL}"
ARGUMENTS = '{"zone": "Köln"}'


async def ask(shared: Shared, text: str, **fields: Any) -> Any:
    shared.worker.reply = list(text.encode())
    asked: dict[str, Any] = {
        "model": "scripted", "messages": [{"role": "user", "content": "Time?"}], "max_tokens": 400,
        "tools": TOOLS,
    }  # fmt: skip
    return await shared.client.chat.completions.create(**asked | fields)


async def test_text_and_calls_come_apart_for_each_choice(shared: Shared) -> None:
    reply = await ask(shared, SAID, n=2)
    ids = set()
    for choice in reply.choices:
        assert (choice.message.content, choice.finish_reason) == ("Let me look.", "tool_calls")
        for call in choice.message.tool_calls:
            assert (call.function.name, call.function.arguments) == ("clock", ARGUMENTS)
            ids.add(call.id)
    assert len(ids) == 4
    prompt = bytes(token for token in array("I", shared.worker.requests[-1].tokens) if token < END)
    assert "Tells the time." in prompt.decode()
    assert "start: tool* tail" in shared.worker.requests[-1].sampling.grammar


async def test_a_stream_of_calls_has_names_first_and_then_arguments(shared: Shared) -> None:
    said, calls, reasons = ["", ""], [dict[int, list[str]](), dict[int, list[str]]()], []
    async for event in await ask(shared, SAID, n=2, stream=True):
        for choice in event.choices:
            said[choice.index] += choice.delta.content or ""
            reasons += [choice.finish_reason] if choice.finish_reason else []
            for part in choice.delta.tool_calls or ():
                made = calls[choice.index].setdefault(part.index, [])
                assert bool(part.id) == (not made), "the name comes with the first piece"
                made.append(part.function.arguments)
    assert said == ["Let me look."] * 2 and reasons == ["tool_calls"] * 2
    assert [["".join(made) for made in one.values()] for one in calls] == [[ARGUMENTS] * 2] * 2
    assert all(len(made) > 3 for one in calls for made in one.values()), "they come in pieces"


async def test_a_reply_without_calls_is_what_it_was(shared: Shared) -> None:
    for text in ("Half <tool_ca", "It is noon.\n\n"):
        reply = await ask(shared, text)
        choice = reply.choices[0]
        assert (choice.message.content, choice.finish_reason) == (text, "stop")
        assert choice.message.tool_calls is None
    cut = await ask(shared, SAID, max_tokens=len(SAID.encode()) - len(CALL.encode()) - 20)
    assert cut.choices[0].finish_reason == "length"
    assert cut.choices[0].message.tool_calls[0].function.arguments.startswith('{"zone"')
    none = await ask(shared, SAID, tool_choice="none")
    assert none.choices[0].message.content == SAID
    assert not shared.worker.requests[-1].sampling.grammar


async def test_earlier_calls_and_their_results_go_into_the_prompt(shared: Shared) -> None:
    call = {"id": "c", "type": "function", "function": {"name": "clock", "arguments": ARGUMENTS}}
    turns = [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "Time?"},
        {"role": "assistant", "content": None, "tool_calls": [call]},
        {"role": "tool", "tool_call_id": "c", "content": "noon"},
    ]
    await ask(shared, "Noon.", messages=turns)
    tokens = list(array("I", shared.worker.requests[-1].tokens))
    reply = await shared.http.post("/tokenize", json={"messages": turns, "tools": TOOLS})
    assert reply.json()["tokens"] == tokens
    shown = (await shared.http.post("/detokenize", json={"tokens": tokens})).json()["prompt"]
    told = instructions([Tool(CLOCK["name"], CLOCK["description"], CLOCK["parameters"])])
    assert shown == (
        f"<|system|>Be brief.\n\n{told}<|end|><|user|>Time?<|end|><|assistant|>{CALL}"
        "<|end|><|user|><tool_response>\nnoon\n</tool_response><|end|><|assistant|>"
    )


async def test_what_asks_for_tools_wrongly_is_refused_by_name(shared: Shared) -> None:
    for fields, param in (
        ({"tool_choice": "required", "tools": []}, "tool_choice"),
        ({"tools": [{"type": "function", "function": CLOCK | {"name": "a b"}}]}, "tools"),
        (
            {"tools": [{"type": "function", "function": CLOCK | {"parameters": LIST}}]},
            "tools.0.function.parameters.type",
        ),
    ):
        with pytest.raises(openai.BadRequestError) as error:
            await ask(shared, "", **fields)
        assert json.loads(error.value.response.text)["error"]["param"].startswith(param)
