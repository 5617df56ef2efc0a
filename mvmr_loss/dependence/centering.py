"""Centring of distance and kernel matrices, and the inner products of centred matrices."""

from __future__ import annotations

import torch
from torch import Tensor

from mvmr_loss._checks import check_float_tensor


def double_centered(a: Tensor) -> Tensor:
    """Computes the doubly centred matrix: rows and columns sum to 0 (biased estimators).

    Source: Szekely, Rizzo and Bakirov, Annals of Statistics 35(6), 2007, definition 4.

    Args:
        a: Tensor of shape (N, N).

    Returns:
        Tensor of shape (N, N): ``a`` minus row means and column means plus the mean.

    Raises:
        TypeError: If ``a`` is not a floating-point tensor.
        ValueError: If ``a`` is not square.

    Examples:
        >>> double_centered(torch.tensor([[1.0, 2.0], [2.0, 4.0]]))
        tensor([[ 0.2500, -0.2500],
                [-0.2500,  0.2500]])
    """
    _check_square(a, 1)
    rows = a.mean(dim=1, keepdim=True)
    return a - rows - (a.mean(dim=0) - rows.mean())


def u_centered(a: Tensor) -> Tensor:
    """Computes the U-centred matrix: off the diagonal, rows and columns sum to 0 (bias-corrected).

    Source: Szekely and Rizzo, Annals of Statistics 42(6), 2014, definition 2.

    Args:
        a: Tensor of shape (N, N), N >= 3, with a zero diagonal as distances have; zero that of a
            kernel matrix first.

    Returns:
        Tensor of shape (N, N) with a zero diagonal.

    Raises:
        TypeError: If ``a`` is not a floating-point tensor.
        ValueError: If ``a`` is not square or smaller than 3 x 3.

    Examples:
        >>> u_centered(torch.tensor([[0.0, 2.0, 3.0], [2.0, 0.0, 5.0], [3.0, 5.0, 0.0]]))
        tensor([[0., 0., 0.],
                [0., 0., 0.],
                [0., 0., 0.]])
    """
    _check_square(a, 3)
    n = a.shape[0]
    rows = a.sum(dim=1, keepdim=True) / (n - 2)
    columns = a.sum(dim=0) / (n - 2)
    return zero_diagonal(a - rows - (columns - rows.sum() / (n - 1)))


def zero_diagonal(a: Tensor) -> Tensor:
    """Returns ``a`` with zeros on its diagonal."""
    diagonal = torch.eye(a.shape[0], dtype=torch.bool, device=a.device)
    return a.masked_fill(diagonal, 0.0)


def centered(a: Tensor, *, corrected: bool) -> Tensor:
    """Returns ``a`` centred for a bias-corrected or a biased estimator."""
    return u_centered(zero_diagonal(a)) if corrected else double_centered(a)


def unit_norm(a: Tensor, reference: Tensor) -> Tensor:
    """Divides a matrix by its Frobenius norm; 0 if it is rounding beside ``reference``.

    Args:
        a: Tensor of shape (N, N) that was derived from ``reference`` by subtractions.
        reference: Tensor of shape (N, N).

    Returns:
        Tensor of shape (N, N), of norm 1 or 0, the latter with a zero gradient.
    """
    norm = torch.linalg.vector_norm(a)
    rounding = 16 * torch.finfo(a.dtype).eps * torch.linalg.vector_norm(reference.detach())
    vanishes = norm <= rounding
    unit = a / torch.where(vanishes, torch.ones_like(norm), norm)
    return torch.where(vanishes, torch.zeros_like(unit), unit)


def inner_product(a: Tensor, b: Tensor) -> Tensor:
    """Computes the sum of products of two matrices of norm 1, a correlation."""
    return (a * b).sum()


def scaled_inner_product(a: Tensor, b: Tensor, divisor: float) -> Tensor:
    """Computes the sum of products over ``divisor``, each product held within the dtype's range."""
    limit = torch.finfo(torch.promote_types(a.dtype, b.dtype)).max / (2 * a.numel())
    return (a * (b / divisor)).clamp(-limit, limit).sum()


def root(value: Tensor) -> Tensor:
    """Computes the square root; 0 with a zero gradient where ``value`` <= 0, NaN where it is NaN."""
    vanishes = value <= 0
    positive = torch.where(vanishes, torch.ones_like(value), value).sqrt()
    return torch.where(vanishes, torch.zeros_like(value), positive)


def _check_square(a: Tensor, minimum: int) -> None:
    check_float_tensor("a", a)
    if a.ndim != 2 or a.shape[0] != a.shape[1] or a.shape[0] < minimum:
        raise ValueError(
            f"a must have shape (N, N) with N at least {minimum} but has shape {tuple(a.shape)}."
        )
