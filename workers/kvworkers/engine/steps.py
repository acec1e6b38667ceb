"""Begins steps on the device and waits for what they chose, on a compute thread of its own.

A GPU computes while the host goes on: step n + 1 can be begun before anybody has seen what step n
chose, since it takes those tokens where they lie. So the host's work for a step (telling callers,
planning, making inputs) happens while the device computes the one before.
"""

import asyncio
import logging
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from typing import Any

import torch
from kvkernels import fused
from torch import Tensor

from kvworkers.engine.batch import build_step
from kvworkers.engine.sampling import Sampled, Sampler
from kvworkers.engine.sequence import Sequence as Run
from kvworkers.engine.work import Work
from kvworkers.models.loading import LoadedModel

_log = logging.getLogger(__name__)


@dataclass(frozen=True, eq=False, slots=True)
class Launched:
    """A step that was begun."""

    samplers: Sequence[Sampler]
    positions: Sequence[int]
    """Where each chosen token will stand in its sequence."""
    rows: dict[Run, int]
    """Each sampled sequence's row."""
    logits: Tensor
    """float32 [rows, vocab]; valid until the next step is begun."""
    chosen: Tensor
    """int64 [2, rows] where the model computes: `fused.choose` of the logits."""
    seen: Tensor
    """The same on the host, once `done` has happened."""
    done: Any
    """A CUDA event; None where the step was computed when it was begun."""


class StepRunner:
    """Runs the steps of one model over one pool. Its coroutines belong to one event loop."""

    def __init__(self, model: LoadedModel, pages: Tensor, *, overlap: bool | None = None) -> None:
        """`pages` is `model.page_view` of the pool.

        `overlap` says whether steps may be begun ahead; None: where the device computes by itself.
        """
        self._model = model
        self._pages = pages
        self._overlap = pages.device.type == "cuda" if overlap is None else overlap
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="compute")

    def runs_ahead(self, samplers: Sequence[Sampler]) -> bool:
        """Say whether the next step may be begun before this one's choices are seen.

        Only where all of them are made on the device.
        """
        return self._overlap and all(sampler.params.only_id for sampler in samplers)

    async def launch(
        self, works: Sequence[Work], samplers: Sequence[Sampler], before: Launched | None
    ) -> Launched:
        """Begin a step behind `before`; `samplers` belong to the works with `samples`."""
        loop = asyncio.get_running_loop()
        return await loop.run_in_executor(self._thread, self._launch, works, samplers, before)

    async def copy(self, copies: Sequence[tuple[int, int]]) -> None:
        """Copy pages, each into the one beside it, behind the steps that were begun.

        Returns when that is done: those copied from may be given away, those copied to be written.
        """
        loop = asyncio.get_running_loop()
        done = await loop.run_in_executor(self._thread, self._copy, copies)
        if done is not None:
            # Not on the compute thread: steps are begun meanwhile.
            await asyncio.to_thread(done.synchronize)

    async def choose(self, asked: Sequence[tuple[Sampler, Sampled, int]]) -> list[Sampled]:
        """Return what each sampler chooses where another chose before, for its position."""
        loop = asyncio.get_running_loop()
        return await loop.run_in_executor(self._thread, _choose, asked)

    async def collect(
        self, step: Launched, good: Sequence[bool], keep: Sequence[bool] = ()
    ) -> list[Sampled | None]:
        """Wait for a step; return what each sampler chose, with its logits where `keep` says so.

        None where it was not asked, since its row is not `good`, and where logits were not finite.
        Where it does not run ahead, no other step may have been begun since.
        """
        loop = asyncio.get_running_loop()
        return await loop.run_in_executor(self._thread, self._collect, step, good, keep)

    async def close(self) -> None:
        """Wait for whatever was begun: nothing writes the pages any more."""
        await asyncio.to_thread(self._thread.shutdown)
        await asyncio.to_thread(self._let_it_end)

    def _launch(
        self, works: Sequence[Work], samplers: Sequence[Sampler], before: Launched | None
    ) -> Launched:
        if before is None:
            step = build_step(works)
        else:
            step = build_step(works, before.rows, before.chosen[0])
        try:
            logits = self._model.forward(step, self._pages)
            with torch.inference_mode():
                chosen = fused.choose(logits)
                seen, done = _on_its_way(chosen)
        except BaseException:
            self._let_it_end()  # What was queued of it writes pages that others will be given.
            raise
        sampled = [work for work in works if work.samples]
        return Launched(
            samplers=samplers,
            positions=[work.start + work.count for work in sampled],
            rows={work.sequence: row for row, work in enumerate(sampled)},
            logits=logits,
            chosen=chosen,
            seen=seen,
            done=done,
        )

    def _let_it_end(self) -> None:
        if self._pages.device.type == "cuda":
            try:
                torch.cuda.synchronize(self._pages.device)
            except RuntimeError:
                _log.exception("the device is lost: its steps did not end, and write nothing")

    def _copy(self, copies: Sequence[tuple[int, int]]) -> Any:
        self._model.copy_pages(self._pages, copies)
        if self._pages.device.type != "cuda":
            return None
        done: Any = torch.cuda.Event()  # type: ignore[no-untyped-call]
        done.record(torch.cuda.current_stream(self._pages.device))
        return done

    def _collect(
        self, step: Launched, good: Sequence[bool], keep: Sequence[bool]
    ) -> list[Sampled | None]:
        if step.done is not None:
            step.done.synchronize()
        best, finite = step.seen.tolist()
        chosen: list[Sampled | None] = []
        for row, (sampler, position) in enumerate(zip(step.samplers, step.positions, strict=True)):
            if not (finite[row] and good[row]):
                chosen.append(None)
            elif sampler.params.only_id:
                chosen.append(Sampled(best[row]))
            else:
                # Drawn on the host, so that a seed gives the same tokens on every device.
                logits = step.logits[row].cpu()
                sampled = sampler.sample(logits, position=position)
                kept = bool(keep) and keep[row]
                chosen.append(replace(sampled, logits=logits.clone()) if kept else sampled)
        return chosen


def _choose(asked: Sequence[tuple[Sampler, Sampled, int]]) -> list[Sampled]:
    chosen: list[Sampled] = []
    for sampler, first, position in asked:
        if sampler.params.only_id:
            chosen.append(Sampled(first.token))
        else:
            assert first.logits is not None, "kept where others choose otherwise"
            chosen.append(sampler.sample(first.logits, position=position))
    return chosen


def _on_its_way(chosen: Tensor) -> tuple[Tensor, Any]:
    """Queue the copy to the host; return where it will lie and the event that says so."""
    if chosen.device.type != "cuda":
        return chosen, None
    seen = torch.empty(chosen.shape, dtype=chosen.dtype, pin_memory=True)
    seen.copy_(chosen, non_blocking=True)
    done: Any = torch.cuda.Event()  # type: ignore[no-untyped-call]
    done.record(torch.cuda.current_stream(chosen.device))
    return seen, done
