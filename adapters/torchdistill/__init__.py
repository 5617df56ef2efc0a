"""Dependence in torchdistill: a mid-level loss, and kept teachers, registered when it is imported.

In a YAML file: ``dependencies: [{name: mvmr_loss.adapters.torchdistill}]``.
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

from .loss import DependenceLoss  # noqa: E402
from .teacher import FixedRepresentations, NonAugmentedDatasetWrapper, forward_non_augmented  # noqa: E402

__all__ = [
    "DependenceLoss",
    "FixedRepresentations",
    "NonAugmentedDatasetWrapper",
    "forward_non_augmented",
]
