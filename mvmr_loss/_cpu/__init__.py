"""The kernels for CPUs: how they are built, and one module for each C++ file.

Nothing outside this package knows how they are called.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.autograd import forward_ad


def can_run(x: Tensor) -> bool:
    """Tells whether an op for CPUs can stand in for torch: ``x`` is on one, and nothing follows it.

    Followed is what a gradient is wanted of, in forward-mode differentiation, and in a transform of
    ``torch.func``. Under ``torch.compile`` and with fake tensors an op stands for itself.
    """
    return (
        x.is_cpu
        and not (x.requires_grad and torch.is_grad_enabled())
        and (
            torch.compiler.is_compiling()
            or (not torch._C._are_functorch_transforms_active() and forward_ad._current_level < 0)
        )
    )


def has_plain_rows(x: Tensor) -> bool:
    """Tells whether a kernel can read a matrix: float32 rows of numbers that follow each other."""
    return x.dtype == torch.float32 and not x.is_neg() and (x.shape[1] < 2 or x.stride(1) == 1)
