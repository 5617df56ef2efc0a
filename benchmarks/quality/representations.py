"""Representations that are not in the paper, tried by the study; registered by import."""

from __future__ import annotations

import math

import torch
from kornia.color import rgb_to_grayscale
from torch import Tensor
from torch.nn import functional as F

from mvmr_loss import register_representation
from mvmr_loss.representations import Representation


@register_representation("color_histogram")
class ColorHistogram(Representation):
    """How many pixels have each of 4 x 4 x 4 colours, in each quarter of an image in [0, 1]."""

    def extract(self, images: Tensor) -> Tensor:
        """Computes shares of the pixels, shape (N, 4 * 64)."""
        levels = (images.clamp(0, 1) * 3.999).long()
        color = levels[:, 0] * 16 + levels[:, 1] * 4 + levels[:, 2]
        of_each = F.one_hot(color, 64).movedim(-1, 1).to(images)
        return F.adaptive_avg_pool2d(of_each, 2).flatten(1)

    def output_shape(self, channels: int, height: int, width: int) -> tuple[int, ...]:
        """Returns (256,)."""
        return (256,)


@register_representation("gabor")
class Gabor(Representation):
    """Energies of Gabor filters, three scales and eight directions, of a 4 x 4 grid.

    Source: Daugman, JOSA A 2(7), 1985.
    """

    def __init__(self) -> None:
        super().__init__()
        place = torch.arange(-7.0, 8.0)
        y, x = torch.meshgrid(place, place, indexing="ij")
        waves = []
        for wavelength in (3.0, 5.0, 8.0):
            envelope = torch.exp(-(x**2 + y**2) / (2 * (0.5 * wavelength) ** 2))
            for i in range(8):
                angle = torch.tensor(math.pi * i / 8)
                phase = 2 * math.pi / wavelength * (x * angle.cos() + y * angle.sin())
                for wave in (phase.cos(), phase.sin()):
                    even = wave - (wave * envelope).sum() / envelope.sum()
                    waves.append(even * envelope / envelope.sum())
        self.register_buffer("filters", torch.stack(waves)[:, None], persistent=False)

    def extract(self, images: Tensor) -> Tensor:
        """Computes mean energies, shape (N, 24 * 16)."""
        filters: Tensor = self.get_buffer("filters").to(images)
        parts = F.conv2d(F.pad(rgb_to_grayscale(images), (7, 7, 7, 7), mode="reflect"), filters)
        energy = parts.unflatten(1, (-1, 2)).square().sum(2).sqrt()
        return F.adaptive_avg_pool2d(energy, 4).flatten(1)

    def output_shape(self, channels: int, height: int, width: int) -> tuple[int, ...]:
        """Returns (384,)."""
        return (384,)


@register_representation("random_network")
class RandomNetwork(Representation):
    """One layer of 256 random filters on patches of 6 x 6 of mean 0 and variance 1, of each quarter.

    Source: Coates, Lee and Ng, AISTATS 2011, with random filters and without whitening.
    """

    def __init__(self) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        filters = torch.randn(256, 3, 6, 6, generator=generator)
        filters -= filters.mean(dim=(1, 2, 3), keepdim=True)
        filters /= filters.flatten(1).norm(dim=1)[:, None, None, None]
        self.register_buffer("filters", filters, persistent=False)

    def extract(self, images: Tensor) -> Tensor:
        """Computes mean responses, shape (N, 512 * 4)."""
        filters: Tensor = self.get_buffer("filters").to(images)
        mean = F.avg_pool2d(images, 6, 1).mean(1, keepdim=True)
        square = F.avg_pool2d(images.square(), 6, 1).mean(1, keepdim=True)
        spread = (square - mean.square()).clamp(min=0).add(1e-3).sqrt()
        response = F.conv2d(images, filters) / spread  # The filters' mean is 0.
        parts = torch.cat([F.relu(response - 0.5), F.relu(-response - 0.5)], dim=1)
        return F.adaptive_avg_pool2d(parts, 2).flatten(1)

    def output_shape(self, channels: int, height: int, width: int) -> tuple[int, ...]:
        """Returns (2048,)."""
        return (2048,)
