"""Who did what only an administrator may: one JSON line per call, in a file or in the log.

A line holds names and outcomes, never a credential or anything of a request's content.
"""

import json
import logging
import os
import time
from pathlib import Path
from typing import Final

from kvstore.core.errors import BadInput

_log = logging.getLogger("kvstore.audit")
_PRIVATE: Final = 0o600


class AuditLog:
    """Appends lines; each is one write, so lines of several processes never mix."""

    def __init__(self, path: Path | None = None) -> None:
        """Open `path` for appending (mode 0600), or log where None; `BadInput` if it cannot be."""
        self._file: int | None = None
        if path is not None:
            flags = os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC
            try:
                self._file = os.open(path, flags, _PRIVATE)
            except OSError as error:
                raise BadInput(f"audit_log {path}: {error.strerror}") from error

    def write(
        self, *, principal: str, share_domain: str, peer: str, method: str, outcome: str
    ) -> None:
        """Record one call. `outcome` is `ok`, `begun` for a stream, or an error's class."""
        line = json.dumps(
            {
                "time": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
                "principal": principal,
                "share_domain": share_domain,
                "peer": peer,
                "method": method,
                "outcome": outcome,
            }
        )
        if self._file is None:
            _log.warning("%s", line)
            return
        try:
            os.write(self._file, line.encode() + b"\n")
        except OSError as error:  # a full disk must not end the service; the log has the line
            _log.error("%s (audit file: %s)", line, error.strerror)

    def close(self) -> None:
        """Close the file. Harmless when repeated."""
        if self._file is not None:
            os.close(self._file)
            self._file = None
