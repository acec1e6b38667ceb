"""A loaded model: one ragged batch in, logits of the sampled rows out."""

import threading
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import torch
from kvkernels import ops
from kvkernels.plans import AttentionPlan
from torch import Tensor

from kvstore.core.errors import BadInput
from kvstore.core.layout import BlockLayout
from kvstore.core.names import Fidelity
from kvworkers.models import attention
from kvworkers.models.sharding import WHOLE, Part, Summing, cut, only_one
from kvworkers.models.spec import ModelSpec, read_spec
from kvworkers.models.step import StepInputs
from kvworkers.stream.forms import Forms, stored_layout

if TYPE_CHECKING:
    from kvworkers.models.fused import FusedDecoder
    from kvworkers.models.graphs import StepGraphs


Copies = Sequence[tuple[int, int]]
"""Pages to copy, and into which."""


class StepLead(Protocol):
    """Who has the other ranks compute a step together with this one."""

    def compute(self, step: StepInputs, mine: Callable[[StepInputs], Tensor]) -> Tensor:
        """Send a checked step that lies on the host to all ranks; return what `mine` gives."""
        ...

    def copy(self, copies: Copies, mine: Callable[[Copies], None]) -> None:
        """Have all ranks copy pages, each into the one beside it, as `mine` does here."""
        ...


@dataclass(slots=True)
class LoadedModel:
    """A model with its weights on one device. `forward` is for one thread at a time."""

    spec: ModelSpec
    device: torch.device
    module: Any
    """The transformers model, attention set to `kvstore_paged`."""
    graphs: "StepGraphs | None" = None
    """Captured steps over one pool; None until `capture`, and always on a CPU."""
    fused: "FusedDecoder | None" = None
    """Computes the module in fewer launches; None on a CPU, and where it does not know the kind."""
    part: Part = WHOLE
    """Which heads it has, of a model that several ranks compute together."""
    total: Summing = only_one
    """Sums over those ranks."""
    lead: "StepLead | None" = None
    """Lets the other ranks compute what this one does; None on those, and where there are none."""

    def new_pool(self, pages: int) -> Tensor:
        """Return a zeroed page pool, uint8 [pages, block_bytes], on the model's device."""
        if pages <= 0:
            raise BadInput(f"a pool needs at least one page, got {pages}")
        return torch.zeros((pages, self.page_bytes), dtype=torch.uint8, device=self.device)

    @property
    def page_bytes(self) -> int:
        """Return the bytes of a page on this device: a block, or a rank's part of one."""
        return self.part.layout(self.spec.layout).block_bytes

    def keep_as(self, fidelity: Fidelity) -> None:
        """Name blocks anew for a store that keeps them with `fidelity`."""
        namespace = replace(self.spec.namespace, fidelity=fidelity)
        self.spec = replace(self.spec, namespace=namespace)

    @property
    def forms(self) -> Forms:
        """Return how blocks lie in pages and in the store, as the namespace's fidelity has it."""
        return self._forms(self.spec.layout)

    @property
    def part_forms(self) -> Forms:
        """Return the same of what this rank has of them."""
        return self._forms(self.part.layout(self.spec.layout))

    def _forms(self, layout: BlockLayout) -> Forms:
        stored = stored_layout(layout, self.spec.namespace.fidelity)
        return Forms(layout, stored, getattr(torch, self.spec.dtype))

    def page_view(self, pool: Tensor) -> Tensor:
        """Return a pool's pages as `forward` takes them, in the model's element type."""
        layout = self.part.layout(self.spec.layout)
        return ops.page_view(pool, layout, getattr(torch, self.spec.dtype))

    def forward(self, step: StepInputs, pages: Tensor) -> Tensor:
        """Compute one step: write K and V of the new tokens, return logits fp32 [S, vocab].

        `pages` as `page_view` gives them; those of the step's slots are written, those of its
        block tables read. Raises `BadInput` before any work when the step does not fit pool
        or model. Row i of the result belongs to `step.sample_rows[i]`.
        """
        step.check(
            pages=pages.shape[0],
            vocab_size=self.spec.vocab_size,
            max_model_tokens=self.spec.max_model_tokens,
        )
        with torch.inference_mode():
            if self.lead is not None:
                return self.lead.compute(step, partial(self._forward, pages))
            return self._forward(pages, step)

    def _forward(self, pages: Tensor, step: StepInputs) -> Tensor:
        if self.graphs is not None and self.graphs.fits(step, pages):
            return self.graphs.forward(step)
        return last_of(self._parts(step.on(self.device), pages, None))

    def copy_pages(self, pages: Tensor, copies: Copies) -> None:
        """Copy pages of `page_view`, each into the one beside it, on every rank.

        Behind the steps before it and ahead of those after it; no page is both.
        """
        if not copies:
            return
        with torch.inference_mode():
            if self.lead is not None:
                self.lead.copy(copies, partial(copy_pages, pages))
            else:
                copy_pages(pages, copies)

    def capture(self, pages: Tensor, *, batch: int, max_pages: int) -> None:
        """Capture short appends and decode steps of up to `batch` sequences over `pages`.

        Nothing on a CPU, and nothing for one of several ranks: sums over them are not captured.
        The last of the pages becomes scratch: no sequence may be given it.
        """
        if self.device.type != "cuda" or self.part.ranks > 1:
            return
        from kvworkers.models.graphs import StepGraphs  # needs triton

        with torch.inference_mode():
            self.graphs = StepGraphs(self._parts, pages, layers=self.spec.layers)
            self.graphs.prepare(batch, max_pages=max_pages)

    def release(self) -> None:
        """Forget what was captured: its pages are given back once nobody else holds them."""
        self.graphs = None

    def fuse(self) -> None:
        """Merge weights for `fused` on a GPU. On a CPU transformers' own order of sums stays."""
        if self.device.type != "cuda":
            return
        from kvworkers.models.fused import FusedDecoder, fuses

        if fuses(self.module):
            self.fused = FusedDecoder(self.module, self.total)

    def _parts(
        self, step: StepInputs, pages: Tensor, plan: AttentionPlan | None
    ) -> Iterator[Tensor]:
        """Run the module over a step that lies on the device, group of layers by group.

        The last tensor is the logits. Modules of transformers are one group.
        """
        if self.fused is not None:
            plan = plan or attention.plan_step(step, pages)
            yield from self.fused.parts(step, pages, plan)
            return
        with attention.running(step, pages, plan):
            output = self.module(
                input_ids=step.tokens.unsqueeze(0),
                position_ids=step.positions.unsqueeze(0),
                use_cache=False,
                logits_to_keep=step.sample_rows,
            )
        logits: Tensor = output.logits[0]
        yield logits.float()


