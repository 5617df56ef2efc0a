"""The local standard deviation: how much the pixels around each pixel differ."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from mvmr_loss._checks import check_int
from mvmr_loss.representations.base import Representation, check_images, follows_derivative
from mvmr_loss.representations.registry import register_representation


def local_std(images: Tensor, window_size: int = 3) -> Tensor:
    r"""Computes the biased standard deviation (divided by the count) of each pixel's window.

    .. math:: s = \sqrt{\frac{1}{w^2} \sum_{i \in \text{window}} (x_i - \bar x)^2}

    Beyond the border the image continues by reflection that does not repeat the edge pixel,
    kornia's ``"reflect"``. The representation ``full_img_std`` of the authors' release of MV-MR
    (Entropy 26(6):466, 2024), which has 1e-8 under the root; here a constant window gives exactly
    0, and a zero gradient.

    The sums are of deviations from a pixel of the window, so a large mean costs no digits: sums of
    squares of the columns first, then of their means, joined as by Chan, Golub and LeVeque, "Updating
    formulae and a pairwise algorithm for computing sample variances" (1979). The module is
    :class:`LocalStd`.

    Args:
        images: Tensor of shape (N, C, H, W), or (C, H, W) for a single image, of any finite values, but
            that in float32 the result is not finite for those from 1e18 on, whose squares leave the
            range; height and width at least ``window_size // 2 + 1``.
        window_size: Side of the window in pixels, odd and at least 3.

    Returns:
        Tensor of shape (N, C, H, W), >= 0, in units of the images, float32 (float64 for float64
        images), differentiable with respect to ``images``.

    Examples:
        >>> import torch
        >>> images = torch.tensor([[[[0.0, 0.0, 0.0, 3.0, 3.0]] * 3]])
        >>> local_std(images)[0, 0, 1]
        tensor([0.0000, 0.0000, 1.4142, 1.4142, 0.0000])
    """
    window_size = _check_window_size(window_size)
    return _local_std(check_images(images, window_size // 2 + 1), window_size)


def _local_std(images: Tensor, window_size: int) -> Tensor:
    # Shifted views of channels-last images are slower to add than a copy is to make.
    padded = F.pad(images.contiguous(), (window_size // 2,) * 4, mode="reflect")
    column_means, column_squares = _sliding_moments(padded, window_size, dim=-2)
    _, between = _sliding_moments(column_means, window_size, dim=-1)
    within = _sum(_shifts(column_squares, window_size, dim=-1))
    variance = within.add_(between, alpha=window_size).div_(window_size**2)
    if not follows_derivative(variance):
        return variance.sqrt_()
    # The root's slope at 0 is infinite; in a constant window the gradient shall be 0.
    flat = variance == 0
    return variance.masked_fill(flat, 1.0).sqrt().masked_fill(flat, 0.0)


# In place wherever autograd allows it: allocating memory takes longer than these sums.


def _sliding_moments(x: Tensor, size: int, dim: int) -> tuple[Tensor, Tensor]:
    """Returns the mean, and the sum of squared deviations from it, of each ``size`` neighbours."""
    # About the first of them: where all are equal, nothing is left, not even a rounding. The squares are
    # at most size + 1 times what remains when those of the mean are subtracted.
    first, second, *others = _shifts(x, size, dim)
    total = second - first
    squares = total * total
    for shift in others:
        deviations = shift - first
        total = total + deviations
        squares.addcmul_(deviations, deviations)
    squares.addcmul_(total, total, value=-1 / size)
    return torch.add(first, total, alpha=1 / size), squares


def _sum(tensors: list[Tensor]) -> Tensor:
    total = tensors[0] + tensors[1]
    for tensor in tensors[2:]:
        total.add_(tensor)
    return total


def _shifts(x: Tensor, size: int, dim: int) -> list[Tensor]:
    """Returns the ``size`` views that hold the first, second ... member of every window."""
    length = x.shape[dim] - size + 1
    return [x.narrow(dim, i, length) for i in range(size)]


def _check_window_size(window_size: int) -> int:
    window_size = check_int("window_size", window_size)
    if window_size < 3 or window_size % 2 == 0:
        raise ValueError(f"window_size must be odd and at least 3 but is {window_size}.")
    return window_size


@register_representation("local_std")
class LocalStd(Representation):
    """Module form of :func:`local_std`.

    Args:
        window_size: As in :func:`local_std`.
        differentiable: If True, the gradient flows through to the images.

    Examples:
        >>> import torch
        >>> LocalStd(window_size=5)(torch.rand(4, 3, 32, 32)).shape
        torch.Size([4, 3, 32, 32])
    """

    def __init__(self, window_size: int = 3, *, differentiable: bool = False) -> None:
        super().__init__(differentiable=differentiable)
        self.window_size = _check_window_size(window_size)
        self.minimum_size = self.window_size // 2 + 1

    def extra_repr(self) -> str:
        return f"window_size={self.window_size}"

    def extract(self, images: Tensor) -> Tensor:
        return _local_std(images, self.window_size)

    def output_shape(self, channels: int, height: int, width: int) -> tuple[int, ...]:
        return channels, height, width
