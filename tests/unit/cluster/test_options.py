"""What is refused before anything starts."""

import socket
from pathlib import Path

import pytest
from kvworkers.commands.options import check_memory, clear, free_address

from kvstore.cli.values import Address
from kvstore.core.errors import BadInput


def test_any_free_port_becomes_a_real_one_that_can_be_bound() -> None:
    chosen = {free_address("--http", Address("127.0.0.1", 0)) for _ in range(4)}
    assert len(chosen) > 1
    for address in chosen:
        assert 20_000 <= address.port < 32_000
        with socket.create_server((address.host, address.port)):
            pass


def test_a_busy_port_names_its_flag() -> None:
    with socket.create_server(("127.0.0.1", 0)) as busy:
        address = Address("127.0.0.1", busy.getsockname()[1])
        with pytest.raises(BadInput, match=f"--grpc {address}: Address already in use"):
            free_address("--grpc", address)


@pytest.mark.parametrize("port", [0, 8000])
def test_an_address_of_another_machine_is_refused(port: int) -> None:
    with pytest.raises(BadInput, match="--http"):
        free_address("--http", Address("192.0.2.1", port))


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
