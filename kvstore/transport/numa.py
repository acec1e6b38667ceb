"""Which NUMA nodes the arena's pages lie on: a decision from what the host has, and a system call.

Memory that nobody placed lies on the node of whoever touched it first, which is the keeper's: on a
host of two sockets half of the GPUs then copy through the link between them.
"""

import ctypes
import os
import platform
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Final

from kvstore.core.errors import BadInput

AUTO: Final = "auto"
_WITH_MEMORY: Final = Path("/sys/devices/system/node/has_memory")
_MBIND: Final = {"x86_64": 237, "aarch64": 235}
"""Number of the system call; libnuma, which would know, is not everywhere."""
PREFERRED, INTERLEAVE = 1, 3
"""Not MPOL_BIND (2): with one node full it ends processes instead of taking memory of another."""
_WORD_BITS: Final = 64
_LIBC: Final = ctypes.CDLL(None, use_errno=True)


def parse_nodes(text: str) -> tuple[int, ...]:
    """Return the numbers in `0-1,4`; raises `ValueError` for anything else."""
    found: set[int] = set()
    for part in text.strip().split(","):
        first, _, last = part.partition("-")
        low, high = int(first), int(last or first)
        if not 0 <= low <= high < 1 << 16:
            raise ValueError(f"{part!r} is not a range of nodes")
        found.update(range(low, high + 1))
    return tuple(sorted(found))


def host_nodes(path: Path = _WITH_MEMORY) -> tuple[int, ...]:
    """Return the nodes of this host that have memory; (0,) where it does not say."""
    try:
        return parse_nodes(path.read_text(encoding="ascii"))
    except (OSError, ValueError):
        return (0,)


def chosen_nodes(wanted: str, present: Sequence[int]) -> tuple[int, ...]:
    """Return the nodes to put an arena on; none: leave it to the kernel.

    `auto` takes all, so that every GPU finds the same share of the arena near; on a host of one
    node there is nothing to choose. Raises `BadInput` for a node that the host does not have.
    """
    if wanted == AUTO:
        return tuple(present) if len(present) > 1 else ()
    try:
        nodes = parse_nodes(wanted)
    except ValueError as error:
        raise BadInput(f"--numa {wanted!r} is not {AUTO} or nodes such as 0-1: {error}") from error
    if missing := set(nodes) - set(present):
        raise BadInput(f"--numa {wanted!r}: this host has no node {min(missing)} with memory")
    return nodes


def place(address: int, length: int, nodes: Sequence[int], *, syscall: Any = _LIBC.syscall) -> None:
    """Let pages of a shared mapping that are not there yet lie on `nodes`, in turn.

    The policy belongs to the memory, not to the process. Raises `OSError` where the kernel or its
    sandbox does not do that.
    """
    assert nodes
    number = _MBIND.get(platform.machine())
    if number is None:
        raise OSError(f"no number of mbind for {platform.machine()}")
    words = max(nodes) // _WORD_BITS + 1
    mask = (ctypes.c_uint64 * words)()
    for node in nodes:
        mask[node // _WORD_BITS] |= 1 << node % _WORD_BITS
    mode = INTERLEAVE if len(nodes) > 1 else PREFERRED
    # The kernel reads one bit less than it is told of.
    bits = words * _WORD_BITS + 1
    failed = syscall(
        number, ctypes.c_void_p(address), ctypes.c_ulong(length), mode, mask,
        ctypes.c_ulong(bits), 0,
    )  # fmt: skip
    if failed:
        error = ctypes.get_errno()
        raise OSError(error, f"mbind: {os.strerror(error)}")
