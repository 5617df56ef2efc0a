"""Local binary patterns: which of a pixel's neighbours are at least as bright, counted in cells."""

from __future__ import annotations

import functools
import operator

import torch
from kornia.color import rgb_to_grayscale
from torch import Tensor

from mvmr_loss._checks import check_int
from mvmr_loss.representations.base import Representation, check_images
from mvmr_loss.representations.registry import register_representation

# Row and column of the eight neighbours in a window of 3 x 3, from the top left clockwise.
_AROUND = ((0, 0), (0, 1), (0, 2), (1, 2), (2, 2), (2, 1), (2, 0), (1, 0))
_PATTERNS = 2 ** len(_AROUND)


def local_binary_patterns(images: Tensor, cells: int = 2) -> Tensor:
    r"""Computes histograms of the local binary patterns of cells of each image.

    .. math:: p = \sum_{b=0}^7 2^b \, [x_b \ge x]

    with x a pixel that has eight neighbours and :math:`x_b` these, from the top left clockwise. A
    histogram has the share of each of the 256 patterns in a cell, so that it sums to 1. RGB images
    are turned grey first, images of other channels are their mean. Brightness and contrast of the
    image change nothing. Source: Ojala, Pietikäinen and Mäenpää, "Multiresolution gray-scale and
    rotation invariant texture classification with local binary patterns", TPAMI 24(7), 2002, eq. 8,
    with the square's corners as they are. Not one of MV-MR's; of those tried beside scattering and
    HOG in ``benchmarks/quality`` the one that helped. The module is :class:`LocalBinaryPatterns`.

    Args:
        images: Tensor of shape (N, C, H, W), or (C, H, W) for a single image, of any values whose sum
            over the channels is finite; height and width at least ``cells + 2``.
        cells: Cells along each side, at least 1.

    Returns:
        Tensor of shape (N, cells, cells, 256), in [0, 1], float32 (float64 for float64 images), without
        gradient.

    Examples:
        >>> stripes = torch.tensor([0.0, 1.0]).repeat(4).expand(1, 1, 8, 8)
        >>> histograms = local_binary_patterns(stripes, cells=1)
        >>> histograms.shape, histograms.flatten().nonzero().flatten().tolist()
        (torch.Size([1, 1, 1, 256]), [34, 255])
    """
    cells = check_int("cells", cells, minimum=1)
    return _histograms(check_images(images, cells + 2).detach(), cells)


def _histograms(images: Tensor, cells: int) -> Tensor:
    if images.shape[1] == 3:
        grey = rgb_to_grayscale(images)[:, 0]
    else:  # In one order for all pixels, which a mean's is not: equal ones are to stay equal.
        grey = functools.reduce(operator.add, images.unbind(1)) / images.shape[1]
    n, height, width = len(grey), grey.shape[1] - 2, grey.shape[2] - 2
    middle = grey[:, 1:-1, 1:-1]
    row, column = (
        torch.arange(size, device=grey.device) * cells // size for size in (height, width)
    )
    # The place of a pixel's count: its cell's first one, and its pattern's after that.
    place = (row[:, None] * cells + column) * _PATTERNS
    for bit, (i, j) in enumerate(_AROUND):
        place = place + ((grey[:, i : i + height, j : j + width] >= middle).long() << bit)
    place = place.flatten(1)
    # From 0, or from NaN for an image that holds it where values are not looked at: comparisons hide it.
    counts = (grey - grey).sum(dim=(1, 2))[:, None].repeat(1, cells * cells * _PATTERNS)
    counts.scatter_add_(1, place, grey.new_ones(()).expand_as(place))
    counts = counts.view(n, cells, cells, _PATTERNS)
    return counts / counts.sum(dim=3, keepdim=True)


@register_representation("local_binary_patterns")
class LocalBinaryPatterns(Representation):
    """Module form of :func:`local_binary_patterns`.

    Args:
        cells: As in :func:`local_binary_patterns`.
        differentiable: Must be False: a comparison has no gradient.

    Raises:
        ValueError: If ``differentiable`` is True.

    Examples:
        >>> LocalBinaryPatterns(cells=3)(torch.rand(4, 3, 32, 32)).shape
        torch.Size([4, 3, 3, 256])
    """

    def __init__(self, cells: int = 2, *, differentiable: bool = False) -> None:
        super().__init__(differentiable=differentiable)
        if self.differentiable:
            raise ValueError(
                "differentiable must be False for local_binary_patterns, which compares pixels and "
                "has no gradient, but is True."
            )
        self.cells = check_int("cells", cells, minimum=1)
        self.minimum_size = self.cells + 2

    def extra_repr(self) -> str:
        return f"cells={self.cells}"

    def extract(self, images: Tensor) -> Tensor:
        return _histograms(images, self.cells)

    def output_shape(self, channels: int, height: int, width: int) -> tuple[int, ...]:
        return self.cells, self.cells, _PATTERNS
