"""MV-MR: the multi-view multi-representation loss for self-supervised learning and distillation."""

from mvmr_loss._cpu.build import KernelStatus, kernels
from mvmr_loss._objective import LossComponents
from mvmr_loss._version import __version__
from mvmr_loss.dependence import list_dependence_measures, register_dependence_measure
from mvmr_loss.distillation import DistillationLoss, TeacherRegression
from mvmr_loss.heads import MVMRProjectionHead
from mvmr_loss.large_batch import backward_in_chunks
from mvmr_loss.loss import MVMRLoss
from mvmr_loss.normalization import Normalization
from mvmr_loss.presets import Preset, list_presets, preset_settings
from mvmr_loss.regularizer import MultiRepresentationRegularizer
from mvmr_loss.representations import (
    Representations,
    list_representations,
    register_representation,
)
from mvmr_loss.teachers import Teacher, TeacherPreprocessing

__all__ = [
    "DistillationLoss",
    "KernelStatus",
    "LossComponents",
    "MVMRLoss",
    "MVMRProjectionHead",
    "MultiRepresentationRegularizer",
    "Normalization",
    "Preset",
    "Representations",
    "Teacher",
    "TeacherPreprocessing",
    "TeacherRegression",
    "__version__",
    "backward_in_chunks",
    "kernels",
    "list_dependence_measures",
    "list_presets",
    "list_representations",
    "preset_settings",
    "register_dependence_measure",
    "register_representation",
]
