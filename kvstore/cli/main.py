"""The `kvstore` command: finds subcommands, runs one, and turns its end into an exit status.

Status 0: done. 1: the thing measured or run failed. 2: wrong usage. 130: ended by Ctrl-C.
Subcommands are imported when they are asked for, so `kvstore --help` never waits for an engine.
"""

import sys
from collections.abc import Sequence
from importlib.metadata import EntryPoint, entry_points
from typing import Final

import click

from kvstore.cli.missing import missing
from kvstore.core.errors import BadInput, KvStoreError

ENTRY_POINT_GROUP: Final = "kvstore.commands"
"""Where `kvworkers` and `kvkernels` (and anyone else) add commands."""

_OWN: Final = {
    "bench": "kvstore.cli.bench:bench",
    "faults": "kvstore.cli.faults:faults",
    "node": "kvstore.cli.node:node",
    "plan": "kvstore.cli.plan:plan",
    "record": "kvstore.cli.record:record",
    "router": "kvstore.cli.router:router",
    "simulate": "kvstore.cli.simulate:simulate",
    "targets": "kvstore.cli.targets:targets",
    "top": "kvstore.cli.top:top",
}

_DONE, _FAILED, _USAGE, _INTERRUPTED = 0, 1, 2, 130


class LazyCommands(click.Group):
    """A group whose commands are modules that are imported on demand."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return sorted(_commands())

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        entry = _commands().get(cmd_name)
        if entry is None:
            return None
        try:
            command = entry.load()
        except ModuleNotFoundError as error:
            return missing(cmd_name, error)
        if not isinstance(command, click.Command):
            raise BadInput(f"{entry.value} is a {type(command).__name__}, not a click command")
        return command


def _commands() -> dict[str, EntryPoint]:
    """Return every command by name; ours win over plugins of the same name."""
    plugins = {entry.name: entry for entry in entry_points(group=ENTRY_POINT_GROUP)}
    own = {name: EntryPoint(name, value, ENTRY_POINT_GROUP) for name, value in _OWN.items()}
    return plugins | own


@click.group(
    cls=LazyCommands,
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100},
    epilog="Start here: kvstore demo, or kvstore up and then kvstore chat in another terminal.",
)
@click.version_option(package_name="kvstore-llm", prog_name="kvstore")
def cli() -> None:
    """A KV-cache service for LLM serving.

    Every prompt prefix that any worker has computed is named after its content, kept in one
    pooled hierarchy of memory, and given back faster than it can be computed again.
    """


def run(arguments: Sequence[str] | None = None) -> int:
    """Run one command and return the exit status; messages go to standard error."""
    try:
        outcome = cli.main(
            args=None if arguments is None else list(arguments),
            prog_name="kvstore",
            standalone_mode=False,
        )
    except click.UsageError as error:
        error.show()
        return _USAGE
    except click.ClickException as error:
        error.show()
        return _FAILED
    except BadInput as error:
        click.echo(f"kvstore: {error}", err=True)
        return _USAGE
    except KvStoreError as error:
        click.echo(f"kvstore: {error}", err=True)
        return _FAILED
    except (click.Abort, KeyboardInterrupt):
        click.echo("kvstore: interrupted", err=True)
        return _INTERRUPTED
    return outcome if isinstance(outcome, int) else _DONE


def main() -> None:
    """Entry point of the `kvstore` script."""
    sys.exit(run())


if __name__ == "__main__":
    main()
