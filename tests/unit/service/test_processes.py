"""What keeper and node stand on: configuration, run directory, key, control, metrics page."""

import asyncio
import os
import stat
from pathlib import Path
from typing import Any

import pytest

from kvstore.core.errors import BadInput, Unreachable
from kvstore.core.slots import MAX_SESSION
from kvstore.service import control as control_module
from kvstore.service.config import KeeperConfig
from kvstore.service.control import SESSIONS_PER_MESSAGE, Control, control_pair
from kvstore.service.keeper import prepare_key, prepare_run_dir
from kvstore.service.metrics_http import MetricsServer
from kvstore.transport.session_socket import Hello


@pytest.mark.parametrize(
    ("field", "value", "named"),
    [
        ("arena_bytes", 0, "--arena-bytes"),
        ("arena_bytes", 4097, "--arena-bytes"),
        ("name", "", "--name"),
        ("name", "a\nb", "--name"),
        ("name", "x" * 257, "--name"),
        ("run_dir", Path("/tmp") / ("d" * 120), "--run-dir"),
        ("listen", "0.0.0.0:0", "--listen"),
        ("listen", "localhost", "--listen"),
        ("listen", "127.0.0.1:99999", "--listen"),
        ("metrics", "example.org:80", "--metrics"),
        ("parent_pid", -1, "--parent-pid"),
    ],
)
def test_bad_configuration_names_the_flag(field: str, value: Any, named: str) -> None:
    good: dict[str, Any] = {"run_dir": Path("/tmp/x"), "name": "n", "arena_bytes": 1 << 20}
    KeeperConfig(**good)
    with pytest.raises(BadInput, match=named):
        KeeperConfig(**{**good, field: value})


def test_the_run_directory_is_ours_alone(tmp_path: Path) -> None:
    prepare_run_dir(tmp_path / "a" / "b")
    assert stat.S_IMODE((tmp_path / "a" / "b").stat().st_mode) == 0o700
    (tmp_path / "open").mkdir(mode=0o755)
    prepare_run_dir(tmp_path / "open")
    assert stat.S_IMODE((tmp_path / "open").stat().st_mode) == 0o700
    (tmp_path / "file").touch()
    with pytest.raises(BadInput, match="--run-dir"):
        prepare_run_dir(tmp_path / "file")
    (tmp_path / "link").symlink_to(tmp_path / "open")
    with pytest.raises(BadInput, match="not a directory"):
        prepare_run_dir(tmp_path / "link")


def test_the_key_is_made_once_and_must_be_private(tmp_path: Path) -> None:
    path = tmp_path / "key"
    prepare_key(path)
    key = path.read_bytes()
    assert len(key) == 32
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    prepare_key(path)
    assert path.read_bytes() == key
    path.chmod(0o644)
    with pytest.raises(BadInput, match="owner's alone"):
        prepare_key(path)
    path.chmod(0o600)
    path.write_bytes(b"short")
    with pytest.raises(BadInput, match="5 bytes"):
        prepare_key(path)
    with pytest.raises(BadInput, match="--cluster-key-file"):
        prepare_key(tmp_path / "missing" / "key")


def test_control_messages_queue_when_the_socket_is_full_and_keep_their_order() -> None:
    ours, theirs = (Control(sock) for sock in control_pair())
    sent = 0
    while not ours.send("ping", n=sent):
        sent += 1
    ours.send("ping", n=sent + 1)
    heard: list[int] = []
    while len(heard) < sent + 2:
        while (message := theirs.receive()) is not None:
            heard.append(message["n"])
        ours.flush()
    assert heard == list(range(sent + 2))
    ours.close()
    with pytest.raises(Unreachable):
        theirs.receive()
    with pytest.raises(Unreachable):
        theirs.send("pong")
    theirs.close()


def test_a_control_socket_that_nobody_reads_is_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(control_module, "MAX_QUEUED", 3)
    ours, theirs = (Control(sock) for sock in control_pair())
    while not ours.send("ping"):
        pass
    ours.send("ping")
    ours.send("ping")
    with pytest.raises(Unreachable, match="reads nothing"):
        ours.send("ping")
    ours.close()
    theirs.close()


async def _http(address: str, request: bytes) -> bytes:
    host, port = address.split(":")
    reader, writer = await asyncio.open_connection(host, int(port))
    writer.write(request)
    answer = await reader.read()
    writer.close()
    return answer


async def test_the_metrics_page_answers_one_path_and_survives_rubbish() -> None:
    server = MetricsServer(lambda: b"kvstore_x 1\n")
    address = await server.start("127.0.0.1:0")
    found = await _http(address, b"GET /metrics HTTP/1.1\r\nHost: x\r\n\r\n")
    assert found.startswith(b"HTTP/1.1 200 OK")
    assert found.endswith(b"\r\n\r\nkvstore_x 1\n")
    for other in (b"GET / HTTP/1.1", b"GET /metrics/all HTTP/1.1", b"GET /metricsx HTTP/1.1"):
        assert (await _http(address, other + b"\r\n\r\n")).startswith(b"HTTP/1.1 404")
    asked = await _http(address, b"GET /metrics?name=x HTTP/1.1\r\n\r\n")
    assert asked.startswith(b"HTTP/1.1 200 OK")
    assert await _http(address, b"x" * 40_000) == b""
    await server.stop()


def test_a_foreign_run_directory_is_refused(tmp_path: Path) -> None:
    if os.getuid() != 0:
        pytest.skip("only root can give a directory away")
    (tmp_path / "theirs").mkdir()
    os.chown(tmp_path / "theirs", 12345, 12345)
    with pytest.raises(BadInput, match="another user"):
        prepare_run_dir(tmp_path / "theirs")


@pytest.mark.parametrize("name", ['"' * 256, "\\" * 256, "\u00e9" * 128, "\U0001f600" * 64])
def test_the_longest_names_fit_a_control_message(name: str) -> None:
    Hello(name, (1,))
    ours, theirs = control_pair()
    keeper, node = Control(ours), Control(theirs)
    rows = [(MAX_SESSION, "f" * 32, name, False)] * SESSIONS_PER_MESSAGE
    keeper.send("sessions", sessions=rows)
    message = node.receive()
    assert message is not None
    assert message["sessions"][-1][2] == name
    keeper.close()
    node.close()
