"""Teachers from transformers."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from mvmr_loss.teachers.checkpoints import import_library, load_checkpoint, some
from mvmr_loss.teachers.preprocessing import TeacherPreprocessing, check_interpolation
from mvmr_loss.teachers.sources.request import Loaded, Request


def from_transformers(request: Request) -> Loaded:
    """Builds a vision network of transformers."""
    transformers = import_library("transformers", "transformers")
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
        raise ValueError(f"weights at {weights} lack {some(missing)}, so they would be random.")
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
        interpolation=check_interpolation(names.get(int(number), str(number))),
        floor_crop=True,
    )
