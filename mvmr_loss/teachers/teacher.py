"""The teacher: a frozen network as a representation."""

from __future__ import annotations

import copy
import functools
import math
import os
import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.compiler import is_compiling
from torch.nn import functional as F
from torch.utils._pytree import tree_map_only

from mvmr_loss._checks import as_rows, can_be_seen, check_bool, check_int
from mvmr_loss.normalization import Normalization
from mvmr_loss.representations.base import Representation
from mvmr_loss.representations.registry import register_representation
from mvmr_loss.teachers.preprocessing import (
    IMAGENET_MEAN,
    IMAGENET_STD,
    TeacherPreprocessing,
    check_statistics,
    is_complete,
    merge,
)
from mvmr_loss.teachers.sources import SOURCES
from mvmr_loss.teachers.sources.request import Request, keeps_head


@register_representation("teacher")
class Teacher(Representation):
    """The features of a frozen network, for knowledge distillation.

    The network is a module of one's own, a method of one, or a callable; or named by where it comes
    from:

    - ``source="torchvision"``: ``model`` such as ``resnet50``; ``weights`` a file or a name such as
      ``IMAGENET1K_V2`` or ``DEFAULT``.
    - ``source="timm"``: ``model`` such as ``vit_small_patch16_224``; ``weights`` a file, a tag such
      as ``augreg_in21k``, or ``default``.
    - ``source="open_clip"``: the image tower of a ``model`` such as ``ViT-B-16``; ``weights`` a
      file or a tag such as ``laion400m_e32``; a ``model`` ``hf-hub:OWNER/NAME`` or
      ``local-dir:FOLDER`` brings its own.
    - ``source="transformers"``: ``weights`` a folder or a name of the hub; or a file, with the type
      of network as ``model``, such as ``dinov2``.
    - ``source="checkpoint"``: ``weights`` a file, and as ``model`` the function that builds the
      network, as ``package.module:function``.

    Without ``weights``, all others but the last have random ones, with a warning.

    Networks of a library lose their classifier and get the library's own preprocessing: the
    student's normalisation is undone, then images are resized, cropped and normalised for the
    teacher. With resizing, the pixels equal those of the library up to the rounding to 8 bits (see
    :class:`TeacherPreprocessing`); without, exactly. This is tried on a few images when the teacher
    is built: where a library does more, ``preprocessing`` must be given, with all of ``resize``,
    ``crop``, ``mean``, ``std`` and ``interpolation``. A network of one's own, a ``checkpoint``'s
    too, stays as it is: its features are what it gives, the classes' scores of a classifier unless a
    ``layer`` is named, and it gets the images as the student does, unless it is given a
    ``preprocessing``.

    The network is frozen and in eval mode whatever its owner does, and is no part of the owner:
    neither its parameters nor its state dict have it. It follows the images to their device. That
    is so of modules and their methods, such as ``network.forward_features``. Of what another
    callable runs nothing is known: put its networks in eval mode and on the device yourself. No
    graph is recorded through it either, unless ``differentiable``.

    Source: MV-MR, Entropy 26(6):466, 2024 (arXiv 2303.12130), section on knowledge distillation.

    Args:
        module: A network, its method, or a callable, from images (N, C, H, W) to features; in place
            of ``source``. A network's parameters are set to need no gradient.
        source: Where the network comes from, see above.
        model: Its name there. This and the next three go with ``source`` alone.
        weights: Its weights: a file, or what the source calls them.
        model_options: Keyword arguments for building the network.
        prefix: Prefix of the network's weights in the checkpoint file; None finds it.
        preprocessing: A :class:`TeacherPreprocessing`, or a mapping of what shall differ from the
            library's.
        mean: Mean per channel that the images are normalised with. None: as the collection says that
            the teacher is put in; ImageNet's where it stands alone.
        std: Standard deviation per channel that the images are normalised with, given with ``mean``.
        layer: Name of the submodule whose output is taken; None: the network's output.
        token: Of features (N, T, D), the token to take: an index, "cls" (0) or "mean". None: all of
            them; of outputs as in transformers, the pooled features, or else the first token.
        l2_normalize: Scale each image's features to length 1.
        dtype: Type to compute in, such as "bfloat16"; None: float32. A module is converted to it,
            a callable gets its input in it.
        device: Where to compute; None: the images' device.
        differentiable: If True, the gradient flows through to the images.

    Raises:
        TypeError: If the module is not callable or an option is of a wrong type.
        ValueError: If the source, model, layer or weights are unknown or do not fit, or the
            library's preprocessing is not to be had here. On a call, if the network does not give
            one tensor with a row for each image.
        FileNotFoundError: If there is no such file.
        ConnectionError: If weights cannot be downloaded.
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
        mean: Sequence[float] | None = None,
        std: Sequence[float] | None = None,
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
        if module is not None:
            of_source = {"model": model, "weights": weights, "prefix": prefix}
            for name, value in {**of_source, "model_options": model_options or None}.items():
                if value is not None:
                    raise ValueError(
                        f"{name} must be None for a module, which is taken as it is, but is {value!r}; "
                        "weights go into it before: mvmr_loss.teachers.load_checkpoint(network, file)."
                    )
        self.source, self.model = source, model
        self.weights = None if weights is None else str(weights)
        self.model_options = dict(model_options or {})
        self.prefix, self.layer = prefix, layer
        self.l2_normalize = check_bool("l2_normalize", l2_normalize)
        if (mean is None) != (std is None):
            raise ValueError(
                f"mean and std must be given both or not at all, but are {mean} and {std}."
            )
        self._normalization_is_stated = mean is not None
        self._normalization = Normalization(
            *check_statistics(
                *("mean", IMAGENET_MEAN if mean is None else mean),
                *("std", IMAGENET_STD if std is None else std),
            )
        )
        self.token = _check_token(token)
        self.dtype = _check_dtype(dtype)
        self.device = None if device is None else torch.device(device)
        own: TeacherPreprocessing | None = None
        if source is not None:
            if source not in SOURCES:
                raise ValueError(f"source must be one of {', '.join(SOURCES)} but is {source!r}.")
            module, librarys = SOURCES[source](
                Request(model, self.weights, self.model_options, prefix, keeps_head(layer))
            )
            own = None if is_complete(preprocessing) else librarys()
        if not callable(module):
            raise TypeError(
                f"module must be a torch.nn.Module or a callable but is a {type(module).__name__}."
            )
        self.preprocessing = merge(own, preprocessing)
        self._check_channels()
        network = _network_of(module)
        if network is not None:
            _cast(network.requires_grad_(False).eval(), torch.float32)
            if source is not None:
                self._check_runs(network)
            _cast(network, self.dtype)
            if layer is not None and layer not in dict(network.named_modules()):
                top = ", ".join(name for name, _ in network.named_children())
                raise ValueError(
                    f"layer must be the name of a submodule but is {layer!r}; the uppermost are "
                    f"{top}, and module.named_modules() has all."
                )
        elif layer is not None:
            raise ValueError("layer must be None for a callable that is no torch.nn.Module.")
        # In a tuple, torch does not see it: no submodule, it is not trained, saved or moved.
        self._held = (module, network)
        self._output = _Output()
        if network is not None and layer is not None:
            # Hooked once, here: a compiler cannot trace the hooking.
            network.get_submodule(layer).register_forward_hook(self._output)

    @property
    def mean(self) -> tuple[float, ...]:
        """The mean per channel that the images are normalised with."""
        return self._normalization.mean

    @property
    def std(self) -> tuple[float, ...]:
        """The standard deviation per channel that the images are normalised with."""
        return self._normalization.std

    @property
    def module(self) -> Callable[..., Any]:
        """The network, or what is called in its place."""
        return self._held[0]

    def undone(self) -> Normalization | None:
        """Returns the images' normalisation, which is undone for a preprocessing; None without one."""
        return None if self.preprocessing is None else self._normalization

    def undoing(self, normalization: Normalization) -> Teacher:
        """Returns the teacher for images so normalised: itself, if it was told ``mean`` and ``std``."""
        if self._normalization_is_stated or self.undone() in (None, normalization):
            return self
        told = copy.copy(self)  # Of the same network.
        told._normalization = normalization
        told._normalization_is_stated = True
        told._check_channels()
        return told

    def as_rows(self, features: Tensor) -> Tensor:
        """Returns features of shape (N, ...) as rows; warns once where tokens or places become one."""
        if features.ndim > 2 and not is_compiling():
            _warn_of_flattening(tuple(features.shape[1:]))
        return as_rows(features)

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
        pixels = self._normalization.undo(images)
        if can_be_seen(pixels):
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
        # Prepared where the teacher is: smaller images travel. A copy, where nothing else makes one: a
        # network may change its input in place, and these are the student's images.
        copied = self.preprocessing is None
        features = self._features(self.preprocess(images.to(device, torch.float32, copy=copied)))
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
        device = self.device or next(_tensors(self._held[1]), torch.empty(0)).device
        black = torch.tensor([-m / s for m, s in zip(self.mean, self.std, strict=True)])
        if self.preprocessing is None:
            black = torch.zeros(channels)
        images = black[None, :, None, None].expand(1, -1, height, width).to(device)
        return tuple(self(images).shape[1:])

    def _check_channels(self) -> None:
        """Raises if the images do not have the channels that the preprocessing is of."""
        channels = None if self.preprocessing is None else len(self.preprocessing.mean)
        if channels is not None and len(self.mean) not in (1, channels):
            raise ValueError(
                f"mean and std must have 1 or {channels} numbers, as the teacher's "
                f"preprocessing has, but have {len(self.mean)}."
            )

    def _check_runs(self, network: nn.Module) -> None:
        """Raises if the network does not take images of the preprocessing's size."""
        if self.preprocessing is None:
            return
        wanted = self.preprocessing.crop or self.preprocessing.resize
        if wanted is None:
            return
        side = (wanted, wanted) if isinstance(wanted, int) else wanted
        shape = (1, len(self.preprocessing.mean), *side)
        device = next(_tensors(network), torch.empty(0)).device
        try:
            with torch.no_grad():
                network(torch.zeros(shape, device=device, dtype=torch.float32))
        except Exception as error:  # Whatever the network raises, AssertionError too.
            raise ValueError(
                f"{self.source}: {self.model or self.weights} must take the images of shape {shape} "
                f"that its preprocessing gives, but fails ({error or type(error).__name__}); check "
                "model_options, or give preprocessing."
            ) from error

    def _features(self, pixels: Tensor) -> Tensor:
        """Runs the network and chooses layer and token."""
        (module, network), pixels = self._held, pixels.to(self.dtype)
        if network is not None:
            if any(submodule.training for submodule in network.modules()):
                network.eval()
            if next(_tensors(network), pixels).device != pixels.device:
                network.to(pixels.device)
        if self.layer is None:
            output = module(pixels)
        else:
            self._output.begin()
            try:
                module(pixels)
            finally:
                outputs = self._output.end()
            if not outputs:
                raise ValueError(f"layer must be used by the network but {self.layer!r} is not.")
            output = outputs[-1]
        features = _as_tensor(output, tokens=self.token is not None)
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