def copy_pages(pages: Tensor, copies: Copies) -> None:
    """Copy pages, each into the one beside it: no other memory is taken for it."""
    for source, target in copies:
        pages[target].copy_(pages[source])


def last_of(parts: Iterator[Tensor]) -> Tensor:
    """Compute every part of a step and return its logits."""
    return deque(parts, maxlen=1)[0]


_loading = threading.Lock()
"""transformers patches its own globals while it loads; two loads at once would mix them."""


@contextmanager
def quiet_loading() -> Iterator[None]:
    """Let one load run at a time, without transformers' own bars between ours."""
    from transformers.utils import logging

    with _loading:
        shown = logging.is_progress_bar_enabled()
        logging.disable_progress_bar()
        try:
            yield
        finally:
            if shown:
                logging.enable_progress_bar()


def load_model(
    path: str | Path,
    *,
    device: str = "cpu",
    threads: int | None = None,
    cache_dir: Path | None = None,
    fidelity: Fidelity = Fidelity.EXACT,
    part: Part = WHOLE,
    total: Summing = only_one,
) -> LoadedModel:
    """Load the Hugging Face directory `path` on `device`.

    `fidelity` is how exactly a store may keep its blocks; `threads` sets torch's intra-op threads
    for this process; `part` is what the device gets of a model that `total` sums over. Raises what
    `read_spec` raises, and `Unsupported` for a device without kernels or a model without parts.
    """
    ops.implementation(torch.device(device).type)
    spec = read_spec(path, device=torch.device(device).type, cache_dir=cache_dir)
    if threads is not None:
        if threads <= 0:
            raise BadInput(f"threads must be positive, got {threads}")
        torch.set_num_threads(threads)
    with quiet_loading():
        attention.register()
        module = _load_weights(spec)
    module.requires_grad_(False)
    cut(module, part, total, kv_heads=spec.kv_heads)
    there = module.to(device).eval()
    model = LoadedModel(spec, torch.device(device), there, part=part, total=total)
    model.keep_as(fidelity)
    model.fuse()
    return model


def _load_weights(spec: ModelSpec) -> Any:
    """Return transformers' model with every weight from the files; `BadInput` otherwise."""
    from safetensors import SafetensorError
    from transformers import AutoModelForCausalLM

    load: Any = AutoModelForCausalLM.from_pretrained  # its overloads fit no checker
    try:
        # The type is said explicitly: converted configs say bfloat16, which a CPU neither
        # computes quickly nor exactly.
        module, loading = load(
            spec.path,
            dtype=getattr(torch, spec.dtype),
            attn_implementation=attention.IMPLEMENTATION,
            local_files_only=True,
            output_loading_info=True,
        )
    except (OSError, ValueError, RuntimeError, SafetensorError) as error:
        raise BadInput(f"{spec.path}: weights could not be loaded: {error}") from error
    if missing := loading["missing_keys"]:
        # transformers would go on with random numbers in their place.
        raise BadInput(f"{spec.path}: weights are missing: {', '.join(sorted(missing)[:3])} …")
    return module
