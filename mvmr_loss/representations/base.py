"""What a representation is: fixed features of the non-augmented view, as a torch module."""

from __future__ import annotations

from abc import ABC, abstractmethod

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad

from mvmr_loss._checks import (
    as_rows,
    check_bool,
    check_finite,
    check_float_tensor,
    low_precision_to_float32,
    without_autocast,
)
from mvmr_loss.normalization import Normalization


def check_images(
    images: object, minimum_size: int = 1, name: str = "images", *, finite: bool = True
) -> Tensor:
    """Returns a batch (N, C, H, W) in float32 or float64 after checking it.

    A single image (C, H, W) becomes a batch of one, half precision float32.

    Args:
        images: What the user gave.
        minimum_size: The smallest allowed height and width in pixels.
        name: What to call ``images`` in errors.
        finite: Whether the values are looked at, too.

    Raises:
        TypeError: If ``images`` is not a floating-point tensor.
        ValueError: If the shape is wrong, an image is too small or, on a CPU, not finite.
    """
    images = check_float_tensor(name, images)
    if images.ndim == 3:
        images = images[None]
    if images.ndim != 4 or 0 in images.shape:
        raise ValueError(
            f"{name} must have shape (N, C, H, W) or (C, H, W), none of them 0, "
            f"but has shape {tuple(images.shape)}."
        )
    check_size(images.shape[-2], images.shape[-1], minimum_size, name)
    if finite:
        check_finite(name, images)
    return low_precision_to_float32(images)


def check_size(height: int, width: int, minimum_size: int, name: str = "images") -> None:
    """Raises a ValueError if height or width, in pixels, is below ``minimum_size``."""
    if min(height, width) < minimum_size:
        raise ValueError(
            f"{name} must be at least {minimum_size} x {minimum_size} pixels for this setting "
            f"but are {height} x {width}."
        )


def follows_derivative(x: Tensor) -> bool:
    """Tells whether a derivative of what is computed from ``x`` may be asked for.

    So it is where ``x`` requires a gradient, under a transform of ``torch.func``, whose tensors do
    not tell, and in forward-mode differentiation.
    """
    return (
        x.requires_grad
        or torch._C._are_functorch_transforms_active()
        or forward_ad._current_level >= 0
    )


class Representation(nn.Module, ABC):
    """A fixed map from images to features; the base of every representation.

    A subclass implements :meth:`extract` and :meth:`output_shape`, and sets ``minimum_size`` if small
    images are out of its reach. Calling the module with images of shape (N, C, H, W), or (C, H, W)
    for a single one, checks them, leaves autocast, raises half precision to float32 and, unless
    ``differentiable``, records no gradient.

    Attributes:
        cacheable: Whether an image always has the same features, so that they may be stored.
        minimum_size: The smallest height and width in pixels.

    Args:
        differentiable: If True, the gradient flows through to the images.

    Raises:
        TypeError: On a call, if the images are not a floating-point tensor.
        ValueError: On a call, if the shape is wrong, an image is too small or, on a CPU, not finite.
    """

    cacheable: bool = True
    minimum_size: int = 1

    def __init__(self, *, differentiable: bool = False) -> None:
        super().__init__()
        self.differentiable = check_bool("differentiable", differentiable)

    @abstractmethod
    def extract(self, images: Tensor) -> Tensor:
        """Computes the features of checked images.

        Args:
            images: Tensor of shape (N, C, H, W), float32 or float64, of any strides.

        Returns:
            Tensor of shape (N, ...), the shape that :meth:`output_shape` tells.
        """

    @abstractmethod
    def output_shape(self, channels: int, height: int, width: int) -> tuple[int, ...]:
        """Returns the shape of the features of one image of that size, without computing them."""

    def undone(self) -> Normalization | None:
        """Returns the normalisation that is undone before the features are computed; None: none is."""
        return None

    def undoing(self, normalization: Normalization) -> Representation:
        """Returns the representation for images so normalised.

        It is itself, unless it undoes a normalisation and was not told which.
        """
        return self

    def as_rows(self, features: Tensor) -> Tensor:
        """Returns features of shape (N, ...) as rows, shape (N, D)."""
        return as_rows(features)

    def forward(self, images: Tensor) -> Tensor:
        """Computes the features, a tensor of shape (N, ...), of a batch of images."""
        images = check_images(images, self.minimum_size)
        if not self.differentiable:
            images = images.detach()
        recorded = self.differentiable and torch.is_grad_enabled()
        with without_autocast(images), torch.set_grad_enabled(recorded):
            features = self.extract(images)
        if features.ndim < 1 or len(features) != len(images):
            raise ValueError(
                f"{type(self).__name__}.extract must return a row for each of {len(images)} images but "
                f"returned shape {tuple(features.shape)}."
            )
        return features