def _network_of(module: Callable[..., Any]) -> nn.Module | None:
    """Returns the network that a callable is, or whose method it is; None of any other."""
    while isinstance(module, functools.partial):
        module = module.func
    owner = getattr(module, "__self__", module)
    return owner if isinstance(owner, nn.Module) else None


def _as_tensor(output: Any, *, tokens: bool) -> Tensor:
    """Returns the features out of a network's output: its tokens, or what is made of them."""
    if isinstance(output, Tensor):
        return output
    pooled = ("image_embeds", "pooler_output")
    names = ("last_hidden_state", *pooled) if tokens else (*pooled, "last_hidden_state")
    for name in names:
        value = getattr(output, name, None)
        if value is None and isinstance(output, Mapping):
            value = output.get(name)
        if isinstance(value, Tensor):
            # Without a pooled output: the class token.
            is_class = name == "last_hidden_state" and value.ndim == 3 and not tokens
            return value[:, 0] if is_class else value
    gave = f"a {type(output).__name__}"
    if isinstance(output, (tuple, list)):
        found = [part for part in output if isinstance(part, Tensor)]
        if len(found) == 1:
            return found[0]
        if found:
            gave += f" of {len(found)}, of shapes {', '.join(str(tuple(x.shape)) for x in found)}"
    elif isinstance(output, Mapping):
        gave += f" of {', '.join(map(repr, output))}"
    raise ValueError(
        f"the teacher must give a tensor of features but gave {gave}; name a layer that gives one, "
        "or give the network in a torch.nn.Module whose forward returns the one to take."
    )


