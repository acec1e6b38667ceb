"""Sums over the ranks of one host, by torch's process group: NCCL between GPUs, gloo on a CPU."""

import os
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor

from kvstore.core.errors import Unreachable
from kvworkers.models.sharding import Part


class Collective:
    """This process's place in the group. A process has one, and one thread at a time uses it."""

    def __init__(self, part: Part) -> None:
        self._part = part
        self._device = torch.device("cpu")

    def join(self, rendezvous: Path, device: torch.device, *, deadline_s: float) -> None:
        """Meet the others through the file `rendezvous`; raises `Unreachable` where they stay away.

        `deadline_s` is the most that any sum may take from then on.
        """
        self.leave()  # An earlier start in this process may have come this far.
        self._device = device
        for name in ("GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME"):
            os.environ.setdefault(name, "lo")  # One host: nothing leaves it.
        cuda = device.type == "cuda"
        try:
            dist.init_process_group(
                "nccl" if cuda else "gloo",
                init_method=rendezvous.as_uri(),
                rank=self._part.rank,
                world_size=self._part.ranks,
                timeout=timedelta(seconds=deadline_s),
                device_id=torch.device("cuda", torch.cuda.current_device()) if cuda else None,
            )
        except (RuntimeError, ValueError) as error:
            raise Unreachable(f"the ranks do not find together: {error}") from error

    def total(self, tensor: Tensor) -> Tensor:
        """Sum `tensor` over the ranks, in place where that can be; returns it."""
        if tensor.numel():  # Every rank has as many.
            dist.all_reduce(tensor)
        return tensor

    def from_first(self, tensor: Tensor) -> Tensor:
        """Overwrite `tensor` with rank 0's; returns it."""
        dist.broadcast(tensor, 0)
        return tensor

    def least(self, count: int) -> int:
        """Return the smallest of the ranks' counts."""
        counts = torch.tensor([count], dtype=torch.int64, device=self._device)
        dist.all_reduce(counts, op=dist.ReduceOp.MIN)
        return int(counts.item())

    def leave(self) -> None:
        """Leave, where the group was joined; nothing is under way."""
        if dist.is_initialized():
            dist.destroy_process_group()
