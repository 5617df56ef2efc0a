"""The augmented view of a whole batch at once: one resampling and one colour matrix an image."""

from __future__ import annotations

import functools
import math

import torch
from torch import Tensor
from torch.nn import functional as F

# To luminance and two chromatic axes, in whose plane a hue is an angle (YIQ).
_YIQ = ((0.299, 0.587, 0.114), (0.596, -0.274, -0.322), (0.211, -0.523, 0.312))


def augment(
    images: Tensor,
    jitter: float = 0.4,
    *,
    size: int | None = None,
    scale: tuple[float, float] = (0.2, 1.0),
    grey: float | None = None,
) -> Tensor:
    """Augments images: random crops, flips, colours and greys, drawn for each image.

    The crop has a ratio of sides from 3/4 to 4/3. Colours change for four of five images.

    Args:
        images: Tensor of shape (N, 3, H, W), from 0 to 1.
        jitter: The largest change of brightness, contrast and saturation; of the hue, as a share of
            the circle, a quarter of it.
        size: Side of the crops in pixels; None is that of the images.
        scale: From and to which part of the area a crop has.
        grey: Which part of the images is made grey; None: a quarter of ``jitter``.

    Returns:
        Tensor of shape (N, 3, size, size), from 0 to 1.

    Examples:
        >>> _ = torch.manual_seed(0)
        >>> augment(torch.rand(4, 3, 32, 32)).shape
        torch.Size([4, 3, 32, 32])
        >>> augment(torch.rand(4, 3, 32, 32), size=16, scale=(0.1, 0.5)).shape
        torch.Size([4, 3, 16, 16])
    """
    return _colored(
        _cropped(images, size or images.shape[-1], scale),
        jitter,
        jitter / 4 if grey is None else grey,
    )


@functools.cache
def _matrices(device: torch.device, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Returns the map to YIQ and the one back, copied to a device once."""
    to_yiq = torch.tensor(_YIQ, dtype=torch.float64)
    return to_yiq.to(device, dtype), torch.linalg.inv(to_yiq).to(device, dtype)


def _uniform(count: int, low: float, high: float, like: Tensor) -> Tensor:
    return torch.empty(count, dtype=like.dtype, device=like.device).uniform_(low, high)


def _cropped(images: Tensor, size: int, scale: tuple[float, float]) -> Tensor:
    """Resamples a random crop of each image to a size, half of them flipped."""
    n = len(images)
    area = _uniform(n, *scale, images)
    root = (_uniform(n, -1.0, 1.0, images) * math.log(4 / 3)).exp().sqrt()
    width, height = ((area.sqrt() * side).clamp(max=1) for side in (root, 1 / root))
    flip = torch.where(_uniform(n, 0, 1, images) < 0.5, -1.0, 1.0)
    theta = images.new_zeros(n, 2, 3)
    theta[:, 0, 0], theta[:, 1, 1] = width * flip, height
    theta[:, 0, 2] = (1 - width) * _uniform(n, -1, 1, images)
    theta[:, 1, 2] = (1 - height) * _uniform(n, -1, 1, images)
    grid = F.affine_grid(theta, [n, 3, size, size], align_corners=False)
    return F.grid_sample(images, grid, padding_mode="reflection", align_corners=False)


def _colored(images: Tensor, jitter: float, grey: float) -> Tensor:
    """Changes brightness, contrast, saturation and hue by one matrix and one offset an image."""
    n = len(images)
    to_yiq, from_yiq = _matrices(images.device, images.dtype)
    changed = (_uniform(n, 0, 1, images) < 0.8).to(images)
    brightness, contrast, saturation = (
        1 + changed * _uniform(n, -jitter, jitter, images) for _ in range(3)
    )
    angle = changed * _uniform(n, -jitter / 4, jitter / 4, images) * 2 * torch.pi
    saturation = saturation * (_uniform(n, 0, 1, images) >= grey)
    turn = torch.eye(3, dtype=images.dtype, device=images.device).repeat(n, 1, 1)
    turn[:, 1, 1] = turn[:, 2, 2] = angle.cos() * saturation
    turn[:, 2, 1] = angle.sin() * saturation
    turn[:, 1, 2] = -turn[:, 2, 1]
    matrix = from_yiq @ turn @ to_yiq * (brightness * contrast)[:, None, None]
    mean = (images.mean(dim=(2, 3)) @ to_yiq[0]) * brightness * (1 - contrast)
    flat = torch.baddbmm(mean[:, None, None].expand(n, 3, 1), matrix, images.flatten(2))
    return flat.clamp(0, 1).view_as(images)
