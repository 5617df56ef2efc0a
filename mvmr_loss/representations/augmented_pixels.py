"""The pixels of a further random augmentation of the images."""

from __future__ import annotations

import copy
import math
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, fields, replace
from typing import Any

import torch
from kornia.color import rgb_to_grayscale
from kornia.filters import filter2d_separable
from kornia.geometry.transform import remap
from torch import Tensor
from torch._functorch.pyfunctorch import temporarily_clear_interpreter_stack

from mvmr_loss._checks import can_be_seen, check_bool, check_int, check_number
from mvmr_loss._random import check_seed, uniform
from mvmr_loss.distributed import rank
from mvmr_loss.normalization import Normalization, NormalizationLike, check_numbers
from mvmr_loss.representations.base import Representation, check_images
from mvmr_loss.representations.registry import register_representation

_CROP_TRIALS = 10
_CROP_RATIO = (3 / 4, 4 / 3)
_BLUR_SIGMA = (0.1, 2.0)
# Numbers for one image: area and ratio of each trial, place (2), flip, whether to jitter, four
# factors, their order, whether to grey, sigma. An option never shifts what another one reads.
_DRAWS = 2 * _CROP_TRIALS + 11
# More than a training draws, and few enough that a million processes' numbers stay below 2^63.
_PLACES_OF_A_PROCESS = 2**38

Floats = Sequence[float]


def augmented_pixels(
    images: Tensor,
    seed: int = 0,
    start: int | Tensor = 0,
    normalization: NormalizationLike | None = None,
    crop_scale: Floats = (0.08, 1.0),
    flip_probability: float = 0.5,
    color_jitter: Floats = (0.8, 0.8, 0.8, 0.2),
    color_jitter_probability: float = 0.8,
    grayscale_probability: float = 0.2,
    blur: bool = True,
) -> Tensor:
    """Computes the pixels of a random augmentation, drawn anew for each image.

    In this order:

    1. A random resized crop, back to the size of the image: an area fraction in ``crop_scale`` and
       an aspect ratio in [3/4, 4/3] (uniform in its logarithm), bilinear. Up to ten trials to fit
       it into the image, then the largest central crop of an allowed ratio.
    2. A horizontal flip.
    3. Colour jitter: brightness, contrast and saturation in an order drawn for each image, then the
       hue. The result of each is clamped to [0, 1].
    4. Greying.
    5. A Gaussian blur, reflected at the border, of a width in [0.1, 2] pixels and a kernel of
       2 int(0.05 min(H, W)) + 1 pixels: below 20 pixels there is none.

    Colours are those of images in [0, 1], so the normalisation is undone for steps 3 and 4, and
    redone. Images of other than three channels have no colours: they go through steps 1, 2 and 5
    alone.

    The image at place i of the batch takes its numbers from place ``start + i`` of a counter-based
    generator of this package: the same arguments give the same augmentations on every device and
    with every version of torch, and a batch may be computed in slices. Nothing is read from torch's
    generators.

    Source: ``full_img_augment`` of the authors' release of MV-MR (Entropy 26(6):466, 2024), which
    draws once a batch; the distributions are torchvision's, except that there the hue has no fixed
    place in the order. The module, which counts the images, is :class:`AugmentedPixels`.

    Args:
        images: Tensor of shape (N, C, H, W), or (C, H, W) for a single image, normalised as
            ``normalization`` says.
        seed: An integer in [0, 2^64).
        start: The place of the first image, from 0 to 2^56; an int or a 0-dimensional int64 tensor.
        normalization: How images of three channels were normalised, in any form that
            :meth:`Normalization.of() <mvmr_loss.normalization.Normalization.of>` takes; ``"none"`` for
            images in [0, 1]. None: ImageNet's.
        crop_scale: Least and greatest area of a crop as a fraction of the image's, in (0, 1].
        flip_probability: Probability of the flip, in [0, 1].
        color_jitter: Strengths (brightness, contrast, saturation, hue), >= 0. The factors of the
            first three are uniform in [max(0, 1 - s), 1 + s]; the hue moves by a fraction of the
            circle uniform in [-s, s], s at most 0.5.
        color_jitter_probability: Probability of the colour jitter, in [0, 1].
        grayscale_probability: Probability of the greying, in [0, 1].
        blur: Whether to blur.

    Returns:
        Tensor of shape (N, C, H, W), normalised as the images, float32 (float64 for float64
        images), differentiable with respect to ``images``.

    Raises:
        TypeError: If an argument is of a wrong type.
        ValueError: If one is out of range, or images on a CPU cannot have been normalised so.

    Examples:
        >>> images = torch.linspace(0, 1, 3 * 32 * 32).reshape(1, 3, 32, 32)
        >>> augmented = augmented_pixels(images, seed=1, normalization="none")
        >>> augmented.shape
        torch.Size([1, 3, 32, 32])
        >>> torch.equal(augmented, augmented_pixels(images, seed=1, normalization="none"))
        True
        >>> torch.equal(augmented, augmented_pixels(images, seed=2, normalization="none"))
        False
    """
    options = _Options(
        seed,
        normalization,
        crop_scale,
        flip_probability,
        color_jitter,
        color_jitter_probability,
        grayscale_probability,
        blur,
    )
    if not isinstance(start, Tensor):
        start = check_int("start", start, minimum=0, maximum=2**56)
    elif start.ndim or start.dtype != torch.int64:
        raise ValueError(
            "start must be an int or a 0-dimensional int64 tensor but is of shape "
            f"{tuple(start.shape)} and dtype {start.dtype}."
        )
    elif can_be_seen(start):
        check_int("start", start.item(), minimum=0, maximum=2**56)
    return _augment(check_images(images), start, options)


