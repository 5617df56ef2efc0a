"""Pairwise Euclidean distances of a batch, and the Gram matrix that every measure starts from."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor

from mvmr_loss._checks import check_finite, check_float_tensor
from mvmr_loss._native import is_compiled_for_cpu
from mvmr_loss.dependence import _gram_cpu

# On a CPU the columns are read in slices that stay in the cache, so a wide batch is never copied
# whole, and the Gram matrix is made in blocks of rows, of which only the lower ones are computed.
_SLICE_COLUMNS = 1024
_BLOCK_ROWS = 64

# A squared distance below this many roundings of its two squared norms is rounding: the points
# coincide.
ROUNDINGS = 16


def pairwise_distances(x: Tensor, *, exponent: float = 1.0, eps: float = 0.0) -> Tensor:
    """Computes the Euclidean distances between all pairs of samples.

    The squared distances come from the Gram matrix of the batch about its mean. Those at the level
    of rounding, below ``16 finfo.eps`` times the two squared norms, are exactly 0 and have a zero
    gradient, as has the diagonal. A batch whose largest magnitude is below ``65536 finfo.tiny``
    counts as constant; distances beyond the dtype's range are ``finfo.max``.

    Source: Szekely, Rizzo and Bakirov, Annals of Statistics 35(6), 2007, definition 4.

    Args:
        x: Tensor of shape (N, D) or (N, ...), which is flattened. Half precision is raised to
            float32.
        exponent: Exponent of the distance, in (0, 2).
        eps: Floor of the squared distances, at least 0; it holds for the diagonal too, and a
            distance at the floor has a zero gradient.

    Returns:
        Symmetric tensor of shape (N, N), float32 or float64. A non-finite ``x`` makes it NaN on an
        accelerator or under ``torch.compile``, where values are not looked at.

    Raises:
        TypeError: If ``x`` is not a floating-point tensor.
        ValueError: If ``x`` is empty, an option is out of range or, on a CPU, a value of ``x`` is
            not finite.

    Examples:
        >>> pairwise_distances(torch.tensor([[0.0, 0.0], [3.0, 4.0], [3.0, 0.0]]))
        tensor([[0., 5., 3.],
                [5., 0., 4.],
                [3., 4., 0.]])
    """
    check_distance_options(exponent, eps)
    gram = centered_gram("x", x, eps=eps)
    return saturated(scaled_distances(gram, exponent=exponent, eps=eps), gram.unit, exponent)


class CenteredGram(NamedTuple):
    """The Gram matrix of a batch about its mean, in units in which it can be neither 0 nor infinite.

    Attributes:
        matrix: Tensor of shape (N, N), in units of ``unit ** 2``.
        scale: What the batch was multiplied by: a power of two, or 0 for a constant batch.
        unit: The power of two that undoes it.
    """

    matrix: Tensor
    scale: Tensor
    unit: Tensor


def centered_gram(name: str, x: Tensor, *, min_samples: int = 1, eps: float = 0.0) -> CenteredGram:
    """Computes the Gram matrix of a batch about its mean, after checking the batch.

    Args:
        name: What to call ``x`` in errors.
        x: Tensor of shape (N, D) or (N, ...).
        min_samples: The smallest N allowed.
        eps: A squared distance that must not overflow in the units of the result.

    Returns:
        The matrix and its units, float32 or float64, differentiable with respect to ``x``.

    Raises:
        TypeError: If ``x`` is not a floating-point tensor.
        ValueError: If ``x`` is empty, has too few samples or, on a CPU, is not finite.
    """
    x = check_batch(name, x, min_samples)
    ready: Tensor | None = None
    if is_compiled_for_cpu(x):
        ready, scale, unit = _opaque_gram(x.detach(), eps)
    elif x.is_cpu:
        ready, scale, unit = _gram_on_cpu(x.detach(), eps, name)
    else:
        scale, unit = _units(x, eps, name)
    with torch.autocast(x.device.type, enabled=False):
        matrix: Tensor = _CenteredGram.apply(x, scale, ready)
    return CenteredGram(matrix, scale, unit)


def about_mean(name: str, x: Tensor, *, min_samples: int = 1) -> Tensor:
    """Returns a checked batch about its mean, scaled by a power of two to a sane range.

    Args:
        name: What to call ``x`` in errors.
        x: Tensor of shape (N, D) or (N, ...).
        min_samples: The smallest N allowed.

    Returns:
        Tensor of shape (N, D), float32 or float64, differentiable with respect to ``x``.

    Raises:
        TypeError: As :func:`centered_gram`.
        ValueError: As :func:`centered_gram`.
    """
    x = check_batch(name, x, min_samples)
    scale, _ = _units(x, 0.0, name)
    with torch.autocast(x.device.type, enabled=False):
        return _centered(x, scale)


def check_batch(name: str, x: Tensor, min_samples: int) -> Tensor:
    """Returns a batch in the shape (N, D), its values not looked at.

    Args:
        name: What to call ``x`` in errors.
        x: Tensor of shape (N, D) or (N, ...).
        min_samples: The smallest N allowed.

    Returns:
        Tensor of shape (N, D).

    Raises:
        TypeError: If ``x`` is not a floating-point tensor.
        ValueError: If ``x`` is empty or has too few samples.
    """
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
    return x.reshape(x.shape[0], -1)


def _units(x: Tensor, eps: float, name: str | None) -> tuple[Tensor, Tensor]:
    """Returns a scale that makes the largest magnitude about 1, and the unit that undoes it.

    Raises if a value is not finite, unless there is no name to call ``x`` by.
    """
    dtype = torch.float64 if x.dtype == torch.float64 else torch.float32
    limits = torch.finfo(dtype)
    with torch.no_grad():
        low, high = torch.aminmax(x)
        peak = torch.maximum(high, -low).to(dtype)
        if name is not None:
            check_finite(name, peak)
        peak = peak.clamp(min=math.sqrt(eps))
        # The margin below keeps gradients, of the order of 1 / peak, within the range.
        constant = peak < 65536 * limits.tiny
        peak = peak.clamp(min=65536 * limits.tiny, max=limits.max / 8)
        # Both quotients are exact: mantissa / peak is the power of two 2^-exponent.
        mantissa, _ = torch.frexp(peak)
        unit = peak / mantissa
        scale = torch.where(constant, torch.zeros_like(peak), mantissa / peak)
    return scale, unit


class _CenteredGram(torch.autograd.Function):
    """The Gram matrix of the scaled rows about their mean.

    Autograd would keep the centred batch and multiply twice for the gradient. Here the batch itself
    is kept and one product suffices, since the matrix is symmetric. The backward is made of
    differentiable operations, so it can be differentiated in turn. ``ready`` is the matrix where it
    has been made already, as on a CPU.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, scale: Tensor, ready: Tensor | None) -> Tensor:
        ctx.save_for_backward(x, scale)
        if ready is not None:
            return ready
        centered = _centered(x, scale)
        return centered @ centered.T

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        x, scale = ctx.saved_tensors
        with torch.autocast(x.device.type, enabled=False):
            weight = grad + grad.T
            # Centred on this side, where it costs n^2; the other side is the centred batch.
            weight = (weight - weight.mean(dim=0)) * scale
            if is_compiled_for_cpu(x):
                return _opaque_product(weight, x, scale), None, None
            if torch.is_grad_enabled() or not x.is_cpu:
                return (weight @ _centered(x, scale)).to(x.dtype), None, None
            return _product_on_cpu(weight, x, scale), None, None


