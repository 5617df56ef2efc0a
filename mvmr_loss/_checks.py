"""The checks of user input that several modules share; each raises one clear sentence."""

from __future__ import annotations

import contextlib
import math
import numbers
import operator
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn


def check_int(name: str, value: Any, minimum: int | None = None, maximum: int | None = None) -> int:
    """Returns ``value`` as an int if it is an integer, numpy's included, in a range.

    Examples:
        >>> check_int("dim", 8, minimum=1)
        8
    """
    # Of tensors the value would be waited for, and a compiler could not know it.
    no_int = isinstance(value, Tensor) or type(value).__name__ in ("bool", "bool_")
    try:
        number = None if no_int else operator.index(value)
    except TypeError:
        number = None
    if number is None:
        raise TypeError(f"{name} must be an int but is a {type(value).__name__}.")
    if minimum is not None and number < minimum:
        raise ValueError(f"{name} must be at least {minimum} but is {number}.")
    if maximum is not None and number > maximum:
        raise ValueError(f"{name} must be at most {maximum} but is {number}.")
    return number


def check_number(
    name: str,
    value: Any,
    minimum: float | None = None,
    maximum: float | None = None,
    *,
    above: float | None = None,
    below: float | None = None,
) -> float:
    """Returns ``value`` as a float if it is a finite number, numpy's included, in a range.

    Examples:
        >>> check_number("exponent", 1, above=0, below=2)
        1.0
    """
    if isinstance(value, bool) or not isinstance(value, numbers.Real):
        raise TypeError(f"{name} must be a number but is a {type(value).__name__}.")
    try:
        number = float(value)
    except OverflowError:  # an integer beyond the largest float
        number = math.inf
    needed, fits = "finite", math.isfinite(number)
    for bound, words, holds in (
        (minimum, "at least", operator.ge),
        (maximum, "at most", operator.le),
        (above, "above", operator.gt),
        (below, "below", operator.lt),
    ):
        if bound is not None:
            needed, fits = f"{needed} and {words} {bound:g}", fits and holds(number, bound)
    if not fits:
        raise ValueError(f"{name} must be {needed} but is {value}.")
    return number


def check_choice(name: str, value: Any, allowed: Sequence[Any]) -> Any:
    """Returns ``value`` if it is one of a few.

    Examples:
        >>> check_choice("kernel", "linear", ("linear", "gaussian"))
        'linear'
    """
    if not any(type(value) is type(choice) and value == choice for choice in allowed):
        raise ValueError(f"{name} must be one of {', '.join(map(repr, allowed))} but is {value!r}.")
    return value


def check_bool(name: str, value: Any) -> bool:
    """Returns ``value`` if it is a bool."""
    if not isinstance(value, bool):
        raise TypeError(f"{name} must be True or False but is {value!r}.")
    return value


def check_module_name(argument: str, name: Any) -> None:
    """Raises unless a module can be kept under a name in torch's ``ModuleDict``."""
    if not isinstance(name, str) or not name or "." in name or hasattr(nn.ModuleDict(), name):
        raise ValueError(
            f"{argument} must have names that are non-empty strings without '.', and none that torch's "
            f"ModuleDict uses, but has {name!r}."
        )


def check_float_tensor(name: str, x: object) -> Tensor:
    """Returns ``x`` if it is a real floating-point tensor."""
    if not isinstance(x, Tensor):
        array = type(x).__name__ == "ndarray"
        raise TypeError(
            f"{name} must be a torch.Tensor but is a {type(x).__name__}"
            f"{f'; convert it first: torch.from_numpy({name})' if array else ''}."
        )
    if not x.is_floating_point():
        raise TypeError(
            f"{name} must have a floating-point dtype but has {x.dtype}; convert it first: "
            f"{name}.float(), and images in 0..255 must be divided by 255 and normalised, too."
        )
    if x.element_size() < 2:
        raise TypeError(f"{name} must have 16 bits or more but has {x.dtype}; convert it first.")
    return x


def can_be_seen(x: Tensor) -> bool:
    """Tells whether Python may look at a tensor's values at no cost: on a CPU, in eager mode.

    On an accelerator the host would wait for the device; a compiler's graph would break; tensors on
    the meta device, fake ones, and those that a transform of ``torch.func`` or a dispatch mode
    follows have no values to look at.

    """
    return (
        not torch.compiler.is_compiling()
        and x.is_cpu
        and type(x).__torch_dispatch__ is Tensor.__torch_dispatch__
        and not torch._C._are_functorch_transforms_active()
        and torch._C._len_torch_dispatch_stack() == 0
    )


def check_finite(name: str, x: Tensor) -> None:
    """Raises if ``x`` holds a NaN or an infinity, where its values :func:`can be seen <can_be_seen>`.

    Elsewhere a non-finite value is left to make the result NaN.

    """
    if not can_be_seen(x):
        return
    # A sum is finite only if all terms are (an overflow is looked at again): one pass, no mask.
    if not math.isfinite(x.detach().sum().item()) and not bool(torch.isfinite(x).all()):
        raise ValueError(
            f"{name} must be finite but holds NaN or infinite values; check the images, the "
            "learning rate and the precision that produced it."
        )


def check_finite_by(result: Tensor, inputs: Mapping[str, Tensor]) -> None:
    """Raises if a result is not finite as an input is not; the inputs are looked at only then."""
    if can_be_seen(result) and not math.isfinite(result.item()):
        for name, x in inputs.items():
            check_finite(name, x)


def low_precision_to_float32(x: Tensor) -> Tensor:
    """Returns ``x`` in float32 if it is of a narrower type; float32 and float64 stay."""
    return x.float() if x.dtype in (torch.float16, torch.bfloat16) else x


def as_rows(x: Tensor) -> Tensor:
    """Returns a batch of shape (N, ...), or (N,), as one of shape (N, D)."""
    return x.flatten(1) if x.ndim > 1 else x[:, None]


def without_autocast(x: Tensor) -> contextlib.AbstractContextManager[Any]:
    """Returns a context without autocast, on devices that know it (meta does not).

    torch 2.6 cannot compile the question; what is compiled is not for meta.
    """
    device = x.device.type
    if not torch.compiler.is_compiling() and not torch.amp.is_autocast_available(device):
        return contextlib.nullcontext()
    return torch.autocast(device, enabled=False)


def check_batch(name: str, x: Any, min_samples: int = 1) -> None:
    """Raises unless ``x`` is a batch of at least so many samples; its values are not looked at."""
    if not isinstance(x, Tensor) or not x.is_floating_point() or x.element_size() < 2:
        check_float_tensor(name, x)
    if x.ndim < 1 or 0 in x.shape:
        raise ValueError(
            f"{name} must have shape (N, D) or (N, ...), none of them 0, "
            f"but has shape {tuple(x.shape)}."
        )
    if x.shape[0] < min_samples:
        raise ValueError(
            f"{name} must have at least {min_samples} samples for this measure "
            f"but has {x.shape[0]}; use a larger batch."
        )
