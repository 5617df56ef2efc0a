"""Frozen networks as representations: knowledge distillation from any teacher, of any width.

A :class:`Teacher` is a representation like the others, under the name ``teacher``: its features of
the non-augmented view go into the loss with the rest, or alone, or through a cache. ::

    Representations([{"name": "teacher", "source": "open_clip", "model": "ViT-B-16",
                      "weights": "laion400m_e32"}])
"""

from __future__ import annotations

import importlib
import math
import os
import pickle
import warnings
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from mvmr_loss.representations.base import Representation
from mvmr_loss.representations.registry import register_representation

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)

_INTERPOLATIONS = ("nearest", "bilinear", "bicubic")
_WEIGHT_SUFFIXES = (".pt", ".pth", ".ckpt", ".bin", ".tar", ".safetensors")


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
                f"one of {', '.join(_SOURCES)}."
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
            if source not in _SOURCES:
                raise ValueError(f"source must be one of {', '.join(_SOURCES)} but is {source!r}.")
            module, own = _SOURCES[source](
                _Request(model, self.weights, self.model_options, prefix, _keeps_head(layer))
            )
        if not callable(module):
            raise TypeError(
                f"module must be a torch.nn.Module or a callable but is a {type(module).__name__}."
            )
        self.preprocessing = _merge(own, preprocessing)
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


class _Request(NamedTuple):
    """What a source is asked for."""

    model: str | None
    weights: str | None
    options: dict[str, Any]
    prefix: str | None
    keep_head: bool

    def name(self, source: str) -> str:
        """Returns the model's name after checking that there is one."""
        if not isinstance(self.model, str) or not self.model:
            raise ValueError(f"model must name a network of {source} but is {self.model!r}.")
        return self.model

    def file(self) -> Path | None:
        """Returns the checkpoint file, if the weights are one."""
        if self.weights is None:
            return None
        path = Path(self.weights).expanduser()
        if path.is_file():
            return path
        if path.suffix in _WEIGHT_SUFFIXES or os.sep in self.weights.removeprefix("hf-hub:"):
            if path.is_dir() or (self.weights.count("/") == 1 and path.suffix == ""):
                return None  # A folder or OWNER/NAME of a hub.
            raise FileNotFoundError(f"weights must be a file or a tag but {path} does not exist.")
        return None

    def warn_if_random(self, source: str) -> None:
        """Warns of a teacher that knows nothing."""
        if self.weights is None:
            warnings.warn(
                f"the teacher {source}: {self.model} has random weights because weights is None.",
                stacklevel=4,
            )


_Loaded = tuple[nn.Module, TeacherPreprocessing | None]


def _from_torchvision(request: _Request) -> _Loaded:
    """Builds a torchvision classification network."""
    models = _import("torchvision.models", "torchvision")
    name, file = request.name("torchvision"), request.file()
    request.warn_if_random("torchvision")
    try:
        known = models.get_model_weights(name)
    except ValueError:
        raise ValueError(f"model must be a network of torchvision but is {name!r}.") from None
    try:
        chosen = known[request.weights] if request.weights and file is None else None
    except KeyError:
        raise ValueError(
            f"weights of {name} must be a file or one of {', '.join(known.__members__)} "
            f"but is {request.weights!r}."
        ) from None
    network = models.get_model(name, weights=chosen, **request.options)
    if not request.keep_head:
        linear = [n for n, m in network.named_modules() if isinstance(m, nn.Linear)]
        if linear and _keeps_head(linear[-1]):
            parent, _, attribute = linear[-1].rpartition(".")
            setattr(network.get_submodule(parent), attribute, nn.Identity())
    if file is not None:
        load_checkpoint(network, file, request.prefix)
    # Weights of one's own are taken to be trained like the library's.
    transform = (known.DEFAULT if chosen is None else chosen).transforms()
    return network, TeacherPreprocessing(
        resize=_size(transform.resize_size),
        crop=_pair(transform.crop_size),
        mean=tuple(transform.mean),
        std=tuple(transform.std),
        interpolation=_interpolation(transform.interpolation.value),
    )


