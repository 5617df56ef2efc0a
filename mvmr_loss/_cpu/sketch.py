"""The C++ kernel of the folded sign sketch, which is done without where it cannot be compiled."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence

import torch
from torch import Tensor

from mvmr_loss._cpu import has_plain_rows
from mvmr_loss._cpu.build import load_library


def fold(x: Tensor, signs: Tensor, rotations: Sequence[int], dim: int) -> Tensor | None:
    """Adds signed and rotated slices of features.

    Args:
        x: Tensor of shape (N, D) on a CPU.
        signs: Contiguous tensor of shape (D,).
        rotations: For each slice how far it is rotated, from 0 to ``dim - 1``.
        dim: Width of the slices.

    Returns:
        Tensor of shape (N, dim), or None where the kernel cannot do it.
    """
    library = load_library("sketch") if has_plain_rows(x) else None
    if library is None:
        return None
    out = x.new_empty(len(x), dim)
    failed = library.folded_sign_sketch(
        *(x.data_ptr(), *x.shape, x.stride(0), signs.data_ptr()),
        *((ctypes.c_int64 * len(rotations))(*rotations), dim, out.data_ptr()),
        torch.get_num_threads(),
    )
    return None if failed else out
