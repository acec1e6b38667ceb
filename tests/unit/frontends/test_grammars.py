"""Forms of replies are checked before any worker is asked, and errors name the place."""

import asyncio
import threading
from typing import Any

import pytest
from kvworkers.frontends import grammars
from kvworkers.frontends.generation import FieldError, Shape
from kvworkers.frontends.grammars import ShapeChecks, json_shape
from kvworkers.frontends.messages import Tool
from kvworkers.frontends.toolcalls import calls_shape

from kvstore.core.errors import Refused
from kvstore.core.limits import MAX_GRAMMAR_BYTES
from tests.patience import PATIENCE_S

PLACE = "response_format.json_schema.schema"
AT = {"type": "object", "properties": {"a": {"type": "array", "items": {"type": "strin"}}}}


@pytest.mark.parametrize(
    ("schema", "where", "why"),
    [
        ({"type": "objekt"}, "", "objekt"),
        (AT, ".properties.a.items", "strin"),
        ({"anyOf": [{"type": "null"}, AT]}, ".anyOf.1.properties.a.items", "strin"),
        ({"$defs": {"x": AT}, "$ref": "#/$defs/x"}, ".$defs.x.properties.a.items", "strin"),
        ({"properties": {"a": {"$ref": "#/nope"}}}, ".properties.a", "/nope"),
        ({"properties": {"a": {"type": "string", "pattern": "("}}}, ".properties.a", "regex"),
        ({"properties": {"a": {"not": {}}}}, ".properties.a", "not"),
        ({"properties": [1]}, "", "properties"),
        ([], "", "object"),
        ("x", "", "object"),
        (None, "", "object"),
    ],
)
async def test_a_bad_schema_is_refused_by_place(schema: Any, where: str, why: str) -> None:
    with pytest.raises(FieldError, match=why) as error:
        await ShapeChecks().check(json_shape(schema, PLACE))
    assert error.value.param == PLACE + where
    assert str(error.value).startswith(PLACE + where)


async def test_a_tool_s_parameters_and_a_bare_grammar_are_named_too() -> None:
    bad = calls_shape([Tool("f", "", {}), Tool("g", "", AT)], required=True, parallel=True)
    with pytest.raises(FieldError) as error:
        await ShapeChecks().check(bad)
    assert error.value.param == "tools.1.function.parameters.properties.a.items"
    with pytest.raises(FieldError, match=r"sampling\.grammar") as error:
        await ShapeChecks().check(Shape("start: nowhere", place="sampling.grammar"))
    await ShapeChecks().check(Shape('start: "yes" | "no"'))


async def test_what_was_good_is_not_checked_again_and_memory_is_bounded(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    checks, seen = ShapeChecks(), list[str]()
    monkeypatch.setattr(grammars, "_check", lambda shape: seen.append(shape.grammar))
    monkeypatch.setattr(grammars, "KEPT", 2)
    for name in ("a", "a", "b", "a", "c", "b", "a"):
        await checks.check(Shape(name))
    # `b` was the oldest when `c` came, `a` when `b` came again.
    assert seen == ["a", "b", "c", "b", "a"]


async def test_a_check_holds_up_nobody_but_other_checks(monkeypatch: pytest.MonkeyPatch) -> None:
    goes_on = threading.Event()
    monkeypatch.setattr(grammars, "_check", lambda shape: goes_on.wait(PATIENCE_S))
    monkeypatch.setattr(grammars, "CHECK_SECONDS", 0.05)
    checks = ShapeChecks()
    first = asyncio.create_task(checks.check(Shape("a")))
    await asyncio.sleep(0)  # the loop goes on: it is another thread that waits
    with pytest.raises(Refused):
        await checks.check(Shape("b"))
    goes_on.set()
    await asyncio.gather(first, return_exceptions=True)


def test_a_schema_has_a_bound() -> None:
    with pytest.raises(FieldError, match=PLACE) as error:
        json_shape({"enum": ["x" * grammars.MAX_SCHEMA_BYTES]}, PLACE)
    assert error.value.param == PLACE


async def test_a_whole_shape_has_a_bound_and_its_text_is_not_kept() -> None:
    large = {"enum": ["x" * (grammars.MAX_SCHEMA_BYTES - 200)]}
    tools = [Tool(name, "", large) for name in ("a", "b", "c")]
    for only in ("", "a"):
        with pytest.raises(FieldError, match=str(MAX_GRAMMAR_BYTES)) as error:
            calls_shape(tools, required=True, parallel=True, only=only)
        assert error.value.param == "tools"
    checks, place = ShapeChecks(), "sampling.grammar"
    with pytest.raises(FieldError, match=place) as error:
        await checks.check(Shape("x" * (MAX_GRAMMAR_BYTES + 1), place=place))
    assert error.value.param == place
    await checks.check(Shape(f'start: "{"x" * 10_000}"'))
    assert [len(key) for key in checks._good] == [32], "a digest, not the text"


async def test_the_search_for_what_is_at_fault_ends(monkeypatch: pytest.MonkeyPatch) -> None:
    now, looks = [0.0], [0]
    heavy = {"type": "object", "properties": {str(at): {"$ref": "#/$defs/x"} for at in range(180)}}
    whole = {"$defs": {"x": {}}, "properties": {"a": heavy}}

    def slow_fault(schema: Any) -> str:
        looks[0] += 1
        now[0] += 0.1
        return "heavy" if "properties" in schema else ""

    monkeypatch.setattr(grammars, "monotonic", lambda: now[0])
    monkeypatch.setattr(grammars, "_schema_fault", slow_fault)
    with pytest.raises(FieldError, match="heavy") as error:
        await ShapeChecks().check(json_shape(whole, PLACE))
    assert error.value.param == PLACE + ".properties.a", "the way found so far"
    assert looks[0] <= 6