def _from_timm(request: _Request) -> _Loaded:
    """Builds a timm network."""
    timm = _import("timm", "timm")
    name, file = request.name("timm"), request.file()
    request.warn_if_random("timm")
    pretrained = request.weights is not None and file is None
    if pretrained and request.weights != "default":
        name = f"{name}.{request.weights}"
    options = dict(request.options)
    if not request.keep_head:
        options["num_classes"] = 0
    try:
        network = timm.create_model(name, pretrained=pretrained, **options)
    except RuntimeError as error:
        raise ValueError(f"model and weights must be a network of timm: {error}") from error
    if file is not None:
        load_checkpoint(network, file, request.prefix)
    data = timm.data.resolve_model_data_config(network)
    crop = tuple(data["input_size"][-2:])
    if data["crop_mode"] not in ("center", "squash"):
        raise ValueError(
            f"preprocessing must be given for {name}: crop mode {data['crop_mode']!r} is unknown."
        )
    scaled = tuple(math.floor(side / data["crop_pct"]) for side in crop)
    square = data["crop_mode"] == "center" and crop[0] == crop[1]
    return network, TeacherPreprocessing(
        resize=scaled[0] if square else scaled,
        crop=crop,
        mean=tuple(data["mean"]),
        std=tuple(data["std"]),
        interpolation=_interpolation(data["interpolation"]),
    )


def _from_open_clip(request: _Request) -> _Loaded:
    """Builds the image tower of an open_clip model."""
    open_clip = _import("open_clip", "open_clip_torch")
    name, file = request.name("open_clip"), request.file()
    request.warn_if_random("open_clip")
    tag = request.weights if file is None else None
    if not name.startswith(("hf-hub:", "local-dir:")):
        if open_clip.get_model_config(name) is None:
            raise ValueError(
                f"model must be one of open_clip.list_models(), such as ViT-B-16, but is {name!r}."
            )
        tags = open_clip.list_pretrained_tags_by_model(name)
        if tag is not None and tag not in tags:
            raise ValueError(
                f"weights of {name} must be a file or one of {', '.join(tags)} but is {tag!r}."
            )
    network = open_clip.create_model(name, pretrained=tag, **request.options).visual
    if file is not None:
        load_checkpoint(network, file, request.prefix)
    wanted = network.preprocess_cfg
    crop, mode = _pair(wanted["size"]), wanted["resize_mode"]
    if mode not in ("shortest", "squash"):
        raise ValueError(
            f"preprocessing must be given for {name}: its resize mode {mode!r} is unknown."
        )
    return network, TeacherPreprocessing(
        resize=crop[0] if mode == "shortest" and crop[0] == crop[1] else crop,
        crop=crop,
        mean=tuple(wanted["mean"]),
        std=tuple(wanted["std"]),
        interpolation=_interpolation(wanted["interpolation"]),
    )


def _from_transformers(request: _Request) -> _Loaded:
    """Builds a vision network of transformers."""
    transformers = _import("transformers", "transformers")
    file = request.file()
    request.warn_if_random("transformers")
    try:
        if request.weights is not None and file is None:
            network = _pretrained(transformers, request.weights, request.options)
            processor = transformers.AutoImageProcessor.from_pretrained(request.weights)
        else:
            name = request.name("transformers")
            if name not in transformers.CONFIG_MAPPING:
                raise ValueError(
                    f"model must be a type of network of transformers, such as dinov2, but is {name!r}."
                )
            config = transformers.AutoConfig.for_model(name, **request.options)
            network = transformers.AutoModel.from_config(config)
            mapping = transformers.IMAGE_PROCESSOR_MAPPING
            # Given by the backend in newer versions, as a pair of slow and fast in older ones.
            classes = mapping[type(config)]
            classes = classes.values() if isinstance(classes, Mapping) else classes
            by_name = {c.__name__: c for c in classes if c is not None}
            fast = [c for n, c in by_name.items() if not n.endswith("Pil")]
            processor = (fast or list(by_name.values()))[0]()
    except (OSError, KeyError) as error:
        raise ValueError(
            "weights must be a folder or name on the hub, or model a type of network, "
            f"of transformers' vision models: {error}"
        ) from error
    if file is not None:
        load_checkpoint(network, file, request.prefix)
    return _TransformersVision(network), _of_processor(processor)


def _pretrained(transformers: Any, weights: str, options: Mapping[str, Any]) -> nn.Module:
    """Loads a transformers network, all of whose weights must be in the checkpoint."""
    network: nn.Module
    network, info = transformers.AutoModel.from_pretrained(
        weights, output_loading_info=True, **options
    )
    missing = list(info["missing_keys"])
    if missing and all("pooler" in key for key in missing):
        # A pooling layer that was never trained: its output would be noise.
        network = transformers.AutoModel.from_pretrained(
            weights, add_pooling_layer=False, **options
        )
    elif missing:
        raise ValueError(f"weights at {weights} lack {_some(missing)}, so they would be random.")
    return network


