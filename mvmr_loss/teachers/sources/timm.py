"""Teachers from timm."""

from __future__ import annotations

import math
from contextlib import nullcontext
from typing import Any

from mvmr_loss.teachers.checkpoints import import_library, load_checkpoint, refusing_objects
from mvmr_loss.teachers.preprocessing import TeacherPreprocessing, check_same, pair, refusal
from mvmr_loss.teachers.sources.downloads import downloading
from mvmr_loss.teachers.sources.request import Loaded, Request


def from_timm(request: Request) -> Loaded:
    """Builds a timm network."""
    timm = import_library("timm", "timm")
    name, file = request.name("timm"), request.file()
    request.warn_if_random("timm")
    pretrained = request.weights is not None and file is None
    if pretrained and request.weights != "default":
        name = f"{name}.{request.weights}"
    # Of the hub there is the model itself.
    downloads = pretrained or name.startswith(("hf-hub:", "hf_hub:"))
    what = f"weights {request.weights} of {name}" if pretrained else name
    options = request.library_options()
    if not request.keep_head:
        options["num_classes"] = 0
    try:
        with (
            refusing_objects(f"weights of {name}"),
            downloading(what) if downloads else nullcontext(),
        ):
            network = timm.create_model(name, pretrained=pretrained, **options)
    except RuntimeError as error:
        raise ValueError(f"model and weights must be a network of timm: {error}") from error
    if file is not None:
        load_checkpoint(network, file, request.prefix)

    def preprocessing() -> TeacherPreprocessing:
        asked: dict[str, Any] = {}
        if options.get("img_size") is not None or options.get("in_chans") is not None:
            usual = timm.data.resolve_model_data_config(network)["input_size"]
            channels = options.get("in_chans") or usual[0]
            asked["input_size"] = (
                channels,
                *pair("img_size", options.get("img_size") or usual[1:]),
            )
        data = timm.data.resolve_model_data_config(network, args=asked)
        channels, *crop = data["input_size"]
        if channels != len(data["mean"]):
            raise refusal(
                f"timm's {name}",
                f"it takes {channels} channels but timm's mean and std are of {len(data['mean'])}",
            )
        scaled = tuple(math.floor(side / data["crop_pct"]) for side in crop)
        square = data["crop_mode"] == "center" and crop[0] == crop[1]
        own = TeacherPreprocessing(
            resize=scaled[0] if square else pair("resize", scaled),
            crop=pair("crop", crop),
            mean=tuple(data["mean"]),
            std=tuple(data["std"]),
            interpolation=data["interpolation"],
        )
        return check_same(f"timm's {name}", own, timm.data.create_transform(**data))

    return network, preprocessing
