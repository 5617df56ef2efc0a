"""The checks of user input that several modules share; each raises one clear sentence."""

from __future__ import annotations

import math

import torch
from torch import Tensor


def check_float_tensor(name: str, x: object) -> Tensor:
    """Returns ``x`` if it is a real floating-point tensor.

    Args:
        name: The argument's name, for the error.
        x: The value to check.

    Returns:
        ``x``, unchanged.

    Raises:
        TypeError: If ``x`` is not a tensor, or not of a floating-point dtype.
    """
    if not isinstance(x, Tensor):
        raise TypeError(f"{name} must be a torch.Tensor but is a {type(x).__name__}.")
    if not x.is_floating_point():
        raise TypeError(
            f"{name} must have a floating-point dtype but has {x.dtype}; "
            f"convert it first, for example with {name}.float()."
        )
    return x


def check_finite(name: str, x: Tensor) -> None:
    """Raises if ``x`` holds a NaN or an infinity, where that is seen without synchronisation.

    On the CPU, in eager mode, the values are looked at. On an accelerator that would make the host
    wait for the device, and under ``torch.compile`` it would break the graph: there a non-finite
    value is left to make the result NaN.

    Args:
        name: The argument's name, for the error.
        x: Tensor of any shape.

    Raises:
        ValueError: If a value is not finite and ``x`` is on the CPU in eager mode.
    """
    if torch.compiler.is_compiling() or x.device.type != "cpu":
        return
    # A sum is finite only if all terms are (an overflow is looked at again): one pass, no mask.
    if not math.isfinite(x.detach().sum().item()) and not bool(torch.isfinite(x).all()):
        raise ValueError(
            f"{name} must be finite but holds NaN or infinite values; check the images, the "
            "learning rate and the precision that produced it."
        )


def low_precision_to_float32(x: Tensor) -> Tensor:
    """Returns ``x`` in float32 if it is of a narrower type; float32 and float64 stay.

    Args:
        x: Floating-point tensor of any shape.

    Returns:
        ``x`` in float32 or float64.
    """
    return x.float() if x.dtype in (torch.float16, torch.bfloat16) else x
