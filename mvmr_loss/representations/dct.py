"""The two-dimensional discrete cosine transform of the pixels."""

from __future__ import annotations

import math
import operator

import torch
from torch import Tensor

from mvmr_loss.representations._constants import constant
from mvmr_loss._checks import can_be_seen
from mvmr_loss._cpu import can_run
from mvmr_loss.representations.base import Representation, check_images
from mvmr_loss.representations.registry import register_representation

# Numbers of a slice on a CPU.
_SLICE_CPU = 2**18


def dct(images: Tensor) -> Tensor:
    r"""Computes the orthonormal two-dimensional DCT-II of each channel.

    .. math:: y_{kl} = a_k b_l \sum_{i=0}^{H-1} \sum_{j=0}^{W-1} x_{ij}
              \cos\frac{\pi (2 i + 1) k}{2 H} \cos\frac{\pi (2 j + 1) l}{2 W}

    with :math:`a_0 = \sqrt{1/H}`, :math:`a_k = \sqrt{2/H}` and b alike for W: the numbers of
    ``scipy.fft.dctn(x, type=2, norm="ortho")``. Being orthonormal it keeps distances. Source: Ahmed,
    Natarajan and Rao, "Discrete cosine transform" (1974); ``full_img_dct`` of the authors' release of
    MV-MR (Entropy 26(6):466, 2024). The module is :class:`DCT`.

    Args:
        images: Tensor of shape (N, C, H, W), or (C, H, W) for a single image, of any finite values.

    Returns:
        Tensor of shape (N, C, H, W), frequencies ascending from the top left, in units of the
        images, float32 (float64 for float64 images), differentiable with respect to ``images``.

    Examples:
        >>> dct(torch.tensor([[[[1.0, 2.0], [3.0, 4.0]]]]))[0, 0].round(decimals=4)
        tensor([[ 5., -1.],
                [-2.,  0.]])
    """
    return _dct(check_images(images))


def _dct(images: Tensor) -> Tensor:
    # A basis is made for one size: a compiler that lets it vary must know.
    rows, columns = (
        _basis(images.device, operator.index(size), images.dtype) for size in images.shape[-2:]
    )
    if not (can_run(images) and can_be_seen(images)):
        return rows @ (images @ columns.T)
    # The same in slices whose first product stays in the cache.
    transformed = images.new_empty(images.shape)
    planes = max(1, _SLICE_CPU // math.prod(images.shape[-2:]))
    for part, out in zip(
        images.flatten(0, 1).split(planes), transformed.flatten(0, 1).split(planes), strict=True
    ):
        torch.matmul(rows, part @ columns.T, out=out)
    return transformed


@constant(maxsize=8)
def _basis(size: int, dtype: torch.dtype) -> Tensor:
    """Returns the (size, size) basis, one frequency a row."""
    # (2 i + 1) k reduced modulo the period 4 size in integers: exact angles for any size.
    number = torch.arange(size)
    phase = (number[:, None] * (2 * number + 1)) % (4 * size)
    basis = torch.cos(phase.double() * (math.pi / (2 * size))) * math.sqrt(2 / size)
    return torch.where(number[:, None] == 0, math.sqrt(1 / size), basis).to(dtype)


@register_representation("dct")
class DCT(Representation):
    """Module form of :func:`dct`.

    Args:
        differentiable: If True, the gradient flows through to the images.

    Examples:
        >>> DCT()(torch.ones(4, 3, 8, 8)).shape
        torch.Size([4, 3, 8, 8])
    """

    def extract(self, images: Tensor) -> Tensor:
        return _dct(images)

    def output_shape(self, channels: int, height: int, width: int) -> tuple[int, ...]:
        return channels, height, width
