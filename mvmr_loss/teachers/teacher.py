"""The teacher: a frozen network as a representation."""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from mvmr_loss.representations.base import Representation
from mvmr_loss.representations.registry import register_representation
from mvmr_loss.teachers.preprocessing import (
    IMAGENET_MEAN,
    IMAGENET_STD,
    TeacherPreprocessing,
    merge,
)
from mvmr_loss.teachers.sources import SOURCES
from mvmr_loss.teachers.sources.request import Request, keeps_head


@register_representation("teacher")
class Teacher(Representation):
    """The features of a frozen network, for knowledge distillation.

    The network is a module or callable of one's own, or named by where it comes from:

    - ``source="torchvision"``: ``model`` such as ``resnet50``; ``weights`` a file or a name such as
      ``IMAGENET1K_V2`` or ``DEFAULT``.
    - ``source="timm"``: ``model`` such as ``vit_small_patch16_224``; ``weights`` a file, a tag such
      as
      ``augreg_in21k``, or ``default``.
    - ``source="open_clip"``: the image tower of a ``model`` such as ``ViT-B-16``; ``weights`` a
      file or
      a tag such as ``laion400m_e32``.
    - ``source="transformers"``: ``weights`` a folder or a name of the hub; or a file, with the type
      of
      network as ``model``, such as ``dinov2``.
    - ``source="checkpoint"``: ``weights`` a file, and as ``model`` the function that builds the
      network,
      as ``package.module:function``.

    Without ``weights``, all but the last have random ones, with a warning.

    Networks with a ``source`` lose their classifier and get their library's own preprocessing: the
    student's normalisation is undone, then images are resized, cropped and normalised for the
    teacher. With resizing, the pixels equal those of the library up to the rounding to 8 bits (see
    :class:`TeacherPreprocessing`); without, exactly. A network of one's own gets the images as the
    student does, unless it is given a ``preprocessing``.

    The network is frozen and in eval mode whatever its owner does, and is no part of the owner:
    neither its parameters nor its state dict have it. It follows the images to their device.

    Source: MV-MR, Entropy 26(6):466, 2024 (arXiv 2303.12130), section on knowledge distillation.

    Args:
        module: A network or callable, from images (N, C, H, W) to features; in place of ``source``.
            A module's parameters are set to need no gradient.
        source: Where the network comes from, see above.
        model: Its name there.
        weights: Its weights: a file, or what the source calls them.
        model_options: Keyword arguments for building the network.
        prefix: Prefix of the network's weights in the checkpoint file; None finds it.
        preprocessing: A :class:`TeacherPreprocessing`, or a mapping of what shall differ from the
            library's.
        mean: Mean per channel that the images are normalised with.
        std: Standard deviation per channel that the images are normalised with.
        layer: Name of the submodule whose output is taken; None: the network's output.
        token: Of features (N, T, D), the token to take: an index, "cls" (0) or "mean".
        l2_normalize: Scale each image's features to length 1.
        dtype: Type to compute in, such as "bfloat16"; None: float32. A callable gets its input in
            it.
        device: Where to compute; None: the images' device.
        differentiable: If True, the gradient flows through to the images.

    Raises:
        TypeError: If the module is not callable or an option is of a wrong type.
        ValueError: If the source, model, layer or weights are unknown or do not fit.
        FileNotFoundError: If there is no such file.
        ImportError: If the source's library is missing.

    Examples:
        >>> network = nn.Sequential(nn.Conv2d(3, 8, 3, stride=2), nn.AdaptiveAvgPool2d(1))
        >>> teacher = Teacher(network, l2_normalize=True)
        >>> features = teacher(torch.rand(4, 3, 32, 32))
        >>> features.shape, features.norm(dim=1).allclose(torch.ones(4))
        (torch.Size([4, 8]), True)
        >>> len(teacher.state_dict()), len(list(teacher.parameters())), network.training
        (0, 0, False)
    """

    def __init__(
        self,
        module: Callable[..., Any] | None = None,
        *,
        source: str | None = None,
        model: str | None = None,
        weights: str | os.PathLike[str] | None = None,
        model_options: Mapping[str, Any] | None = None,
        prefix: str | None = None,
        preprocessing: TeacherPreprocessing | Mapping[str, Any] | None = None,
        mean: Sequence[float] = IMAGENET_MEAN,
        std: Sequence[float] = IMAGENET_STD,
        layer: str | None = None,
        token: int | str | None = None,
        l2_normalize: bool = False,
        dtype: torch.dtype | str | None = None,
        device: torch.device | str | None = None,
        differentiable: bool = False,
    ) -> None:
        super().__init__(differentiable=differentiable)
        if (module is None) == (source is None):
            raise ValueError(
                "either module or source must be given, and not both: a network of one's own, or "
                f"one of {', '.join(SOURCES)}."
            )
        self.source, self.model = source, model
        self.weights = None if weights is None else str(weights)
        self.model_options = dict(model_options or {})
        self.prefix, self.layer, self.l2_normalize = prefix, layer, l2_normalize
        self.mean, self.std = _check_statistics("mean", mean), _check_statistics("std", std)
        if len(self.mean) != len(self.std) or min(self.std) <= 0:
            raise ValueError(
                "mean and std must be of the same length, and std positive, "
                f"but are {mean} and {std}."
            )
        if token is not None and (isinstance(token, bool) or not isinstance(token, (int, str))):
            raise TypeError(f"token must be an int or a str but is a {type(token).__name__}.")
        if isinstance(token, str) and token not in ("cls", "mean"):
            raise ValueError(f'token must be an index, "cls" or "mean" but is {token!r}.')
        self.token = token
        self.dtype = _check_dtype(dtype)
        self.device = None if device is None else torch.device(device)
        own: TeacherPreprocessing | None = None
        if source is not None:
            if source not in SOURCES:
                raise ValueError(f"source must be one of {', '.join(SOURCES)} but is {source!r}.")
            module, own = SOURCES[source](
                Request(model, self.weights, self.model_options, prefix, keeps_head(layer))
            )
        if not callable(module):
            raise TypeError(
                f"module must be a torch.nn.Module or a callable but is a {type(module).__name__}."
            )
        self.preprocessing = merge(own, preprocessing)
        if isinstance(module, nn.Module):
            module.requires_grad_(False).eval()
            if self.dtype is not None:
                module.to(self.dtype)
            if layer is not None and layer not in dict(module.named_modules()):
                top = ", ".join(name for name, _ in module.named_children())
                raise ValueError(
                    f"layer must be the name of a submodule but is {layer!r}; the uppermost are "
                    f"{top}, and module.named_modules() has all."
                )
        elif layer is not None:
            raise ValueError("layer must be None for a callable that is no torch.nn.Module.")
        # In a tuple, torch does not see it: no submodule, it is not trained, saved or moved.
        self._held = (module,)
        self._shapes: dict[tuple[int, ...], tuple[int, ...]] = {}

    @property
    def module(self) -> Callable[..., Any]:
        """The network."""
        return self._held[0]

    def extra_repr(self) -> str:
        """Returns the main arguments, for printing."""
        named = f"{self.source}: {self.model}" if self.source else type(self.module).__name__
        return f"{named}, weights={self.weights}, layer={self.layer}, token={self.token}"

    def preprocess(self, images: Tensor) -> Tensor:
        """Undoes the student's normalisation and prepares the images for the teacher.

        Args:
            images: Tensor of shape (N, C, H, W), normalised with ``mean`` and ``std``.

        Returns:
            What the teacher sees, shape (N, C', H', W').

        Raises:
            ValueError: If the channels do not fit or, on a CPU, undoing the normalisation does not
                give pixels from 0 to 1.
        """
        if self.preprocessing is None:
            return images
        if images.shape[1] != len(self.mean):
            raise ValueError(
                f"images must have {len(self.mean)} channels, as mean and std, but have shape "
                f"{tuple(images.shape)}."
            )
        mean, std = (
            torch.tensor(v, dtype=images.dtype, device=images.device)[:, None, None]
            for v in (self.mean, self.std)
        )
        pixels = images * std + mean
        if pixels.device.type == "cpu" and not torch.compiler.is_compiling():
            low, high = pixels.detach().aminmax()
            # Room for what resizing with bicubic interpolation overshoots.
            if low < -0.2 or high > 1.2:
                raise ValueError(
                    "images must be normalised with the teacher's arguments mean and std, but "
                    f"undoing mean {self.mean} and std {self.std} gives pixels from {low:.2f} to "
                    f"{high:.2f}, not from 0 to 1; give those of the student's images."
                )
        pixels = pixels.clamp(0, 1)
        if pixels.shape[1] == 1:
            pixels = pixels.expand(-1, len(self.preprocessing.mean), -1, -1)
        return self.preprocessing(pixels, quantize=not self.differentiable)

    def extract(self, images: Tensor) -> Tensor:
        """Computes the teacher's features of checked images.

        Args:
            images: Tensor of shape (N, C, H, W).

        Returns:
            Tensor of shape (N, ...), float32.
        """
        device = images.device if self.device is None else self.device
        # Prepared where the teacher is: smaller images travel.
        features = self._features(self.preprocess(images.to(device, torch.float32)))
        features = features.to(images.device, images.dtype)
        if features.shape[0] != len(images) or features.ndim < 2:
            raise ValueError(
                f"the teacher must give features of shape ({len(images)}, ...), a row for each "
                f"image, but gave {tuple(features.shape)}."
            )
        return F.normalize(features.flatten(1), dim=1) if self.l2_normalize else features

    def output_shape(self, channels: int, height: int, width: int) -> tuple[int, ...]:
        """Returns the shape of one image's features; the teacher runs once to tell.

        Args:
            channels: Number of channels.
            height: Height in pixels.
            width: Width in pixels.

        Returns:
            The shape without the batch dimension.
        """
        key = (channels, height, width)
        if key not in self._shapes:
            device = self.device or next(_tensors(self.module), torch.empty(0)).device
            black = torch.tensor([-m / s for m, s in zip(self.mean, self.std, strict=True)])
            if self.preprocessing is None:
                black = torch.zeros(channels)
            images = black[None, :, None, None].expand(1, -1, height, width).to(device)
            self._shapes[key] = tuple(self(images).shape[1:])
        return self._shapes[key]

    def _features(self, pixels: Tensor) -> Tensor:
        """Runs the network and chooses layer and token."""
        network, captured = self.module, []
        if self.dtype is not None:
            pixels = pixels.to(self.dtype)
        if isinstance(network, nn.Module):
            if any(submodule.training for submodule in network.modules()):
                network.eval()
            if next(_tensors(network), pixels).device != pixels.device:
                network.to(pixels.device)
        if isinstance(network, nn.Module) and self.layer is not None:
            chosen = network.get_submodule(self.layer)
            handle = chosen.register_forward_hook(lambda *arguments: captured.append(arguments[2]))
            try:
                network(pixels)
            finally:
                handle.remove()
            if not captured:
                raise ValueError(f"layer must be used by the network but {self.layer!r} is not.")
            output = captured[-1]
        else:
            output = network(pixels)
        features = _as_tensor(output)
        if self.token is not None:
            if features.ndim != 3:
                raise ValueError(
                    "token must be None unless the features have shape (N, T, D), but they have "
                    f"{tuple(features.shape)}; choose a layer that has tokens."
                )
            if self.token == "mean":
                features = features.mean(dim=1)
            else:
                index = 0 if self.token == "cls" else self.token
                if not -features.shape[1] <= int(index) < features.shape[1]:
                    raise ValueError(
                        f"token must be among the {features.shape[1]} tokens but is {self.token}."
                    )
                features = features[:, int(index)]
        return features


