"""Float64 references for the property tests, from differences of points; nothing of the package."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor


class Measure(NamedTuple):
    """What a measure computes, as plainly as possible."""

    kernel: str  # "distance", "linear" or "gaussian"
    corrected: bool = False
    normalized: bool = True
    rooted: bool = False


MEASURES = {
    "distance_correlation": Measure("distance", rooted=True),
    "distance_correlation_sqr": Measure("distance"),
    "u_distance_correlation_sqr": Measure("distance", corrected=True),
    "distance_covariance": Measure("distance", normalized=False, rooted=True),
    "distance_covariance_sqr": Measure("distance", normalized=False),
    "u_distance_covariance_sqr": Measure("distance", corrected=True, normalized=False),
    "hsic": Measure("gaussian", normalized=False),
    "unbiased_hsic": Measure("gaussian", corrected=True, normalized=False),
    "cka": Measure("linear"),
    "debiased_cka": Measure("linear", corrected=True),
    "gaussian_cka": Measure("gaussian"),
    "debiased_gaussian_cka": Measure("gaussian", corrected=True),
}
# What the package calls those that it has no name of their own for.
SETTINGS = {
    "gaussian_cka": {"name": "cka", "kernel": "gaussian"},
    "debiased_gaussian_cka": {"name": "debiased_cka", "kernel": "gaussian"},
}


class Reference(NamedTuple):
    """A value, and how far rounding may move it.

    Attributes:
        value: The squared value of a rooted measure, else the value.
        scale: What an unnormalised value is to be compared with: the product of both norms.
        condition: The greater of both batches' norms before centring over those after it.
    """

    value: Tensor
    scale: float
    condition: float


def matrix(
    x: Tensor,
    kernel: str,
    exponent: float = 1.0,
    eps: float = 0.0,
    bandwidth: float | None = None,
) -> Tensor:
    """Returns the distances or kernel values of float64 (N, D)."""
    squared = (x[:, None] - x[None]).square().sum(dim=2)
    if kernel == "distance":
        squared = squared.clamp(min=eps) if eps else squared
        apart = squared > 0
        return torch.where(apart, torch.where(apart, squared, 1.0) ** (exponent / 2), 0.0)
    if kernel == "linear":
        centered = x - x.mean(dim=0)
        return centered @ centered.T
    if bandwidth is not None:
        return torch.exp(-squared / (2 * bandwidth**2))
    pairs = squared.detach()[~torch.eye(len(x), dtype=torch.bool)]
    spread = pairs.sort().values[(len(pairs) - 1) // 2]
    if spread == 0:
        spread = pairs.mean()
    return torch.exp(-squared / (2 * (spread if spread > 0 else 1.0)))


def reference(name: str, x: Tensor, y: Tensor, **options: Any) -> Reference:
    """Computes a measure of float64 batches."""
    measure = MEASURES[name]
    n = len(x)
    centered, conditions = [], []
    for t in (x, y):
        a = matrix(t, measure.kernel, **options)
        if measure.corrected:
            off = 1 - torch.eye(n, dtype=a.dtype)
            a = a * off
            rows = a.sum(dim=1) / (n - 2)
            c = (a - rows[:, None] - rows + a.sum() / ((n - 1) * (n - 2))) * off
        else:
            c = a - a.mean(dim=0) - a.mean(dim=1)[:, None] + a.mean()
        centered.append(c)
        before, after = a.detach().norm().item(), c.detach().norm().item()
        conditions.append(before / after if after > 0 else float("inf"))
    c, d = centered
    norms = c.norm() * d.norm()
    if measure.normalized:
        value, scale = (c * d).sum() / norms, 1.0
    else:
        pairs_less_one = measure.kernel != "distance"
        count = n * (n - 3) if measure.corrected else (n - pairs_less_one) ** 2
        value, scale = (c * d).sum() / count, float(norms.detach()) / count
    return Reference(value, scale, max(conditions))


def partial_reference(x: Tensor, y: Tensor, z: Tensor) -> tuple[Tensor, float, float]:
    """Computes the partial distance correlation of float64 batches.

    Returns:
        The value; what is left of x and y without z, as the
        product of the shares of their squared norms; and the greatest condition.
    """
    name = "u_distance_correlation_sqr"
    xy, xz, yz = (reference(name, *pair) for pair in ((x, y), (x, z), (y, z)))
    left = (1 - xz.value.square()) * (1 - yz.value.square())
    value = (xy.value - xz.value * yz.value) / left.sqrt()
    return value, float(left.detach()), max(r.condition for r in (xy, xz, yz))
