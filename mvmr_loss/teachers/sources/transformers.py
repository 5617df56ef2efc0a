"""Teachers from transformers."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from mvmr_loss.teachers.checkpoints import (
    import_library,
    load_checkpoint,
    refusing_objects,
    some,
    without_counts,
)
from mvmr_loss.teachers.preprocessing import TeacherPreprocessing, as_pil, check_same, refusal
from mvmr_loss.teachers.sources.downloads import downloading
from mvmr_loss.teachers.sources.request import Loaded, Request


def from_transformers(request: Request) -> Loaded:
    """Builds a vision network of transformers."""
    transformers = import_library("transformers", "transformers")
    file, name = request.file(), request.model
    request.warn_if_random("transformers")
    of_hub = request.weights is not None and file is None
    weights = _folder_or_name(str(request.weights))
    try:
        if of_hub:
            options = request.library_options()
            with refusing_objects(f"weights {weights}"), _from_hub(weights):
                network = _pretrained(transformers, weights, options)
        else:
            network = transformers.AutoModel.from_config(_config(transformers, request))
    except (OSError, KeyError) as error:
        raise _unknown(error) from error
    if file is not None:
        load_checkpoint(network, file, request.prefix)
    config = network.config

    def preprocessing() -> TeacherPreprocessing:
        try:
            if of_hub:
                with _from_hub(weights):
                    processor = transformers.AutoImageProcessor.from_pretrained(
                        weights, trust_remote_code=_trusted(request.options)
                    )
            else:
                processor = _default_processor(transformers, config)
        except (OSError, KeyError) as error:
            raise _unknown(error) from error
        return _of_processor(f"transformers' {name or request.weights}", processor)

    return _TransformersVision(network), preprocessing


def _folder_or_name(weights: str) -> str:
    """Returns the path of a folder, which the library does not look for at ``~``, or a name."""
    folder = Path(weights).expanduser()
    return str(folder) if folder.is_dir() else weights


def _from_hub(weights: str) -> AbstractContextManager[None]:
    """Returns the context to load a folder, or a name of the hub, in."""
    return nullcontext() if Path(weights).is_dir() else downloading(f"weights {weights}")


def _unknown(error: Exception) -> ValueError:
    """Returns the error of weights or a model that transformers does not have."""
    return ValueError(
        "weights must be a folder or name on the hub, or model a type of network, "
        f"of transformers' vision models: {error}"
    )


def _config(transformers: Any, request: Request) -> Any:
    """Returns the configuration of a type of network."""
    name = request.name("transformers")
    if name not in transformers.CONFIG_MAPPING:
        raise ValueError(
            f"model must be a type of network of transformers, such as dinov2, but is {name!r}; "
            "the name of a network on the hub, such as facebook/dinov2-small, belongs in weights."
        )
    return transformers.AutoConfig.for_model(name, **request.options)


def _default_processor(transformers: Any, config: Any) -> Any:
    """Returns the image processor of a type of network."""
    # Given by the backend in newer versions, as a pair of slow and fast in older ones.
    classes = transformers.IMAGE_PROCESSOR_MAPPING[type(config)]
    classes = classes.values() if isinstance(classes, Mapping) else classes
    by_name = {c.__name__: c for c in classes if c is not None}
    fast = [c for n, c in by_name.items() if not n.endswith("Pil")]
    return (fast or list(by_name.values()))[0]()


def _pretrained(transformers: Any, weights: str, options: Mapping[str, Any]) -> nn.Module:
    """Loads a transformers network, all of whose weights must be in the checkpoint."""
    network: nn.Module
    # Tensors alone are unpickled, and code beside the weights is not asked for, nor about.
    options = {**options, "weights_only": True, "trust_remote_code": _trusted(options)}
    network, info = transformers.AutoModel.from_pretrained(
        weights, output_loading_info=True, **options
    )
    missing = without_counts(info["missing_keys"])
    if missing and all("pooler" in key for key in missing):
        # A pooling layer that was never trained: its output would be noise.
        network = transformers.AutoModel.from_pretrained(
            weights, add_pooling_layer=False, **options
        )
    elif missing:
        raise ValueError(f"weights at {weights} lack {some(missing)}, so they would be random.")
    return network


def _trusted(options: Mapping[str, Any]) -> bool:
    """Tells whether code that comes with weights may be run: only if the options say so."""
    return options.get("trust_remote_code") is True


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


def _of_processor(teacher: str, processor: Any) -> TeacherPreprocessing:
    """Returns what an image processor of transformers does: sizes as it says, colours as it does."""

    def run(image: Any) -> Any:
        pixels = processor(image, return_tensors="pt")["pixel_values"]
        return pixels[0] if len(pixels) == 1 else pixels

    def option(name: str, default: Any = None) -> Any:
        value = getattr(processor, name, default)
        return default if value is None else value

    names = {0: "nearest", 2: "bilinear", 3: "bicubic"}
    resize: int | tuple[int, int] | None = None
    crop: tuple[int, int] | None = None
    wanted = dict(option("size", {}))
    if option("do_resize", False):
        if wanted.get("shortest_edge"):
            resize = int(wanted["shortest_edge"])
            # ConvNeXT's: small sizes are resized larger and cropped, large ones squeezed.
            percentage = option("crop_pct")
            if percentage and resize < 384:
                resize, crop = int(resize / percentage), (resize, resize)
            elif percentage:
                resize = (resize, resize)
        elif wanted.get("height") and wanted.get("width"):
            resize = (int(wanted["height"]), int(wanted["width"]))
        else:
            raise refusal(teacher, f"the image processor's size {wanted} is unknown")
    if option("do_center_crop", False):
        cropped = dict(option("crop_size", {}))
        if not (cropped.get("height") and cropped.get("width")):
            raise refusal(teacher, f"the image processor's crop_size {cropped} is unknown")
        crop = (int(cropped["height"]), int(cropped["width"]))
    mean, std, flip = _colors(teacher, run)
    number = option("resample", 2)
    own = TeacherPreprocessing(
        resize=resize,
        crop=crop,
        mean=mean,
        std=std,
        interpolation=names.get(int(number), str(number)),
        floor_crop=True,
        flip_channels=flip,
    )
    return check_same(teacher, own, run)


def _colors(
    teacher: str, run: Callable[[Any], Any]
) -> tuple[tuple[float, ...], tuple[float, ...], bool]:
    """Returns mean, standard deviation and whether channels are flipped, by plain images."""
    plain = torch.zeros(4, 3, 64, 64, dtype=torch.uint8)  # Black, red, green, blue.
    for channel in range(3):
        plain[1 + channel, channel] = 255
    try:
        results = [run(as_pil(image)) for image in plain]
        values = torch.stack([r[:, r.shape[1] // 2, r.shape[2] // 2] for r in results]).double()
        black, slopes = values[0], values[1:] - values[0]
        if tuple(slopes.shape) != (3, 3):
            raise ValueError(f"it gives {tuple(results[0].shape)} of an image of 64 x 64 pixels")
    except Exception as error:  # Whatever the library raises.
        raise refusal(teacher, f"the image processor cannot be run here ({error})") from error
    flip = bool(slopes[0, 0] == 0)
    scale = (slopes.flip(0) if flip else slopes).diagonal()
    if not bool((scale > 0).all()):
        raise refusal(teacher, "the image processor mixes the channels")
    # Float32's noise is rounded off.
    std = tuple(float(f"{1 / s:.7g}") for s in scale.tolist())
    mean = tuple(
        round(-b / s, 7) + 0.0 for b, s in zip(black.tolist(), scale.tolist(), strict=True)
    )
    return mean, std, flip
