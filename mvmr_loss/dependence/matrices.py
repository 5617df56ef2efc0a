"""The matrix through which every measure reads a batch: its squared distances, many batches in a stack.

Distances to a power are powers of it, a Gaussian kernel is its exponential, and the Gram matrix is,
once centred, minus half of it. The precision is decided here, and only here.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from mvmr_loss._checks import (
    can_be_seen,
    check_finite,
    check_float_tensor,
    low_precision_to_float32,
)
from mvmr_loss.dependence import _gram_cpu
from mvmr_loss.distributed import ALL_ROWS, Rows

# So many numbers of a batch are raised to float64 at once.
_WIDE_NUMBERS = 2**24
# A squared distance below this fraction of its two squared norms has lost too many of float32's
# digits, and is computed again.
_CLOSE = 2.0**-13
# One below so many roundings of its two squared norms is rounding: the points coincide.
_ROUNDINGS = 16


def check_batch(name: str, x: Tensor, min_samples: int = 1) -> Tensor:
    """Returns a checked batch in the shape (N, D); the values are looked at on a CPU.

    Args:
        name: What to call ``x`` in errors.
        x: Tensor of shape (N, D) or (N, ...).
        min_samples: The smallest N allowed.

    Returns:
        Tensor of shape (N, D).
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
    check_finite(name, x)
    return x.reshape(x.shape[0], -1)


def squared_distances(batches: Sequence[Tensor], rows: Rows = ALL_ROWS) -> tuple[Tensor, Tensor]:
    """Computes the squared Euclidean distances of several batches, each in units of its own.

    They are float64, so that neither points close to each other, nor far outliers, nor the user's
    precision of matrix products spoil what follows. On a CPU they are float32 as long as none of them
    has lost digits. Coinciding points have a distance of exactly 0. A batch whose norms are below
    ``65536 finfo.tiny`` counts as constant.

    Args:
        batches: Tensors of shape (N, D_k), at least one.
        rows: Which rows of the matrices to compute: all, or this process's.

    Returns:
        Tensor of shape (K, rows, N), values from 0 to 1 in float64, or of the batches' own size in
        float32; differentiable any number of times, forward and backward. Units, powers of two, a
        tensor of shape (K,): what the root of a value is to be multiplied by.
    """
    raised = [low_precision_to_float32(x) for x in batches]
    function: Any = _WithTransforms.apply
    if torch.compiler.is_compiling():
        differentiated = any(x.requires_grad for x in raised)
        function = _SquaredDistances.apply if differentiated else _SquaredDistances.forward
    squared, units = function(rows.start, rows.stop, *raised)
    return squared, units


class _SquaredDistances(torch.autograd.Function):
    """The gradient is one matrix product a batch, and is itself made of differentiable operations."""

    @staticmethod
    def forward(start: int, stop: int | None, *batches: Tensor) -> tuple[Tensor, Tensor]:
        if stop is None and all(_is_for_kernel(x) for x in batches):
            if all(can_be_seen(x) for x in batches):
                found = [_float32_distances(x) for x in batches]
                exact = [squared for squared in found if squared is not None]
                if len(exact) == len(batches):
                    squared = torch.stack(exact)
                    return squared, squared.new_ones(len(batches), dtype=torch.float64)
            else:
                pairs = [_distances_on_cpu(x) for x in batches]
                return torch.stack([s for s, _ in pairs]), torch.stack([u for _, u in pairs])
        return _wide_distances(start, stop, batches)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
        start, stop, *batches = inputs
        ctx.rows = slice(start, stop)
        ctx.mark_non_differentiable(output[1])
        ctx.save_for_backward(*batches, output[1])
        ctx.save_for_forward(*batches, output[1])

    @staticmethod
    def backward(ctx: Any, grad: Tensor, _units: Tensor) -> tuple[Tensor | None, ...]:
        *batches, units = ctx.saved_tensors
        gradients = [
            _gradient(grad[k], x, units[k], ctx.rows) if ctx.needs_input_grad[2 + k] else None
            for k, x in enumerate(batches)
        ]
        return None, None, *gradients


