"""The Hilbert-Schmidt independence criterion and the centred kernel alignment."""

from __future__ import annotations

from typing import Literal

from torch import Tensor

from mvmr_loss._checks import check_bool, check_choice, check_number
from mvmr_loss.dependence.measures import Estimator, Gaussian, Linear, compare_two

Kernel = Literal["linear", "gaussian"]


def kernel_estimator(
    kernel: Kernel, bandwidth: float | None, *, corrected: bool, normalized: bool
) -> Estimator:
    """Returns HSIC or CKA after checking its options."""
    check_choice("kernel", kernel, ("linear", "gaussian"))
    if bandwidth is not None:
        bandwidth = check_number("bandwidth", bandwidth, above=0)
    if kernel == "linear" and bandwidth is not None:
        raise ValueError(
            f"bandwidth must be None for the linear kernel, which has none, but is {bandwidth}."
        )
    matrix = Linear() if kernel == "linear" else Gaussian(bandwidth)
    return Estimator(matrix, corrected, normalized, pairs_less_one=True)


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
        >>> import torch
        >>> x = torch.arange(1.0, 17.0).reshape(4, 4)
        >>> y = torch.tensor([[1.0], [0.0], [0.0], [1.0]])
        >>> round(hsic(x, x, kernel="linear").item(), 3)
        11377.777
        >>> round(hsic(x, y).item(), 4), round(hsic(x, y, unbiased=True).item(), 4)
        (0.0496, -0.0163)
    """
    corrected = check_bool("unbiased", unbiased)
    estimator = kernel_estimator(kernel, bandwidth, corrected=corrected, normalized=False)
    return compare_two(estimator, x, y)


def cka(
    x: Tensor,
    y: Tensor,
    *,
    kernel: Kernel = "linear",
    bandwidth: float | None = None,
    debiased: bool = False,
) -> Tensor:
    """Computes the centred kernel alignment, biased or debiased.

    It is ``HSIC(x, y) / sqrt(HSIC(x, x) HSIC(y, y))`` with the biased or the unbiased estimators of
    :func:`hsic`. The biased one has no zero: on independent Gaussians, N = 256, the linear one is
    0.34, 0.80, 0.89 and 0.97 at D = E = 128, 1024, 2048 and 8192 (means of three draws), where the
    debiased one is within 0.011 of 0.

    Source: Kornblith et al., ICML 2019, section 3 (biased); Nguyen, Raghu and Kornblith, ICLR 2021,
    section 3 (with the unbiased HSIC); Murphy et al., 2024 (arXiv 2405.01012), its bias.

    Args:
        x: Tensor of shape (N, D) or (N, ...), which is flattened; N >= 2, debiased N >= 4. Half
            precision is raised to float32.
        y: Tensor of shape (N, E) or (N, ...).
        kernel: "linear" or "gaussian", for both batches.
        bandwidth: Standard deviation of the Gaussian kernel, in the units of the inputs; None is
            the median heuristic of :func:`hsic`.
        debiased: Whether to compute the debiased estimator.

    Returns:
        Scalar tensor in [0, 1], debiased in [-1, 1], up to rounding; 0, with a zero gradient, where
        ``x`` or ``y`` is constant. A non-finite input makes it NaN on an accelerator or under
        ``torch.compile``.

    Raises:
        TypeError: If an input is not a floating-point tensor, or the bandwidth not a number.
        ValueError: If the shapes do not fit, N is too small, an option is out of range or, on a
            CPU, a value is not finite.

    Examples:
        >>> import torch
        >>> x, y = torch.arange(1.0, 17.0).reshape(4, 4), torch.tensor([1.0, 0.0, 0.0, 2.0])
        >>> round(cka(x, y).item(), 4), round(cka(x, x, debiased=True).item(), 4)
        (0.1636, 1.0)
    """
    corrected = check_bool("debiased", debiased)
    estimator = kernel_estimator(kernel, bandwidth, corrected=corrected, normalized=True)
    return compare_two(estimator, x, y)