class _TransformersVision(nn.Module):
    """A transformers network as one from pixels to features."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def forward(self, pixels: Tensor) -> Any:
        """Computes the image embedding of two-tower models, or the output of others."""
        if hasattr(self.network, "get_image_features"):
            two_towers: Any = self.network
            return two_towers.get_image_features(pixel_values=pixels)
        return self.network(pixel_values=pixels)


def _of_processor(processor: Any) -> TeacherPreprocessing:
    """Returns what an image processor of transformers does."""

    def option(name: str, default: Any = None) -> Any:
        value = getattr(processor, name, default)
        return default if value is None else value

    names = {0: "nearest", 2: "bilinear", 3: "bicubic"}
    resize: int | tuple[int, int] | None = None
    crop: tuple[int, int] | None = None
    size = dict(option("size", {}))
    if option("do_resize", False):
        if size.get("shortest_edge"):
            resize = int(size["shortest_edge"])
            # ConvNeXT's: small sizes are resized larger and cropped, large ones squeezed.
            percentage = option("crop_pct")
            if percentage and resize < 384:
                resize, crop = int(resize / percentage), (resize, resize)
            elif percentage:
                resize = (resize, resize)
        elif size.get("height") and size.get("width"):
            resize = (int(size["height"]), int(size["width"]))
        else:
            raise ValueError(
                f"preprocessing must be given: the image processor's size {size} is unknown."
            )
    if option("do_center_crop", False):
        wanted = dict(option("crop_size", {}))
        crop = (int(wanted["height"]), int(wanted["width"]))
    plain = not option("do_normalize", False)
    number = option("resample", 2)
    return TeacherPreprocessing(
        resize=resize,
        crop=crop,
        mean=(0.0, 0.0, 0.0) if plain else tuple(option("image_mean")),
        std=(1.0, 1.0, 1.0) if plain else tuple(option("image_std")),
        interpolation=_interpolation(names.get(int(number), str(number))),
        floor_crop=True,
    )


def _from_checkpoint(request: _Request) -> _Loaded:
    """Builds a network by one's own function and loads a checkpoint file into it."""
    module_name, colon, function_name = request.name("one's own").partition(":")
    if not colon:
        raise ValueError(
            f"model must be 'package.module:function', which builds the network, "
            f"but is {request.model!r}."
        )
    if request.weights is None:
        raise ValueError("weights must be a checkpoint file but are None.")
    path = Path(request.weights).expanduser()
    if not path.is_file():
        raise FileNotFoundError(f"weights must be a checkpoint file but {path} does not exist.")
    try:
        function = getattr(importlib.import_module(module_name), function_name)
    except (ImportError, AttributeError) as error:
        raise ValueError(
            f"model must be 'package.module:function' but {request.model!r} "
            f"cannot be imported: {error}."
        ) from error
    network = function(**request.options)
    if not isinstance(network, nn.Module):
        raise TypeError(
            f"model {request.model!r} must build a torch.nn.Module but gave a "
            f"{type(network).__name__}."
        )
    load_checkpoint(network, path, request.prefix)
    return network, None


_SOURCES: dict[str, Callable[[_Request], _Loaded]] = {
    "torchvision": _from_torchvision,
    "timm": _from_timm,
    "open_clip": _from_open_clip,
    "transformers": _from_transformers,
    "checkpoint": _from_checkpoint,
}


def load_checkpoint(
    module: nn.Module, path: str | os.PathLike[str], prefix: str | None = None
) -> None:
    """Loads a network's weights out of a checkpoint file, wherever they are in it.

    The file holds a state dict, itself or under a key such as ``state_dict``, in which the network
    may be a part with a prefix (``backbone.``, ``module.``, ``visual.``). Other entries are
    ignored; every weight of the network must be there. Nothing but tensors and plain containers is
    unpickled.

    Args:
        module: The network, loaded in place.
        path: File written by ``torch.save`` or safetensors.
        prefix: Prefix of the network's weights; None finds it.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If the file cannot be read safely, or the weights are missing, of other shapes,
            or there several times.
        ImportError: If safetensors is needed and missing.

    Examples:
        >>> import tempfile
        >>> path = Path(tempfile.mkdtemp()) / "checkpoint.pt"
        >>> network = nn.Linear(2, 1)
        >>> state = {f"backbone.{key}": value for key, value in network.state_dict().items()}
        >>> torch.save({"epoch": 3, "state_dict": state}, path)
        >>> loaded = nn.Linear(2, 1)
        >>> load_checkpoint(loaded, path)
        >>> torch.equal(loaded.weight, network.weight)
        True
    """
    path = Path(path)
    state = _read_state(path)
    wanted = module.state_dict()
    if prefix is None:
        prefix = _find_prefix(wanted, state, path)
    found = {key: state[prefix + key] for key in wanted if prefix + key in state}
    missing = [prefix + key for key in wanted if key not in found]
    if missing:
        raise ValueError(
            f"{path} must have all weights of the network but lacks {_some(missing)}; it has "
            f"{_some(list(state))}. Check the model, its options, and prefix."
        )
    wrong = [key for key in wanted if found[key].shape != wanted[key].shape]
    if wrong:
        raise ValueError(
            f"{path} must have weights of the network's shapes but {prefix + wrong[0]} has "
            f"{tuple(found[wrong[0]].shape)} there, {tuple(wanted[wrong[0]].shape)} in the network; "
            "check the model and its options."
        )
    module.load_state_dict(found)


