"""`kvstore plan`: KV bytes, batch and context per GPU, load against recompute, tiers, money."""

import json
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any, Final

import click

from kvstore.cli.plan_plot import charts_of, write_charts
from kvstore.cli.plan_report import render, render_trace
from kvstore.cli.planning import Question, answer
from kvstore.cli.progress import Steps, steps_shown
from kvstore.cli.tier_plan import Machine, TraceAnswer, plan_tiers
from kvstore.cli.values import BYTES
from kvstore.core.capacity import FIDELITY_CODECS, Budget
from kvstore.core.catalogue import GPUS, MODELS
from kvstore.core.errors import BadInput
from kvstore.core.model_shape import ModelShape, read_config
from kvstore.core.money import Prices
from kvstore.directory.policies import DEFAULT_POLICY, POLICIES
from kvstore.simulate.formats import read_trace
from kvstore.simulate.plot import check_plot

_TOKENS: Final = re.compile(r"(\d+(?:\.\d+)?)(k|m|mi)?", re.IGNORECASE | re.ASCII)
_TOKEN_UNITS: Final = {"": 1, "k": 1024, "m": 1000 * 1024, "mi": 1024 * 1024}
_WEIGHT_BYTES: Final = {"bf16": 2.0, "fp8": 1.0, "int4": 0.55}
_PRICES: Final = ("gpu-hour", "dram-gib-month", "nvme-gib-month")
_TIERS: Final = ("dram", "nvme", "peer", "files")
_MAX_CONFIG_BYTES: Final = 8 << 20


def parse_tokens(text: str) -> int:
    """Return the tokens that `4096`, `32k` or `1M` stand for.

    k is 1,024 tokens and M is 1,000 k, as in "128k" and "1M" contexts; Mi is 1,048,576. Raises
    `ValueError` for anything else, zero included.
    """
    match = _TOKENS.fullmatch(text.strip())
    tokens = int(float(match[1]) * _TOKEN_UNITS[(match[2] or "").lower()]) if match else 0
    if tokens <= 0:
        raise ValueError(f"{text!r} is not a number of tokens such as 4096, 32k or 1M")
    return tokens


class TokensType(click.ParamType[int]):
    """A number of tokens, written as people write context lengths."""

    name = "tokens"

    def convert(
        self, value: object, param: click.Parameter | None, ctx: click.Context | None
    ) -> int:
        if isinstance(value, int):
            return value
        try:
            return parse_tokens(str(value))
        except ValueError as error:
            self.fail(str(error), param, ctx)


