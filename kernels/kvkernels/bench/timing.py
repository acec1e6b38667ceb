"""Times on the GPU: medians over CUDA events around replays of a captured graph."""

# A launch takes options that the kernel's signature does not have.
# pyright: reportCallIssue=false

import statistics
from collections.abc import Callable
from typing import Final

import torch
import triton
import triton.language as tl

REPLAYS: Final = 9
_READ_BYTES: Final = 4 << 30


def microseconds(launch: Callable[[int], object], *, launches: int = 20) -> float:
    """Return the median time of one of `launches`, captured together; `launch` gets its number."""
    launch(0)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for number in range(launches):
            launch(number)
    graph.replay()
    times: list[float] = []
    for _ in range(REPLAYS):
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))  # type: ignore[no-untyped-call]
        begin.record()
        graph.replay()
        end.record()
        torch.cuda.synchronize()
        times.append(begin.elapsed_time(end) / launches * 1e3)
    return statistics.median(times)


def read_limit() -> float:
    """Return the GB/s at which a kernel that does nothing else reads this GPU's memory."""
    source = torch.zeros(_READ_BYTES // 4, dtype=torch.int32, device="cuda")
    total = torch.zeros(1, dtype=torch.int32, device="cuda")
    processors = torch.cuda.get_device_properties(0).multi_processor_count
    taken = microseconds(
        lambda _: _read[(processors * 8,)](source, total, source.numel(), BLOCK=4096, num_warps=8),
        launches=3,
    )
    return _READ_BYTES / taken / 1e3


def product_limit() -> float:
    """Return the TFLOP/s of a large bf16 matrix product on this GPU."""
    one, two = (torch.randn(8_192, 8_192, dtype=torch.bfloat16, device="cuda") for _ in range(2))
    taken = microseconds(lambda _: one @ two, launches=5)
    return float(2 * one.shape[0] ** 3 / taken / 1e6)


# The decorator carries no types, and a kernel's annotations are its own signature.
@triton.jit  # type: ignore[untyped-decorator]
def _read(source, total, count, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]
    """Sum everything: what is read must be used, or the compiler leaves it out."""
    found = tl.zeros((BLOCK,), tl.int32)
    step = tl.num_programs(0) * BLOCK
    for start in range(tl.program_id(0) * BLOCK, count, step):
        found += tl.load(source + start + tl.arange(0, BLOCK))
    tl.atomic_add(total, tl.sum(found, 0))
