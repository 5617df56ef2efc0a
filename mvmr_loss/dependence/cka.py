"""Centred kernel alignment, biased and debiased."""

from __future__ import annotations

from torch import Tensor

from mvmr_loss.dependence.base import DependenceMeasure, check_same_samples
from mvmr_loss.dependence.centering import inner_product
from mvmr_loss.dependence.hsic import Kernel, centered_kernel, check_kernel_options


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
    check_kernel_options(kernel, bandwidth)
    a = centered_kernel("x", x, kernel, bandwidth, corrected=debiased, unit=True)
    b = centered_kernel("y", y, kernel, bandwidth, corrected=debiased, unit=True)
    check_same_samples("x", x, "y", y)
    return inner_product(a, b)


class CKA(DependenceMeasure):
    """The centred kernel alignment as a module and strategy; see :func:`cka`.

    Args:
        kernel: "linear" or "gaussian".
        bandwidth: Standard deviation of the Gaussian kernel; None is the median heuristic.
        debiased: Whether to compute the debiased estimator, which needs N >= 4.

    Raises:
        TypeError: If the bandwidth is not a number.
        ValueError: If an option is out of range.

    Examples:
        >>> import torch
        >>> x, y = torch.arange(1.0, 17.0).reshape(4, 4), torch.tensor([1.0, 0.0, 0.0, 2.0])
        >>> round(CKA()(x, y).item(), 4)
        0.1636
    """

    def __init__(
        self,
        *,
        kernel: Kernel = "linear",
        bandwidth: float | None = None,
        debiased: bool = False,
    ) -> None:
        super().__init__()
        check_kernel_options(kernel, bandwidth)
        self.kernel = kernel
        self.bandwidth = bandwidth
        self.debiased = debiased
        self.min_samples = 4 if debiased else 2

    def center(self, x: Tensor, name: str = "x") -> Tensor:
        """Computes the centred kernel matrix of a batch, of norm 1; see the base class."""
        return centered_kernel(
            name, x, self.kernel, self.bandwidth, corrected=self.debiased, unit=True
        )

    def compare(self, a: Tensor, b: Tensor) -> Tensor:
        """Computes the alignment from two centred matrices."""
        return inner_product(a, b)

    def extra_repr(self) -> str:
        """Returns the options, for printing."""
        return f"kernel={self.kernel!r}, bandwidth={self.bandwidth}, debiased={self.debiased}"
