"""Commands that are installed and cannot run here: listed all the same, with what to install."""

import click

from kvstore.core.errors import BadInput


def missing(name: str, error: ModuleNotFoundError) -> click.Command:
    """Return a command that says what to install: `--help` must list it all the same."""
    reason = (
        f"needs a package that is not installed ({error.name}): pip install kvstore-llm[worker]"
    )

    def explain(arguments: tuple[str, ...]) -> None:
        raise BadInput(f"kvstore {name} {reason}")

    return click.Command(
        name,
        callback=explain,
        params=[click.Argument(["arguments"], nargs=-1, type=click.UNPROCESSED)],
        short_help=f"({reason})",
        context_settings={"ignore_unknown_options": True},
    )
