"""The audit log: whole lines, in a private file or in the log."""

import json
import logging
from pathlib import Path

import pytest

from kvstore.core.errors import BadInput
from kvstore.observe.audit import AuditLog

CALL = {
    "principal": "op\n{", "share_domain": "d", "peer": "ipv4:1.2.3.4:5", "method": "/a/b",
    "outcome": "ok",
}  # fmt: skip


def test_lines_are_appended_whole(tmp_path: Path) -> None:
    path = tmp_path / "audit.jsonl"
    for _ in range(2):
        log = AuditLog(path)
        log.write(**CALL)
        log.close()
        log.close()
    lines = path.read_text().splitlines()
    assert len(lines) == 2, "a name with a newline in it makes no second line"
    assert json.loads(lines[0]) | CALL == json.loads(lines[0])
    assert path.stat().st_mode & 0o077 == 0


def test_without_a_file_it_goes_to_the_log(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING, logger="kvstore.audit"):
        AuditLog().write(**CALL)
    assert json.loads(caplog.messages[0])["method"] == "/a/b"


def test_a_file_that_cannot_be_opened_is_named(tmp_path: Path) -> None:
    with pytest.raises(BadInput, match="audit_log"):
        AuditLog(tmp_path / "no" / "such")


def test_a_full_disk_loses_no_line(caplog: pytest.LogCaptureFixture) -> None:
    log = AuditLog(Path("/dev/full"))
    with caplog.at_level(logging.ERROR, logger="kvstore.audit"):
        log.write(**CALL)
    assert "/a/b" in caplog.text
    log.close()
