"""MV-MR in lightly: its loss, projection head, transform and a method for lightly's benchmarks.

Source: MV-MR, Entropy 26(6):466, 2024 (arXiv 2303.12130).
"""

from __future__ import annotations

import importlib.metadata
import re

# The first lightly whose KNNClassifier takes features, as its benchmarks' online kNN does, and whose
# scheduler leaves checkpoints from which Lightning resumes.
MINIMUM_LIGHTLY = "1.5.26"


def _check_lightly() -> None:
    """Raises if lightly is absent or too old for what is imported below."""
    remedy = f"install it with: pip install 'lightly>={MINIMUM_LIGHTLY}'"
    try:
        installed = importlib.metadata.version("lightly")
    except importlib.metadata.PackageNotFoundError as error:
        raise ImportError(
            f"mvmr_loss.adapters.lightly needs lightly, which is not installed; {remedy}"
        ) from error
    numbers = [tuple(map(int, re.findall(r"\d+", v)[:3])) for v in (installed, MINIMUM_LIGHTLY)]
    if numbers[0] < numbers[1]:
        raise ImportError(
            f"mvmr_loss.adapters.lightly needs lightly {MINIMUM_LIGHTLY} or newer but "
            f"{installed} is installed; {remedy}"
        )


_check_lightly()

from mvmr_loss import (  # noqa: E402
    MultiRepresentationRegularizer,
    MVMRLoss,
    MVMRProjectionHead,
    Representations,
)

from .method import MVMR, MVMRViT  # noqa: E402
from .transform import (  # noqa: E402
    MVMRTransform,
    MVMRViewTransform,
    NonAugmentedViewTransform,
)

__all__ = [
    "MVMR",
    "MVMRLoss",
    "MVMRProjectionHead",
    "MVMRTransform",
    "MVMRViT",
    "MVMRViewTransform",
    "MultiRepresentationRegularizer",
    "NonAugmentedViewTransform",
    "Representations",
]
