"""Measures of dependence between two batches, from their distances or kernel matrices."""

from mvmr_loss.dependence.base import DependenceMeasure
from mvmr_loss.dependence.centering import double_centered, u_centered
from mvmr_loss.dependence.cka import CKA, cka
from mvmr_loss.dependence.distance_correlation import (
    DistanceCorrelation,
    DistanceCorrelationSqr,
    DistanceCovariance,
    DistanceCovarianceSqr,
    PartialDistanceCorrelation,
    UDistanceCorrelationSqr,
    UDistanceCovarianceSqr,
    distance_correlation,
    distance_correlation_sqr,
    distance_covariance,
    distance_covariance_sqr,
    partial_distance_correlation,
    u_distance_correlation_sqr,
    u_distance_covariance_sqr,
)
from mvmr_loss.dependence.distances import pairwise_distances
from mvmr_loss.dependence.hsic import HSIC, hsic
from mvmr_loss.dependence.registry import dependence_measure

__all__ = [
    "CKA",
    "HSIC",
    "DependenceMeasure",
    "DistanceCorrelation",
    "DistanceCorrelationSqr",
    "DistanceCovariance",
    "DistanceCovarianceSqr",
    "PartialDistanceCorrelation",
    "UDistanceCorrelationSqr",
    "UDistanceCovarianceSqr",
    "cka",
    "dependence_measure",
    "distance_correlation",
    "distance_correlation_sqr",
    "distance_covariance",
    "distance_covariance_sqr",
    "double_centered",
    "hsic",
    "pairwise_distances",
    "partial_distance_correlation",
    "u_centered",
    "u_distance_correlation_sqr",
    "u_distance_covariance_sqr",
]
