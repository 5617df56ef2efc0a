"""Float64 references for the property tests, by the definitions; nothing of the package."""

from __future__ import annotations

from collections.abc import Callable, Sequence
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
    "linear_hsic": Measure("linear", normalized=False),
    "unbiased_linear_hsic": Measure("linear", corrected=True, normalized=False),
}
# What the package calls those that it has no name of their own for.
SETTINGS = {
    "gaussian_cka": {"name": "cka", "kernel": "gaussian"},
    "debiased_gaussian_cka": {"name": "debiased_cka", "kernel": "gaussian"},
    "linear_hsic": {"name": "hsic", "kernel": "linear"},
    "unbiased_linear_hsic": {"name": "unbiased_hsic", "kernel": "linear"},
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


def double_centered(a: Tensor) -> Tensor:
    """Subtracts the row and column means of (N, M)."""
    return a - a.mean(dim=0) - a.mean(dim=1)[:, None] + a.mean()


def u_centered(a: Tensor) -> Tensor:
    """Subtracts those of the entries off the diagonal of a symmetric matrix."""
    n = len(a)
    off = 1 - torch.eye(n, dtype=a.dtype)
    a = a * off
    rows = a.sum(dim=1) / (n - 2)
    return (a - rows[:, None] - rows + a.sum() / ((n - 1) * (n - 2))) * off


def _centered(
    matrices: Sequence[Tensor], center: Callable[[Tensor], Tensor]
) -> tuple[list[Tensor], float]:
    """Returns centred matrices, and the greatest of their norms before over those after it."""
    centered, conditions = [], []
    for a in matrices:
        c = center(a)
        before, after = a.detach().norm().item(), c.detach().norm().item()
        conditions.append(before / after if after > 0 else float("inf"))
        centered.append(c)
    return centered, max(conditions)


def reference(name: str, x: Tensor, y: Tensor, **options: Any) -> Reference:
    """Computes a measure of float64 batches."""
    measure = MEASURES[name]
    n = len(x)
    matrices = [matrix(t, measure.kernel, **options) for t in (x, y)]
    centered, condition = _centered(matrices, u_centered if measure.corrected else double_centered)
    c, d = centered
    norms = c.norm() * d.norm()
    if measure.normalized:
        value, scale = (c * d).sum() / norms, 1.0
    else:
        pairs_less_one = measure.kernel != "distance"
        count = n * (n - 3) if measure.corrected else (n - pairs_less_one) ** 2
        value, scale = (c * d).sum() / count, float(norms.detach()) / count
    return Reference(value, scale, condition)


def cross_reference(
    x: Tensor, y: Tensor, x_anchors: Tensor, y_anchors: Tensor, exponent: float = 1.0
) -> Reference:
    """Computes the squared distance correlation of the distances to anchors, of float64 batches."""
    matrices = []
    for t, anchors in ((x, x_anchors), (y, y_anchors)):
        squared = (t[:, None] - anchors[None]).square().sum(dim=2)
        apart = squared > 0
        matrices.append(torch.where(apart, torch.where(apart, squared, 1.0) ** (exponent / 2), 0.0))
    (c, d), condition = _centered(matrices, double_centered)
    return Reference((c * d).sum() / (c.norm() * d.norm()), 1.0, condition)


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


def dct_reference(x: Tensor) -> Tensor:
    """Computes the orthonormal DCT-II of float64 images by the sum that defines it."""
    bases = []
    for size in x.shape[-2:]:
        number = torch.arange(size, dtype=torch.float64)
        basis = torch.cos(torch.pi * (2 * number + 1) * number[:, None] / (2 * size))
        norm = torch.full((size, 1), (2 / size) ** 0.5, dtype=torch.float64)
        norm[0] = (1 / size) ** 0.5
        bases.append(norm * basis)
    return torch.einsum("ki,lj,...ij->...kl", *bases, x)


def local_std_reference(x: Tensor, window_size: int = 3) -> Tensor:
    """Computes the standard deviation of float64 images over each pixel's window."""
    half = window_size // 2
    x = torch.nn.functional.pad(x, (half,) * 4, mode="reflect")
    windows = x.unfold(2, window_size, 1).unfold(3, window_size, 1).flatten(4)
    variance = (windows - windows.mean(dim=4, keepdim=True)).square().mean(dim=4)
    apart = variance > 0
    return torch.where(apart, torch.where(apart, variance, 1.0).sqrt(), 0.0)


def hog_reference(
    x: Tensor,
    orientations: int = 24,
    pixels_per_cell: int = 8,
    cells_per_block: int = 1,
    block_norm: str | None = None,
    gradient: str = "sobel",
    interpolation: str = "linear",
) -> Tensor:
    """Computes histograms of oriented gradients of float64 images, one bin, cell and block at a time."""
    eps, side = 1e-5, pixels_per_cell
    if gradient == "sobel":
        # Differences first, which are 0 where nothing changes: the rounding of a sum of six products
        # is not, and a block's norm divides by as little as 1e-5, twice.
        padded = torch.nn.functional.pad(x, (1, 1, 1, 1), mode="replicate")
        across = padded[..., 2:] - padded[..., :-2]
        down = padded[..., 2:, :] - padded[..., :-2, :]
        dx = across[..., :-2, :] + 2 * across[..., 1:-1, :] + across[..., 2:, :]
        dy = down[..., :-2] + 2 * down[..., 1:-1] + down[..., 2:]
    else:
        dx, dy = torch.zeros_like(x), torch.zeros_like(x)
        dx[..., :, 1:-1] = x[..., :, 2:] - x[..., :, :-2]
        dy[..., 1:-1, :] = x[..., 2:, :] - x[..., :-2, :]
    there = (dx != 0) | (dy != 0)
    dx = torch.where(there, dx, 1.0)
    magnitude = torch.where(there, torch.sqrt(dx.square() + dy.square()), 0.0)
    position = torch.remainder(torch.atan2(dy, dx), torch.pi) * orientations / torch.pi
    bins = []
    for number in range(orientations):
        if interpolation == "none":
            share = (position.detach() + 1e-9).floor().remainder(orientations) == number
            bins.append(magnitude * share)
        else:
            # A hat about the bin's own angle, around the half turn; a single bin has all.
            away = torch.remainder(position - number + orientations / 2, orientations)
            share = (1 - (away - orientations / 2).abs()).clamp(min=0)
            bins.append(magnitude * (share if orientations > 1 else 1.0))
    pixels = torch.stack(bins, dim=2)
    rows, columns = x.shape[2] // side, x.shape[3] // side
    pixels = pixels[..., : rows * side, : columns * side]
    cells = pixels.unflatten(-1, (columns, side)).unflatten(-3, (rows, side)).mean(dim=(-3, -1))
    if block_norm is None:
        return cells
    blocks = []
    for i in range(rows - cells_per_block + 1):
        for j in range(columns - cells_per_block + 1):
            block = cells[..., i : i + cells_per_block, j : j + cells_per_block].flatten(2)
            if block_norm.startswith("L1"):
                block = block / (block.sum(dim=2, keepdim=True) + eps)
            else:
                block = block / (block.square().sum(dim=2, keepdim=True) + eps**2).sqrt()
            if block_norm == "L2-Hys":
                block = block.clamp(max=0.2)
                block = block / (block.square().sum(dim=2, keepdim=True) + eps**2).sqrt()
            if block_norm == "L1-sqrt":
                some = block > 0
                block = torch.where(some, torch.where(some, block, 1.0).sqrt(), 0.0)
            blocks.append(block)
    shape = (orientations, cells_per_block, cells_per_block)
    if cells_per_block == 1:
        shape = shape[:1]
    places = (rows - cells_per_block + 1, columns - cells_per_block + 1)
    return torch.stack(blocks, dim=3).unflatten(2, shape).unflatten(-1, places)


REPRESENTATIONS = {
    "pixels": lambda x: x,
    "dct": dct_reference,
    "local_std": local_std_reference,
    "hog": hog_reference,
}
