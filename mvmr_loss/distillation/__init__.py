"""Distillation of frozen teachers: regression onto their features and dependence on them."""

from mvmr_loss.distillation.bank import AnchorBank
from mvmr_loss.distillation.loss import DistillationLoss
from mvmr_loss.distillation.regression import TeacherRegression, regression_loss
from mvmr_loss.distillation.standardization import (
    Standardization,
    hadamard,
    stored_features,
)

__all__ = [
    "AnchorBank",
    "DistillationLoss",
    "Standardization",
    "TeacherRegression",
    "hadamard",
    "regression_loss",
    "stored_features",
]
