"""A real Redis or Valkey for tests: on loopback, without a disk, ended by its pid."""

import shutil
import socket
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

import pytest

from tests.patience import PATIENCE_S, until_so

COMMAND = shutil.which("redis-server") or shutil.which("valkey-server")

needs_redis = pytest.mark.skipif(
    COMMAND is None, reason="no redis-server or valkey-server is installed (apt: redis-server)"
)


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@dataclass
class RedisProcess:
    """A server on a port of its own, which it keeps when it is started again."""

    port: int = field(default_factory=free_port)
    process: subprocess.Popen[bytes] | None = None

    @property
    def url(self) -> str:
        return f"redis://127.0.0.1:{self.port}/0"

    def start(self) -> None:
        assert COMMAND is not None and self.process is None
        self.process = subprocess.Popen(
            [COMMAND, "--port", str(self.port), "--bind", "127.0.0.1", "--save", "",
             "--appendonly", "no", "--daemonize", "no", "--dir", "/tmp"],
            stdout=subprocess.DEVNULL,
        )  # fmt: skip
        until_so(self._listens)

    def _listens(self) -> bool:
        assert self.process is not None and self.process.poll() is None, "redis-server ended"
        try:
            socket.create_connection(("127.0.0.1", self.port), 1.0).close()
        except OSError:
            return False
        return True

    def kill(self) -> None:
        process, self.process = self.process, None
        if process is not None:
            process.kill()
            process.wait(PATIENCE_S)


@contextmanager
def redis_process() -> Iterator[RedisProcess]:
    server = RedisProcess()
    server.start()
    try:
        yield server
    finally:
        server.kill()
