"""Where the arena's pages lie: the decision, the system call's arguments, and a real call."""

import ctypes
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from kvstore.core.errors import BadInput
from kvstore.transport import numa
from kvstore.transport.arena import ArenaMapping, ArenaSize, create_arena


@pytest.mark.parametrize(
    ("wanted", "present", "nodes"),
    [
        ("auto", (0,), ()),
        ("auto", (0, 1), (0, 1)),
        ("auto", (0, 2, 3), (0, 2, 3)),
        ("0", (0,), (0,)),
        ("1", (0, 1), (1,)),
        ("0-2,5", (0, 1, 2, 5), (0, 1, 2, 5)),
    ],
)
def test_what_is_chosen(wanted: str, present: tuple[int, ...], nodes: tuple[int, ...]) -> None:
    assert numa.chosen_nodes(wanted, present) == nodes


@pytest.mark.parametrize("wanted", ["", "x", "2-1", "-1", "0,,1", "3"])
def test_a_wrong_choice_is_refused_by_name(wanted: str) -> None:
    with pytest.raises(BadInput, match="--numa"):
        numa.chosen_nodes(wanted, (0, 1))


def test_what_the_host_says(tmp_path: Path) -> None:
    said = tmp_path / "has_memory"
    said.write_text("0-1,4\n")
    assert numa.host_nodes(said) == (0, 1, 4)
    said.write_text("\n")
    assert numa.host_nodes(said) == (0,)
    assert numa.host_nodes(tmp_path / "none") == (0,)


@pytest.mark.parametrize(
    ("nodes", "mode", "words"),
    [
        ((1,), numa.PREFERRED, [0b10]),
        ((0, 1), numa.INTERLEAVE, [0b11]),
        ((0, 65), numa.INTERLEAVE, [1, 2]),
    ],
)
def test_what_the_kernel_is_told(nodes: tuple[int, ...], mode: int, words: list[int]) -> None:
    told: list[Any] = []

    def syscall(*arguments: Any) -> int:
        told.extend(arguments)
        return 0

    numa.place(0x1000, 4096, nodes, syscall=syscall)
    _, address, length, said_mode, mask, bits, flags = told
    assert (address.value, length.value, said_mode, flags) == (0x1000, 4096, mode, 0)
    assert list(mask) == words
    assert bits.value == 64 * len(words) + 1


def test_a_kernel_that_refuses_is_an_error_with_its_number() -> None:
    def syscall(*arguments: Any) -> int:
        ctypes.set_errno(1)
        return -1

    with pytest.raises(OSError, match="mbind: Operation not permitted"):
        numa.place(0x1000, 4096, (0,), syscall=syscall)


def test_an_arena_is_placed_for_real() -> None:
    fd = create_arena(ArenaSize(4 << 20, 16))
    arena = ArenaMapping(fd, owner=True)
    try:
        arena.place(numa.host_nodes()[:1])
        view = np.frombuffer(arena.data, np.uint8)
        view[:] = 1
        mode = ctypes.c_int()
        address = ctypes.c_void_p(view.ctypes.data)
        asked = ctypes.CDLL(None).syscall(239, ctypes.byref(mode), None, 0, address, 2)
        del view
        if os.uname().machine == "x86_64":
            assert (asked, mode.value) == (0, numa.PREFERRED)
    except PermissionError:
        pytest.skip("the sandbox does not let memory be placed")
    finally:
        arena.close()
        os.close(fd)