@click.command(short_help="Plan capacity: KV bytes, batch per GPU, load against recompute.")
@click.option(
    "--model", "model_name", required=True, metavar="NAME|CONFIG",
    help=f"A known model ({', '.join(MODELS)}) or the path of a config.json.",
)  # fmt: skip
@click.option(
    "--context", "contexts", multiple=True, type=TokensType(),
    help="Tokens of a request; repeat for several. k = 1,024, M = 1,000 k.",
)  # fmt: skip
@click.option(
    "--users", default=1, show_default=True, type=click.IntRange(1), help="Requests at once."
)
@click.option("--gpu", default="h100", show_default=True, type=click.Choice(sorted(GPUS)))
@click.option(
    "--gpus", "ranks", default=1, show_default=True, type=click.IntRange(1, 1024),
    help="GPUs that share one copy of the model (tensor parallel).",
)  # fmt: skip
@click.option(
    "--fidelity", default="exact", show_default=True, type=click.Choice(list(FIDELITY_CODECS)),
    help="How KV is kept; exact is 16 bits.",
)  # fmt: skip
@click.option(
    "--weights", default="bf16", show_default=True, type=click.Choice(list(_WEIGHT_BYTES)),
    help="How weights are kept.",
)  # fmt: skip
@click.option(
    "--usable", default=0.9, show_default=True, type=float,
    help="Share of GPU memory for weights and KV; the rest is runtime and activations.",
)  # fmt: skip
@click.option(
    "--mfu", default=0.5, show_default=True, type=click.FloatRange(0, 1, min_open=True),
    help="Share of the data sheet's FLOP/s that prefill reaches.",
)  # fmt: skip
@click.option(
    "--bandwidth", "bandwidths", multiple=True, metavar="TIER=GB/S",
    help="Measured GB/s of a tier: dram (per GPU), nvme, peer, files (per host).",
)  # fmt: skip
@click.option(
    "--price", "prices", multiple=True, metavar="WHAT=MONEY",
    help=f"A price: {', '.join(_PRICES)}.",
)  # fmt: skip
@click.option(
    "--trace", "traces", multiple=True, metavar="FILE",
    type=click.Path(path_type=Path, exists=True, dir_okay=False),
    help="Say which tiers this trace of requests needs: docs/simulate.md has the format.",
)  # fmt: skip
@click.option(
    "--hit-rate", "targets", multiple=True, metavar="SHARE", type=click.FloatRange(0, 1),
    help="Of a trace's prompt tokens, 0 to 1.  [default: 50, 80 and 95 % of what it allows]",
)  # fmt: skip
@click.option(
    "--dram", default="1TiB", show_default=True, type=BYTES,
    help="A host's memory for the cache; a trace that needs more gets NVMe.",
)  # fmt: skip
@click.option(
    "--copies", default=1, show_default=True, type=click.IntRange(1, 1024),
    help="Copies of the model on the host that serve the trace.",
)  # fmt: skip
@click.option(
    "--policy", default=DEFAULT_POLICY, show_default=True, type=click.Choice(list(POLICIES)),
    help="What every tier evicts by.",
)  # fmt: skip
@click.option("--limit", type=click.IntRange(1), help="Read the first N requests of a trace only.")
@click.option(
    "--plot", type=click.Path(path_type=Path, dir_okay=False),
    help="Draw the plan: FILE.html (self-contained) or FILE.png (extra `plot`).",
)  # fmt: skip
@click.option("--json", "as_json", is_flag=True, help="One JSON object per context and target.")
def plan(
    model_name: str, contexts: tuple[int, ...], users: int, gpu: str, ranks: int, fidelity: str,
    weights: str, usable: float, mfu: float, bandwidths: tuple[str, ...], prices: tuple[str, ...],
    traces: tuple[Path, ...], targets: tuple[float, ...], dram: int, copies: int, policy: str,
    limit: int | None, plot: Path | None, as_json: bool,
) -> None:  # fmt: skip
    """Say what a model's KV cache needs and what each tier is worth.

    Sizes come from the table of formats that the store itself uses. Bytes are printed in binary
    units: GiB = 2^30.
    """
    if not contexts and not traces:
        raise BadInput("say what to plan for: --context TOKENS, --trace FILE or both")
    if plot is not None:
        check_plot(plot)
    device = GPUS[gpu]
    budget = Budget(
        gpu_bytes=device.memory_bytes, ranks=ranks, usable=usable,
        weight_bytes=_WEIGHT_BYTES[weights],
    )  # fmt: skip
    question = Question(
        model=_model(model_name), users=users, gpu_name=gpu, gpu=device, budget=budget,
        fidelity=fidelity, mfu=mfu, bandwidths=_numbers("--bandwidth", bandwidths, _TIERS),
        prices=_prices(prices),
    )  # fmt: skip
    plans = [answer(question, tokens) for tokens in contexts]
    if as_json:
        for each in plans:
            click.echo(json.dumps(each.as_row()))
    elif plans:
        click.echo(render(question, plans))
    machine = Machine(copies=copies, dram_bytes=dram, policy=policy)
    answers: list[TraceAnswer] = []
    with steps_shown() as steps:
        for path in traces:
            found = _tiers(question, machine, path, targets, limit, steps)
            _tell(found, as_json=as_json, first=not answers and not plans)
            answers.append(found)
    if plot is not None:
        write_charts(plot, charts_of(question, plans, answers))


def _tiers(
    question: Question, machine: Machine, path: Path, targets: tuple[float, ...],
    limit: int | None, steps: Steps,
) -> TraceAnswer:  # fmt: skip
    """Plan one trace with its progress shown."""
    trace = read_trace(path, limit=limit)

    def begin(what: str) -> None:
        steps.begin(what, len(trace.requests))

    return plan_tiers(question, machine, trace, targets, on_replay=begin, on_request=steps.step)


def _tell(found: TraceAnswer, *, as_json: bool, first: bool) -> None:
    if as_json:
        for each in found.plans:
            click.echo(json.dumps(each.as_row()))
    else:
        click.echo(("" if first else "\n") + render_trace(found))


def _model(name: str) -> ModelShape:
    """Return a model of the catalogue, or the one a configuration file describes."""
    if name in MODELS:
        return read_config(name, MODELS[name])
    path = Path(name)
    path = path / "config.json" if path.is_dir() else path
    if not path.is_file():
        raise BadInput(f"--model {name}: neither a known model ({', '.join(MODELS)}) nor a file")
    if path.stat().st_size > _MAX_CONFIG_BYTES:
        raise BadInput(f"--model {path}: over {_MAX_CONFIG_BYTES} bytes is no configuration")
    try:
        config: Any = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise BadInput(f"--model {path}: {error}") from error
    if not isinstance(config, dict):
        raise BadInput(f"--model {path}: not a JSON object")
    return read_config(path.parent.name if path.name == "config.json" else path.stem, config)


def _numbers(flag: str, texts: Iterable[str], known: tuple[str, ...]) -> dict[str, float]:
    """Read `NAME=NUMBER` values of one flag."""
    values: dict[str, float] = {}
    for text in texts:
        name, equals, number = text.partition("=")
        try:
            value = float(number)
        except ValueError:
            value = -1.0
        if name not in known or not equals or not 0 <= value < float("inf"):
            raise BadInput(f"{flag} {text}: write NAME=NUMBER with NAME one of {', '.join(known)}")
        values[name] = value
    return values


def _prices(texts: Iterable[str]) -> Prices:
    given = _numbers("--price", texts, _PRICES)
    return Prices(
        gpu_hour=given.get("gpu-hour"),
        dram_gib_month=given.get("dram-gib-month"),
        nvme_gib_month=given.get("nvme-gib-month"),
    )
