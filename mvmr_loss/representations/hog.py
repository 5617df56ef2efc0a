"""Histograms of oriented gradients."""

from __future__ import annotations

import math
from typing import Any, Literal, get_args

import torch
import torch.nn.functional as F
from torch import Tensor

from mvmr_loss._checks import check_choice, check_int
from mvmr_loss._cpu import can_run
from mvmr_loss.representations.base import Representation, check_images, follows_derivative
from mvmr_loss.representations.registry import register_representation

Gradient = Literal["sobel", "central"]
Interpolation = Literal["linear", "none"]
BlockNorm = Literal["L1", "L1-sqrt", "L2", "L2-Hys"]

_EPS = 1e-5  # scikit-image's, in the block norms


def hog(
    images: Tensor,
    orientations: int = 24,
    pixels_per_cell: int = 8,
    cells_per_block: int = 1,
    block_norm: BlockNorm | None = None,
    gradient: Gradient = "sobel",
    interpolation: Interpolation = "linear",
) -> Tensor:
    r"""Computes the histograms of oriented gradients of each channel.

    Each pixel has a gradient of magnitude m and of unsigned angle :math:`\theta \in [0, \pi)`, from
    the x axis towards the y axis, which points down. With t = :math:`\theta` orientations /
    :math:`\pi`, the magnitude is shared linearly by the bins :math:`\lfloor t \rfloor` (:math:`1 -
    t + \lfloor t \rfloor` of it) and :math:`\lfloor t \rfloor + 1` (the rest), the last bin being
    followed by the first: bin k stands for the angle k :math:`\pi` / orientations. The mean over
    each cell is the histogram.

    Rows and columns beyond the last whole cell are left out of the cells, as in scikit-image. The
    module is :class:`HOG`.

    Settings of other works:

    - The default is ``full_img_hog`` of the authors' release of MV-MR (Entropy 26(6):466, 2024)
      with its bins interpolated linearly.
    - ``block_norm="L2"`` with cells of one: the per-cell normalisation of MaskFeat (Wei et al.,
      CVPR 2022).
    - ``gradient="central", interpolation="none", cells_per_block=3, block_norm="L2-Hys"``: equal to
      ``skimage.feature.hog`` of each channel, and to Dalal and Triggs, "Histograms of oriented
      gradients for human detection" (CVPR 2005) but for their interpolation.

    Args:
        images: Tensor of shape (N, C, H, W), or (C, H, W) for a single image; H and W at least
            ``cells_per_block * pixels_per_cell``. Values may be of any size whose sum over a cell is in
            the type's range: up to some 1e35 in float32.
        orientations: Number of bins over [0, pi), at least 1.
        pixels_per_cell: Side of a cell in pixels, at least 1.
        cells_per_block: Side of a block in cells, at least 1. Blocks overlap: one starts at every
            cell.
        block_norm: None: no normalisation, which goes with blocks of one cell. ``"L1"``,
            ``"L1-sqrt"`` (the root of it), ``"L2"`` or ``"L2-Hys"`` (L2, clipped at 0.2, L2 again):
            that of the block's numbers, as in scikit-image.
        gradient: ``"sobel"``: kornia's ``spatial_gradient(..., normalized=False)``, the border
            replicated. ``"central"``: differences of the two neighbours, 0 at the border, as in
            scikit-image.
        interpolation: ``"linear"``: as above. ``"none"``: all of the magnitude goes to the first of
            the two bins, which then holds the angles from its own to the next one's, as in
            scikit-image.

    Returns:
        Tensor of shape (N, C, orientations, H // pixels_per_cell, W // pixels_per_cell), >= 0, in
        units of the images unless normalised, float32 (float64 for float64 images), differentiable
        with respect to ``images`` (except, as any histogram, where an angle changes bins without
        interpolation). With b = ``cells_per_block`` > 1, of shape (N, C, orientations, b, b, H //
        pixels_per_cell - b + 1, W // pixels_per_cell - b + 1): bin, row and column in the block,
        row and column of the block.

    Examples:
        >>> ramp = torch.arange(8.0).expand(1, 1, 8, 8)
        >>> hog(ramp, orientations=4)[0, 0, :, 0, 0]
        tensor([7., 0., 0., 0.])
        >>> hog(ramp.mT, orientations=4)[0, 0, :, 0, 0]
        tensor([0., 0., 7., 0.])
    """
    options = _check_options(
        orientations, pixels_per_cell, cells_per_block, block_norm, gradient, interpolation
    )
    return _extract(check_images(images, options[1] * options[2]), *options)


