"""What the entries of `ops` and `fused` check of their tensors: shapes and types, never values."""

from torch import Tensor

from kvkernels.quantised import QuantisedPages
from kvstore.core.errors import BadInput
from kvstore.core.limits import BLOCK_TOKENS


def check(holds: bool, message: str) -> None:
    """Raise `BadInput` with `message` where something does not hold."""
    if not holds:
        raise BadInput(message)


def say(tensor: Tensor) -> str:
    """Return a tensor's type and shape, for messages."""
    return f"{tensor.dtype} {list(tensor.shape)}"


def check_pages(pages: Tensor | QuantisedPages, layer: int) -> tuple[int, int]:
    """Return KV heads and head dimension of pages that a view function made."""
    if isinstance(pages, QuantisedPages):
        heads, layers, dim = pages.cells.shape[1], pages.cells.shape[2], pages.head_dim
    else:
        check(
            pages.dim() == 6 and pages.shape[3] == 2 and pages.shape[4] == BLOCK_TOKENS,
            f"pages must come from page_view, got {say(pages)}",
        )
        heads, layers, dim = pages.shape[1], pages.shape[2], pages.shape[5]
    check(0 <= layer < layers, f"layer {layer} of {layers}")
    return heads, dim
