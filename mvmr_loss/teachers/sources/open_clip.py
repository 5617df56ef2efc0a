"""Teachers from open_clip."""

from __future__ import annotations

from contextlib import nullcontext

from mvmr_loss.teachers.checkpoints import import_library, load_checkpoint, refusing_objects
from mvmr_loss.teachers.preprocessing import TeacherPreprocessing, check_same, pair
from mvmr_loss.teachers.sources.downloads import downloading
from mvmr_loss.teachers.sources.request import Loaded, Request


def from_open_clip(request: Request) -> Loaded:
    """Builds the image tower of an open_clip model."""
    open_clip = import_library("open_clip", "open_clip_torch")
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
    options = request.library_options()
    with (
        refusing_objects(name if tag is None else f"weights {tag} of {name}"),
        nullcontext() if tag is None else downloading(f"weights {tag} of {name}"),
    ):
        # Its readers unpickle tensors alone, by themselves or because torch does.
        network = open_clip.create_model(name, pretrained=tag, **options).visual
    if file is not None:
        load_checkpoint(network, file, request.prefix)

    def preprocessing() -> TeacherPreprocessing:
        wanted = dict(network.preprocess_cfg)
        crop = pair("crop", wanted["size"])
        shortest = wanted["resize_mode"] == "shortest" and crop[0] == crop[1]
        own = TeacherPreprocessing(
            resize=crop[0] if shortest else crop,
            crop=crop,
            mean=tuple(wanted["mean"]),
            std=tuple(wanted["std"]),
            interpolation=wanted["interpolation"],
        )
        transform = import_library("open_clip.transform", "open_clip_torch")
        librarys = transform.image_transform_v2(transform.PreprocessCfg(**wanted), is_train=False)
        return check_same(f"open_clip's {name}", own, librarys)

    return network, preprocessing
