"""What a worker computes with: a model, its pages and their mover, on one device or on several."""

import asyncio
import shutil
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

import torch

from kvstore.core.errors import Unsupported
from kvstore.core.names import Fidelity
from kvworkers.cluster.rundir import new_ranks_dir
from kvworkers.models.loading import LoadedModel, load_model
from kvworkers.models.provision import ensure_model
from kvworkers.models.sharding import WHOLE, Part, Summing, only_one
from kvworkers.models.spec import read_spec
from kvworkers.pages.sizing import DevicePages, new_pages
from kvworkers.ranks.collective import Collective
from kvworkers.ranks.gathering import Launcher, Processes, gather
from kvworkers.ranks.lead import Lead
from kvworkers.ranks.messages import Orders
from kvworkers.ranks.mover import RanksMover
from kvworkers.stream.device_mover import make_mover
from kvworkers.stream.mover import Mover
from kvworkers.worker_config import WorkerConfig


@dataclass(frozen=True, slots=True)
class Held:
    """A model that is loaded and pages to compute it over."""

    model: LoadedModel
    pages: DevicePages
    mover: Mover
    lead: Lead | None
    """The other ranks; None where there are none."""
    let_go: ExitStack
    """Ends them; holds nothing else."""

    @property
    def pids(self) -> tuple[int, ...]:
        """The processes besides this one that write blocks."""
        return self.lead.pids if self.lead is not None else ()

    async def close(self) -> None:
        """End the other ranks; no step and no copy is under way."""
        await asyncio.to_thread(self.let_go.close)


async def hold(
    config: WorkerConfig, launcher: Launcher | None, on_lost: Callable[[str], None]
) -> Held:
    """Load what `config` asks for; with several ranks, have `launcher` start the others.

    `launcher` None: as processes of this one. `on_lost` is told, on the event loop, why nothing
    can be computed any more. Raises what loading raises, and `Unreachable` for a rank's failure.
    """
    path = await asyncio.to_thread(ensure_model, config.model)
    device = config.device
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    if config.tensor_parallel > 1:
        return await _hold_ranks(config, path, device, launcher, on_lost)
    model = await asyncio.to_thread(_load, config, path, device, WHOLE, only_one)
    pages = await asyncio.to_thread(
        new_pages,
        model,
        config.pool_bytes,
        step_tokens=config.step_tokens,
        batch=config.max_running,
    )
    return Held(model, pages, make_mover(pages.memory, model.forms), None, ExitStack())


async def _hold_ranks(
    config: WorkerConfig,
    path: Path,
    device: str,
    launcher: Launcher | None,
    on_lost: Callable[[str], None],
) -> Held:
    ranks = config.tensor_parallel
    spec = await asyncio.to_thread(read_spec, path, device=device)
    Part(0, ranks).layout(spec.layout)  # Raises here, not in as many processes.
    if ":" in device:
        raise Unsupported(f"device {device} with {ranks} ranks: name none, each takes its own")
    with ExitStack() as undo:
        directory = new_ranks_dir()
        undo.callback(shutil.rmtree, directory, ignore_errors=True)
        launcher = launcher or Processes(ranks, device)
        undo.callback(launcher.close)
        orders = Orders(
            model=str(path),
            ranks=ranks,
            device=device,
            threads=config.threads,
            fidelity=config.fidelity,
            pool_bytes=config.pool_bytes,
            step_tokens=config.step_tokens,
            max_running=config.max_running,
            rendezvous=str(directory / "rendezvous"),
            deadline_ms=config.rank_deadline_ms,
        )

        def load(part: Part, collective: Collective) -> LoadedModel:
            return _load(config, path, device, part, collective.total)

        gathered = await gather(orders, load, launcher, directory)
        loop = asyncio.get_running_loop()
        undo.callback(gathered.lead.close)
        gathered.lead.start(lambda why: loop.call_soon_threadsafe(on_lost, why))
        mover = RanksMover(gathered.pages.memory, gathered.model, gathered.lead)
        return Held(gathered.model, gathered.pages, mover, gathered.lead, undo.pop_all())


def _load(config: WorkerConfig, path: Path, device: str, part: Part, total: Summing) -> LoadedModel:
    return load_model(
        path,
        device=device,
        threads=config.threads,
        fidelity=Fidelity(config.fidelity),
        part=part,
        total=total,
    )
