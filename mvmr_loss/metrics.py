"""Dependence measures as torchmetrics: accumulated over minibatches and processes, and unbiased there.

A measure of a minibatch is a biased estimate of that of all samples, and the mean over minibatches keeps
the bias. What is unbiased on a minibatch is the covariance: so the covariance and both variances are
summed over minibatches, and divided only at the end. It needs torchmetrics (0.11.4 or newer), which
``import mvmr_loss`` does not import.

Source: Nguyen, Raghu and Kornblith, ICLR 2021 (arXiv 2010.15327), section 3, for the debiased CKA.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from mvmr_loss._checks import as_rows, check_batch, check_finite
from mvmr_loss.dependence.distance_correlation import distance_estimator
from mvmr_loss.dependence.hsic import Kernel, kernel_estimator
from mvmr_loss.dependence.measures import Estimator, dependence

try:
    from torchmetrics import Metric
except ImportError as error:
    raise ImportError(
        "mvmr_loss.metrics needs torchmetrics, which cannot be imported; install it with: "
        "pip install 'torchmetrics>=0.11.4'"
    ) from error

__all__ = ["DebiasedCKA", "UDistanceCorrelationSqr"]


class _MinibatchDependence(Metric):  # type: ignore[misc, unused-ignore]
    """The covariance over the root of both variances, each the mean of its minibatches' estimates.

    Args:
        estimator: Of the covariance, unbiased.
        **kwargs: Of ``torchmetrics.Metric``.
    """

    is_differentiable = True
    higher_is_better = True
    full_state_update = False

    moments: Tensor
    samples: Tensor

    def __init__(self, estimator: Estimator, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.estimator = estimator
        # The covariance and both variances, summed over samples.
        self.add_state("moments", torch.zeros(3, dtype=torch.float64), dist_reduce_fx="sum")
        self.add_state("samples", torch.zeros((), dtype=torch.int64), dist_reduce_fx="sum")

    def update(self, x: Tensor, y: Tensor) -> None:
        """Adds a minibatch.

        Args:
            x: Tensor of shape (N, D) or (N, ...), which is flattened; N >= 4.
            y: Tensor of shape (N, E) or (N, ...), of the same samples; E may differ from D.

        Raises:
            TypeError: If an input is not a floating-point tensor.
            ValueError: If there are fewer than four samples or x and y have different numbers of them,
                or a value is not finite.
        """
        for name, batch in (("x", x), ("y", y)):
            check_batch(name, batch, 4)
            check_finite(name, batch)
        if len(x) != len(y):
            raise ValueError(
                f"x and y must have the same number of samples but have {len(x)} and {len(y)}."
            )
        batches = [as_rows(batch.double()) for batch in (x, y)]
        found = dependence(self.estimator, batches, [(0, 1), (0, 0), (1, 1)])
        self.moments = self.moments + len(x) * found
        self.samples = self.samples + len(x)

    def compute(self) -> Tensor:
        """Computes the measure over all minibatches of all processes.

        Returns:
            Scalar tensor, float64, at most 1 on one minibatch; 0 where ``x`` or ``y`` is constant.

        Raises:
            ValueError: If there was no minibatch.
        """
        if not self.samples:
            raise ValueError("update must be called before compute but was not.")
        covariance, variance_x, variance_y = self.moments / self.samples
        constant = (variance_x == 0) | (variance_y == 0)
        # 1 in the place of 0, of which a root has no finite gradient.
        root_x, root_y = (torch.where(v == 0, 1.0, v).sqrt() for v in (variance_x, variance_y))
        return torch.where(constant, 0.0, covariance / (root_x * root_y))


class DebiasedCKA(_MinibatchDependence):
    """Centred kernel alignment over minibatches, debiased: a ``torchmetrics.Metric``.

    The mean over minibatches of the unbiased HSIC of x and y, over the root of those of x and of y with
    themselves; minibatches count by their number of samples. On one minibatch it is
    :func:`mvmr_loss.dependence.cka` with ``debiased=True``. The mean of the minibatches' CKA depends on
    their size; this does not, but for its variance and for the ratio's bias, which vanishes as their
    number grows.

    Source: Nguyen, Raghu and Kornblith, ICLR 2021 (arXiv 2010.15327), section 3; Song et al., JMLR 13,
    2012, eq. 5, for the unbiased HSIC.

    Args:
        kernel: "linear" or "gaussian", for both.
        bandwidth: Standard deviation of the Gaussian kernel, in the units of the inputs. It must be
            given: the median distance would be another one in every minibatch.
        **kwargs: Of ``torchmetrics.Metric``.

    Raises:
        TypeError: If the bandwidth is not a number.
        ValueError: If an option is out of range, or a Gaussian kernel has no bandwidth.

    Examples:
        >>> import torch
        >>> from mvmr_loss.metrics import DebiasedCKA
        >>> _ = torch.manual_seed(0)
        >>> x, noise = torch.randn(64, 512), torch.randn(64, 512)
        >>> metric = DebiasedCKA()
        >>> for batch in range(4):
        ...     rows = slice(16 * batch, 16 * batch + 16)
        ...     metric.update(x[rows], x[rows] + noise[rows])
        >>> round(metric.compute().item(), 2)
        0.52
    """

    def __init__(
        self, kernel: Kernel = "linear", bandwidth: float | None = None, **kwargs: Any
    ) -> None:
        estimator = kernel_estimator(kernel, bandwidth, corrected=True, normalized=False)
        if kernel == "gaussian" and bandwidth is None:
            raise ValueError(
                "bandwidth must be given for the gaussian kernel but is None: the median distance would "
                "be another one in every minibatch."
            )
        super().__init__(estimator, **kwargs)


class UDistanceCorrelationSqr(_MinibatchDependence):
    """Bias-corrected squared distance correlation over minibatches: a ``torchmetrics.Metric``.

    The mean over minibatches of the unbiased squared distance covariance, over the root of both distance
    variances; minibatches count by their number of samples. On one minibatch it is
    :func:`mvmr_loss.dependence.u_distance_correlation_sqr`. It can be negative.

    Source: Szekely and Rizzo, Annals of Statistics 42(6), 2014, section 3, for the covariance; summed
    over minibatches as :class:`DebiasedCKA` is, of which it is the case of the distance's kernel
    (Sejdinovic et al., Annals of Statistics 41(5), 2013).

    Args:
        exponent: Exponent of the Euclidean distance, in (0, 2).
        **kwargs: Of ``torchmetrics.Metric``.

    Raises:
        TypeError: If the exponent is not a number.
        ValueError: If the exponent is out of range.

    Examples:
        >>> import torch
        >>> from mvmr_loss.metrics import UDistanceCorrelationSqr
        >>> metric = UDistanceCorrelationSqr()
        >>> x = torch.arange(8.0)[:, None]
        >>> metric.update(x[:4], 2 * x[:4])
        >>> metric.update(x[4:], x[4:].square())
        >>> round(metric.compute().item(), 3)
        0.822
    """

    def __init__(self, exponent: float = 1.0, **kwargs: Any) -> None:
        super().__init__(
            distance_estimator(exponent=exponent, corrected=True, normalized=False), **kwargs
        )
