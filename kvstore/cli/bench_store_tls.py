"""Cases of `bench store` over TLS, apart from the others: what encryption costs a verified read.

Certificates are made for the run by `openssl`; where there is none, nothing is measured.
"""

import asyncio
import os
import secrets
import shutil
import subprocess
from pathlib import Path
from typing import Final

import click

from kvstore.cli import bench_store_peer as plain
from kvstore.cli.bench_rows import Bench
from kvstore.client import AsyncRemoteClient
from kvstore.core.errors import Unreachable
from kvstore.rpc.credentials import Credentials
from kvstore.rpc.tokens import digest_of
from kvstore.testing.node import RunningNode, start_node

SIZES: Final = (1, 4)
_ARENA_BYTES: Final = 256 << 20
_MAKE: Final = (
    "req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes",
    "-days", "2", "-subj", "/CN=127.0.0.1", "-addext", "subjectAltName=IP:127.0.0.1",
)  # fmt: skip


def bench_tls(bench: Bench, directory: Path) -> None:
    """Batches of 64 MiB from a node that wants TLS, beside a bare socket without it."""
    if not bench.wants(*map(_case, SIZES)):
        return
    openssl = shutil.which("openssl")
    if openssl is None:
        click.echo("openssl is not here: TLS is not measured", err=True)
        return
    token = secrets.token_hex(16)
    security, credentials = _secured(openssl, directory / "tls", token)
    options = ("--security", str(security))
    with start_node(arena_bytes=_ARENA_BYTES, name="secured", options=options) as node:
        for mib in SIZES:
            with plain.start_pouring(mib << 20) as port:
                asyncio.run(_bench_size(bench, node, credentials, mib, port))


async def _bench_size(
    bench: Bench, node: RunningNode, credentials: Credentials, mib: int, port: int
) -> None:
    size = mib << 20
    batch = plain.BATCH_BYTES // size
    buffers = [memoryview(bytearray(size)) for _ in range(batch)]
    client = AsyncRemoteClient.connect(
        node.listen, namespace=plain.model(f"tls {mib}"), payload_bytes=size, shares=8,
        config=plain.CONFIG, credentials=credentials,
    )  # fmt: skip
    async with await client as there:
        names = plain.names_of(there.root, 0, batch)
        assert None not in await there.put(names, [os.urandom(size) for _ in range(batch)])

        async def get() -> None:
            assert await there.get_into(names, buffers) == batch

        async def bare() -> None:
            await asyncio.to_thread(plain.drink, port, buffers)

        await bench.against(
            _case(mib), get, bare, limit_name="bare recv_into and xxh3-128, no TLS",
            amount=plain.BATCH_BYTES / 1e9, unit="GB/s",
        )  # fmt: skip


def _case(mib: int) -> str:
    return f"remote get over TLS {mib} MiB"


def _secured(openssl: str, directory: Path, token: str) -> tuple[Path, Credentials]:
    """Write a certificate and a `--security` file; return it, and what a client shows."""
    directory.mkdir()
    key, certificate = directory / "server.key", directory / "server.pem"
    made = subprocess.run(
        [openssl, *_MAKE, "-keyout", str(key), "-out", str(certificate)],
        check=False, capture_output=True, timeout=30,
    )  # fmt: skip
    if made.returncode:
        raise Unreachable(f"openssl: {made.stderr.decode(errors='replace')[-200:]}")
    file = directory / "security.toml"
    file.write_text(
        'certificate = "server.pem"\nkey = "server.key"\nca = "server.pem"\n'
        '[[identities]]\nname = "bench"\nshare_domain = "bench"\nroles = ["client"]\n'
        f'tokens_sha256 = ["{digest_of(token)}"]\n'
    )
    return file, Credentials(ca=certificate.read_bytes(), token=token)
