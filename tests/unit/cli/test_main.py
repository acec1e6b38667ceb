"""The command line's frame: lazy commands, exit statuses, one-line errors."""

import subprocess
import sys
from importlib.metadata import EntryPoint

import click
import pytest

from kvstore.cli import main
from kvstore.core.errors import BadInput, Unreachable
from tests.patience import PATIENCE_S


def add_command(monkeypatch: pytest.MonkeyPatch, callback: object) -> None:
    command = click.Command("boom", callback=callback)  # type: ignore[arg-type]

    class Loaded(EntryPoint):
        def load(self) -> click.Command:
            return command

    entry = Loaded("boom", "tests:boom", main.ENTRY_POINT_GROUP)
    monkeypatch.setattr(main, "entry_points", lambda group: [entry])


def raising(error: BaseException) -> object:
    def callback() -> None:
        raise error

    return callback


@pytest.mark.parametrize(
    ("error", "status", "message"),
    [
        (BadInput("--arena: too small"), 2, "kvstore: --arena: too small\n"),
        (Unreachable("node gone"), 1, "kvstore: node gone\n"),
        (KeyboardInterrupt(), 130, "kvstore: interrupted\n"),
    ],
)
def test_an_error_becomes_one_line_and_a_status(
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    error: BaseException,
    status: int,
    message: str,
) -> None:
    add_command(monkeypatch, raising(error))
    assert main.run(["boom"]) == status
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.lstrip("\n") == message


def test_a_command_may_return_its_exit_status(monkeypatch: pytest.MonkeyPatch) -> None:
    add_command(monkeypatch, lambda: 1)
    assert main.run(["boom"]) == 1
    add_command(monkeypatch, lambda: None)
    assert main.run(["boom"]) == 0


def test_wrong_usage_is_status_2(capsys: pytest.CaptureFixture[str]) -> None:
    assert main.run(["no-such-command"]) == 2
    assert "no-such-command" in capsys.readouterr().err


def test_a_command_of_an_absent_package_is_listed_and_says_what_to_install(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    entry = EntryPoint("paint", "no_such_package.paint:paint", main.ENTRY_POINT_GROUP)
    monkeypatch.setattr(main, "entry_points", lambda group: [entry])
    assert main.run(["--help"]) == 0
    assert "paint" in capsys.readouterr().out
    assert main.run(["paint", "--colour", "red"]) == 2
    assert "no_such_package" in capsys.readouterr().err


def test_help_lists_every_command_and_imports_no_engine() -> None:
    probe = (
        "import sys; from kvstore.cli.main import run; assert run(['--help']) == 0;"
        "heavy = {'ray', 'torch', 'transformers', 'fastapi'} & set(sys.modules);"
        "assert not heavy, heavy"
    )
    done = subprocess.run(
        [sys.executable, "-c", probe],
        capture_output=True,
        text=True,
        timeout=PATIENCE_S,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    for name in ("chat", "demo", "down", "node", "router", "up"):
        assert f"\n  {name} " in done.stdout