@dataclass(frozen=True)
class _Options:
    """The options of :func:`augmented_pixels`, checked."""

    seed: int
    normalization: Any
    crop_scale: Floats
    flip_probability: float
    color_jitter: Floats
    color_jitter_probability: float
    grayscale_probability: float
    blur: bool

    def __post_init__(self) -> None:
        checked = {
            "seed": check_seed(self.seed),
            "normalization": Normalization.of(
                "imagenet" if self.normalization is None else self.normalization
            ),
            "crop_scale": check_numbers("crop_scale", self.crop_scale, 2),
            "color_jitter": check_numbers("color_jitter", self.color_jitter, 4),
            "blur": check_bool("blur", self.blur),
        }
        for name in ("flip_probability", "color_jitter_probability", "grayscale_probability"):
            checked[name] = check_number(name, getattr(self, name), minimum=0, maximum=1)
        for name, value in checked.items():
            object.__setattr__(self, name, value)
        least, greatest = self.crop_scale
        if not 0 < least <= greatest <= 1:
            raise ValueError(
                f"crop_scale must be two ascending numbers in (0, 1] but is {self.crop_scale}."
            )
        if min(self.color_jitter) < 0 or self.color_jitter[3] > 0.5:
            raise ValueError(
                "color_jitter must be at least 0, and its fourth number, the hue, at most 0.5, "
                f"but is {self.color_jitter}."
            )


def _augment(images: Tensor, start: int | Tensor, options: _Options) -> Tensor:
    n, channels, height, width = images.shape
    draws = uniform(options.seed, start * _DRAWS, n * _DRAWS, images.device).view(n, _DRAWS)
    trials, place = draws[:, : 2 * _CROP_TRIALS], draws[:, 2 * _CROP_TRIALS : 2 * _CROP_TRIALS + 2]
    others = draws[:, 2 * _CROP_TRIALS + 2 :]
    flip, jitter, *factors, order, grey, sigma = torch.unbind(others, dim=1)

    if channels == 3 != len(options.normalization.mean):
        raise ValueError(
            "normalization must be of three channels, as the images are, but is "
            f"{options.normalization}."
        )
    options.normalization.check(images)
    box = _crop_boxes(trials, place, height, width, options.crop_scale)
    x = _crop_resize_flip(images, box, flip < options.flip_probability)
    if channels == 3:
        x = options.normalization.undo(x)
        x = _jitter_colors(
            x,
            jitter < options.color_jitter_probability,
            torch.stack(factors, dim=1),
            order,
            options.color_jitter,
        )
        grey = (grey < options.grayscale_probability).view(n, 1, 1, 1)
        x = torch.where(grey, rgb_to_grayscale(x), x)
        x = options.normalization.apply(x)
    kernel_size = 2 * int(0.05 * min(height, width)) + 1
    if options.blur and kernel_size > 1:
        low, high = _BLUR_SIGMA
        x = _blur(x, (low + (high - low) * sigma).to(x.dtype), kernel_size)
    return x


def _blur(images: Tensor, sigmas: Tensor, kernel_size: int) -> Tensor:
    # kornia's gaussian_blur2d, but for its look at the sigmas, which makes an accelerator wait.
    place = torch.arange(kernel_size, device=images.device, dtype=images.dtype) - kernel_size // 2
    kernels = torch.exp(-(place**2) / (2 * sigmas[:, None] ** 2))
    kernels = kernels / kernels.sum(dim=1, keepdim=True)
    blurred: Tensor = filter2d_separable(images, kernels, kernels)
    return blurred


