"""How images in [0, 1] became what a network sees: less a mean, over a standard deviation."""

from __future__ import annotations

import functools
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from mvmr_loss._checks import can_be_seen, check_float_tensor, check_number

# How far outside of [0, 1] an image may reach, as interpolation and noise make it.
_OVERSHOOT = 1.0


@dataclass(frozen=True)
class Normalization:
    """The mean and standard deviation of each channel with which images in [0, 1] were normalised.

    Args:
        mean: One number a channel, at least one.
        std: As many, above 0.

    Examples:
        >>> Normalization.of("none")
        Normalization(mean=(0.0, 0.0, 0.0), std=(1.0, 1.0, 1.0))
        >>> images = torch.full((1, 3, 1, 1), 0.5)
        >>> normalized = Normalization.imagenet().apply(images)
        >>> normalized.flatten()
        tensor([0.0655, 0.1964, 0.4178])
        >>> Normalization.imagenet().undo(normalized).flatten()
        tensor([0.5000, 0.5000, 0.5000])
    """

    mean: tuple[float, ...]
    std: tuple[float, ...]

    def __post_init__(self) -> None:
        for name in ("mean", "std"):
            object.__setattr__(self, name, check_numbers(name, getattr(self, name)))
        if len(self.mean) != len(self.std):
            raise ValueError(
                "mean and std must have a number for each channel but are "
                f"{self.mean} and {self.std}."
            )
        if min(self.std) <= 0:
            raise ValueError(f"std must be above 0 but is {self.std}.")

    @classmethod
    def imagenet(cls) -> Normalization:
        """Returns ImageNet's statistics, the usual ones for RGB images."""
        return cls((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))

    @classmethod
    def cifar10(cls) -> Normalization:
        """Returns CIFAR-10's statistics as solo-learn has them."""
        return cls((0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616))

    @classmethod
    def cifar100(cls) -> Normalization:
        """Returns CIFAR-100's statistics as solo-learn has them."""
        return cls((0.5071, 0.4865, 0.4409), (0.2673, 0.2564, 0.2762))

    @classmethod
    def stl10(cls) -> Normalization:
        """Returns STL-10's statistics as solo-learn has them."""
        return cls((0.4914, 0.4823, 0.4466), (0.247, 0.243, 0.261))

    @classmethod
    def none(cls) -> Normalization:
        """Returns the normalisation that changes nothing, of RGB images in [0, 1]."""
        return cls((0.0, 0.0, 0.0), (1.0, 1.0, 1.0))

    @classmethod
    def of(cls, value: NormalizationLike) -> Normalization:
        """Returns the normalisation that is meant.

        Args:
            value: A Normalization, ``"imagenet"``, ``"cifar10"``, ``"cifar100"``, ``"stl10"`` or
                ``"none"``, or a pair of means and standard deviations.

        Examples:
            >>> Normalization.of([[0.5, 0.5, 0.5], [0.5, 0.5, 0.5]])
            Normalization(mean=(0.5, 0.5, 0.5), std=(0.5, 0.5, 0.5))
        """
        if isinstance(value, Normalization):
            return value
        if isinstance(value, str) and value in _NAMES:
            return _NAMES[value]()
        if not isinstance(value, (str, Mapping)):
            try:
                mean, std = value
            except (TypeError, ValueError):
                pass  # Said below.
            else:
                return cls(mean, std)  # type: ignore[arg-type]
        raise ValueError(
            f"normalization must be one of {', '.join(map(repr, _NAMES))}, a pair (mean, std) or a "
            f"Normalization but is {value!r}."
        )

    def apply(self, images: Tensor) -> Tensor:
        """Normalises images (N, C, H, W) in [0, 1].

        Raises:
            TypeError: If the images are no floating-point tensor.
            ValueError: If they are of another shape, or have not a channel for each mean.
        """
        self._check_shape(images)
        return (images - per_channel(self.mean, images)) / per_channel(self.std, images)

    def undo(self, images: Tensor) -> Tensor:
        """Takes normalised images (N, C, H, W) back to [0, 1]; errors as of :meth:`apply`."""
        self._check_shape(images)
        return images * per_channel(self.std, images) + per_channel(self.mean, images)

    def _check_shape(self, images: Tensor) -> None:
        check_float_tensor("images", images)
        if images.ndim != 4 or images.shape[1] != len(self.mean):
            raise ValueError(
                f"images must have shape (N, {len(self.mean)}, H, W), a channel for each mean, but has "
                f"shape {tuple(images.shape)}."
            )

    def check(self, images: Tensor, *, wait: bool = False) -> None:
        """Raises, or warns once, if images (N, C, H, W) cannot have been normalised so.

        Their least and greatest value are looked at where that costs little, on a CPU in eager mode.

        Args:
            images: Tensor of shape (N, C, H, W).
            wait: Look on an accelerator too, which the host waits for.

        Raises:
            ValueError: If a value is out of the range that the statistics allow.
        """
        can_be_read = can_be_waited_for if wait else can_be_seen
        if images.shape[1] != len(self.mean) or not images.numel() or not can_be_read(images):
            return
        low, high = (bound.item() for bound in torch.aminmax(images.detach()))
        pairs = list(zip(self.mean, self.std, strict=True))
        lowest = min((-_OVERSHOOT - mean) / std for mean, std in pairs)
        highest = max((1 + _OVERSHOOT - mean) / std for mean, std in pairs)
        if low < lowest or high > highest:
            raise ValueError(
                f"images must be normalised with mean {self.mean} and std {self.std}, which gives "
                f"no value outside of [{lowest:.3g}, {highest:.3g}], but reach from {low:.4g} to "
                f"{high:.4g}; scale them to [0, 1] and normalise them, or state the normalization "
                "that they have."
            )
        # A normalised batch of such contrast has values below 0: it has dark pixels, too.
        if self.mean != (0.0,) * len(self.mean) and low >= 0 and high - low > 0.5 and high <= 1:
            _warn_not_normalized(self)


