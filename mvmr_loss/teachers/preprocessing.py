"""What a teacher wants done to images: resize, centre crop, normalise."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from mvmr_loss._checks import check_bool, check_choice, check_int, check_number
from mvmr_loss.normalization import per_channel
from mvmr_loss.teachers.checkpoints import import_library

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
        flip_channels: Give BGR instead of RGB; mean and std are of the flipped channels.
    """

    resize: int | tuple[int, int] | None = None
    crop: tuple[int, int] | None = None
    mean: tuple[float, ...] = IMAGENET_MEAN
    std: tuple[float, ...] = IMAGENET_STD
    interpolation: str = "bicubic"
    floor_crop: bool = False
    flip_channels: bool = False

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
        if self.flip_channels:
            pixels = pixels.flip(1)
        return (pixels - per_channel(self.mean, pixels)) / per_channel(self.std, pixels)


COMPLETE = ("resize", "crop", "mean", "std", "interpolation")


def is_complete(given: TeacherPreprocessing | Mapping[str, Any] | None) -> bool:
    """Tells whether a preprocessing says all, so that the library's need not be known."""
    return isinstance(given, TeacherPreprocessing) or (
        isinstance(given, Mapping) and all(key in given for key in COMPLETE)
    )


def merge(
    own: TeacherPreprocessing | None, given: TeacherPreprocessing | Mapping[str, Any] | None
) -> TeacherPreprocessing | None:
    """Returns the preprocessing to use: the library's, but for what is given; checked."""
    if isinstance(given, Mapping):
        unknown = [key for key in given if key not in TeacherPreprocessing._fields]
        if unknown:
            raise TypeError(
                f"preprocessing has no option {unknown[0]!r}; its options are "
                f"{', '.join(TeacherPreprocessing._fields)}."
            )
        given = (own or TeacherPreprocessing())._replace(**given)
    elif given is not None and not isinstance(given, TeacherPreprocessing):
        raise TypeError(
            "preprocessing must be a TeacherPreprocessing or a mapping but is a "
            f"{type(given).__name__}."
        )
    chosen = own if given is None else given
    if chosen is None:
        return None
    mean, std = check_statistics("preprocessing's mean", chosen.mean, "std", chosen.std)
    return TeacherPreprocessing(
        resize=None if chosen.resize is None else size("resize", chosen.resize),
        crop=None if chosen.crop is None else pair("crop", chosen.crop),
        mean=mean,
        std=std,
        interpolation=check_choice("interpolation", chosen.interpolation, INTERPOLATIONS),
        floor_crop=check_bool("floor_crop", chosen.floor_crop),
        flip_channels=check_bool("flip_channels", chosen.flip_channels),
    )


def check_statistics(
    mean_name: str, mean: Sequence[float], std_name: str, std: Sequence[float]
) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Returns a mean and a standard deviation per channel after checking them."""
    checked = []
    for name, values in ((mean_name, mean), (std_name, std)):
        values = values.tolist() if hasattr(values, "tolist") else values
        if not isinstance(values, (list, tuple)) or not values:
            raise ValueError(f"{name} must be a list of a number per channel but is {values!r}.")
        checked.append(tuple(check_number(name, value) for value in values))
    if len(checked[0]) != len(checked[1]) or min(checked[1]) <= 0:
        raise ValueError(
            f"{mean_name} and {std_name} must be of the same length, and std positive, "
            f"but are {mean} and {std}."
        )
    return checked[0], checked[1]


def pair(name: str, side: int | Sequence[int]) -> tuple[int, int]:
    """Returns (height, width) of an int, or a list of one or two."""
    values = list(side) if isinstance(side, (list, tuple)) else [side]
    if len(values) not in (1, 2):
        raise ValueError(f"{name} must be an int or (height, width) but is {side!r}.")
    height, width = (check_int(name, value, minimum=1) for value in (values[0], values[-1]))
    return height, width


def size(name: str, side: int | Sequence[int]) -> int | tuple[int, int]:
    """Returns the length of the shorter side of an int or a list of one, else (height, width)."""
    height, width = pair(name, side)
    return (height, width) if isinstance(side, (list, tuple)) and len(side) == 2 else height


def refusal(name: str, reason: str) -> ValueError:
    """Returns the error of a library's preprocessing that cannot be followed."""
    return ValueError(
        f"preprocessing must be given for {name}, with {', '.join(COMPLETE)}: "
        f"{' '.join(reason.split())}."
    )


# Wide, wider and tall, small and large, of sides that leave odd margins around a crop.
_SHAPES = ((97, 141), (61, 223), (531, 402))


def check_same(
    name: str, own: TeacherPreprocessing, librarys: Callable[[Any], Any]
) -> TeacherPreprocessing:
    """Returns ``own`` if it makes of fixed images what the library makes of them.

    Args:
        name: What to call the teacher in the error.
        own: What the library is thought to do.
        librarys: The library's preprocessing, from a PIL image to a tensor of shape (C, H, W).

    Returns:
        ``own``, unchanged.

    Raises:
        ValueError: If it differs by more than the rounding to 8 bits, or the library fails.
    """
    if own.interpolation not in INTERPOLATIONS:
        raise refusal(name, f"interpolation {own.interpolation!r} is not among {INTERPOLATIONS}")
    for height, width in _SHAPES:
        # Waves of another length per channel: a shift by half a pixel shows.
        rows, columns = torch.arange(height)[:, None], torch.arange(width)[None]
        waves = [
            torch.sin(rows / (4 + i)) * torch.cos(columns / (6 - i)) * (90 - 20 * i)
            for i in range(3)
        ]
        image = torch.stack(waves).add(127).round().to(torch.uint8)
        try:
            expected = librarys(as_pil(image))
            ours = own(image[None] / 255)[0]
        except Exception as error:  # Whatever the library raises.
            raise refusal(name, f"the library's cannot be run here ({error})") from error
        if not isinstance(expected, Tensor) or expected.shape != ours.shape:
            got = tuple(expected.shape) if isinstance(expected, Tensor) else type(expected).__name__
            raise refusal(
                name,
                f"the library makes {got} of an image of {height} x {width} pixels, "
                f"not {tuple(ours.shape)}",
            )
        std = torch.tensor(own.std)[:, None, None]
        levels = (expected - ours).abs() * std * 255
        if not (levels.max() < 4 and levels.mean() < 0.5):
            raise refusal(
                name,
                "the library does more than resize, crop and normalise: its pixels differ by up to "
                f"{levels.max():.3g} of 255 levels",
            )
    return own


def as_pil(image: Tensor) -> Any:
    """Returns an 8-bit image of shape (3, H, W) as a PIL image."""
    pil = import_library("PIL.Image", "pillow")
    return pil.fromarray(image.permute(1, 2, 0).contiguous().numpy())
