"""`kvstore router`: a router by itself, for frontends that talk to engines themselves."""

import asyncio
import json
import signal
from contextlib import AsyncExitStack
from dataclasses import dataclass
from pathlib import Path

import click

from kvstore.cli.ext_proc import ExtProcOptions, ext_proc_options
from kvstore.cli.values import ADDRESS, Address
from kvstore.core.errors import BadInput
from kvstore.core.names import Root
from kvstore.router.members import Kind, Member, Members, parse_hashes, parse_member, parse_vllm
from kvstore.router.router import RouterConfig
from kvstore.router.server import RouterServer
from kvstore.rpc.convert import root_from_wire
from kvstore.rpc.event_writers import check_redis
from kvstore.rpc.metrics_port import serve_metrics
from kvstore.rpc.security import SecurityConfig, check_listen, load_security


@dataclass(frozen=True, slots=True)
class RouterOptions:
    """What the command line said."""

    members: Members
    listen: str
    metrics: Address | None
    json: bool
    config: RouterConfig
    security: SecurityConfig
    root: Root
    ext_proc: ExtProcOptions | None


@click.command(short_help="Choose workers for prompts, by what they have cached.")
@click.option(
    "--worker", "workers", multiple=True, metavar="[NAME=]HOST:PORT[@HOST]",
    help="A worker to route to; give it once for each. Default names: worker-0, worker-1 …",
)  # fmt: skip
@click.option(
    "--node", "nodes", multiple=True, metavar="[NAME=]HOST:PORT[@HOST]",
    help="A cache node; workers reach the nodes of their own host. Default names: node-0 …",
)  # fmt: skip
@click.option(
    "--listen", "listen_on", default="127.0.0.1:0", show_default=True, type=ADDRESS,
    help="Where to serve gRPC; port 0 takes a free one.",
)  # fmt: skip
@click.option("--metrics", type=ADDRESS, help="Where to serve Prometheus metrics over HTTP.")
@click.option(
    "--hold-ms", default=5_000.0, show_default=True, type=click.FloatRange(min=0, min_open=True),
    help="Requests wait in the router while the best worker's queue is longer.",
)  # fmt: skip
@click.option(
    "--max-waiting", default=1_024, show_default=True, type=click.IntRange(min=1),
    help="Requests that may wait; beyond it the weakest claim is refused.",
)  # fmt: skip
@click.option(
    "--weight", "weights", multiple=True, metavar="DOMAIN=WEIGHT",
    help="A domain's share where requests wait; 1 where none is given.",
)  # fmt: skip
@click.option(
    "--security", type=click.Path(path_type=Path, dir_okay=False),
    help="Who may connect, and with what proof: docs/security.md.",
)  # fmt: skip
@click.option(
    "--events-redis", default="", metavar="URL",
    help="Redis or Valkey that members write their events to; Watch while it is away.",
)  # fmt: skip
@click.option(
    "--vllm", "engines", multiple=True, metavar="NAME=HOST:PORT,EVENTS[,REPLAY]",
    help="A vLLM engine to route to, and the tcp:// endpoints of its KV events and their replay.",
)  # fmt: skip
@click.option(
    "--vllm-root", default=bytes(32).hex(), metavar="HEX",
    help="32 bytes that callers name the prompts of vLLM engines under. [default: zeros]",
)  # fmt: skip
@click.option(
    "--vllm-hash", default="", metavar="ALGORITHM[:SEED]",
    help="Their --prefix-caching-hash-algo (sha256, sha256_cbor) and PYTHONHASHSEED: check them.",
)  # fmt: skip
@ext_proc_options
@click.option("--json", "as_json", is_flag=True, help="Print one JSON line once ready.")
def router(
    workers: tuple[str, ...],
    nodes: tuple[str, ...],
    listen_on: Address,
    metrics: Address | None,
    hold_ms: float,
    max_waiting: int,
    weights: tuple[str, ...],
    security: Path | None,
    events_redis: str,
    engines: tuple[str, ...],
    vllm_root: str,
    vllm_hash: str,
    ext_proc: ExtProcOptions | None,
    as_json: bool,
) -> None:
    """Follow workers and cache nodes, and answer where a prompt should go.

    Serves kvstore.rpc.v1.Router: Route books a worker, Complete frees the booking, Explain shows
    every worker's score. Runs until SIGTERM or Ctrl-C.
    """
    if not workers and not engines:
        raise click.UsageError("give at least one --worker or --vllm")
    hashes, root = parse_hashes(vllm_hash), _root(vllm_root)
    vllm = [parse_vllm(text, root, hashes) for text in engines]
    members = Members.of(
        [*_members("worker", workers), *_members("node", nodes), *(member for member, _ in vllm)]
    )
    check_redis("--events-redis", events_redis)
    config = RouterConfig(
        hold_ms=hold_ms,
        max_waiting=max_waiting,
        domain_weights=dict(map(_weight, weights)),
        events_redis=events_redis,
        events_vllm={member.name: events for member, events in vllm},
    )
    rules = load_security(security)
    check_listen("--listen", str(listen_on), rules)
    if ext_proc is not None:
        ext_proc.check(rules)
    asyncio.run(
        _serve(
            RouterOptions(members, str(listen_on), metrics, as_json, config, rules, root, ext_proc)
        )
    )


def _root(text: str) -> Root:
    try:
        return root_from_wire(bytes.fromhex(text))
    except (BadInput, ValueError) as error:
        raise BadInput(f"--vllm-root {text[:80]!r}: {error}") from None


def _weight(text: str) -> tuple[str, float]:
    domain, _, number = text.partition("=")
    try:
        return domain, float(number)
    except ValueError:
        raise BadInput(f"--weight {text!r} is not DOMAIN=WEIGHT") from None


def _members(kind: Kind, texts: tuple[str, ...]) -> list[Member]:
    return [
        parse_member(kind, text, default_name=f"{kind}-{number}")
        for number, text in enumerate(texts)
    ]


async def _serve(options: RouterOptions) -> None:
    """Serve until told to end."""
    ended = asyncio.Event()
    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, ended.set)
    server = RouterServer(options.members, config=options.config, security=options.security)
    extra = {}
    picker = options.ext_proc.server(server, options.root) if options.ext_proc else None
    await server.start(options.listen)
    async with AsyncExitStack() as stack:
        stack.push_async_callback(server.stop)
        if picker is not None and options.ext_proc is not None:
            await picker.start(options.ext_proc.listen, options.security)
            stack.push_async_callback(picker.stop)
            extra = {"ext_proc": picker.address}
        metrics = ""
        if options.metrics is not None:
            port = serve_metrics(
                "--metrics", str(options.metrics), server.registry, options.security
            )
            stack.callback(port.close)
            metrics = port.address
        ready = {"router": server.address, "metrics": metrics, "members": len(options.members)}
        ready |= extra
        if options.json:
            click.echo(json.dumps(ready))
        else:
            click.echo(f"router of {len(options.members)} members listens on {server.address}")
            for name, address in extra.items():
                click.echo(f"{name} listens on {address}")
        await ended.wait()
