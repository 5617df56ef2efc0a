"""The C++ kernel of Gram matrices for CPUs, which is done without where it cannot be compiled."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from mvmr_loss._cpu import has_plain_rows
from mvmr_loss._cpu.build import load_library

# Every thread has sums of its own: so many numbers in all, 128 MiB.
_MAX_SUMS = 2**25
# So many times faster than torch's own product, in float64, at the least, thread for thread.
_FASTER = 2
# A product of fewer multiplications is not worth a thread.
_WORK_OF_A_THREAD = 2**24


def centered_gram(x: Tensor) -> Tensor | None:
    """Computes the Gram matrix of a batch about its mean.

    Args:
        x: Tensor of shape (N, D).

    Returns:
        A tensor of shape (N, N) without a gradient; or None where the kernel cannot do it, as where
        ``x`` is not finite or of a size whose square is near the limits of the dtype.
    """
    library = _library_for(x)
    wanted = _threads(x)
    threads = min(wanted, _MAX_SUMS // max(1, len(x) ** 2))
    if library is None or threads * _FASTER < wanted:
        return None
    gram, peak = x.new_empty(len(x), len(x)), x.new_empty(())
    failed = library.centered_gram(
        x.data_ptr(), *x.shape, x.stride(0), gram.data_ptr(), peak.data_ptr(), threads
    )
    return None if failed or not _is_sane(peak) else gram


def product_about_mean(weight: Tensor, x: Tensor) -> Tensor | None:
    """Computes ``weight @ (x - x.mean(dim=0))``.

    Args:
        weight: Tensor of shape (N, N).
        x: Tensor of shape (N, D).

    Returns:
        A tensor of shape (N, D) without a gradient, or None where the kernel cannot do it.
    """
    library = _library_for(x)
    if library is None or weight.dtype != torch.float32:
        return None
    weight, out = weight.resolve_neg().contiguous(), x.new_empty(x.shape)
    failed = library.product_about_mean(
        *(weight.data_ptr(), x.data_ptr(), *x.shape, x.stride(0), out.data_ptr(), _threads(x))
    )
    return None if failed else out


def _library_for(x: Tensor) -> Any:
    return load_library("gram") if has_plain_rows(x) else None


def _is_sane(peak: Tensor) -> bool:
    return 2.0**-15 < peak.item() < 2.0**15


def _threads(x: Tensor) -> int:
    n, d = x.shape
    return max(1, min(torch.get_num_threads(), n * n * d // _WORK_OF_A_THREAD))
