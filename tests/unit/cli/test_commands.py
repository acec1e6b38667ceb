"""Every command explains itself, its shared options (`kvworkers.commands.options`) included."""

import socket
from importlib import import_module

import click
import pytest
from click.testing import CliRunner

from kvstore.cli.main import run

COMMANDS = {
    "faults": "kvstore.cli.faults",
    "node": "kvstore.cli.node",
    "record": "kvstore.cli.record",
    "router": "kvstore.cli.router",
    "simulate": "kvstore.cli.simulate",
    "targets": "kvstore.cli.targets",
    "top": "kvstore.cli.top",
    "up": "kvworkers.commands.up",
    "down": "kvworkers.commands.down",
    "chat": "kvworkers.commands.chat",
    "demo": "kvworkers.commands.demo",
    "model": "kvworkers.commands.model",
    "status": "kvworkers.commands.operate",
    "drain": "kvworkers.commands.operate",
    "scale": "kvworkers.commands.operate",
    "restart": "kvworkers.commands.operate",
}


def _command(name: str) -> click.Command:
    command = getattr(import_module(COMMANDS[name]), name)
    assert isinstance(command, click.Command)
    return command


def _leaves(command: click.Command) -> list[click.Command]:
    if isinstance(command, click.Group):
        return [leaf for inner in command.commands.values() for leaf in _leaves(inner)]
    return [command]


@pytest.mark.parametrize("name", COMMANDS)
def test_help_explains_every_option(name: str) -> None:
    shown = CliRunner().invoke(_command(name), ["--help"])
    assert shown.exit_code == 0, shown.output
    for leaf in _leaves(_command(name)):
        assert leaf.help, f"{leaf.name} has no help"
        for option in leaf.params:
            if isinstance(option, click.Option) and not option.hidden:
                assert option.help, f"{leaf.name} {option.opts[0]} has no help"


@pytest.mark.parametrize("name", COMMANDS)
def test_an_unknown_flag_is_wrong_usage_and_named(name: str) -> None:
    for leaf in _leaves(_command(name)):
        refused = CliRunner().invoke(leaf, ["--no-such-flag"])
        assert refused.exit_code == 2
        assert "--no-such-flag" in refused.output


def test_an_address_of_metrics_that_is_taken_is_wrong_usage(
    capsys: pytest.CaptureFixture[str],
) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        address = f"127.0.0.1:{taken.getsockname()[1]}"
        arguments = ["router", "--worker", "127.0.0.1:1", "--metrics", address]
        assert run(arguments) == 2
    assert f"--metrics {address}" in capsys.readouterr().err
