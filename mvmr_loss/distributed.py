"""Gathering a batch from all processes, with gradient."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor


def world_size() -> int:
    """Returns the number of processes, 1 where no process group is initialised.

    Examples:
        >>> world_size()
        1
    """
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


class _SumOverProcesses(torch.autograd.Function):
    """All-reduce (sum) whose gradient is an all-reduce, so that gradients of gradients exist."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        x = x.clone(memory_format=torch.contiguous_format)
        dist.all_reduce(x)
        return x

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        total: Tensor = _SumOverProcesses.apply(grad)
        return total


class _Gather(torch.autograd.Function):
    """All-gather along the batch; the gradient is summed over processes and cut to the own rows."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.rows = len(x)
        gathered = [torch.empty_like(x) for _ in range(world_size())]
        dist.all_gather(gathered, x)
        return torch.cat(gathered)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        total: Tensor = _SumOverProcesses.apply(grad)
        return total.narrow(0, dist.get_rank() * ctx.rows, ctx.rows)


class Gatherer:
    """Gathers tensors of equal shape from all processes, with gradient.

    Every process gets the same rows in the order of the ranks. When each then computes the same loss
    of the whole batch, the gradient that reaches a process is the sum over processes of that loss's
    gradient, and the mean that DistributedDataParallel takes is the gradient of one process on the
    whole batch: nothing is to be multiplied by the world size.

    Processes with different shapes would hang or mix up rows, so the shapes are exchanged first. The
    exchange is launched at every call, but the host looks at it only on a CPU, at the first call and
    when the own shapes have changed: of several processes that differ at least one has just changed,
    and it says so. A steady training loop on accelerators is thus never made to wait.
    """

    def __init__(self) -> None:
        self._checked: tuple[tuple[int, ...], ...] | None = None

    def __call__(self, tensors: list[Tensor]) -> list[Tensor]:
        """Gathers each tensor along its first dimension.

        Args:
            tensors: Tensors of shape (N, ...), as many in every process, all on one device.

        Returns:
            Tensors of shape (world_size * N, ...); the same ones where there is one process.

        Raises:
            ValueError: If the shapes differ between processes.
        """
        if world_size() == 1:
            return tensors
        self._check_shapes(tensors)
        return [_Gather.apply(x.contiguous()) for x in tensors]

    def _check_shapes(self, tensors: list[Tensor]) -> None:
        shapes = tuple(tuple(x.shape) for x in tensors)
        device = tensors[0].device
        # A summary of fixed size, so that it can be exchanged however the processes differ.
        summary = [len(shapes), shapes[0][0], sum(x.numel() for x in tensors)]
        own = torch.tensor(summary, device=device)
        all_summaries = [torch.empty_like(own) for _ in range(world_size())]
        dist.all_gather(all_summaries, own)
        if device.type != "cpu" and shapes == self._checked:
            return
        rows = torch.stack(all_summaries).tolist()
        if any(row != rows[0] for row in rows):
            raise ValueError(
                "z, z_augmented and representations must have equal shapes in all processes when "
                "gather_distributed=True, but the batch sizes per process are "
                f"{[row[1] for row in rows]}, with {[row[0] for row in rows]} tensors of "
                f"{[row[2] for row in rows]} numbers in all; use drop_last=True in the data loader "
                "and the same representations everywhere."
            )
        self._checked = shapes
