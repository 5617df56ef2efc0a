"""The matrix through which every measure reads a batch: its squared distances, many batches in a stack.

Distances to a power are powers of it, a Gaussian kernel is its exponential, and the Gram matrix is,
once centred, minus half of it. The precision is decided here, and for blocks of rows in ``points.py``.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from mvmr_loss._checks import can_be_seen
from mvmr_loss._cpu import can_run
from mvmr_loss._cpu import gram as gram_kernel
from mvmr_loss.distributed import ALL_ROWS, Rows

# What is precise enough whatever the batch, but where a device has none.
WIDE = {"mps": torch.float32}
# So many numbers of a batch are raised to float64 at once.
_WIDE_NUMBERS = 2**24
# A squared distance below this fraction of its two squared norms has lost too many of float32's
# digits, and is computed again.
CLOSE = 2.0**-13
# Of smaller squared norms the gradients of a normalised measure, of their power -3, leave float32.
SMALL = 2.0**-32
# One below so many roundings of its two squared norms is rounding: the points coincide.
ROUNDINGS = 16


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
    raised = [x.float() if x.element_size() < 4 else x for x in batches]
    function: Any = _WithTransforms.apply
    if torch.compiler.is_compiling():
        differentiated = any(x.requires_grad for x in raised)
        function = _SquaredDistances.apply if differentiated else _SquaredDistances.forward
    else:  # what was made in inference mode cannot be kept for a gradient
        raised = [x.clone() if x.is_inference() else x for x in raised]
    squared, units = function(rows.start, rows.stop, *raised)
    return squared, units


class _SquaredDistances(torch.autograd.Function):
    """The gradient is one matrix product a batch, and is itself made of differentiable operations."""

    @staticmethod
    def forward(start: int, stop: int | None, *batches: Tensor) -> tuple[Tensor, Tensor]:
        if stop is None and all(map(_is_for_kernel, batches)):
            found = _kernel_distances(batches)
            if found is not None:
                return found
        wide = WIDE.get(batches[0].device.type, torch.float64)
        dtype = functools.reduce(torch.promote_types, [x.dtype for x in batches])
        grams: list[Any] = []
        norms: list[Any] = []
        scales: list[Tensor | None] = []
        for x in batches:
            n, d = x.shape
            scale = None
            if x.dtype == wide:  # whose squares could leave the range of the type
                largest = torch.linalg.vector_norm(x, torch.inf)
                largest = torch.where(largest == 0, 1.0, largest)
                # A number over twice its mantissa is the power of two at or below it.
                scale = largest / (2 * torch.frexp(largest).mantissa)
                x = x / scale
            gram = norm = None
            for part in (
                x.split(max(1, _WIDE_NUMBERS // n), dim=1) if n * d > _WIDE_NUMBERS else [x]
            ):
                part = part.to(wide)
                part = part - part.mean(dim=0)
                product = part[start:stop] @ part.T
                gram = product if gram is None else gram + product
                if stop is not None:
                    square = part.square().sum(dim=1)
                    norm = square if norm is None else norm + square
            grams.append(gram)
            norms.append(norm)
            scales.append(scale)
        gram = torch.stack(grams)
        norm = gram.diagonal(dim1=1, dim2=2) if stop is None else torch.stack(norms)
        total = norm[:, start:stop, None] + norm[:, None]
        squared = torch.sub(total, gram, alpha=2)
        squared.diagonal(start, dim1=1, dim2=2).zero_()
        # The power of two above the root of the largest squared distance, at most twice the norm's.
        peak = norm.amax(dim=1).sqrt()
        alike = peak == 0
        peak = torch.where(alike, torch.finfo(wide).tiny, peak)
        units = 2 * peak / torch.frexp(peak).mantissa
        true_units = units
        if any(scale is not None for scale in scales):
            ones = torch.ones_like(peak[0])
            true_units = units * torch.stack([ones if s is None else s for s in scales])
        # Gradients are of the order of 1 / unit: the margin keeps them within the range.
        constant = alike | (true_units < 2 * 65536 * torch.finfo(dtype).tiny)
        nothing = squared <= ROUNDINGS * torch.finfo(wide).eps * total
        nothing = nothing | constant[:, None, None]
        squared = torch.where(nothing, 0.0, squared / units.square()[:, None, None])
        return squared, torch.where(constant, 1.0, true_units)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
        start, stop, *batches = inputs
        ctx.rows, ctx.dtype = slice(start, stop), output[0].dtype
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
    def jvp(ctx: Any, _start: None, _stop: None, *tangents: Tensor | None) -> tuple[Tensor, None]:
        *batches, units = ctx.saved_tensors
        changes = []
        for x, tangent, unit in zip(batches, tangents, units, strict=True):
            wide, change = (_in_units(t, unit) for t in (x, x * 0 if tangent is None else tangent))
            product = wide @ change.T
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
        return ((weight.to(unit.dtype) @ _in_units(x, unit)) / unit).to(x.dtype)
    weight = -2 * grad
    wide = _in_units(x, unit)
    own = weight @ wide - weight.sum(dim=1, keepdim=True) * wide[rows]
    pad = (0, 0, rows.start, len(x) - rows.stop)
    if torch.is_grad_enabled():  # for a further derivative
        whole = weight.T @ wide[rows] - weight.sum(dim=0)[:, None] * wide
        whole = whole + torch.nn.functional.pad(own, pad)
    else:
        # A matrix is symmetric, and so is its gradient: what a pair adds in the row of the one sample it
        # adds in that of the other, wherever that is computed.
        whole = torch.nn.functional.pad(2 * own, pad)
    return (whole / unit).to(x.dtype)


def _is_for_kernel(x: Tensor) -> bool:
    # What a dispatch mode follows, as one that counts operations does, is made of torch's own.
    seen = torch.compiler.is_compiling() or can_be_seen(x)
    return x.dtype == torch.float32 and seen and can_run(x)


def _in_units(x: Tensor, unit: Tensor) -> Tensor:
    """Returns a batch about its mean in its units, in the wide type."""
    scaled = x.to(WIDE.get(x.device.type, torch.float64)) / unit
    return scaled - scaled.mean(dim=0)


def _kernel_distances(batches: Sequence[Tensor]) -> tuple[Tensor, Tensor] | None:
    """Returns what the kernel makes of float32 batches; None where it would lose digits."""
    if not torch.compiler.is_compiling():
        found = [_float32_distances(x) for x in batches]
        exact = [squared for squared in found if squared is not None]
        if len(exact) < len(found):
            return None
        return torch.stack(exact), exact[0].new_ones(len(exact), dtype=torch.float64)
    # A compiler cannot look at values: the op decides, for each batch by itself.
    squared, units = zip(*[_distances_on_cpu(x) for x in batches], strict=True)
    return torch.stack(squared), torch.stack(units)


def _float32_distances(x: Tensor) -> Tensor | None:
    """Computes squared distances in float32; None where too many of them would lose digits."""
    gram = gram_kernel.centered_gram(x.resolve_neg())
    if gram is None:
        return None
    norms = gram.diagonal()
    if norms.max() < SMALL:
        return None
    total = norms[:, None] + norms
    squared = torch.sub(total, gram, alpha=2)
    close = squared <= CLOSE * total
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
    squared, units = _SquaredDistances.forward(0, None, x)
    return squared[0].to(x.dtype), units[0]


@_distances_on_cpu.register_fake
def _(x: Tensor) -> tuple[Tensor, Tensor]:
    return x.new_empty(len(x), len(x)), x.new_empty((), dtype=torch.float64)


def _correct(squared: Tensor, total: Tensor, x: Tensor, close: Tensor) -> None:
    """Computes some squared distances again, from differences."""
    pairs = close.triu(1).nonzero()
    for i, j in (part.T for part in pairs.split(max(1, _WIDE_NUMBERS // (8 * x.shape[1])))):
        distance = (x[i].double() - x[j].double()).square().sum(dim=1)
        rounding = ROUNDINGS * torch.finfo(torch.float64).eps * total[i, j]
        distance = torch.where(distance <= rounding, 0.0, distance).to(squared.dtype)
        squared[i, j] = distance
        squared[j, i] = distance


@torch.library.custom_op("mvmr_loss::product_about_mean", mutates_args=())
def _product_on_cpu(weight: Tensor, x: Tensor, unit: Tensor) -> Tensor:
    x = x.resolve_neg()
    product = gram_kernel.product_about_mean(weight, x) if float(unit) == 1 else None
    if product is None:
        product = ((weight.double() @ _in_units(x, unit)) / unit).to(x.dtype)
    return product


@_product_on_cpu.register_fake
def _(weight: Tensor, x: Tensor, unit: Tensor) -> Tensor:
    return x.new_empty(x.shape)


def without_diagonal(matrices: Tensor, start: int) -> Tensor:
    """Returns rows of a stack, the first of them row ``start``, with zeros on the diagonal."""
    return matrices.masked_fill(diagonal(matrices, start), 0.0)


def diagonal(matrices: Tensor, start: int) -> Tensor:
    """Returns a mask of shape (rows, N) of the diagonal."""
    height, n = matrices.shape[-2:]
    column = torch.arange(n, device=matrices.device)
    return column[start : start + height, None] == column