def _gram_on_cpu(x: Tensor, eps: float, name: str | None) -> tuple[Tensor, Tensor, Tensor]:
    """Computes the matrix, the scale and the unit of a :class:`CenteredGram`, without a gradient."""
    matrix = _gram_cpu.centered_gram(x) if eps < 1 else None
    if matrix is not None:  # of a sane size, in the units of the batch
        return matrix, matrix.new_ones(()), matrix.new_ones(())
    scale, unit = _units(x, eps, name)
    with torch.autocast("cpu", enabled=False):
        return _gram_in_slices(x, scale), scale, unit


def _product_on_cpu(weight: Tensor, x: Tensor, scale: Tensor) -> Tensor:
    """Computes ``weight @ _centered(x, scale)`` in the dtype of ``x``; never differentiated."""
    # With another scale than 1, sizes are beyond what the kernel takes.
    product = _gram_cpu.product_about_mean(weight, x) if scale == 1 else None
    with torch.autocast("cpu", enabled=False):
        return _product_in_slices(weight, x, scale) if product is None else product


def _gram_in_slices(x: Tensor, scale: Tensor) -> Tensor:
    n = x.shape[0]
    matrix = scale.new_zeros(n, n)
    for part in x.split(_SLICE_COLUMNS, dim=1):
        centered = _centered(part, scale)
        for start in range(0, n, _BLOCK_ROWS):
            end = min(start + _BLOCK_ROWS, n)
            matrix[start:end, :end].addmm_(centered[start:end], centered[:end].T)
    return matrix.tril() + matrix.tril(-1).T


