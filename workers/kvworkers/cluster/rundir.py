"""The user's run directory: short paths, private, one folder per cluster.

A Unix socket's path has at most 107 bytes, so everything lies under /tmp/kvstore-<uid>.
"""

import os
import secrets
import shutil
import stat
import time
from pathlib import Path
from typing import Final

from kvstore.core.errors import BadInput

_PRIVATE: Final = 0o700
_FORGOTTEN_S: Final = 3_600.0


def user_dir() -> Path:
    """Return this user's own directory for sockets and state, made if missing.

    Raises `BadInput` where the path is another's, or open to others: someone could replace sockets.
    """
    path = Path(f"/tmp/kvstore-{os.getuid()}")
    path.mkdir(mode=_PRIVATE, exist_ok=True)
    status = path.lstat()
    if not stat.S_ISDIR(status.st_mode) or status.st_uid != os.getuid():
        raise BadInput(f"{path} is not a directory of this user")
    if stat.S_IMODE(status.st_mode) & 0o077:
        path.chmod(_PRIVATE)
    return path


def new_run_dir() -> Path:
    """Return a fresh directory for one cluster's sockets and logs."""
    path = user_dir() / secrets.token_hex(4)
    path.mkdir(mode=_PRIVATE)
    return path


def new_ranks_dir() -> Path:
    """Return a fresh directory for the sockets of a worker's ranks, named by this process.

    Removes those of processes that were killed: nobody else does.
    """
    for left in user_dir().glob("ranks-*"):
        pid = left.name.split("-")[1]
        try:
            old = time.time() - left.lstat().st_mtime > _FORGOTTEN_S  # not another container's
        except FileNotFoundError:
            continue  # Another worker that starts was faster.
        if old and not Path("/proc", pid).exists():
            shutil.rmtree(left, ignore_errors=True)
    path = user_dir() / f"ranks-{os.getpid()}-{secrets.token_hex(4)}"
    path.mkdir(mode=_PRIVATE)
    return path


def last_line(log: Path) -> str:
    """Return the last line of a log, for a message that says why something ended."""
    lines = log.read_text(errors="replace").strip().splitlines()[-1:]
    return lines[0] if lines else "it left no message"