NormalizationLike = Normalization | str | Sequence[Sequence[float]]

_NAMES: dict[str, Callable[[], Normalization]] = {
    "imagenet": Normalization.imagenet,
    "cifar10": Normalization.cifar10,
    "cifar100": Normalization.cifar100,
    "stl10": Normalization.stl10,
    "none": Normalization.none,
}


def can_be_waited_for(x: Tensor) -> bool:
    """Tells whether Python may look at a tensor's values if the host waits for the device.

    So it is in eager mode, of plain tensors, but while a CUDA graph is captured.
    """
    return (
        not torch.compiler.is_compiling()
        and not x.is_meta
        and type(x).__torch_dispatch__ is Tensor.__torch_dispatch__
        and not torch._C._are_functorch_transforms_active()
        and torch._C._len_torch_dispatch_stack() == 0
        and not (x.is_cuda and torch.cuda.is_current_stream_capturing())
    )


@functools.cache
def _warn_not_normalized(normalization: Normalization) -> None:
    warnings.warn(
        f"images seem not to be normalised: all values of a batch lie in [0, 1], though mean "
        f"{normalization.mean} and std {normalization.std} are stated; normalise them, or state "
        "normalization='none'.",
        stacklevel=2,
    )


def check_numbers(name: str, values: object, length: int | None = None) -> tuple[float, ...]:
    """Returns finite numbers, of an array or tensor too, as floats: at least one, or ``length``."""
    if isinstance(values, Tensor):
        values = values.tolist()
    try:
        numbers = tuple(check_number(name, value) for value in values)  # type: ignore[attr-defined]
    except (TypeError, ValueError):
        numbers = ()
    if not numbers or length not in (None, len(numbers)):
        count = "" if length is None else f"{length} "
        raise ValueError(f"{name} must be {count}finite numbers but is {values!r}.")
    return numbers


def per_channel(values: Sequence[float], like: Tensor) -> Tensor:
    """Returns a number a channel as a tensor (1, C, 1, 1), of another's type and device."""
    # Filled in, not copied from the host: a copy would make an accelerator wait.
    return torch.cat([like.new_full((1, 1, 1, 1), value) for value in values], dim=1)
