"""Distillation in torchdistill: mid-level losses, a student with heads, kept teachers, by name.

They are registered when this is imported; in a YAML file:
``dependencies: [{name: mvmr_loss.adapters.torchdistill}]``.
"""

from __future__ import annotations

MINIMUM_TORCHDISTILL = "1.1.5"

try:
    import torchdistill as _torchdistill
except ImportError as error:
    raise ImportError(
        "mvmr_loss.adapters.torchdistill needs torchdistill, which cannot be imported; install it with: "
        f"pip install 'torchdistill>={MINIMUM_TORCHDISTILL}'"
    ) from error
del _torchdistill

from .loss import DependenceLoss, RegressionDependenceLoss  # noqa: E402
from .student import StudentWithHeads, fit_to_kept_teacher  # noqa: E402
from .teacher import FixedRepresentations, NonAugmentedDatasetWrapper, forward_non_augmented  # noqa: E402

__all__ = [
    "DependenceLoss",
    "FixedRepresentations",
    "NonAugmentedDatasetWrapper",
    "RegressionDependenceLoss",
    "StudentWithHeads",
    "fit_to_kept_teacher",
    "forward_non_augmented",
]
