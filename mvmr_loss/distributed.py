"""A batch over several processes: gathered with gradient, its matrices shared out by rows.

Each process gets the embeddings and representations of all, computes its own rows of every matrix, and
exchanges the sums: n row means a matrix, and a few numbers. All of them get the loss of the whole
batch. The gradient that reaches a process is the sum over processes of that loss's gradient, and the
mean that DistributedDataParallel takes is the gradient of one process on the whole batch: nothing is to
be multiplied by the world size.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

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


def rank() -> int:
    """Returns the number of this process, 0 where no process group is initialised.

    Examples:
        >>> rank()
        0
    """
    return dist.get_rank() if dist.is_available() and dist.is_initialized() else 0


class Rows(NamedTuple):
    """Which rows of the matrices are computed here, and how processes put theirs together.

    Attributes:
        start: The first row.
        stop: The row after the last one; None: all rows, in one process.
    """

    start: int = 0
    stop: int | None = None

    def sum(self, x: Tensor) -> Tensor:
        """Returns the sum over processes, with gradient."""
        if self.stop is None:
            return x
        total: Tensor = _SumOverProcesses.apply(x)
        return total

    def concatenate(self, x: Tensor) -> Tensor:
        """Returns what the processes have of shape (K, rows) as (K, N), with gradient."""
        if self.stop is None:
            return x
        whole: Tensor = _Gather.apply(x.T, "")
        return whole.T


ALL_ROWS = Rows()


# By their names of torch 2.14, and before.
_ALL_GATHER: Any = getattr(dist, "all_gather_single", getattr(dist, "all_gather_into_tensor", None))
_REDUCE_SCATTER: Any = getattr(
    dist, "reduce_scatter_single", getattr(dist, "reduce_scatter_tensor", None)
)

# The exchanges are ops, so that a compiler takes them as they are.


@torch.library.custom_op("mvmr_loss::sum_over_processes", mutates_args=())
def _sum(x: Tensor) -> Tensor:
    x = x.clone(memory_format=torch.contiguous_format)
    dist.all_reduce(x)
    return x


@_sum.register_fake
def _(x: Tensor) -> Tensor:
    return torch.empty_like(x, memory_format=torch.contiguous_format)


@torch.library.custom_op("mvmr_loss::gather_rows", mutates_args=())
def _gather(x: Tensor, description: str) -> Tensor:
    if description:
        _check_alike(description, x.device)
    whole = x.new_empty(world_size() * x.shape[0], *x.shape[1:])
    _ALL_GATHER(whole, x.contiguous())
    return whole


@_gather.register_fake
def _(x: Tensor, description: str) -> Tensor:
    return x.new_empty(world_size() * x.shape[0], *x.shape[1:])


@torch.library.custom_op("mvmr_loss::scatter_sum", mutates_args=())
def _scatter(x: Tensor) -> Tensor:
    n = x.shape[0] // world_size()
    if dist.get_backend() == "gloo":  # which has no reduce-scatter
        total: Tensor = _sum(x)
        return total[rank() * n : (rank() + 1) * n].clone()
    own = x.new_empty(n, *x.shape[1:])
    _REDUCE_SCATTER(own, x.contiguous())
    return own


@_scatter.register_fake
def _(x: Tensor) -> Tensor:
    return x.new_empty(x.shape[0] // world_size(), *x.shape[1:])


class _SumOverProcesses(torch.autograd.Function):
    """All-reduce (sum) whose gradient is an all-reduce, so that gradients of gradients exist."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        total: Tensor = _sum(x)
        return total

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        total: Tensor = _SumOverProcesses.apply(grad)
        return total


class _Gather(torch.autograd.Function):
    """All-gather along the batch, whose gradient is a reduce-scatter."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, description: str) -> Tensor:
        whole: Tensor = _gather(x, description)
        return whole

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return _Scatter.apply(grad), None


class _Scatter(torch.autograd.Function):
    """Sum over processes of which each keeps its own rows; the gradient is a gather."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        own: Tensor = _scatter(x)
        return own

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        whole: Tensor = _Gather.apply(grad, "")
        return whole


def gather(tensors: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], Rows]:
    """Gathers named tensors from all processes, with gradient, if theirs are alike.

    Each process sends a digest of its tensors' names, shapes and types. On a CPU everybody compares the
    digests in every step. On an accelerator, where looking makes the host wait, a process looks the
    first time that it has such tensors, so that a steady loop never waits.

    Args:
        tensors: Name -> tensor of shape (N, ...); the order does not matter.

    Returns:
        Name -> tensor of shape (world_size * N, ...), and which rows are this process's; the tensors
        themselves and all rows where there is one process.

    Raises:
        ValueError: If the processes' tensors differ in name, shape or type.
    """
    if world_size() == 1:
        return dict(tensors), ALL_ROWS
    # By name: every process gathers in the same order.
    names = sorted(tensors)
    description = "\n".join(
        [f"{name}: {list(tensors[name].shape)} {tensors[name].dtype}" for name in names]
    )
    gathered = {}
    for name in names:
        gathered[name] = _Gather.apply(tensors[name], description)
        description = ""  # shown once
    n = len(tensors[names[0]])
    start = rank() * n
    return {name: gathered[name] for name in tensors}, Rows(start, start + n)


# What all processes have shown to have in common, on an accelerator.
_agreed: set[str] = set()


def _check_alike(description: str, device: torch.device) -> None:
    """Raises in every process that sees it if another one has other tensors."""
    digest = hashlib.sha256(description.encode()).digest()
    own = torch.frombuffer(bytearray(digest), dtype=torch.int64).to(device)
    digests = own.new_empty(world_size() * len(own))
    _ALL_GATHER(digests, own)
    if device.type != "cpu" and description in _agreed:
        return
    if bool((digests.view(world_size(), -1) != own).any()):
        descriptions: list[Any] = [None] * world_size()
        dist.all_gather_object(descriptions, description)
        raise ValueError(_explain(descriptions))
    _agreed.add(description)


def _explain(descriptions: Sequence[str]) -> str:
    """Returns what differs between processes, in words."""
    lines = [set(text.split("\n")) for text in descriptions]
    everywhere = set.intersection(*lines)
    parts = [
        f"process {rank} has {', '.join(sorted(own - everywhere)) or 'none of these'}"
        for rank, own in enumerate(lines)
    ]
    return (
        "z, z_augmented and representations must have equal names, shapes and types in all "
        f"processes when gather_distributed=True, but {'; '.join(parts)}. Use drop_last=True in "
        "the data loader and the same views and representations everywhere."
    )
