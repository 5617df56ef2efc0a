"""A ResNet small enough to train on two CPU cores in minutes."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor, nn
from torch.nn import functional as F


class _Block(nn.Module):
    """The basic residual block of He et al., 2016 (arXiv 1512.03385)."""

    def __init__(self, width_in: int, width_out: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(width_in, width_out, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(width_out)
        self.conv2 = nn.Conv2d(width_out, width_out, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(width_out)
        self.shortcut = nn.Sequential()
        if stride != 1 or width_in != width_out:
            self.shortcut = nn.Sequential(
                nn.Conv2d(width_in, width_out, 1, stride, bias=False), nn.BatchNorm2d(width_out)
            )

    def forward(self, x: Tensor) -> Tensor:
        out = F.relu(self.bn1(self.conv1(x)))
        return F.relu(self.bn2(self.conv2(out)) + self.shortcut(x))


def check_widths(name: str, widths: Sequence[int]) -> None:
    """Raises a ValueError if widths are none that :class:`SmallResNet` can be trained with."""
    # With other numbers of channels, the backward pass of torch 2.14's convolutions on a CPU writes
    # beyond its memory when channels come last.
    if not widths or any(width < 8 or width % 8 for width in widths):
        raise ValueError(f"{name} must be positive multiples of 8 but are {list(widths)}.")


class SmallResNet(nn.Module):
    """A residual network with one block a stage, made for images of about 32 x 32 pixels.

    A stride-2 3 x 3 stem, then stages of which each after the first halves the size.

    Args:
        widths: Number of channels of each stage, positive multiples of 8.

    Raises:
        ValueError: If a width is none.

    Attributes:
        output_dim: Width of the features.

    Examples:
        >>> import torch
        >>> encoder = SmallResNet((32, 64))
        >>> encoder(torch.zeros(2, 3, 32, 32)).shape, encoder.output_dim
        (torch.Size([2, 64]), 64)
    """

    def __init__(self, widths: Sequence[int] = (48, 96, 192)) -> None:
        super().__init__()
        check_widths("widths", widths)
        self.widths = tuple(widths)
        self.output_dim = self.widths[-1]
        self.stem = nn.Sequential(
            nn.Conv2d(3, self.widths[0], 3, 2, 1, bias=False),
            nn.BatchNorm2d(self.widths[0]),
            nn.ReLU(),
        )
        stages = [
            _Block(before, width, stride=1 if i == 0 else 2)
            for i, (before, width) in enumerate(
                zip((self.widths[0], *self.widths), self.widths, strict=False)
            )
        ]
        self.stages = nn.Sequential(*stages)

    def forward(self, images: Tensor) -> Tensor:
        """Computes features of shape (N, output_dim) of images of shape (N, 3, H, W)."""
        features: Tensor = self.stages(self.stem(images)).mean(dim=(2, 3))
        return features
