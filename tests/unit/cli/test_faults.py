"""`kvstore faults`, and that its list is what `kvstore.testing` can do."""

import json
from dataclasses import fields
from importlib import import_module

import pytest

from kvstore.cli.main import run
from kvstore.testing.devices import FaultyDisk
from kvstore.testing.fault_points import FAULT_POINTS

SWITCHES_OF_DISKS = {
    *(field.name for field in fields(FaultyDisk) if field.name.startswith(("fail_", "delay_"))),
    "hang",
}


def test_every_fault_can_be_injected_where_it_says() -> None:
    names = [point.name for point in FAULT_POINTS]
    assert names == sorted(set(names))
    for point in FAULT_POINTS:
        module, _, path = point.where.partition(":")
        owner, _, switch = path.partition(".")
        class_ = getattr(import_module(module), owner)
        known = {*dir(class_), *getattr(class_, "__dataclass_fields__", ())}
        assert switch in known, point.where


def test_every_switch_of_the_faulty_disk_is_listed() -> None:
    prefix = "kvstore.testing.devices:FaultyDisk."
    listed = {p.where.removeprefix(prefix) for p in FAULT_POINTS if p.where.startswith(prefix)}
    assert listed == SWITCHES_OF_DISKS


def test_the_command_prints_them(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["faults"]) == 0
    shown = capsys.readouterr().out
    assert all(point.name in shown and point.expect in shown for point in FAULT_POINTS)
    assert run(["faults", "--json"]) == 0
    lines = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [line["name"] for line in lines] == [point.name for point in FAULT_POINTS]