@functools.cache
def _warn_of_flattening(shape: tuple[int, ...]) -> None:
    """Warns once of tokens, or places of a map, that become one long row."""
    count = math.prod(shape)
    if count > max(shape):
        remedy = "token='cls' or 'mean' takes one" if len(shape) == 2 else "pool them"
        warnings.warn(
            f"the teacher's features of shape (N, {', '.join(map(str, shape))}) are flattened to "
            f"{count} numbers an image; {remedy}, or name a layer whose features are pooled.",
            stacklevel=2,
        )


class _Output:
    """A forward hook that keeps its layer's outputs, during a teacher's call alone."""

    def __init__(self) -> None:
        self.wanted = False
        self.kept: list[Any] = []

    def __call__(self, module: nn.Module, inputs: Any, output: Any) -> None:
        if self.wanted:
            # Copied: the network may change it in place afterwards, as ReLU(inplace=True) does.
            self.kept.append(tree_map_only(Tensor, Tensor.clone, output))

    def begin(self) -> None:
        """Begins to keep outputs."""
        self.wanted = True

    def end(self) -> list[Any]:
        """Ends that and returns them."""
        self.wanted, outputs = False, list(self.kept)
        self.kept.clear()
        return outputs


def _cast(module: nn.Module, dtype: torch.dtype) -> None:
    """Converts parameters and buffers of other floating-point types; complex ones stay."""
    if any(t.is_floating_point() and t.dtype != dtype for t in _tensors(module)):
        module._apply(lambda t: t.to(dtype) if t.is_floating_point() else t)


def _check_token(token: Any) -> int | str | None:
    """Returns which token to take after checking it."""
    if isinstance(token, str):
        if token not in ("cls", "mean"):
            raise ValueError(f'token must be an index, "cls" or "mean" but is {token!r}.')
        return token
    try:
        return None if token is None else check_int("token", token)
    except TypeError:
        raise TypeError(f"token must be an int or a str but is a {type(token).__name__}.") from None


def _check_dtype(dtype: torch.dtype | str | None) -> torch.dtype:
    """Returns a floating-point type, also given by name; float32 by default."""
    if dtype is None:
        return torch.float32
    chosen = getattr(torch, dtype, None) if isinstance(dtype, str) else dtype
    if not isinstance(chosen, torch.dtype) or not chosen.is_floating_point:
        raise ValueError(f"dtype must be a floating-point type such as bfloat16 but is {dtype!r}.")
    return chosen


def _tensors(module: Any) -> Any:
    """Yields a module's parameters and buffers; nothing for a callable."""
    if isinstance(module, nn.Module):
        yield from module.parameters()
        yield from module.buffers()
