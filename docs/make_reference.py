"""Writes docs/reference.md from what is there: the protocol's definitions and Python's docstrings.

`make reference` runs it; a test holds the committed page against what it writes now.
"""

import inspect
import re
import sys
import tempfile
from collections.abc import Iterable, Iterator
from enum import Enum
from pathlib import Path
from typing import Any, Final

from google.protobuf import descriptor_pb2
from grpc_tools import protoc

import kvstore

ROOT: Final = Path(__file__).resolve().parents[1]
PAGE: Final = ROOT / "docs" / "reference.md"
_FIELD: Final = descriptor_pb2.FieldDescriptorProto
_FILE: Final = descriptor_pb2.FileDescriptorProto
_MESSAGE: Final = descriptor_pb2.DescriptorProto
_SERVICE: Final = descriptor_pb2.ServiceDescriptorProto
_WORDS: Final = re.compile(r"kvstore\.(?:\w+\.)+|typing\.|collections\.abc\.|pathlib\.")
_OPENING = """# Reference

Written by `make reference` from `proto/` and from docstrings: what every call, message, class and
method is. How they belong together is said elsewhere: [HTTP and gRPC API](api.md),
[client](client.md), [router](router.md), [deploying](deploy.md). Commands explain themselves with
`--help`.
"""


def page() -> str:
    """Return the whole page."""
    parts = [_OPENING, "## gRPC: `kvstore.rpc.v1`\n", *_protocol(), "## Python: `kvstore`\n"]
    parts += _python()
    return "\n".join(parts)


# -- the protocol ------------------------------------------------------------------------------


def _protocol() -> Iterator[str]:
    for file in _described():
        comments = {tuple(at.path): _said(at) for at in file.source_code_info.location}
        yield f"### {Path(file.name).name}\n\n{_opening(file)}"
        for number, service in enumerate(file.service):
            yield from _service(service, (_FILE.SERVICE_FIELD_NUMBER, number), comments)
        for number, message in enumerate(file.message_type):
            at = (_FILE.MESSAGE_TYPE_FIELD_NUMBER, number)
            yield from _message(message, at, comments)
        for number, enum in enumerate(file.enum_type):
            at = (_FILE.ENUM_TYPE_FIELD_NUMBER, number)
            yield f"**{enum.name}** (enum). {comments.get(at, '')}".rstrip() + "\n"
            values = (
                (value.name, "", comments.get((*at, 2, place), ""))
                for place, value in enumerate(enum.value)
            )
            yield _table(("value", "", ""), values)


def _described() -> Iterable[descriptor_pb2.FileDescriptorProto]:
    """Return the definitions with their comments."""
    files = sorted((ROOT / "proto" / "kvstore" / "rpc" / "v1").glob("*.proto"))
    with tempfile.TemporaryDirectory() as directory:
        out = Path(directory) / "set"
        status = protoc.main(
            ["protoc", f"-I{ROOT / 'proto'}", "--include_source_info",
             f"--descriptor_set_out={out}", *map(str, files)]
        )  # fmt: skip
        assert status == 0, "proto/ does not compile"
        return descriptor_pb2.FileDescriptorSet.FromString(out.read_bytes()).file


def _opening(file: descriptor_pb2.FileDescriptorProto) -> str:
    """Return what the file's first lines say of it."""
    text = (ROOT / "proto" / file.name).read_text(encoding="utf-8")
    lines = [line for line in text.partition("\n\n")[0].splitlines() if line.startswith("//")]
    return " ".join(line.strip("/ ") for line in lines) + "\n"


def _said(at: descriptor_pb2.SourceCodeInfo.Location) -> str:
    return " ".join(f"{at.leading_comments} {at.trailing_comments}".split())