def _product_in_slices(weight: Tensor, x: Tensor, scale: Tensor) -> Tensor:
    product = x.new_empty(x.shape)
    for part, out in zip(
        x.split(_SLICE_COLUMNS, dim=1), product.split(_SLICE_COLUMNS, dim=1), strict=True
    ):
        out.copy_(weight @ _centered(part, scale))
    return product


@torch.library.custom_op("mvmr_loss::centered_gram", mutates_args=())
def _opaque_gram(x: Tensor, eps: float) -> tuple[Tensor, Tensor, Tensor]:
    return _gram_on_cpu(x, eps, name=None)


@_opaque_gram.register_fake
def _(x: Tensor, eps: float) -> tuple[Tensor, Tensor, Tensor]:
    dtype = torch.float64 if x.dtype == torch.float64 else torch.float32
    n = x.shape[0]
    scale, unit = x.new_empty((), dtype=dtype), x.new_empty((), dtype=dtype)
    return x.new_empty((n, n), dtype=dtype), scale, unit


@torch.library.custom_op("mvmr_loss::product_about_mean", mutates_args=())
def _opaque_product(weight: Tensor, x: Tensor, scale: Tensor) -> Tensor:
    return _product_on_cpu(weight, x, scale)


@_opaque_product.register_fake
def _(weight: Tensor, x: Tensor, scale: Tensor) -> Tensor:
    return x.new_empty(x.shape)


def _centered(x: Tensor, scale: Tensor) -> Tensor:
    """Returns the columns about their means, times ``scale``, in the dtype of ``scale``."""
    x = x.to(scale.dtype)
    # Dividing before the sum keeps it from overflowing.
    mean = torch.full_like(x[:, 0], 1 / x.shape[0]) @ x
    return torch.addcmul(-scale * mean, x, scale)


def squared_distances(gram: CenteredGram, eps: float = 0.0) -> tuple[Tensor, Tensor, Tensor]:
    """Computes squared distances and where they are at their floor.

    Args:
        gram: The Gram matrix of the batch.
        eps: Floor of the squared distances in the units of the batch.

    Returns:
        The squared distances, in the units of ``gram``, with 1 in the place of those at the floor,
        so that any function of them has a finite gradient; the mask of those; the floor, a scalar.
    """
    norms = gram.matrix.diagonal()
    total = norms[:, None] + norms
    squared = torch.sub(total, gram.matrix, alpha=2)
    # The root first: 0 times the square of a large scale would be NaN.
    floor = (math.sqrt(eps) * gram.scale).square()
    rounding = ROUNDINGS * torch.finfo(total.dtype).eps
    at_floor = squared <= torch.maximum(rounding * total.detach(), floor)
    return torch.where(at_floor, torch.ones_like(squared), squared), at_floor, floor


def scaled_distances(gram: CenteredGram, *, exponent: float = 1.0, eps: float = 0.0) -> Tensor:
    """Computes distances to a power, in units of ``gram.unit ** exponent``.

    Args:
        gram: The Gram matrix of the batch.
        exponent: Exponent of the distance.
        eps: Floor of the squared distances in the units of the batch.

    Returns:
        Tensor of shape (N, N).
    """
    squared, at_floor, floor = squared_distances(gram, eps)
    if exponent == 1:
        return torch.where(at_floor, floor.sqrt(), squared.sqrt())
    return torch.where(at_floor, floor.pow(exponent / 2), squared.pow(exponent / 2))


def saturated(a: Tensor, unit: Tensor, exponent: float = 1.0) -> Tensor:
    """Computes ``a * unit ** exponent``, held within the range of the dtype."""
    limit = torch.finfo(a.dtype).max
    return (a * unit.pow(exponent).clamp(max=limit)).clamp(-limit, limit)


def check_distance_options(exponent: float, eps: float) -> None:
    """Raises if the exponent or the floor is out of range."""
    for name, value in (("exponent", exponent), ("eps", eps)):
        if isinstance(value, bool) or not isinstance(value, (int, float)):
            raise TypeError(f"{name} must be a number but is a {type(value).__name__}.")
    if not 0 < exponent < 2:
        raise ValueError(f"exponent must be above 0 and below 2 but is {exponent}.")
    if not 0 <= eps < math.inf:
        raise ValueError(f"eps must be finite and at least 0 but is {eps}.")
