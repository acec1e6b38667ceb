"""`kvstore model`: make a model ready, and say what one is."""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import click
from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeElapsedColumn

from kvworkers.models.convert import Progress as Report
from kvworkers.models.provision import ensure_model
from kvworkers.models.spec import ModelSpec, read_spec


@contextmanager
def model_progress(console: Console | None = None) -> Iterator[Report]:
    """Show `ensure_model`'s steps on standard error: bars on a terminal, else a line a step."""
    console = console or Console(stderr=True)
    if not console.is_terminal:
        yield _lines(console)
        return
    columns = (TextColumn("{task.description:<34}"), BarColumn(), TimeElapsedColumn())
    with Progress(*columns, console=console) as bars:
        tasks: dict[str, TaskID] = {}

        def report(step: str, done: int, total: int) -> None:
            title, _, part = step.partition(": ")
            if title not in tasks:
                tasks[title] = bars.add_task(title, total=None)
            text = f"{title}: {part}" if part else title
            bars.update(tasks[title], description=text, completed=done, total=total or None)

        yield report


def _lines(console: Console) -> Report:
    said: set[str] = set()

    def report(step: str, done: int, total: int) -> None:
        if step not in said:
            said.add(step)
            console.print(step, highlight=False)

    return report


@click.group()
def model() -> None:
    """Make models ready and describe them."""


@model.command()
@click.option("--model", "source", metavar="PATH", help="A GGUF file or Hugging Face directory.")
@click.option("--json", "as_json", is_flag=True, help="One JSON object on standard output.")
def prepare(source: str | None, as_json: bool) -> None:
    """Download and convert a model where needed; print its directory.

    Without --model, the default model (SmolLM2-135M-Instruct) is made ready.
    """
    with model_progress() as report:
        path = ensure_model(source, progress=report)
    click.echo(json.dumps({"path": str(path)}) if as_json else str(path))


@model.command()
@click.option("--model", "source", metavar="PATH", help="A GGUF file or Hugging Face directory.")
@click.option("--json", "as_json", is_flag=True, help="One JSON object on standard output.")
def show(source: str | None, as_json: bool) -> None:
    """Say what a model is to the cache: sizes, block layout, identity."""
    with model_progress() as report:
        path = ensure_model(source, progress=report)
    facts = _facts(read_spec(path))
    if as_json:
        click.echo(json.dumps(facts))
        return
    for name, value in facts.items():
        click.echo(f"{name.replace('_', ' '):<18}{value}")


def _facts(spec: ModelSpec) -> dict[str, str | int | float | list[int]]:
    return {
        "name": spec.name,
        "path": str(Path(spec.path)),
        "layers": spec.layers,
        "query_heads": spec.query_heads,
        "kv_heads": spec.kv_heads,
        "head_dim": spec.head_dim,
        "vocab_size": spec.vocab_size,
        "max_model_tokens": spec.max_model_tokens,
        "eos_token_ids": list(spec.eos_token_ids),
        "dtype": spec.dtype,
        "codec": spec.layout.codec.name,
        "block_bytes": spec.layout.block_bytes,
        "bytes_per_token": spec.layout.bytes_per_token,
        "weights_digest": spec.namespace.weights_digest,
        "namespace_digest": spec.namespace.digest().hex(),
    }
