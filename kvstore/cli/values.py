"""Values that command lines share: sizes such as `1GiB` and addresses such as `127.0.0.1:8000`."""

import math
import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Final

import click

from kvstore.core.errors import BadInput
from kvstore.tiers.quotas import QuotaRule

_UNITS: Final = {
    "": 1, "b": 1,
    "k": 1 << 10, "kib": 1 << 10, "kb": 1000,
    "m": 1 << 20, "mib": 1 << 20, "mb": 1000**2,
    "g": 1 << 30, "gib": 1 << 30, "gb": 1000**3,
    "t": 1 << 40, "tib": 1 << 40, "tb": 1000**4,
}  # fmt: skip
_SIZE: Final = re.compile(r"\s*(\d+(?:\.\d+)?)\s*([a-z]*)\s*", re.IGNORECASE | re.ASCII)
_MAX_PORT: Final = 65_535


def parse_bytes(text: str) -> int:
    """Return the bytes that `512MiB`, `1.5g` or `1048576` stand for.

    Raises `ValueError` for anything else, zero included.
    """
    match = _SIZE.fullmatch(text)
    unit = _UNITS.get(match[2].lower()) if match else None
    amount = float(match[1]) * unit if match and unit else 0.0
    size = int(amount) if math.isfinite(amount) else 0
    if size <= 0:
        raise ValueError(f"{text!r} is not a size such as 512MiB or 1GiB")
    return size


def parse_room(text: str) -> int:
    """As `parse_bytes`; `0` stands for none."""
    return 0 if text == "0" else parse_bytes(text)


def format_bytes(size: int) -> str:
    """Return `size` bytes for people, in binary units: `512.0 MiB`."""
    amount = float(size)
    for unit in ("B", "KiB", "MiB", "GiB"):
        if amount < 1024:
            return f"{amount:.0f} {unit}" if unit == "B" else f"{amount:.1f} {unit}"
        amount /= 1024
    return f"{amount:.1f} TiB"


@dataclass(frozen=True, slots=True)
class Address:
    """A host and a TCP port; port 0 asks for any free one."""

    host: str
    port: int

    @classmethod
    def parse(cls, text: str) -> "Address":
        """Read `host:port`; raises `ValueError` naming what is wrong."""
        host, colon, port = text.rpartition(":")
        if not colon or not host or not port.isascii() or not port.isdigit():
            raise ValueError(f"{text!r} is not HOST:PORT")
        if int(port) > _MAX_PORT:
            raise ValueError(f"{text!r}: a port is at most {_MAX_PORT}")
        return cls(host, int(port))

    def __str__(self) -> str:
        return f"{self.host}:{self.port}"


class BytesType(click.ParamType[int]):
    """A size in bytes, written as people write it."""

    name = "size"

    def __init__(self, read: Callable[[str], int] = parse_bytes) -> None:
        self._read = read

    def convert(
        self, value: object, param: click.Parameter | None, ctx: click.Context | None
    ) -> int:
        if isinstance(value, int):
            return value
        try:
            return self._read(str(value))
        except ValueError as error:
            self.fail(str(error), param, ctx)


class AddressType(click.ParamType[Address]):
    """A `host:port`."""

    name = "host:port"

    def convert(
        self, value: object, param: click.Parameter | None, ctx: click.Context | None
    ) -> Address:
        if isinstance(value, Address):
            return value
        try:
            return Address.parse(str(value))
        except ValueError as error:
            self.fail(str(error), param, ctx)


class QuotaType(click.ParamType[QuotaRule]):
    """What a share domain or a root may hold: `domain:acme:dram=8GiB,nvme=1TiB`."""

    name = "quota"

    def convert(
        self, value: object, param: click.Parameter | None, ctx: click.Context | None
    ) -> QuotaRule:
        if isinstance(value, QuotaRule):
            return value
        try:
            return QuotaRule.parse(str(value), parse_bytes)
        except BadInput as error:
            self.fail(str(error), param, ctx)


BYTES: Final = BytesType()
ROOM: Final = BytesType(parse_room)
ADDRESS: Final = AddressType()
QUOTA: Final = QuotaType()
