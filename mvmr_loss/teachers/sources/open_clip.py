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
    tag = request.weights if file is None else None
    brings_its_own = name.startswith(("hf-hub:", "local-dir:"))
    if brings_its_own and tag is not None:
        raise ValueError(
            f"weights of {name} must be a file or None, for the model brings its own, but are {tag!r}."
        )
    if not brings_its_own:
        request.warn_if_random("open_clip")
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
    if brings_its_own and file is None:
        options.setdefault("require_pretrained", True)  # or it would be random where there are none
    what = name if tag is None else f"weights {tag} of {name}"
    downloads = tag is not None or name.startswith("hf-hub:")
    try:
        with refusing_objects(what), downloading(what) if downloads else nullcontext():
            # Its readers unpickle tensors alone, by themselves or because torch does.
            network = open_clip.create_model(name, pretrained=tag, **options).visual
    except RuntimeError as error:
        raise ValueError(f"model and weights must be a network of open_clip: {error}") from error
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