def _crop_boxes(
    trials: Tensor, place: Tensor, height: int, width: int, scale: Floats
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Returns top, left, height and width of each image's crop, whole numbers of shape (N,)."""
    area, ratio = trials.chunk(2, dim=1)
    area = height * width * (scale[0] + (scale[1] - scale[0]) * area)
    low, high = (math.log(bound) for bound in _CROP_RATIO)
    ratio = torch.exp(low + (high - low) * ratio)
    heights = torch.sqrt(area / ratio).round()
    widths = torch.sqrt(area * ratio).round()
    fits = (heights >= 1) & (heights <= height) & (widths >= 1) & (widths <= width)

    # The first trial that fits; argmax tells the first of equal values.
    first = fits.to(torch.uint8).argmax(dim=1, keepdim=True)
    any_fits = fits.gather(1, first)[:, 0]
    fallback_height = min(height, round(width / _CROP_RATIO[0]))
    fallback_width = min(width, round(height * _CROP_RATIO[1]))
    crop_height = torch.where(any_fits, heights.gather(1, first)[:, 0], fallback_height)
    crop_width = torch.where(any_fits, widths.gather(1, first)[:, 0], fallback_width)
    free = torch.stack((height - crop_height, width - crop_width))
    top, left = torch.where(any_fits, torch.floor(place.T * (free + 1)), torch.floor(free / 2))
    return top, left, crop_height, crop_width


def _crop_resize_flip(
    images: Tensor, box: tuple[Tensor, Tensor, Tensor, Tensor], flip: Tensor
) -> Tensor:
    # As torch.nn.functional.interpolate (bilinear, align_corners=False) of the crop: a pixel at the
    # crop's border repeats and does not mix with those outside, as it would in kornia's
    # crop_and_resize.
    n, _, height, width = images.shape
    top, left, crop_height, crop_width = (side.to(images.dtype)[:, None] for side in box)
    row = torch.arange(height, device=images.device, dtype=images.dtype)
    column = torch.arange(width, device=images.device, dtype=images.dtype)
    column = torch.where(flip[:, None], width - 1 - column, column)
    y = ((row + 0.5) * (crop_height / height) - 0.5).clamp(min=0)
    x = ((column + 0.5) * (crop_width / width) - 0.5).clamp(min=0)
    y = top + torch.minimum(y, crop_height - 1)
    x = left + torch.minimum(x, crop_width - 1)
    cropped: Tensor = remap(
        images,
        x[:, None, :].expand(n, height, width),
        y[:, :, None].expand(n, height, width),
        padding_mode="border",
        align_corners=True,
    )
    return cropped


def _jitter_colors(
    images: Tensor, chosen: Tensor, draws: Tensor, order: Tensor, strengths: Floats
) -> Tensor:
    """Jitters the colours of RGB images in [0, 1]; draws (N, 4), order (N,) uniform in [0, 1)."""
    # Brightness (0), contrast (1) and saturation (2) are one formula: a mixture with black, with
    # the mean grey, with the grey image. So each image can have its own order without a loop over
    # the images.
    factors = []
    for strength, draw in zip(strengths[:3], draws.unbind(dim=1)[:3], strict=True):
        low, high = max(0.0, 1 - strength), 1 + strength
        factors.append(torch.where(chosen, low + (high - low) * draw, 1.0))
    by_kind = torch.stack(factors, dim=1).to(images.dtype)
    permutation = torch.floor(6 * order).long()
    first, swap = permutation // 2, permutation % 2
    for kind in (first, (first + 1 + swap) % 3, (first + 2 - swap) % 3):
        factor = by_kind.gather(1, kind[:, None]).view(-1, 1, 1, 1)
        kind = kind.view(-1, 1, 1, 1)
        grey = rgb_to_grayscale(images)
        other = torch.where(kind == 1, grey.mean(dim=(1, 2, 3), keepdim=True), grey)
        share = torch.where(kind == 0, 0.0, 1 - factor)
        images = torch.addcmul(other * share, images, factor).clamp(0.0, 1.0)
    shift = torch.where(chosen, strengths[3] * (2 * draws[:, 3] - 1), 0.0)
    return _shift_hue(images, shift.to(images.dtype))


def _shift_hue(images: Tensor, shift: Tensor) -> Tensor:
    """Shifts the hue of RGB images by fractions of the circle, of shape (N,).

    The numbers of ``kornia.enhance.adjust_hue(images, 2 pi shift)`` without its way there and back
    through an HSV image, in a quarter of the time.
    """
    red, green, blue = images.unbind(dim=1)
    value, least = images.amax(dim=1), images.amin(dim=1)
    chroma = value - least
    divisor = chroma.masked_fill(chroma == 0, 1.0)
    sextant = torch.where(
        value == red,
        (green - blue) / divisor,
        torch.where(value == green, (blue - red) / divisor + 2, (red - green) / divisor + 4),
    )
    sextant = sextant + 6 * shift.view(-1, 1, 1)
    channels = []
    for offset in (5, 3, 1):
        k = (sextant + offset).remainder(6)
        channels.append(value - chroma * torch.minimum(k, 4 - k).clamp(0, 1))
    return torch.stack(channels, dim=1)


def _outside_of_transforms() -> AbstractContextManager[object]:
    """Returns a context in which a transform of ``torch.func`` does not follow what is counted."""
    if torch.compiler.is_compiling() or not torch._C._are_functorch_transforms_active():
        return nullcontext()
    return temporarily_clear_interpreter_stack()


@register_representation("augmented_pixels")
class AugmentedPixels(Representation):
    """Module form of :func:`augmented_pixels`, a random augmentation drawn anew at each call.

    The module counts the images that it has seen in ``samples_drawn``; the next image continues
    there. The count is in the module's state dict, so a run that is resumed from a checkpoint
    continues exactly; set ``samples_drawn.fill_(0)`` to begin again. A batch in slices gives the
    same as the whole batch. It draws in eval mode as well.

    Where a process group is initialised, each process draws its own augmentations with one seed: the
    first image of the process of rank r is at place 2^38 r, as ``augmented_pixels(images, seed,
    start=2**38 * r)`` is. The process of rank 0 draws as one alone.

    Never the same twice, it is not to be stored (``cacheable`` is False).

    Args:
        seed ... blur: As in :func:`augmented_pixels`; without a ``normalization``, it is that of the
            collection that the module is put in, ImageNet's where it stands alone.
        differentiable: If True, the gradient flows through to the images.

    Examples:
        >>> images = torch.linspace(-2, 2, 2 * 3 * 32 * 32).reshape(2, 3, 32, 32)
        >>> augment, again = AugmentedPixels(seed=1), AugmentedPixels(seed=1)
        >>> features = augment(images)
        >>> torch.equal(features, torch.cat([again(images[:1]), again(images[1:])]))
        True
        >>> torch.equal(features, augment(images))
        False
        >>> augment.samples_drawn
        tensor(4)
    """

    cacheable = False
    samples_drawn: Tensor

    def __init__(
        self,
        seed: int = 0,
        normalization: NormalizationLike | None = None,
        crop_scale: Floats = (0.08, 1.0),
        flip_probability: float = 0.5,
        color_jitter: Floats = (0.8, 0.8, 0.8, 0.2),
        color_jitter_probability: float = 0.8,
        grayscale_probability: float = 0.2,
        blur: bool = True,
        *,
        differentiable: bool = False,
    ) -> None:
        super().__init__(differentiable=differentiable)
        self._normalization_is_stated = normalization is not None
        self.options = _Options(
            seed,
            normalization,
            crop_scale,
            flip_probability,
            color_jitter,
            color_jitter_probability,
            grayscale_probability,
            blur,
        )
        self.register_buffer("samples_drawn", torch.zeros((), dtype=torch.int64))

    def extra_repr(self) -> str:
        return ", ".join(
            f"{field.name}={getattr(self.options, field.name)}" for field in fields(self.options)
        )

    def undone(self) -> Normalization:
        return self.options.normalization  # type: ignore[no-any-return]

    def undoing(self, normalization: Normalization) -> AugmentedPixels:
        if self._normalization_is_stated or self.undone() == normalization:
            return self
        told = copy.copy(self)  # It counts the images in the same buffer.
        told.options = replace(self.options, normalization=normalization)
        told._normalization_is_stated = True
        return told

    def extract(self, images: Tensor) -> Tensor:
        with _outside_of_transforms():
            start = self.samples_drawn.to(images.device, copy=True)
            self.samples_drawn += len(images)
        # Not in the count: a checkpoint, and DistributedDataParallel's buffers, are rank 0's.
        return _augment(images, start + rank() * _PLACES_OF_A_PROCESS, self.options)

    def output_shape(self, channels: int, height: int, width: int) -> tuple[int, ...]:
        return channels, height, width
