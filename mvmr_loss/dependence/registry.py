"""The dependence measures by name."""

from __future__ import annotations

from collections.abc import Callable

from mvmr_loss.dependence.base import DependenceMeasure
from mvmr_loss.dependence.cka import CKA
from mvmr_loss.dependence.distance_correlation import (
    DistanceCorrelation,
    DistanceCorrelationSqr,
    DistanceCovariance,
    DistanceCovarianceSqr,
    UDistanceCorrelationSqr,
    UDistanceCovarianceSqr,
)
from mvmr_loss.dependence.hsic import HSIC

_MEASURES: dict[str, Callable[[], DependenceMeasure]] = {
    "distance_correlation": DistanceCorrelation,
    "distance_correlation_sqr": DistanceCorrelationSqr,
    "u_distance_correlation_sqr": UDistanceCorrelationSqr,
    "distance_covariance": DistanceCovariance,
    "distance_covariance_sqr": DistanceCovarianceSqr,
    "u_distance_covariance_sqr": UDistanceCovarianceSqr,
    "hsic": HSIC,
    "unbiased_hsic": lambda: HSIC(unbiased=True),
    "cka": CKA,
    "debiased_cka": lambda: CKA(debiased=True),
}


def dependence_measure(measure: str | DependenceMeasure) -> DependenceMeasure:
    """Returns the dependence measure of a name, with its default options.

    Args:
        measure: One of "distance_correlation", "distance_correlation_sqr",
            "u_distance_correlation_sqr", "distance_covariance", "distance_covariance_sqr",
            "u_distance_covariance_sqr", "hsic", "unbiased_hsic", "cka", "debiased_cka"; or a
            measure, for example with other options, which is returned as it is.

    Returns:
        The measure.

    Raises:
        TypeError: If ``measure`` is neither a name nor a measure.
        ValueError: If no measure has that name.

    Examples:
        >>> dependence_measure("distance_correlation")
        DistanceCorrelation(exponent=1.0, eps=0.0)
        >>> dependence_measure("debiased_cka")
        CKA(kernel='linear', bandwidth=None, debiased=True)
    """
    if isinstance(measure, DependenceMeasure):
        return measure
    if not isinstance(measure, str):
        raise TypeError(
            "dependence_measure must be a name or a mvmr_loss.dependence.DependenceMeasure "
            f"but is {measure!r}."
        )
    if measure not in _MEASURES:
        raise ValueError(
            f"dependence_measure must be one of {', '.join(_MEASURES)} but is {measure!r}; "
            "other options are given by an object, for example HSIC(kernel='linear')."
        )
    return _MEASURES[measure]()