def _as_tensor(output: Any) -> Tensor:
    """Returns the features out of a network's output."""
    for name in ("image_embeds", "pooler_output", "last_hidden_state"):
        value = getattr(output, name, None)
        if isinstance(value, Tensor):
            # Without a pooled output: the class token.
            return value[:, 0] if name == "last_hidden_state" and value.ndim == 3 else value
    if isinstance(output, (tuple, list)) and output:
        output = output[0]
    if not isinstance(output, Tensor):
        raise ValueError(
            f"the teacher must give a tensor of features but gave a {type(output).__name__}; "
            "choose a layer that does."
        )
    return output


def _check_statistics(name: str, values: Sequence[float]) -> tuple[float, ...]:
    """Returns a mean or standard deviation per channel after checking it."""
    if isinstance(values, (str, int, float)) or not values:
        raise ValueError(f"{name} must be a list of a number per channel but is {values!r}.")
    checked = tuple(float(value) for value in values)
    if not all(math.isfinite(value) for value in checked):
        raise ValueError(f"{name} must be finite but is {values}.")
    return checked


def _check_dtype(dtype: torch.dtype | str | None) -> torch.dtype | None:
    """Returns a floating-point type, also given by name."""
    chosen = getattr(torch, dtype, None) if isinstance(dtype, str) else dtype
    if dtype is None:
        return None
    if not isinstance(chosen, torch.dtype) or not chosen.is_floating_point:
        raise ValueError(f"dtype must be a floating-point type such as bfloat16 but is {dtype!r}.")
    return chosen


def _tensors(module: Any) -> Any:
    """Yields a module's parameters and buffers; nothing for a callable."""
    if isinstance(module, nn.Module):
        yield from module.parameters()
        yield from module.buffers()