class _WithTransforms(_SquaredDistances):
    """The same with forward derivatives and vmap, at which ``torch.compile`` would stop."""

    generate_vmap_rule = True

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
        _SquaredDistances.setup_context(ctx, inputs, output)
        ctx.dtype = output[0].dtype

    @staticmethod
    def jvp(ctx: Any, _start: None, _stop: None, *tangents: Tensor | None) -> tuple[Tensor, None]:
        *batches, units = ctx.saved_tensors
        changes = []
        for x, tangent, unit in zip(batches, tangents, units, strict=True):
            wide, change = (_raise(t) / unit for t in (x, x * 0 if tangent is None else tangent))
            product = (wide - wide.mean(dim=0)) @ (change - change.mean(dim=0)).T
            own = product.diagonal()
            whole = 2 * (own[:, None] + own - product - product.T)
            changes.append(whole[ctx.rows])
        return torch.stack(changes).to(ctx.dtype), None


def _gradient(grad: Tensor, x: Tensor, unit: Tensor, rows: slice) -> Tensor:
    """Returns the gradient of a batch from that of its squared distances."""
    if rows.stop is None:
        weight = -2 * (grad + grad.T)
        # Rows that sum to 0: what they are multiplied with may be moved at will.
        weight = weight - torch.diag(weight.sum(dim=1))
        if _is_for_kernel(x) and not torch.is_grad_enabled():
            product: Tensor = _product_on_cpu(weight, x, unit)
            return product
        return ((weight.to(_wide_dtype(x)) @ _about_mean(x, unit)) / unit).to(x.dtype)
    weight = -2 * grad.to(_wide_dtype(x))
    wide = _about_mean(x, unit)
    own = weight @ wide - weight.sum(dim=1, keepdim=True) * wide[rows]
    others = weight.T @ wide[rows] - weight.sum(dim=0)[:, None] * wide
    before, after = rows.start, len(x) - rows.stop
    total = others + torch.nn.functional.pad(own, (0, 0, before, after))
    return (total / unit).to(x.dtype)


def _is_for_kernel(x: Tensor) -> bool:
    """Tells whether a batch is one of the kernels' on a CPU: they read float32, as it lies there."""
    return (
        x.is_cpu
        and x.dtype == torch.float32
        and (torch.compiler.is_compiling() or not torch._C._are_functorch_transforms_active())
    )


def _wide_dtype(x: Tensor) -> torch.dtype:
    return torch.float32 if x.device.type == "mps" else torch.float64


def result_dtype(batches: Sequence[Tensor]) -> torch.dtype:
    """Returns the type of a result: float64 if a batch is, else float32."""
    return torch.float64 if any(x.dtype == torch.float64 for x in batches) else torch.float32


def _raise(x: Tensor) -> Tensor:
    return x.to(_wide_dtype(x))


def _about_mean(x: Tensor, unit: Tensor) -> Tensor:
    """Returns a batch about its mean in its units, in the wide type."""
    scaled = _raise(x) / unit
    return scaled - scaled.mean(dim=0)


