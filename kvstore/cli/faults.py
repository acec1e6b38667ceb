"""`kvstore faults`: what can be broken on purpose, and what has to be seen then."""

import json

import click

from kvstore.testing.fault_points import FAULT_POINTS


@click.command(short_help="List the faults that tests inject, by name.")
@click.option("--json", "as_json", is_flag=True, help="Print one line of JSON for each fault.")
def faults(*, as_json: bool) -> None:
    """List every fault that kvstore.testing can inject: what it does and what is to be expected."""
    for point in FAULT_POINTS:
        if as_json:
            click.echo(json.dumps(point._asdict()))
        else:
            click.echo(f"{point.name:<12} {point.does}\n{'':<13}expect: {point.expect}\n"
                       f"{'':<13}inject: {point.where}")  # fmt: skip
