"""Flags of `kvstore router` that make it an endpoint picker behind a gateway as well."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import wraps
from pathlib import Path
from typing import Any

import click

from kvstore.adapters.envoy.picker import PickerConfig
from kvstore.adapters.envoy.server import ExtProcServer
from kvstore.adapters.prompts import ModelTokenizer
from kvstore.cli.values import ADDRESS, BYTES, Address
from kvstore.core.names import Root
from kvstore.router.server import RouterServer
from kvstore.rpc.security import SecurityConfig, check_listen


@dataclass(frozen=True, slots=True)
class ExtProcOptions:
    """What the command line said about the picker."""

    listen: str
    tokenizer: Path | None
    base_models: frozenset[str]
    fallbacks: int
    patience_ms: float
    max_body_bytes: int

    def server(self, beside: RouterServer, root: Root) -> ExtProcServer:
        """Return the picker, not started; raises `BadInput` naming an unreadable tokenizer."""
        config = PickerConfig(
            root=root,
            base_models=self.base_models,
            fallbacks=self.fallbacks,
            patience_ms=self.patience_ms,
            max_body_bytes=self.max_body_bytes,
        )
        tokenizer = ModelTokenizer(self.tokenizer) if self.tokenizer is not None else None
        return ExtProcServer(beside, config, tokenizer)

    def check(self, rules: SecurityConfig) -> None:
        """Raise `BadInput` where the port may not be opened."""
        check_listen("--ext-proc", self.listen, rules)


_FLAGS = (
    click.option(
        "--ext-proc", "picker_on", type=ADDRESS, metavar="HOST:PORT",
        help="Also serve Envoy's external processing: an endpoint picker for a gateway.",
    ),
    click.option(
        "--tokenizer", type=click.Path(path_type=Path, file_okay=False, exists=True),
        help="The engines' model directory, to see a gateway's prompts as they do.",
    ),
    click.option(
        "--base-model", "base_models", multiple=True, metavar="NAME",
        help="Served name of the model; others are adapters. [default: every name is the model]",
    ),
    click.option(
        "--fallbacks", default=0, show_default=True, type=click.IntRange(0, 16),
        help="Endpoints named behind the best, for gateways that try them in turn.",
    ),
    click.option(
        "--pick-wait-ms", "patience_ms", default=30_000.0, show_default=True,
        type=click.FloatRange(min=0, min_open=True),
        help="How long a gateway's request waits for room before it gets 429.",
    ),
    click.option(
        "--max-body", "max_body_bytes", default="4MiB", show_default=True, type=BYTES,
        help="A gateway's request body; beyond it 413.",
    ),
)  # fmt: skip


def ext_proc_options(command: Callable[..., Any]) -> Callable[..., Any]:
    """Add the flags to a command, which gets them as one `ext_proc`: None without `--ext-proc`."""

    @wraps(command)
    def with_picker(
        *, picker_on: Address | None, tokenizer: Path | None, base_models: tuple[str, ...],
        fallbacks: int, patience_ms: float, max_body_bytes: int, **rest: Any,
    ) -> Any:  # fmt: skip
        options = None
        if picker_on is not None:
            options = ExtProcOptions(
                str(picker_on), tokenizer, frozenset(base_models), fallbacks, patience_ms,
                max_body_bytes,
            )  # fmt: skip
        elif tokenizer is not None or base_models:
            raise click.UsageError("--tokenizer and --base-model are for --ext-proc")
        return command(ext_proc=options, **rest)

    for flag in reversed(_FLAGS):
        with_picker = flag(with_picker)
    return with_picker
