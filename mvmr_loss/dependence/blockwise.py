"""Inner products of centred distance matrices in blocks of rows, never holding an n x n matrix."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor

from mvmr_loss.dependence.distances import ROUNDINGS


class _Centring(NamedTuple):
    """What centres a distance matrix: ``rows[i] + rows[j] - total`` is taken from element i, j."""

    rows: Tensor
    total: Tensor


def blockwise_inner_products(
    x: Tensor, y: Tensor, *, corrected: bool, exponent: float, block_size: int
) -> tuple[Tensor, Tensor]:
    """Computes the inner products of two batches' centred distance matrices in blocks of rows.

    The memory grows as n x ``block_size``. The sums are in float64: with them the centring can be
    done on the sums alone, since the inner product of centred matrices is that of the distances
    less terms made of their row sums. The gradient computes the distances a second time.

    Source: Szekely, Rizzo and Bakirov, Annals of Statistics 35(6), 2007, definition 4; Szekely and
    Rizzo, Annals of Statistics 42(6), 2014, definition 2, for the corrected ones.

    Args:
        x: Tensor of shape (N, D), float32 or float64, about its mean and of a sane scale.
        y: Tensor of shape (N, E), likewise.
        corrected: Whether to U-centre (bias-corrected) rather than double-centre.
        exponent: Exponent of the distance, in (0, 2).
        block_size: How many rows of the distance matrices exist at once.

    Returns:
        Float64 tensor of shape (3,): the inner products of x with y, of x with x, of y with y; it
        can be differentiated once. Float64 tensor of shape (2,): the sums of squares of x's and of
        y's distances before centring, to judge rounding by.
    """
    products, squares = _BlockwiseInnerProducts.apply(x, y, corrected, exponent, block_size)
    return products, squares


def blockwise_correlation(
    x: Tensor, y: Tensor, *, corrected: bool, exponent: float, block_size: int
) -> Tensor:
    """Computes the squared distance correlation in blocks of rows.

    Args:
        x: As in :func:`blockwise_inner_products`.
        y: As in :func:`blockwise_inner_products`.
        corrected: As in :func:`blockwise_inner_products`.
        exponent: As in :func:`blockwise_inner_products`.
        block_size: As in :func:`blockwise_inner_products`.

    Returns:
        Scalar tensor; 0, with a zero gradient, where a batch is constant.
    """
    products, squares = blockwise_inner_products(
        x, y, corrected=corrected, exponent=exponent, block_size=block_size
    )
    rounding = (ROUNDINGS * torch.finfo(x.dtype).eps) ** 2
    vanishes = (products[1:] <= rounding * squares).any()
    safe = torch.where(vanishes, torch.ones_like(products), products)
    correlation = safe[0] / (safe[1].sqrt() * safe[2].sqrt())
    return torch.where(vanishes, torch.zeros_like(correlation), correlation).to(x.dtype)


class _BlockwiseInnerProducts(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, y: Tensor, corrected: bool, exponent: float, block_size: int
    ) -> tuple[Tensor, Tensor]:
        n = x.shape[0]
        rows_x, rows_y = [], []
        products = x.new_zeros(3, dtype=torch.float64)
        for (_, a), (_, b) in zip(
            _distance_blocks(x, exponent, block_size),
            _distance_blocks(y, exponent, block_size),
            strict=True,
        ):
            a, b = a.double(), b.double()
            rows_x.append(a.sum(dim=1))
            rows_y.append(b.sum(dim=1))
            products += torch.stack([(a * b).sum(), a.square().sum(), b.square().sum()])
        squares = products[1:].clone()
        ctx.mark_non_differentiable(squares)
        sums_x, sums_y = torch.cat(rows_x), torch.cat(rows_y)
        m = n - 2 if corrected else n
        pairs = (n - 1) * (n - 2) if corrected else n * n
        for i, (s, t) in enumerate(((sums_x, sums_y), (sums_x, sums_x), (sums_y, sums_y))):
            products[i] += s.sum() * t.sum() / pairs - 2 / m * (s @ t)
        ctx.save_for_backward(x, y, sums_x, sums_y)
        ctx.options = corrected, exponent, block_size
        return products, squares

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(
        ctx: Any, grad: Tensor, _squares: Tensor
    ) -> tuple[Tensor | None, Tensor | None, None, None, None]:
        x, y, sums_x, sums_y = ctx.saved_tensors
        corrected, exponent, block_size = ctx.options
        n = x.shape[0]
        m = n - 2 if corrected else n
        pairs = (n - 1) * (n - 2) if corrected else n * n
        centring_x = _Centring(sums_x / m, sums_x.sum() / pairs)
        centring_y = _Centring(sums_y / m, sums_y.sum() / pairs)
        grads = [
            torch.empty_like(t) if wanted else None
            for t, wanted in zip((x, y), ctx.needs_input_grad, strict=False)
        ]
        for (part, a), (_, b) in zip(
            _distance_blocks(x, exponent, block_size),
            _distance_blocks(y, exponent, block_size),
            strict=True,
        ):
            centered_a = _centered_block(a, part, centring_x)
            centered_b = _centered_block(b, part, centring_y)
            if grads[0] is not None:
                weight = grad[0] * centered_b + 2 * grad[1] * centered_a
                grads[0][part] = _through_distances(weight, a, x, part, exponent)
            if grads[1] is not None:
                weight = grad[0] * centered_a + 2 * grad[2] * centered_b
                grads[1][part] = _through_distances(weight, b, y, part, exponent)
        return grads[0], grads[1], None, None, None


def _distance_blocks(x: Tensor, exponent: float, block_size: int) -> Iterator[tuple[slice, Tensor]]:
    """Yields which rows, and their distances to all samples to the power ``exponent``."""
    norms = x.square().sum(dim=1)
    rounding = ROUNDINGS * torch.finfo(x.dtype).eps
    for start in range(0, len(x), block_size):
        part = slice(start, start + block_size)
        total = norms[part, None] + norms
        squared = torch.addmm(total, x[part], x.T, alpha=-2)
        squared = torch.where(squared <= rounding * total, 0.0, squared)
        yield part, squared.sqrt() if exponent == 1 else squared.pow(exponent / 2)


def _centered_block(a: Tensor, part: slice, centring: _Centring) -> Tensor:
    """Returns rows of the centred matrix in float64; the diagonal, which no distance feels, is not."""
    return a.double() - centring.rows[part, None] - centring.rows + centring.total


def _through_distances(
    weight: Tensor, a: Tensor, x: Tensor, part: slice, exponent: float
) -> Tensor:
    """Returns the gradient of a block of rows of ``x`` from that of their distances.

    Each distance occurs twice in the matrix, so the weight of a pair counts double.
    """
    safe = torch.where(a == 0, torch.ones_like(a), a)
    # With r the distance and a = r^exponent: (da / dr) / r.
    slope = exponent * safe.pow((exponent - 2) / exponent)
    pull = torch.where(a == 0, 0.0, 2 * weight * slope).to(x.dtype)
    return pull.sum(dim=1, keepdim=True) * x[part] - pull @ x
