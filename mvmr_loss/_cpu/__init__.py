"""The kernels for CPUs: how they are built, and one module for each C++ file.

Nothing outside this package knows how they are called.
"""

from __future__ import annotations

import torch
from torch import Tensor


def can_read(x: Tensor) -> bool:
    """Tells whether a kernel can read a tensor: float32, as it lies in the CPU's memory."""
    return (
        not torch.compiler.is_compiling()
        and type(x) in (Tensor, torch.nn.Parameter)
        and not torch._C._are_functorch_transforms_active()
        and x.is_cpu
        and x.dtype == torch.float32
        and not x.is_neg()
    )


def can_compute(x: Tensor) -> bool:
    """Tells whether a kernel can stand in for torch: it can read ``x``, and no gradient is wanted."""
    return can_read(x) and not _wants_gradient(x)


def is_compiled_for_cpu(x: Tensor) -> bool:
    """Tells whether ``torch.compile`` is at work on a computation on a CPU.

    There, what runs in a kernel, or faster in eager mode, is a custom op, which the compiler leaves
    as it is.
    """
    return torch.compiler.is_compiling() and x.is_cpu


def can_be_op(x: Tensor) -> bool:
    """Tells whether a compiled computation can be such an op: no gradient of it is wanted."""
    return is_compiled_for_cpu(x) and not _wants_gradient(x)


def _wants_gradient(x: Tensor) -> bool:
    return x.requires_grad and torch.is_grad_enabled()