def _extract(images: Tensor, *options: Any) -> Tensor:
    """Calls :func:`_hog`, as an op where that is faster."""
    histograms: Tensor = (_hog_on_cpu if can_run(images) else _hog)(images, *options)
    return histograms


def _hog(
    images: Tensor,
    orientations: int,
    pixels_per_cell: int,
    cells_per_block: int,
    block_norm: str | None,
    gradient: str,
    interpolation: str,
) -> Tensor:
    # Shifted views of channels-last images are slower to add than a copy is to make.
    images = images.contiguous()
    dx, dy = _sobel(images) if gradient == "sobel" else _central_differences(images)
    height, width = (size // pixels_per_cell for size in images.shape[-2:])
    inside = (..., slice(height * pixels_per_cell), slice(width * pixels_per_cell))
    histogram = _histogram(dx[inside], dy[inside], orientations, pixels_per_cell, interpolation)
    if block_norm is None:
        return histogram
    if cells_per_block > 1:
        blocks = histogram.unfold(3, cells_per_block, 1).unfold(4, cells_per_block, 1)
        histogram = blocks.permute(0, 1, 2, 5, 6, 3, 4)
    return _normalize(histogram, block_norm, dim=tuple(range(2, histogram.ndim - 2)))


# A CPU adds by index twice as fast in eager mode as in what a compiler makes of it.
_hog_on_cpu = torch.library.custom_op("mvmr_loss::hog", _hog, mutates_args=())
_hog_on_cpu.register_fake(_hog)


def _sobel(images: Tensor) -> tuple[Tensor, Tensor]:
    # kornia.filters.spatial_gradient(images, normalized=False): the same numbers, but as sums of
    # shifted views, which take a tenth of the time of its convolution on a CPU.
    x = F.pad(images, (1, 1, 1, 1), mode="replicate")
    smooth_y = torch.add(x[..., :-2, :] + x[..., 2:, :], x[..., 1:-1, :], alpha=2)
    step_y = x[..., 2:, :] - x[..., :-2, :]
    dx = smooth_y[..., 2:] - smooth_y[..., :-2]
    dy = torch.add(step_y[..., :-2] + step_y[..., 2:], step_y[..., 1:-1], alpha=2)
    return dx, dy


def _central_differences(images: Tensor) -> tuple[Tensor, Tensor]:
    dx = F.pad(images[..., 2:] - images[..., :-2], (1, 1))
    dy = F.pad(images[..., 2:, :] - images[..., :-2, :], (0, 0, 1, 1))
    return dx, dy


def _histogram(
    dx: Tensor, dy: Tensor, orientations: int, pixels_per_cell: int, interpolation: str
) -> Tensor:
    n, channels, height, width = dx.shape
    rows, columns = height // pixels_per_cell, width // pixels_per_cell

    if follows_derivative(dx):
        # At a zero gradient the slopes of magnitude and angle are undefined: shall be 0.
        flat = (dx == 0) & (dy == 0)
        dx = dx.masked_fill(flat, 1.0)
        length = torch.hypot(dx, dy)
        magnitude = length.masked_fill(flat, 0.0)
        # An angle has no unit; the slope of atan2 divides by the square of what may be tiny.
        dx, dy = dx / length.detach(), dy / length.detach()
    else:
        magnitude = torch.hypot(dx, dy)
    position = torch.atan2(dy, dx) * (orientations / math.pi)
    if interpolation == "none":
        # The frequent angles of pixel differences (0, 45, 90 degrees ...) may fall between two
        # bins: a rounding error below them must not change their bin.
        position = position + 8 * orientations * torch.finfo(position.dtype).eps
    lower = position.detach().floor()

    # Each pixel adds to the number of its bin in its cell. Adding by index visits a pixel once,
    # where pooling a one-hot image visits it once a bin. The remainder makes the angle unsigned, and
    # gives a bin to NaN as well, which stays where values are not looked at: its sum is NaN then.
    device = dx.device
    cell_row = torch.arange(height, device=device, dtype=torch.int32) // pixels_per_cell
    cell_column = torch.arange(width, device=device, dtype=torch.int32) // pixels_per_cell
    cell = cell_row[:, None] * columns + cell_column
    index = (lower.int().remainder(orientations) + cell * orientations).long()

    def add_up(amount: Tensor) -> Tensor:
        sums = amount.new_zeros(n * channels, rows * columns * orientations)
        sums = sums.scatter_add(1, index.flatten(2).flatten(0, 1), amount.flatten(2).flatten(0, 1))
        return sums.view(n, channels, rows, columns, orientations)

    if interpolation == "none":
        histogram = add_up(magnitude)
    else:
        to_next = magnitude * (position - lower)
        histogram = add_up(magnitude - to_next) + add_up(to_next).roll(1, dims=-1)
    return histogram.permute(0, 1, 4, 2, 3).contiguous() / pixels_per_cell**2


def _normalize(blocks: Tensor, block_norm: str, dim: tuple[int, ...]) -> Tensor:
    if block_norm in ("L1", "L1-sqrt"):
        blocks = blocks / (blocks.sum(dim, keepdim=True) + _EPS)
        if block_norm == "L1":
            return blocks
        empty = blocks == 0
        return blocks.masked_fill(empty, 1.0).sqrt().masked_fill(empty, 0.0)
    blocks = _divide_by_l2(blocks, dim)
    return _divide_by_l2(blocks.clamp(max=0.2), dim) if block_norm == "L2-Hys" else blocks


def _divide_by_l2(blocks: Tensor, dim: tuple[int, ...]) -> Tensor:
    # In units of the largest number: squares of what is far above 1 may leave the range of the type.
    unit = blocks.detach().amax(dim, keepdim=True).clamp(min=1.0)
    blocks = blocks / unit
    return blocks * torch.rsqrt(blocks.square().sum(dim, keepdim=True) + (_EPS / unit) ** 2)


def _check_options(
    orientations: int,
    pixels_per_cell: int,
    cells_per_block: int,
    block_norm: str | None,
    gradient: str,
    interpolation: str,
) -> tuple[int, int, int, str | None, str, str]:
    orientations = check_int("orientations", orientations, minimum=1)
    pixels_per_cell = check_int("pixels_per_cell", pixels_per_cell, minimum=1)
    cells_per_block = check_int("cells_per_block", cells_per_block, minimum=1)
    check_choice("block_norm", block_norm, (None, *get_args(BlockNorm)))
    check_choice("gradient", gradient, get_args(Gradient))
    check_choice("interpolation", interpolation, get_args(Interpolation))
    if block_norm is None and cells_per_block > 1:
        raise ValueError(
            f"block_norm must be given for blocks of {cells_per_block} x {cells_per_block} cells "
            f"but is None; name one of {', '.join(map(repr, get_args(BlockNorm)))}, or set "
            "cells_per_block=1."
        )
    return orientations, pixels_per_cell, cells_per_block, block_norm, gradient, interpolation


@register_representation("hog")
class HOG(Representation):
    """Module form of :func:`hog`, with the same options.

    Args:
        orientations ... interpolation: As in :func:`hog`.
        differentiable: If True, the gradient flows through to the images.

    Examples:
        >>> HOG()(torch.rand(4, 3, 96, 96)).shape
        torch.Size([4, 3, 24, 12, 12])
        >>> HOG(orientations=9, cells_per_block=2, block_norm="L2").output_shape(3, 96, 96)
        (3, 9, 2, 2, 11, 11)
    """

    def __init__(
        self,
        orientations: int = 24,
        pixels_per_cell: int = 8,
        cells_per_block: int = 1,
        block_norm: BlockNorm | None = None,
        gradient: Gradient = "sobel",
        interpolation: Interpolation = "linear",
        *,
        differentiable: bool = False,
    ) -> None:
        super().__init__(differentiable=differentiable)
        (
            self.orientations,
            self.pixels_per_cell,
            self.cells_per_block,
            self.block_norm,
            self.gradient,
            self.interpolation,
        ) = _check_options(
            orientations, pixels_per_cell, cells_per_block, block_norm, gradient, interpolation
        )
        self.minimum_size = self.cells_per_block * self.pixels_per_cell

    def extra_repr(self) -> str:
        return (
            f"orientations={self.orientations}, pixels_per_cell={self.pixels_per_cell}, "
            f"cells_per_block={self.cells_per_block}, block_norm={self.block_norm!r}, "
            f"gradient={self.gradient!r}, interpolation={self.interpolation!r}"
        )

    def extract(self, images: Tensor) -> Tensor:
        return _extract(
            images,
            self.orientations,
            self.pixels_per_cell,
            self.cells_per_block,
            self.block_norm,
            self.gradient,
            self.interpolation,
        )

    def output_shape(self, channels: int, height: int, width: int) -> tuple[int, ...]:
        b = self.cells_per_block
        rows, columns = (size // self.pixels_per_cell - b + 1 for size in (height, width))
        block = (b, b) if b > 1 else ()
        return channels, self.orientations, *block, rows, columns
