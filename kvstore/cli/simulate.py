"""`kvstore simulate`: replays traces through the classes that run in production."""

from importlib import import_module
from typing import Final

import click

_COMMANDS: Final = {
    "evict": "kvstore.cli.simulate_evict:evict",
    "tiers": "kvstore.cli.simulate_tiers:tiers",
}


class _Lazy(click.Group):
    """Imports a simulation when it is asked for."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return sorted(_COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        if cmd_name not in _COMMANDS:
            return None
        module, _, name = _COMMANDS[cmd_name].partition(":")
        command = getattr(import_module(module), name)
        assert isinstance(command, click.Command)
        return command


@click.group(cls=_Lazy, short_help="Replay traces through the production policies.")
def simulate() -> None:
    """Replay traces of prefix blocks through the classes that run in production.

    A TRACE is JSONL, plain or gzip: the fields of docs/simulate.md, Mooncake's, Dynamo's, or a
    recording of `kvstore record`.
    """