def _read_state(path: Path) -> dict[str, Tensor]:
    """Reads a state dict from a checkpoint file."""
    if not path.is_file():
        raise FileNotFoundError(f"path must be a checkpoint file but {path} does not exist.")
    if path.suffix == ".safetensors":
        try:
            content: Any = _import("safetensors.torch", "safetensors").load_file(path)
        except Exception as error:  # Its own error class is not importable on all versions.
            if isinstance(error, ImportError):
                raise
            raise ValueError(f"{path} cannot be read as safetensors: {error}") from error
    else:
        try:
            content = torch.load(path, map_location="cpu", weights_only=True)
        except (pickle.UnpicklingError, RuntimeError, EOFError, ValueError) as error:
            reason = (str(error) or type(error).__name__).splitlines()[0]
            raise ValueError(
                f"{path} cannot be read as a file of tensors: it is damaged, or holds objects that "
                "would run code when loaded; save the state dict alone, with "
                f"torch.save(network.state_dict(), ...). ({reason})"
            ) from error
    for key in ("state_dict", "model_state_dict", "model", "teacher", "ema"):
        if isinstance(content, Mapping) and isinstance(content.get(key), Mapping):
            content = content[key]
    state = (
        {str(key): value for key, value in content.items() if isinstance(value, Tensor)}
        if isinstance(content, Mapping)
        else {}
    )
    if not state:
        raise ValueError(f"{path} must hold a state dict but holds a {type(content).__name__}.")
    return state


def _find_prefix(wanted: Mapping[str, Tensor], state: Mapping[str, Tensor], path: Path) -> str:
    """Returns the prefix under which all the wanted weights are; "" if none has all."""
    if not wanted or all(key in state for key in wanted):
        return ""
    first = next(iter(wanted))
    ends = [key[: -len(first)] for key in state if key.endswith(f".{first}")]
    prefixes = [p for p in ends if all(p + key in state for key in wanted)]
    if len(prefixes) > 1:
        raise ValueError(
            f"{path} has the network's weights several times, so prefix must be given: one of "
            f"{', '.join(prefixes)}."
        )
    return prefixes[0] if prefixes else ""


def _keeps_head(layer: str | None) -> bool:
    """Tells whether a layer is (in) a classifier, by the names that libraries use."""
    return layer is not None and layer.split(".")[0] in ("fc", "head", "heads", "classifier")


def _import(module: str, package: str) -> Any:
    """Imports an optional library."""
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise ImportError(f"this teacher needs {package}: pip install {package}") from error


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


def _merge(
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
            options["crop"] = _pair(options["crop"])
        given = (own or TeacherPreprocessing())._replace(**options)
    elif given is not None and not isinstance(given, TeacherPreprocessing):
        raise TypeError(
            "preprocessing must be a TeacherPreprocessing or a mapping but is a "
            f"{type(given).__name__}."
        )
    chosen = own if given is None else given
    if chosen is not None:
        _interpolation(chosen.interpolation)
    return chosen


def _interpolation(name: str) -> str:
    """Returns the name of an interpolation after checking it."""
    if name not in _INTERPOLATIONS:
        raise ValueError(f"interpolation must be among {_INTERPOLATIONS} but is {name!r}.")
    return name


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


def _pair(size: int | Sequence[int]) -> tuple[int, int]:
    """Returns (height, width) of an int, or a list of one or two."""
    values = [size] if isinstance(size, int) else list(size)
    return (int(values[0]), int(values[-1]))


def _size(size: int | Sequence[int]) -> int | tuple[int, int]:
    """Returns the length of the shorter side of an int or a list of one, else (height, width)."""
    values = [size] if isinstance(size, int) else list(size)
    return int(values[0]) if len(values) == 1 else _pair(values)


def _some(keys: Sequence[str]) -> str:
    """Returns the first of many names."""
    return ", ".join(keys[:3]) + (f" and {len(keys) - 3} more" if len(keys) > 3 else "")
