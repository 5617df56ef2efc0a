"""Teachers from timm."""

from __future__ import annotations

import math

from mvmr_loss.teachers.checkpoints import import_library, load_checkpoint
from mvmr_loss.teachers.preprocessing import TeacherPreprocessing, check_interpolation
from mvmr_loss.teachers.sources.request import Loaded, Request


def from_timm(request: Request) -> Loaded:
    """Builds a timm network."""
    timm = import_library("timm", "timm")
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
        interpolation=check_interpolation(data["interpolation"]),
    )
