"""The Hilbert-Schmidt independence criterion, biased and unbiased."""

from __future__ import annotations

import math
from typing import Literal

import torch
from torch import Tensor

from mvmr_loss.dependence.base import DependenceMeasure, check_same_samples
from mvmr_loss.dependence.centering import centered, scaled_inner_product, unit_norm
from mvmr_loss.dependence.distances import (
    CenteredGram,
    centered_gram,
    saturated,
    squared_distances,
)

Kernel = Literal["linear", "gaussian"]


def hsic(
    x: Tensor,
    y: Tensor,
    *,
    kernel: Kernel = "gaussian",
    bandwidth: float | None = None,
    unbiased: bool = False,
) -> Tensor:
    """Computes the Hilbert-Schmidt independence criterion, biased or unbiased.

    Biased: ``tr(K H L H) / (N - 1)^2``. Unbiased: the sum of products of the U-centred kernel
    matrices over ``N (N - 3)``, which equals eq. 5 of Song et al.

    The kernel is ``<x, x'>`` or ``exp(-|x - x'|^2 / (2 bandwidth^2))``. Without a bandwidth, each
    batch has its own: the median of the N (N - 1) / 2 distances between its samples (the lower one
    of two; if that is 0, the root mean square of the distances), through which no gradient flows.

    Source: Gretton et al., ALT 2005, definition 2 (biased); Song et al., JMLR 13, 2012, eq. 5
    (unbiased); Gretton et al., JMLR 13, 2012, section 8 (median heuristic).

    Args:
        x: Tensor of shape (N, D) or (N, ...), which is flattened; N >= 2, unbiased N >= 4. Half
            precision is raised to float32.
        y: Tensor of shape (N, E) or (N, ...).
        kernel: "linear" or "gaussian", for both batches.
        bandwidth: Standard deviation of the Gaussian kernel, in the units of the inputs; None is
            the median heuristic.
        unbiased: Whether to compute the unbiased estimator.

    Returns:
        Scalar tensor, at least 0 up to rounding if biased, which may be negative if unbiased; a
        value beyond the dtype's range is held within it. A non-finite input makes it NaN on an
        accelerator or under ``torch.compile``.

    Raises:
        TypeError: If an input is not a floating-point tensor, or the bandwidth not a number.
        ValueError: If the shapes do not fit, N is too small, an option is out of range or, on a
            CPU, a value is not finite.

    Examples:
        >>> x = torch.arange(1.0, 17.0).reshape(4, 4)
        >>> y = torch.tensor([[1.0], [0.0], [0.0], [1.0]])
        >>> round(hsic(x, x, kernel="linear").item(), 3)
        11377.777
        >>> round(hsic(x, y).item(), 4), round(hsic(x, y, unbiased=True).item(), 4)
        (0.0496, -0.0163)
    """
    check_kernel_options(kernel, bandwidth)
    a = centered_kernel("x", x, kernel, bandwidth, corrected=unbiased, unit=False)
    b = centered_kernel("y", y, kernel, bandwidth, corrected=unbiased, unit=False)
    check_same_samples("x", x, "y", y)
    return _compare(a, b, unbiased)


def centered_kernel(
    name: str,
    x: Tensor,
    kernel: Kernel,
    bandwidth: float | None,
    *,
    corrected: bool,
    unit: bool,
) -> Tensor:
    """Computes the centred kernel matrix of a batch.

    Args:
        name: What to call ``x`` in errors.
        x: Tensor of shape (N, D) or (N, ...).
        kernel: "linear" or "gaussian".
        bandwidth: Standard deviation of the Gaussian kernel, or None.
        corrected: U-centred if True, doubly centred if False.
        unit: Divided by its norm if True, in the units of the kernel if False.

    Returns:
        Tensor of shape (N, N).
    """
    gram = centered_gram(name, x, min_samples=4 if corrected else 2)
    matrix = gram.matrix if kernel == "linear" else _gaussian(gram, bandwidth)
    a = centered(matrix, corrected=corrected)
    if unit:
        return unit_norm(a, matrix)
    return saturated(a, gram.unit, 2) if kernel == "linear" else a


