"""What a device has to provide, and the plan that the layers of one step share."""

from typing import Protocol

from torch import Tensor


class AttentionPlan(Protocol):
    """What an implementation prepares once per step and uses in every layer."""

    @property
    def query_tokens(self) -> int:
        """Rows of `query` that the plan was made for."""
        ...


class Implementation(Protocol):
    """One device's code. `kvkernels.ops` documents and checks the arguments before it calls."""

    def write_pages(
        self, key: Tensor, value: Tensor, pages: Tensor, slots: Tensor, layer: int
    ) -> None: ...

    def plan_attention(
        self, block_tables: Tensor, context_lengths: Tensor, query_starts: Tensor
    ) -> AttentionPlan: ...

    def paged_attention(
        self, query: Tensor, pages: Tensor, *, layer: int, plan: AttentionPlan, scale: float
    ) -> Tensor: ...

    def load_blocks(self, arena: Tensor, offsets: Tensor, pool: Tensor, pages: Tensor) -> None: ...

    def store_blocks(self, pool: Tensor, pages: Tensor, arena: Tensor, offsets: Tensor) -> None: ...
