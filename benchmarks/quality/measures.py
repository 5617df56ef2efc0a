"""A dependence measure that is not in the package, tried by the study.

It is not registered: what lists the package's measures would have it, too, wherever this was imported.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor

from mvmr_loss.dependence import DependenceMeasure, dependence_measure
from mvmr_loss.dependence.measures import Estimator, MatrixMeasure
from mvmr_loss.distributed import Rows

MULTIQUADRIC = "multiquadric_cka"


class InverseMultiquadric(NamedTuple):
    """The kernel matrix ``(1 + |x - x'|^2 / bandwidth^2)^(-1/2)``: a Gaussian's near 0, with long tails.

    Source: Micchelli, Constructive Approximation 2, 1986.

    Attributes:
        bandwidth: Above 0.
    """

    bandwidth: float
    exponent: float = 0.0

    def matrices(self, squared: Tensor, units: Tensor, rows: Rows) -> Tensor:
        """Returns the kernel matrices, which have no unit."""
        ratio = (units / self.bandwidth).square().to(squared.dtype)
        return torch.rsqrt(1 + squared * ratio[:, None, None])


def measure_of(told: str | Mapping[str, Any]) -> DependenceMeasure:
    """Returns a measure of the package, or the debiased CKA with inverse multiquadric kernels.

    Examples:
        >>> x = torch.arange(1.0, 17.0).reshape(4, 4)
        >>> round(measure_of({"name": "multiquadric_cka", "bandwidth": 1.0})(x, x).item(), 3)
        1.0
    """
    if isinstance(told, Mapping) and told["name"] == MULTIQUADRIC:
        matrix = cast("Any", InverseMultiquadric(told["bandwidth"]))
        return MatrixMeasure(MULTIQUADRIC, Estimator(matrix, corrected=True, normalized=True))
    return dependence_measure(told)
