"""`python -m kvworkers.frontends`: HTTP and gRPC frontends without Ray."""

import asyncio
import json
import signal
import sys
from pathlib import Path

import click

from kvstore.core.errors import KvStoreError
from kvstore.router.members import Member, parse_member
from kvstore.router.router import RouterConfig
from kvworkers.frontends.server import FrontendConfig, serving


@click.command()
@click.option("--model", required=True, type=click.Path(path_type=Path), help="Model directory.")
@click.option(
    "--worker", "workers", multiple=True, required=True, metavar="[NAME=]HOST:PORT[@HOST]",
    help="A worker; give it once for each.",
)  # fmt: skip
@click.option(
    "--node", "nodes", multiple=True, metavar="[NAME=]HOST:PORT[@HOST]",
    help="A cache node; give it once for each.",
)  # fmt: skip
@click.option("--http", default="127.0.0.1:8000", show_default=True, help="HTTP address.")
@click.option("--grpc", default="127.0.0.1:0", show_default=True, help="gRPC address.")
@click.option("--security", type=click.Path(path_type=Path), help="Who may connect, as TOML.")
@click.option("--events-redis", default="", metavar="URL", help="Redis that carries events.")
@click.option(
    "--drain-ms", default=30_000, show_default=True, type=click.IntRange(0),
    help="How long requests may go on after SIGTERM; a second one does not wait.",
)  # fmt: skip
@click.option("--trace", default="", help="Send spans to this OTLP collector: http://HOST:PORT.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON line once ready.")
def frontends(
    model: Path, workers: tuple[str, ...], nodes: tuple[str, ...], http: str, grpc: str,
    security: Path | None, events_redis: str, drain_ms: int, trace: str, as_json: bool,
) -> None:  # fmt: skip
    """Serve the OpenAI-compatible HTTP API and gRPC Inference until SIGTERM or Ctrl-C."""
    try:
        members = [
            *(
                parse_member("worker", text, default_name=f"worker-{number}")
                for number, text in enumerate(workers)
            ),
            *(
                parse_member("node", text, default_name=f"node-{number}")
                for number, text in enumerate(nodes)
            ),
        ]
        router = RouterConfig(events_redis=events_redis)
        config = FrontendConfig(
            model=model, http=http, grpc=grpc, security=security, trace=trace, router=router,
            drain_ms=drain_ms,
        )  # fmt: skip
        asyncio.run(_serve(config, members, as_json=as_json))
    except KvStoreError as error:
        click.echo(f"frontends: {error}", err=True)
        sys.exit(2)


async def _serve(config: FrontendConfig, members: list[Member], *, as_json: bool) -> None:
    ended = asyncio.Event()
    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, ended.set)
    async with serving(config) as server:
        await server.set_members(members)
        ready = {"http": server.http_address, "grpc": server.grpc_address}
        if as_json:
            click.echo(json.dumps(ready))
        else:
            click.echo(f"http://{server.http_address}/v1  grpc {server.grpc_address}")
        await ended.wait()
        ended.clear()
        draining = asyncio.create_task(server.drain(drain_ms=config.drain_ms))
        again = asyncio.create_task(ended.wait())
        await asyncio.wait({draining, again}, return_when=asyncio.FIRST_COMPLETED)
        for task in (draining, again):
            task.cancel()
        await asyncio.gather(draining, again, return_exceptions=True)
        await server.stop(drain_ms=0)


if __name__ == "__main__":
    frontends()