def _wide_distances(
    start: int, stop: int | None, batches: Sequence[Tensor]
) -> tuple[Tensor, Tensor]:
    """Computes rows of the squared distances of a stack in the wide type, on any device."""
    grams, norms, scales = [], [], []
    for x in batches:
        wide, scale = _raise(x), None
        if wide.dtype == x.dtype:  # whose squares could leave the range of the type
            scale = _power_of_two(torch.linalg.vector_norm(x, torch.inf))
            wide = wide / scale
        n, d = x.shape
        gram: Any = 0
        norm: Any = 0
        for part in wide.split(max(1, _WIDE_NUMBERS // n), dim=1):
            part = part - part.mean(dim=0)
            gram = (
                part[start:stop] @ part.T + gram
                if d * n > _WIDE_NUMBERS
                else part[start:stop] @ part.T
            )
            if stop is not None:
                norm = part.square().sum(dim=1) + norm
        grams.append(gram)
        norms.append(gram.diagonal() if stop is None else norm)
        scales.append(scale)
    gram, norm = torch.stack(grams), torch.stack(norms)
    total = norm[:, start:stop, None] + norm[:, None]
    squared = total - 2 * gram
    nothing = squared <= _ROUNDINGS * torch.finfo(squared.dtype).eps * total
    nothing = nothing | diagonal(squared, start)
    peak = norm.amax(dim=1).sqrt()
    if any(scale is not None for scale in scales):
        ones = torch.ones_like(peak[0])
        scale = torch.stack([ones if s is None else s.to(ones.dtype) for s in scales])
    else:
        scale = None
    # Gradients are of the order of 1 / peak: the margin keeps them within the range.
    true_peak = peak if scale is None else peak * scale
    constant = true_peak < 65536 * torch.finfo(result_dtype(batches)).tiny
    unit = torch.where(constant, torch.ones_like(peak), 2 * _power_of_two(peak))
    squared = squared / (unit * unit)[:, None, None]
    squared = torch.where(nothing | constant[:, None, None], 0.0, squared)
    unit = unit if scale is None else torch.where(constant, unit, unit * scale)
    return squared, unit


def _power_of_two(x: Tensor) -> Tensor:
    """Returns the power of two above a positive number, 1 for 0."""
    mantissa, _ = torch.frexp(x)
    # Exact: the quotient of a number and its mantissa.
    return torch.where(x == 0, torch.ones_like(x), x / mantissa)


def diagonal(matrices: Tensor, start: int) -> Tensor:
    """Returns a mask of shape (rows, N) of the diagonal of rows that begin with row ``start``."""
    rows, n = matrices.shape[-2:]
    column = torch.arange(n, device=matrices.device)
    return column[start : start + rows, None] == column


def _float32_distances(x: Tensor) -> Tensor | None:
    """Computes squared distances in float32; None where too many of them would lose digits."""
    gram = _gram_cpu.centered_gram(x.resolve_neg())
    if gram is None:
        return None
    norms = gram.diagonal()
    total = norms[:, None] + norms
    squared = torch.sub(total, gram, alpha=2)
    close = squared <= _CLOSE * total
    count = int(close.count_nonzero()) - len(x)  # but for the diagonal
    if count > 8 * len(x):
        return None
    if count > 0:
        _correct(squared, total, x, close)
    return squared.fill_diagonal_(0)


@torch.library.custom_op("mvmr_loss::squared_distances", mutates_args=())
def _distances_on_cpu(x: Tensor) -> tuple[Tensor, Tensor]:
    squared = _float32_distances(x)
    if squared is not None:
        return squared, x.new_ones((), dtype=torch.float64)
    squared, units = _wide_distances(0, None, [x])
    return squared[0].to(x.dtype), units[0]


@_distances_on_cpu.register_fake
def _(x: Tensor) -> tuple[Tensor, Tensor]:
    return x.new_empty(len(x), len(x)), x.new_empty((), dtype=torch.float64)


def _correct(squared: Tensor, total: Tensor, x: Tensor, close: Tensor) -> None:
    """Computes some squared distances again, from differences."""
    pairs = close.triu(1).nonzero()
    for i, j in (part.T for part in pairs.split(max(1, _WIDE_NUMBERS // (8 * x.shape[1])))):
        distance = (x[i].double() - x[j].double()).square().sum(dim=1)
        rounding = _ROUNDINGS * torch.finfo(torch.float64).eps * total[i, j]
        distance = torch.where(distance <= rounding, 0.0, distance).to(squared.dtype)
        squared[i, j] = distance
        squared[j, i] = distance


@torch.library.custom_op("mvmr_loss::product_about_mean", mutates_args=())
def _product_on_cpu(weight: Tensor, x: Tensor, unit: Tensor) -> Tensor:
    x = x.resolve_neg()
    product = _gram_cpu.product_about_mean(weight, x) if float(unit) == 1 else None
    if product is None:
        product = ((weight.double() @ _about_mean(x, unit)) / unit).to(x.dtype)
    return product


@_product_on_cpu.register_fake
def _(weight: Tensor, x: Tensor, unit: Tensor) -> Tensor:
    return x.new_empty(x.shape)


@register_flop_formula(torch.ops.mvmr_loss.squared_distances)  # type: ignore[untyped-decorator, unused-ignore]
def _distance_flops(x_shape: Sequence[int], *_: Any, **__: Any) -> int:
    return 2 * x_shape[0] ** 2 * x_shape[1]


@register_flop_formula(torch.ops.mvmr_loss.product_about_mean)  # type: ignore[untyped-decorator, unused-ignore]
def _product_flops(_weight: Sequence[int], x_shape: Sequence[int], *_: Any, **__: Any) -> int:
    return 2 * x_shape[0] ** 2 * x_shape[1]