def _service(
    service: descriptor_pb2.ServiceDescriptorProto,
    at: tuple[int, ...],
    comments: dict[tuple[int, ...], str],
) -> Iterator[str]:
    yield f"#### Service `{service.name}`\n"
    if comments.get(at):
        yield comments[at] + "\n"
    rows = []
    for number, method in enumerate(service.method):
        asked, told = (
            f"{'stream ' if streams else ''}{kind.rpartition('.')[2]}"
            for kind, streams in (
                (method.input_type, method.client_streaming),
                (method.output_type, method.server_streaming),
            )
        )
        comment = comments.get((*at, _SERVICE.METHOD_FIELD_NUMBER, number), "")
        rows.append((method.name, f"`{asked}` → `{told}`", comment))
    yield _table(("call", "takes and gives", ""), rows)


def _message(
    message: descriptor_pb2.DescriptorProto,
    at: tuple[int, ...],
    comments: dict[tuple[int, ...], str],
    within: str = "",
) -> Iterator[str]:
    name = f"{within}{message.name}"
    said = comments.get(at, "")
    if message.options.map_entry:
        return
    if not message.field:
        yield f"**{name}** has no fields. {said}".rstrip() + "\n"
    else:
        yield f"**{name}** {said}".rstrip() + "\n"
        rows = (
            (field.name, _type(field), comments.get((*at, _MESSAGE.FIELD_FIELD_NUMBER, place), ""))
            for place, field in enumerate(message.field)
        )
        yield _table(("field", "type", ""), rows)
    for number, inner in enumerate(message.nested_type):
        inside = (*at, _MESSAGE.NESTED_TYPE_FIELD_NUMBER, number)
        yield from _message(inner, inside, comments, f"{name}.")


def _type(field: descriptor_pb2.FieldDescriptorProto) -> str:
    name = field.type_name.rpartition(".")[2] or _FIELD.Type.Name(field.type)[5:].lower()
    return f"repeated {name}" if field.label == _FIELD.LABEL_REPEATED else name


# -- Python ------------------------------------------------------------------------------------


def _python() -> Iterator[str]:
    for name in kvstore.__all__:
        one = getattr(kvstore, name)
        if not inspect.isclass(one):
            if callable(one) and not hasattr(one, "__supertype__"):
                yield f"### `{name}{_signature(one)}`\n\n{_doc(one)}\n"
            else:
                yield f"### `{name}`\n\nBytes of a type of its own (`typing.NewType`).\n"
            continue
        bases = ", ".join(b.__name__ for b in one.__bases__ if b is not object)
        yield f"### `{name}`{f' ({bases})' if bases else ''}\n\n{_doc(one)}\n"
        if issubclass(one, Enum):
            yield ", ".join(f"`{member.name}`" for member in one) + "\n"
        elif not issubclass(one, BaseException):
            yield from _methods(one)


def _methods(one: type) -> Iterator[str]:
    rows = []
    for name, member in sorted(vars(one).items()):
        if name.startswith("_"):
            continue
        if isinstance(member, property):
            rows.append((name, "", _doc(member.fget)))
        elif isinstance(member, classmethod | staticmethod):
            inner = member.__func__
            rows.append((name, f"`{_signature(inner)}`", _doc(inner)))
        elif inspect.isfunction(member):
            rows.append((name, f"`{_signature(member)}`", _doc(member)))
    fields = getattr(one, "__dataclass_fields__", {})
    rows = [(name, f"`{_named(field.type)}`", "") for name, field in fields.items()] + rows
    if rows:
        yield _table(("name", "", ""), rows)


def _signature(function: Any) -> str:
    return _named(str(inspect.signature(function)))


def _named(annotation: Any) -> str:
    """Return an annotation with the last words of its names only."""
    text = annotation if isinstance(annotation, str) else inspect.formatannotation(annotation)
    text = re.sub(r"\((?:self|cls)(?:, )?", "(", _WORDS.sub("", text))
    return re.sub(r"(: |-> )'([^']+)'", r"\1\2", text)


def _doc(one: Any) -> str:
    return " ".join((inspect.getdoc(one) or "").split())


def _table(head: tuple[str, str, str], rows: Iterable[tuple[str, str, str]]) -> str:
    lines = [f"| {' | '.join(head)} |", "|---|---|---|"]
    for name, kind, text in rows:
        cells = (f"`{name}`", kind, text)
        lines.append(f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in cells)} |")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
    sys.stderr.write(f"{PAGE.relative_to(ROOT)} is written\n")
