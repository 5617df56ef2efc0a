"""What a teacher wants done to images: resize, centre crop, normalise."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)

INTERPOLATIONS = ("nearest", "bilinear", "bicubic")


class TeacherPreprocessing(NamedTuple):
    """What a teacher wants done to 8-bit images: resize, centre crop, normalise.

    Attributes:
        resize: Length of the shorter side, or (height, width); None leaves the size.
        crop: (height, width) of the centre crop after that; None does not crop.
        mean: Mean per channel, of pixels in [0, 1].
        std: Standard deviation per channel.
        interpolation: "bilinear", "bicubic" (both with antialiasing) or "nearest".
        floor_crop: Where the crop cannot be centred, begin it half a pixel early, as transformers
            does; by default, half a pixel is rounded to even, as in torchvision.
    """

    resize: int | tuple[int, int] | None = None
    crop: tuple[int, int] | None = None
    mean: tuple[float, ...] = IMAGENET_MEAN
    std: tuple[float, ...] = IMAGENET_STD
    interpolation: str = "bicubic"
    floor_crop: bool = False

    def __call__(self, pixels: Tensor, *, quantize: bool = True) -> Tensor:
        """Prepares a batch of images.

        Args:
            pixels: Tensor of shape (N, C, H, W) with values from 0 to 1.
            quantize: Round resized pixels to 8 bits, as libraries do that resize image files. The
                gradient through this is zero.

        Returns:
            Tensor of shape (N, C, H', W').

        Examples:
            >>> preprocessing = TeacherPreprocessing(resize=256, crop=(224, 224))
            >>> preprocessing(torch.rand(2, 3, 96, 128)).shape
            torch.Size([2, 3, 224, 224])
        """
        height, width = pixels.shape[-2:]
        size = self.resize
        if isinstance(size, int):
            short, long = sorted((height, width))
            longer = int(size * long / short)
            size = (longer, size) if height > width else (size, longer)
        if size is not None and tuple(size) != (height, width):
            smooth = self.interpolation != "nearest"
            pixels = F.interpolate(
                pixels, size, mode=self.interpolation, antialias=smooth, align_corners=None
            ).clamp(0, 1)
        if quantize:
            pixels = (pixels * 255).round() / 255
        if self.crop is not None:
            # As torchvision, what is too small gets a black border.
            spare = [have - want for have, want in zip(pixels.shape[-2:], self.crop, strict=True)]
            if min(spare) < 0:
                missing = [max(0, -s) for s in spare]
                (top, left), (bottom, right) = zip(
                    *((m // 2, m - m // 2) for m in missing), strict=True
                )
                pixels = F.pad(pixels, (left, right, top, bottom))
                spare = [max(0, s) for s in spare]
            top, left = (s // 2 if self.floor_crop else round(s / 2) for s in spare)
            pixels = pixels[..., top : top + self.crop[0], left : left + self.crop[1]]
        mean, std = (
            torch.tensor(v, dtype=pixels.dtype, device=pixels.device)[:, None, None]
            for v in (self.mean, self.std)
        )
        return (pixels - mean) / std


def merge(
    own: TeacherPreprocessing | None, given: TeacherPreprocessing | Mapping[str, Any] | None
) -> TeacherPreprocessing | None:
    """Returns the preprocessing to use, after checking it."""
    if isinstance(given, Mapping):
        unknown = [key for key in given if key not in TeacherPreprocessing._fields]
        if unknown:
            raise TypeError(
                f"preprocessing has no option {unknown[0]!r}; its options are "
                f"{', '.join(TeacherPreprocessing._fields)}."
            )
        options: dict[str, Any] = {
            key: tuple(value) if isinstance(value, (list, tuple)) else value
            for key, value in given.items()
        }
        if isinstance(options.get("crop"), int):
            options["crop"] = pair(options["crop"])
        given = (own or TeacherPreprocessing())._replace(**options)
    elif given is not None and not isinstance(given, TeacherPreprocessing):
        raise TypeError(
            "preprocessing must be a TeacherPreprocessing or a mapping but is a "
            f"{type(given).__name__}."
        )
    chosen = own if given is None else given
    if chosen is not None:
        check_interpolation(chosen.interpolation)
    return chosen


def check_interpolation(name: str) -> str:
    """Returns the name of an interpolation after checking it."""
    if name not in INTERPOLATIONS:
        raise ValueError(f"interpolation must be among {INTERPOLATIONS} but is {name!r}.")
    return name


def pair(size: int | Sequence[int]) -> tuple[int, int]:
    """Returns (height, width) of an int, or a list of one or two."""
    values = [size] if isinstance(size, int) else list(size)
    return (int(values[0]), int(values[-1]))


def size(size: int | Sequence[int]) -> int | tuple[int, int]:
    """Returns the length of the shorter side of an int or a list of one, else (height, width)."""
    values = [size] if isinstance(size, int) else list(size)
    return int(values[0]) if len(values) == 1 else pair(values)
