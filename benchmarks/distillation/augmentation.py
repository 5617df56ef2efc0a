"""The augmented view of a whole batch at once: one resampling and one colour matrix an image."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

_GREY = (0.299, 0.587, 0.114)
# To luminance and two chromatic axes, in whose plane a hue is an angle (YIQ).
_TO_YIQ = ((0.299, 0.587, 0.114), (0.596, -0.274, -0.322), (0.211, -0.523, 0.312))


def augment(images: Tensor, jitter: float = 0.4) -> Tensor:
    """Augments images: random crops, flips, colours and greys, drawn for each image.

    The crop has 0.2 to 1 of the area and a ratio of sides from 3/4 to 4/3. Colours change for four
    of five images, and a ``jitter / 4`` of all is made grey.

    Args:
        images: Tensor of shape (N, 3, H, W), from 0 to 1.
        jitter: The largest change of brightness, contrast and saturation; of the hue, as a share of
            the circle, a quarter of it.

    Returns:
        Tensor of the same shape, from 0 to 1.

    Examples:
        >>> _ = torch.manual_seed(0)
        >>> augment(torch.rand(4, 3, 32, 32)).shape
        torch.Size([4, 3, 32, 32])
    """
    return _colored(_cropped(images), jitter)


def _uniform(count: int, low: float, high: float, like: Tensor) -> Tensor:
    return torch.empty(count, dtype=like.dtype, device=like.device).uniform_(low, high)


def _cropped(images: Tensor) -> Tensor:
    """Resamples a random crop of each image to the size of the whole, half of them flipped."""
    n = len(images)
    area = _uniform(n, 0.2, 1.0, images)
    root = (_uniform(n, -1.0, 1.0, images) * torch.tensor(4 / 3).log()).exp().sqrt()
    width, height = ((area.sqrt() * side).clamp(max=1) for side in (root, 1 / root))
    flip = torch.where(_uniform(n, 0, 1, images) < 0.5, -1.0, 1.0)
    theta = images.new_zeros(n, 2, 3)
    theta[:, 0, 0], theta[:, 1, 1] = width * flip, height
    theta[:, 0, 2] = (1 - width) * _uniform(n, -1, 1, images)
    theta[:, 1, 2] = (1 - height) * _uniform(n, -1, 1, images)
    grid = F.affine_grid(theta, list(images.shape), align_corners=False)
    return F.grid_sample(images, grid, padding_mode="reflection", align_corners=False)


def _colored(images: Tensor, jitter: float) -> Tensor:
    """Changes brightness, contrast, saturation and hue by one matrix and one offset an image."""
    n = len(images)
    grey = images.new_tensor(_GREY)
    to_yiq = images.new_tensor(_TO_YIQ)
    changed = (_uniform(n, 0, 1, images) < 0.8).to(images)
    brightness, contrast, saturation = (
        1 + changed * _uniform(n, -jitter, jitter, images) for _ in range(3)
    )
    angle = changed * _uniform(n, -jitter / 4, jitter / 4, images) * 2 * torch.pi
    saturation = saturation * (_uniform(n, 0, 1, images) >= jitter / 4)
    turn = torch.eye(3, dtype=images.dtype, device=images.device).repeat(n, 1, 1)
    turn[:, 1, 1] = turn[:, 2, 2] = angle.cos() * saturation
    turn[:, 2, 1] = angle.sin() * saturation
    turn[:, 1, 2] = -turn[:, 2, 1]
    matrix = torch.linalg.inv(to_yiq) @ turn @ to_yiq * (brightness * contrast)[:, None, None]
    mean = (images.mean(dim=(2, 3)) @ grey) * brightness * (1 - contrast)
    flat = torch.baddbmm(mean[:, None, None].expand(n, 3, 1), matrix, images.flatten(2))
    return flat.clamp(0, 1).view_as(images)
