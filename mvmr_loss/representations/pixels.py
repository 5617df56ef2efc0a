"""The pixels themselves."""

from __future__ import annotations

from torch import Tensor

from mvmr_loss.representations.base import Representation
from mvmr_loss.representations.registry import register_representation


@register_representation("pixels")
class Pixels(Representation):
    """The pixels of the images, unchanged: (N, C, H, W) gives (N, C, H, W).

    The representation ``full_img`` of the authors' release of "MV-MR: Multi-Views and
    Multi-Representations for Self-Supervised Learning and Knowledge Distillation" (Entropy
    26(6):466, 2024).

    Args:
        differentiable: If True, the gradient flows through to the images.

    Examples:
        >>> import torch
        >>> images = torch.arange(12.0).reshape(1, 3, 2, 2)
        >>> Pixels()(images).flatten(1)
        tensor([[ 0.,  1.,  2.,  3.,  4.,  5.,  6.,  7.,  8.,  9., 10., 11.]])
        >>> Pixels().output_shape(3, 96, 96)
        (3, 96, 96)
    """

    def extract(self, images: Tensor) -> Tensor:
        return images

    def output_shape(self, channels: int, height: int, width: int) -> tuple[int, ...]:
        return channels, height, width
