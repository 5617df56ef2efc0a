"""The scattering transform of each patch of an image."""

from __future__ import annotations

from torch import Tensor

from mvmr_loss._checks import check_int
from mvmr_loss.representations.base import Representation, check_images
from mvmr_loss.representations.registry import register_representation
from mvmr_loss.representations.scattering import (
    check_scattering_options,
    scattering,
    scattering_shape,
)


def patch_scattering(
    images: Tensor, J: int = 2, L: int = 8, max_order: int = 2, grid_size: int = 4
) -> Tensor:
    """Computes the scattering transform of each patch of a grid, channel by channel.

    The image is cut into ``grid_size`` x ``grid_size`` patches of H // grid_size x W // grid_size
    pixels, and each is scattered by itself: extended by its own reflection, so that no coefficient
    sees beyond its patch. Rows and columns beyond the last whole patch are left out. Source:
    ``patch_scatnet`` of the authors' release of MV-MR (Entropy 26(6):466, 2024), whose grid is 4 x 4
    and whose J and L are those of its scattering of the whole image. The module is
    :class:`PatchScattering`.

    Args:
        images: As in :func:`~mvmr_loss.representations.scattering`, but height and width at least
            ``grid_size * 2^J``.
        J: As in :func:`~mvmr_loss.representations.scattering`, like the two that follow.
        L: Number of angles.
        max_order: 1 or 2.
        grid_size: Number of patches along each side, at least 1.

    Returns:
        Tensor of shape (N, C, grid_size, grid_size, K, h, w): row and column of the patch, then its
        coefficients, K paths of H // grid_size // 2^J x W // grid_size // 2^J. In units of the
        images, float32 (float64 for float64 images), differentiable with respect to ``images``.

    Examples:
        >>> import torch
        >>> stripes = torch.arange(4.0).repeat_interleave(8).expand(1, 3, 32, 32)
        >>> coefficients = patch_scattering(stripes, J=2, L=4)
        >>> coefficients.shape
        torch.Size([1, 3, 4, 4, 25, 2, 2])
        >>> coefficients[0, 0, 0, :, 0, 0, 0].round(decimals=3)  # order 0: nothing of the others
        tensor([0., 1., 2., 3.])
    """
    J, L, max_order, grid_size = _check_options(J, L, max_order, grid_size)
    return _patch_scattering(check_images(images, grid_size * 2**J), J, L, max_order, grid_size)


def _patch_scattering(images: Tensor, J: int, L: int, max_order: int, grid_size: int) -> Tensor:
    height, width = (size // grid_size for size in images.shape[-2:])
    inside = images[..., : grid_size * height, : grid_size * width]
    patches = inside.unflatten(-1, (grid_size, width)).unflatten(-3, (grid_size, height))
    # (N, C, row of patches, column of patches, height, width): to the transform, more channels.
    patches = patches.transpose(-3, -2)
    scattered = scattering(patches.flatten(1, 3), J, L, max_order)
    coefficients: Tensor = scattered.unflatten(1, patches.shape[1:4])
    return coefficients


def _check_options(J: int, L: int, max_order: int, grid_size: int) -> tuple[int, int, int, int]:
    return *check_scattering_options(J, L, max_order), check_int("grid_size", grid_size, minimum=1)


@register_representation("patch_scattering")
class PatchScattering(Representation):
    """Module form of :func:`patch_scattering`, with the same options.

    Args:
        J ... grid_size: As in :func:`patch_scattering`.
        differentiable: If True, the gradient flows through to the images.

    Examples:
        >>> import torch
        >>> PatchScattering()(torch.ones(2, 3, 32, 32)).shape
        torch.Size([2, 3, 4, 4, 81, 2, 2])
        >>> PatchScattering().output_shape(3, 96, 96)
        (3, 4, 4, 81, 6, 6)
    """

    def __init__(
        self,
        J: int = 2,
        L: int = 8,
        max_order: int = 2,
        grid_size: int = 4,
        *,
        differentiable: bool = False,
    ) -> None:
        super().__init__(differentiable=differentiable)
        self.J, self.L, self.max_order, self.grid_size = _check_options(J, L, max_order, grid_size)
        self.minimum_size = self.grid_size * 2**self.J

    def extra_repr(self) -> str:
        return f"J={self.J}, L={self.L}, max_order={self.max_order}, grid_size={self.grid_size}"

    def extract(self, images: Tensor) -> Tensor:
        return _patch_scattering(images, self.J, self.L, self.max_order, self.grid_size)

    def output_shape(self, channels: int, height: int, width: int) -> tuple[int, ...]:
        grid = self.grid_size
        patch = scattering_shape(height // grid, width // grid, self.J, self.L, self.max_order)
        return (channels, grid, grid, *patch)
