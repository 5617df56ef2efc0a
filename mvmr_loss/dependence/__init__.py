"""Measures of dependence between two batches, from their distances or kernel matrices."""

from mvmr_loss.dependence.cross import (
    TokenDistanceCorrelation,
    cross_distance_correlation,
    token_distance_correlation,
)
from mvmr_loss.dependence.distance_correlation import (
    distance_correlation,
    distance_correlation_sqr,
    distance_covariance,
    distance_covariance_sqr,
    pairwise_distances,
    partial_distance_correlation,
    u_distance_correlation_sqr,
    u_distance_covariance_sqr,
)
from mvmr_loss.dependence.hsic import cka, hsic
from mvmr_loss.dependence.measures import DependenceMeasure
from mvmr_loss.dependence.registry import (
    dependence_measure,
    list_dependence_measures,
    register_dependence_measure,
)

__all__ = [
    "DependenceMeasure",
    "TokenDistanceCorrelation",
    "cka",
    "cross_distance_correlation",
    "dependence_measure",
    "distance_correlation",
    "distance_correlation_sqr",
    "distance_covariance",
    "distance_covariance_sqr",
    "hsic",
    "list_dependence_measures",
    "pairwise_distances",
    "partial_distance_correlation",
    "register_dependence_measure",
    "token_distance_correlation",
    "u_distance_correlation_sqr",
    "u_distance_covariance_sqr",
]
