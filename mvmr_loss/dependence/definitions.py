"""The definitions of distance covariance and correlation, as plainly as they are written down.

Nothing here is fast, safe for coinciding points, or used by the loss: it is what all that is faster is
tested against, and where to read what it computes.

Source: Szekely, Rizzo and Bakirov, Annals of Statistics 35(6), 2007, definitions 4 and 5; Szekely and
Rizzo, Annals of Statistics 42(6), 2014, definitions 2 to 4.
"""

from __future__ import annotations

import torch
from torch import Tensor


def pairwise_distances(x: Tensor, exponent: float = 1.0) -> Tensor:
    """Computes the Euclidean distances between the rows of (N, D), to a power, as (N, N)."""
    squared = (x[:, None] - x[None]).square().sum(dim=-1)
    apart = ~torch.eye(len(x), dtype=torch.bool)
    # A power has no finite gradient at the diagonal's zeros.
    return torch.where(apart, torch.where(apart, squared, 1.0).pow(exponent / 2), 0.0)


def double_centered(a: Tensor) -> Tensor:
    """Subtracts row and column means: what is left sums to 0 along both."""
    return a - a.mean(dim=0, keepdim=True) - a.mean(dim=1, keepdim=True) + a.mean()


def u_centered(a: Tensor) -> Tensor:
    """Subtracts row and column means of the entries off the diagonal, which is set to 0."""
    n = len(a)
    rows, columns = a.sum(dim=1, keepdim=True), a.sum(dim=0, keepdim=True)
    centered = a - rows / (n - 2) - columns / (n - 2) + a.sum() / ((n - 1) * (n - 2))
    return centered * (1 - torch.eye(n, dtype=a.dtype))


def mean_product(a: Tensor, b: Tensor) -> Tensor:
    """Computes the mean product of double-centred matrices."""
    return (a * b).mean()


def u_product(a: Tensor, b: Tensor) -> Tensor:
    """Computes the unbiased product of U-centred matrices."""
    n = len(a)
    return (a * b).sum() / (n * (n - 3))


def distance_covariance_sqr(x: Tensor, y: Tensor, exponent: float = 1.0) -> Tensor:
    """Computes the biased squared distance covariance of (N, D) and (N, E)."""
    a, b = (double_centered(pairwise_distances(t, exponent)) for t in (x, y))
    return mean_product(a, b)


def u_distance_covariance_sqr(x: Tensor, y: Tensor, exponent: float = 1.0) -> Tensor:
    """Computes the unbiased squared distance covariance of (N, D) and (N, E)."""
    a, b = (u_centered(pairwise_distances(t, exponent)) for t in (x, y))
    return u_product(a, b)


def distance_correlation_sqr(x: Tensor, y: Tensor, exponent: float = 1.0) -> Tensor:
    """Computes the biased squared distance correlation of (N, D) and (N, E)."""
    covariance = distance_covariance_sqr(x, y, exponent)
    variances = [distance_covariance_sqr(t, t, exponent) for t in (x, y)]
    return covariance / (variances[0] * variances[1]).sqrt()


def u_distance_correlation_sqr(x: Tensor, y: Tensor, exponent: float = 1.0) -> Tensor:
    """Computes the bias-corrected squared distance correlation of (N, D) and (N, E)."""
    covariance = u_distance_covariance_sqr(x, y, exponent)
    variances = [u_distance_covariance_sqr(t, t, exponent) for t in (x, y)]
    return covariance / (variances[0] * variances[1]).sqrt()


def distance_correlation(x: Tensor, y: Tensor, exponent: float = 1.0) -> Tensor:
    """Computes the distance correlation of (N, D) and (N, E), biased."""
    return distance_correlation_sqr(x, y, exponent).sqrt()


def distance_covariance(x: Tensor, y: Tensor, exponent: float = 1.0) -> Tensor:
    """Computes the distance covariance of (N, D) and (N, E), biased."""
    return distance_covariance_sqr(x, y, exponent).sqrt()
