"""`kvstore bench`: what a part of the system reaches, each number beside its limit.

Sub-commands are found like commands are: our own here, others by the entry point group
`kvstore.benchmarks` (kernels and worker bring theirs).
"""

from importlib.metadata import EntryPoint, entry_points
from typing import Final

import click

from kvstore.cli.missing import missing

ENTRY_POINT_GROUP: Final = "kvstore.benchmarks"
_OWN: Final = {
    "router": "kvstore.cli.bench_router:router",
    "store": "kvstore.cli.bench_store:store",
}


class Benchmarks(click.Group):
    """A group whose commands are imported on demand."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return sorted(_benchmarks())

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        entry = _benchmarks().get(cmd_name)
        if entry is None:
            return None
        try:
            command = entry.load()
        except ModuleNotFoundError as error:
            return missing(f"bench {cmd_name}", error)
        assert isinstance(command, click.Command), entry.value
        return command


def _benchmarks() -> dict[str, EntryPoint]:
    plugins = {entry.name: entry for entry in entry_points(group=ENTRY_POINT_GROUP)}
    own = {name: EntryPoint(name, value, ENTRY_POINT_GROUP) for name, value in _OWN.items()}
    return plugins | own


@click.group(cls=Benchmarks, short_help="Measure a part of the system beside its limit.")
def bench() -> None:
    """Measure a part of the system beside its physical limit and, where there is one, a peer.

    Ratios are medians of interleaved pairs in one run; above 1 is better than the other.
    """
