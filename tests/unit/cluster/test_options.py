"""What is refused before anything starts."""

import socket
from pathlib import Path

import pytest
from kvworkers.commands.options import check_free, check_memory, clear

from kvstore.cli.values import Address
from kvstore.core.errors import BadInput


def test_a_free_port_passes_and_a_busy_one_names_its_flag() -> None:
    check_free((("--http", Address("127.0.0.1", 0)),))
    with socket.create_server(("127.0.0.1", 0)) as busy:
        address = Address("127.0.0.1", busy.getsockname()[1])
        with pytest.raises(BadInput, match=f"--grpc {address}: Address already in use"):
            check_free((("--http", Address("127.0.0.1", 0)), ("--grpc", address)))


def test_an_address_of_another_machine_is_refused() -> None:
    with pytest.raises(BadInput, match="--http"):
        check_free((("--http", Address("192.0.2.1", 0)),))


def test_an_arena_must_fit_into_memory() -> None:
    check_memory(1 << 20)
    with pytest.raises(BadInput, match="--arena"):
        check_memory(1 << 50)


def test_logs_are_kept_after_a_failure_only(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    kept, removed = tmp_path / "kept", tmp_path / "removed"
    for path in (kept, removed):
        path.mkdir()
        (path / "node-0.log").write_text("x")
    clear(kept, keep_logs=True)
    clear(removed, keep_logs=False)
    assert kept.exists() and str(kept) in capsys.readouterr().err
    assert not removed.exists()
