"""What a device has to provide, and the plan that the layers of one step share."""

from dataclasses import dataclass
from typing import Protocol

from torch import Tensor

from kvkernels.movement import Movement
from kvkernels.quantised import QuantisedPages
from kvstore.core.errors import BadInput


@dataclass(frozen=True, slots=True, kw_only=True)
class Rules:
    """What changes attention beyond causality. The default changes nothing.

    Raises `BadInput` naming the value that makes no sense.
    """

    window: int | None = None
    """A token sees itself and the `window - 1` tokens before it."""
    sinks: int = 0
    """Tokens at the start of a sequence that stay visible beyond the window."""
    softcap: float | None = None
    """Scaled scores s become softcap * tanh(s / softcap)."""

    def __post_init__(self) -> None:
        if self.window is not None and self.window < 1:
            raise BadInput(f"window must be at least 1, got {self.window}")
        if self.sinks < 0 or (self.sinks and self.window is None):
            raise BadInput(f"sinks go with a window and are not negative, got {self.sinks}")
        if self.softcap is not None and not self.softcap > 0:
            raise BadInput(f"softcap must be above 0, got {self.softcap}")


class AttentionPlan(Protocol):
    """What an implementation prepares once per step and uses in every layer."""

    @property
    def query_tokens(self) -> int:
        """Rows of `query` that the plan was made for."""
        ...


class Implementation(Protocol):
    """One device's code. `kvkernels.ops` documents and checks the arguments before it calls."""

    def write_pages(
        self,
        key: Tensor,
        value: Tensor,
        pages: Tensor | QuantisedPages,
        slots: Tensor,
        layer: int,
    ) -> None: ...

    def plan_attention(
        self, block_tables: Tensor, context_lengths: Tensor, query_starts: Tensor
    ) -> AttentionPlan: ...

    def paged_attention(
        self,
        query: Tensor,
        pages: Tensor | QuantisedPages,
        *,
        layer: int,
        plan: AttentionPlan,
        scale: float,
        rules: Rules,
    ) -> Tensor: ...

    def load_blocks(self, arena: Tensor, offsets: Tensor, pool: Tensor, pages: Tensor) -> None: ...

    def store_blocks(self, pool: Tensor, pages: Tensor, arena: Tensor, offsets: Tensor) -> None: ...

    def move_layers(
        self,
        movement: Movement,
        layers: range | None,
        blocks: range | None,
        *,
        store: bool,
        programs: int,
    ) -> None: ...
