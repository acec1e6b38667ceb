"""What transformers calls in every layer: write the new K and V, attend over the pages.

A model is loaded with the attention implementation `kvstore_paged`, so transformers' own code
computes q, k and v (with RoPE, norms, biases as the architecture has them) and hands them here.
The step they belong to travels in a context variable, set by the thread that runs the forward:
two models in two threads of one process never see each other's step.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any, Final

from kvkernels import ops
from kvkernels.plans import AttentionPlan
from torch import Tensor, nn

from kvstore.core.errors import Unsupported
from kvworkers.models.step import StepInputs

IMPLEMENTATION: Final = "kvstore_paged"
"""The name under which transformers finds this module's attention."""

_REFUSED: Final = ("sliding_window", "softcap", "s_aux")
"""Arguments that change attention and that the kernels do not serve yet."""


@dataclass(frozen=True, slots=True)
class RunningStep:
    """What every layer of the forward pass in this context shares."""

    step: StepInputs
    pages: Tensor
    plan: AttentionPlan


_running: ContextVar[RunningStep] = ContextVar("kvstore_running_step")


def plan_step(step: StepInputs, pages: Tensor) -> AttentionPlan:
    """Return what the layers of a step share on the device of `pages`."""
    return ops.plan_attention(
        step.block_tables, step.context_lengths, step.query_starts, device_type=pages.device.type
    )


@contextmanager
def running(step: StepInputs, pages: Tensor, plan: AttentionPlan | None = None) -> Iterator[None]:
    """Make `step` the one that attention calls in this context belong to.

    `plan` is the step's where the caller has one that outlives it (a captured graph's).
    """
    if plan is None:
        plan = plan_step(step, pages)
    token = _running.set(RunningStep(step, pages, plan))
    try:
        yield
    finally:
        _running.reset(token)


def paged_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    **arguments: Any,
) -> tuple[Tensor, None]:
    """Serve one layer of the running step; transformers' signature.

    query [1, query_heads, T, head_dim], key and value [1, kv_heads, T, head_dim]; returns
    [1, T, query_heads, head_dim] and no weights. Raises `Unsupported` for attention that the
    kernels do not compute (window, softcap, sinks, a mask).
    """
    for name in _REFUSED:
        if arguments.get(name) is not None:
            raise Unsupported(f"attention with {name} is not served yet")
    if attention_mask is not None:
        raise Unsupported("attention with a mask of the model's own is not served")
    now = _running.get()
    layer: Any = module.layer_idx
    now.step.pass_layer(layer)
    ops.write_pages(
        key[0].transpose(0, 1), value[0].transpose(0, 1), now.pages, now.step.slots, layer
    )
    attended = ops.paged_attention(
        query[0].transpose(0, 1),
        now.pages,
        layer=layer,
        block_tables=now.step.block_tables,
        context_lengths=now.step.context_lengths,
        query_starts=now.step.query_starts,
        scale=query.shape[-1] ** -0.5 if scaling is None else scaling,
        plan=now.plan,
    )
    return attended.unsqueeze(0), None


def register() -> None:
    """Tell transformers of `kvstore_paged` and that it needs no mask. Idempotent."""
    from transformers import AttentionInterface
    from transformers.masking_utils import AttentionMaskInterface

    AttentionInterface.register(IMPLEMENTATION, paged_attention)
    AttentionMaskInterface.register(IMPLEMENTATION, _no_mask)


def _no_mask(*_: Any, **__: Any) -> None:
    """Answer transformers' question for a mask: block tables and lengths say it all."""