def check_kernel_options(kernel: str, bandwidth: float | None) -> None:
    """Raises if the kernel is unknown or the bandwidth does not go with it."""
    if kernel not in ("linear", "gaussian"):
        raise ValueError(f"kernel must be 'linear' or 'gaussian' but is {kernel!r}.")
    if bandwidth is None:
        return
    if isinstance(bandwidth, bool) or not isinstance(bandwidth, (int, float)):
        raise TypeError(f"bandwidth must be a number but is a {type(bandwidth).__name__}.")
    if not 0 < bandwidth < math.inf:
        raise ValueError(f"bandwidth must be finite and above 0 but is {bandwidth}.")
    if kernel == "linear":
        raise ValueError(
            f"bandwidth must be None for the linear kernel, which has none, but is {bandwidth}."
        )


def _gaussian(gram: CenteredGram, bandwidth: float | None) -> Tensor:
    """Returns the Gaussian kernel matrix."""
    squared, at_floor, _ = squared_distances(gram)
    squared = torch.where(at_floor, torch.zeros_like(squared), squared)
    if bandwidth is None:
        n = len(squared)
        # Without its diagonal: drop the first entry of every run of n + 1.
        pairs = squared.detach().flatten()[1:].view(n - 1, n + 1)[:, :-1]
        median, mean = pairs.flatten().median(), pairs.mean()
        spread = torch.where(median == 0, mean, median)
        spread = torch.where(spread == 0, torch.ones_like(spread), spread)
        return torch.exp(-squared / (2 * spread))
    # Held so that its square stays finite: the kernel is 0 there anyway.
    ratio = (gram.unit / bandwidth).clamp(max=torch.finfo(squared.dtype).max ** 0.25)
    return torch.exp(-squared * (ratio.square() / 2))


def _compare(a: Tensor, b: Tensor, unbiased: bool) -> Tensor:
    n = len(a)
    return scaled_inner_product(a, b, n * (n - 3) if unbiased else (n - 1) ** 2)


class HSIC(DependenceMeasure):
    """The Hilbert-Schmidt independence criterion as a module and strategy; see :func:`hsic`.

    Args:
        kernel: "linear" or "gaussian".
        bandwidth: Standard deviation of the Gaussian kernel; None is the median heuristic.
        unbiased: Whether to compute the unbiased estimator, which needs N >= 4.

    Raises:
        TypeError: If the bandwidth is not a number.
        ValueError: If an option is out of range.

    Examples:
        >>> x, y = torch.arange(1.0, 17.0).reshape(4, 4), torch.tensor([1.0, 0.0, 0.0, 2.0])
        >>> round(HSIC(kernel="linear")(x, y).item(), 4)
        16.0
    """

    def __init__(
        self,
        *,
        kernel: Kernel = "gaussian",
        bandwidth: float | None = None,
        unbiased: bool = False,
    ) -> None:
        super().__init__()
        check_kernel_options(kernel, bandwidth)
        self.kernel = kernel
        self.bandwidth = bandwidth
        self.unbiased = unbiased
        self.min_samples = 4 if unbiased else 2

    def center(self, x: Tensor, name: str = "x") -> Tensor:
        """Computes the centred kernel matrix of a batch; see the base class."""
        return centered_kernel(
            name, x, self.kernel, self.bandwidth, corrected=self.unbiased, unit=False
        )

    def compare(self, a: Tensor, b: Tensor) -> Tensor:
        """Computes the criterion from two centred matrices."""
        return _compare(a, b, self.unbiased)

    def extra_repr(self) -> str:
        """Returns the options, for printing."""
        return f"kernel={self.kernel!r}, bandwidth={self.bandwidth}, unbiased={self.unbiased}"
