"""What a reply has to look like, checked before any worker is asked: JSON by a schema, tool calls.

Workers compile the same text again, with their model's tokens (`kvworkers.engine.grammar`).
"""

import json
from collections import OrderedDict
from collections.abc import Iterator, Mapping
from hashlib import sha256
from time import monotonic
from typing import Any, Final

from kvstore.core.limits import MAX_GRAMMAR_BYTES
from kvworkers.few_threads import FewThreads
from kvworkers.frontends.generation import FieldError, Shape

MAX_SCHEMA_BYTES: Final = 128 << 10
LOOK_SECONDS: Final = 0.3
"""For looking at a schema's parts, one by one, for the one at fault: others wait meanwhile, and
each part is compiled with all that is shared."""
KEPT: Final = 256
CHECK_SECONDS: Final = 30.0
_SPACE: Final = {"whitespace_pattern": r"[ \n\t]{1,20}"}
"""Between JSON's parts: enough to indent by, and never so much that a model could stay in it."""


def json_shape(schema: Any, place: str) -> Shape:
    """Return the shape of JSON that a schema describes; `place` names it in errors.

    Raises `FieldError` for one that is too long.
    """
    grammar = "start: " + embedded(schema, place)
    return Shape(grammar, ((place, schema),), place)


def embedded(schema: Any, place: str) -> str:
    """Return a schema as a part of a Lark grammar; raises `FieldError` for one that is too long."""
    if isinstance(schema, Mapping):
        schema = {**schema, "x-guidance": _SPACE}
    written = json.dumps(schema)
    if len(written) > MAX_SCHEMA_BYTES:
        raise FieldError(f"{place} has {len(written)} bytes; {MAX_SCHEMA_BYTES} allowed", place)
    return f"%json {written}"


def check_length(characters: int, place: str) -> None:
    """Raise `FieldError` for a grammar longer than workers take; `place` names it."""
    if characters > MAX_GRAMMAR_BYTES:
        what = f"{place} makes a grammar of {characters} characters; {MAX_GRAMMAR_BYTES} allowed"
        raise FieldError(what, place)


class ShapeChecks:
    """Says whether shapes can be followed. One event loop's."""

    def __init__(self) -> None:
        self._good: OrderedDict[bytes, None] = OrderedDict()
        self._threads = FewThreads("checking of grammars", 1)

    async def check(self, shape: Shape) -> None:
        """Raise `FieldError` naming the place in a schema, or `Refused` behind too many others."""
        check_length(len(shape.grammar), shape.place)
        # Remembered by digest: the texts themselves may have hundreds of kilobytes each.
        key = sha256(shape.grammar.encode()).digest()
        if key not in self._good:
            # Off the loop: it takes as long as the schema is twisted.
            await self._threads.run(lambda: _check(shape), within_s=CHECK_SECONDS)
            self._good[key] = None
            while len(self._good) > KEPT:
                self._good.popitem(last=False)
        self._good.move_to_end(key)


def _check(shape: Shape) -> None:
    for place, schema in shape.schemas:
        if not isinstance(schema, Mapping):
            raise FieldError(f"{place} must be an object, a JSON schema", place)
        if fault := _schema_fault(schema):
            where = ".".join([place, *_place_of(schema, fault)])
            raise FieldError(f"{where}: {fault}", where)
    if fault := _fault(json.dumps({"grammars": [{"lark_grammar": shape.grammar}]})):
        raise FieldError(f"{shape.place}: {fault}", shape.place)


def _schema_fault(schema: Any) -> str:
    """Return why a schema cannot be followed, for whatever part of it; empty where it can."""
    return _fault(json.dumps({"grammars": [{"json_schema": schema}]}))


def _fault(grammars: str) -> str:
    """Return why grammars, as the library's JSON, cannot be followed; empty where they can."""
    from llguidance import LLMatcher, LLParserLimits

    limits = LLParserLimits(verbose_errors=False)
    wrong, messages = LLMatcher.validate_grammar_with_warnings(grammars, limits=limits)
    return " ".join(messages[0].split()) if wrong else ""


def _place_of(schema: Mapping[str, Any], fault: str) -> list[str]:
    """Return the way to the innermost part of a schema that has this fault by itself.

    As far as it is found within `LOOK_SECONDS`.
    """
    shared = {key: schema[key] for key in ("$defs", "definitions") if key in schema}
    until = monotonic() + LOOK_SECONDS
    way: list[str] = []
    part: Any = schema
    while True:
        for step, inner in _parts(part):
            if monotonic() > until:
                return way
            alone = {**shared, **inner} if isinstance(inner, Mapping) else inner
            if _schema_fault(alone) == fault:
                way, part = [*way, *step], inner
                break
        else:
            return way


def _parts(schema: Any) -> Iterator[tuple[list[str], Any]]:
    """Yield the schemas right inside a schema, each with its way there."""
    if not isinstance(schema, Mapping):
        return
    for key, value in schema.items():
        if key in ("properties", "patternProperties", "$defs", "definitions"):
            if isinstance(value, Mapping):
                yield from (([key, str(name)], inner) for name, inner in value.items())
        elif key in ("items", "additionalProperties", "not", "contains"):
            yield [key], value
        elif key in ("anyOf", "oneOf", "allOf", "prefixItems") and isinstance(value, list):
            yield from (([key, str(at)], inner) for at, inner in enumerate(value))
