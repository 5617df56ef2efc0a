"""MV-MR inside other frameworks; each adapter imports its host, and nothing else does.

Here is what all hosts share: defaults, and one meaning of the options ``cache`` and ``fill_cache``.
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from mvmr_loss import DistillationLoss, LossComponents, MVMRLoss, preset_settings
from mvmr_loss.cache.metadata import is_store

# Where a host trains in several processes, the loss is that of the whole batch unless told
# otherwise: with it, a batch means the same on one device and on eight.
GATHER_DISTRIBUTED = True
# Side of the images by which widths are told where it is not known; in larger ones they are the same,
# as sketches.
IMAGE_SIZE = 224


def check_filled(cache: Any, fill_cache: bool) -> None:
    """Raises if a store is to be filled and none is named.

    Args:
        cache: What :class:`~mvmr_loss.Representations` takes.
        fill_cache: Whether the store is made if there is none, and filled in the first epoch.

    Raises:
        ValueError: If ``cache`` is missing.
    """
    if fill_cache and cache is None:
        raise ValueError("cache must be a folder where fill_cache is True but is None.")


def check_cache(cache: str | os.PathLike[str] | Mapping[str, Any] | None, fill_cache: bool) -> None:
    """Raises unless the store of a host's option ``cache`` is there, or there shall be one or none.

    Args:
        cache: What :class:`~mvmr_loss.Representations` takes.
        fill_cache: Whether the store is made if there is none, and filled in the first epoch.

    Raises:
        ValueError: If it is missing.
    """
    check_filled(cache, fill_cache)
    path = cache.get("path") if isinstance(cache, Mapping) else cache
    # What is no path Representations refuses.
    if isinstance(path, (str, os.PathLike)) and not fill_cache and not is_store(path):
        raise ValueError(
            "cache must be the folder of a store of representations but there is none at "
            f"{os.fspath(path)!r}; set fill_cache to True to have it made and filled in the first "
            "epoch, or leave cache out."
        )


def with_preset(
    name: str, representations: Any, sketch_dim: int | None, distillation: Any
) -> tuple[Any, int | None]:
    """Fills in from a preset what a host was not told of the representations.

    Args:
        name: The preset's name.
        representations: What :class:`~mvmr_loss.Representations` is built from; None: the preset's.
        sketch_dim: Width of their sketches; None: the preset's, if it distils them and no teacher is
            said to be wider.
        distillation: Options of :class:`~mvmr_loss.DistillationLoss` in the place of the preset's.

    Returns:
        Representations and width of their sketches, filled in.

    Raises:
        ValueError: If there is no preset of that name; or it distils representations that are a
            module of one's own, whose widths are not known, or teachers that are not named.

    Examples:
        >>> with_preset("features", ["hog"], None, None)
        (['hog'], 1024)
    """
    preset = preset_settings(name)
    if representations is None:
        representations = list(preset.representations)
    named = isinstance(representations, nn.Module) or bool(representations)
    if not named and not preset.representations:
        raise ValueError(
            f"representations must name a teacher with preset {name!r}, such as [{{'name': 'teacher', "
            "'source': 'timm', 'model': 'resnet50', 'weights': 'default'}], but are empty."
        )
    if preset.distillation is None:
        return representations, sketch_dim
    dims = distillation.get("teacher_dims") if isinstance(distillation, Mapping) else None
    if isinstance(representations, nn.Module):
        if dims is None:
            raise ValueError(
                "distillation must say its teacher_dims where representations are a module and the "
                f"preset is {name!r}, but is {distillation!r}."
            )
    elif sketch_dim is None and preset.sketch_dim is not None:
        widths = dims.values() if isinstance(dims, Mapping) else ()
        if not any(isinstance(width, int) and width > preset.sketch_dim for width in widths):
            sketch_dim = preset.sketch_dim
    return representations, sketch_dim


def preset_distillation(
    name: str, distillation: Any, sizes: Callable[[], Mapping[str, int]]
) -> Any:
    """Fills in from a preset what a host was not told of the distillation.

    Args:
        name: The preset's name.
        distillation: Options of :class:`~mvmr_loss.DistillationLoss` in the place of the preset's.
        sizes: Tells each representation's width, which is called only if ``teacher_dims`` are needed.

    Returns:
        The options; None: nothing is distilled.

    Raises:
        TypeError: If an option is unknown.
        ValueError: If there are options but no representations.

    Examples:
        >>> preset_distillation("features", None, lambda: {"hog": 648})["teacher_dims"]
        {'hog': 648}
        >>> preset_distillation("features", None, dict)  # of no representations
    """
    preset = preset_settings(name).distillation
    if not isinstance(distillation, Mapping | None) or preset is None is distillation:
        return distillation
    given = dict(distillation or {})
    known = ["teacher_dims", *(DistillationLoss.__init__.__kwdefaults__ or {})]
    for option in given:
        if option not in known:
            raise TypeError(
                f"distillation has no option {option!r}; its options are {', '.join(known)}."
            )
    if "teacher_dims" not in given:
        widths = dict(sizes())
        if not widths and given:
            raise ValueError(
                "distillation must be left out without representations, which it distils, but is "
                f"{distillation!r}."
            )
        if not widths:
            return None
        given = {"teacher_dims": widths, **given}
    return {**(preset or {}), **given}


def check_teachers(names: Iterable[str] | None, teachers: Iterable[str]) -> None:
    """Raises if something is to be distilled that is not among the representations.

    Args:
        names: The representations'; None where they are not known.
        teachers: The names of those that are distilled.

    Raises:
        ValueError: If a name is unknown.

    Examples:
        >>> check_teachers(["hog", "teacher"], ["teacher"])
    """
    for teacher in teachers:
        if names is not None and teacher not in names:
            raise ValueError(
                "teacher_dims of the distillation must name representations, which are "
                f"{', '.join(map(repr, names)) or 'none'}, but names {teacher!r}."
            )


# What of the loss is about representations, and what says it where they meet the features.
_ABOUT_REPRESENTATIONS = {
    "representation_weights": "'dependence_weight' or 'regression_weight'",
    "representation_views": "nothing, for all views meet them",
    "dependence_measure": "'dependence_measure'",
}


def check_loss_options(
    preset: str, loss: Mapping[str, Any], names: Iterable[str] | None, teachers: Iterable[str]
) -> None:
    """Raises if the loss is told what has no effect on representations, or not told what is needed.

    Args:
        preset: The preset's name.
        loss: Options of :class:`~mvmr_loss.MVMRLoss` in the place of the preset's.
        names: The representations'; None where they are not known.
        teachers: The names of those that are distilled.

    Raises:
        ValueError: If all representations meet the features and an option other than the preset's would
            have no effect; or if one is no teacher, and the preset has no weight for it.

    Examples:
        >>> check_loss_options("features", {"representation_weights": 0.5}, ["hog", "dct"], ["hog"])
    """
    settings = preset_settings(preset)
    told = {**(MVMRLoss.__init__.__kwdefaults__ or {}), **settings.loss}
    others = sorted(set(names or ()) - set(teachers))
    if others and told["representation_weights"] == 0 and "representation_weights" not in loss:
        raise ValueError(
            f"representation_weights must be given with preset {preset!r} for {', '.join(others)}, not "
            "named by teacher_dims of the distillation: it has no weight for what is no teacher."
        )
    if not names or others:
        return
    for name, instead in _ABOUT_REPRESENTATIONS.items():
        used = name == "dependence_measure" and {**told, **loss}["dependence_weight"] != 0
        # A weight of 0 says what is the case.
        if name in loss and loss[name] not in (told[name], 0) and not used:
            where = f"with preset {preset!r}" if settings.distillation else "with this distillation"
            raise ValueError(
                f"{name} must be left out {where}, whose representations all meet the features and not "
                f"the embeddings, but is {loss[name]!r}; in distillation it is {instead}."
            )


def fixed(representations: nn.Module, *arguments: Any) -> dict[str, Tensor]:
    """Computes representations in eval mode and without a gradient, as a teacher is.

    A host sets all that it holds to training: the statistics of a network of one's own would drift.

    Args:
        representations: A :class:`~mvmr_loss.Representations`, or a module of one's own like it.
        *arguments: Of its call.

    Returns:
        Name -> representation of the images, shape (N, E).
    """
    if any(module.training for module in representations.modules()):
        representations.eval()
    with torch.no_grad():
        values: dict[str, Tensor] = representations(*arguments)
    return values


def distil(
    distillation: DistillationLoss | None,
    features: Sequence[Tensor],
    represented: Mapping[str, Tensor],
) -> tuple[LossComponents | None, Mapping[str, Tensor]]:
    """Computes what a training step adds on the backbone's features.

    Args:
        distillation: The loss, or None.
        features: Of each view, shape (N, D).
        represented: Name -> representation of the images, shape (N, E).

    Returns:
        Its terms, or None; the representations that are not its teachers.

    Raises:
        ValueError: If a teacher is missing, or of another width.
    """
    if distillation is None:
        return None, represented
    dims = distillation.teacher_dims
    widths = {
        name: math.prod(represented[name].shape[1:])
        for name in dims
        if isinstance(represented.get(name), Tensor)
    }
    if {**dims, **widths} != dims:
        raise ValueError(
            f"teacher_dims of the distillation must be {widths} for these images but are {dims}; give "
            f"distillation={{'teacher_dims': {widths}}}."
        )
    teachers, others = distillation.split(represented)
    components = distillation.forward_components(features, teachers)
    distillation.update(features, teachers)
    return components, others


def freeze_unused(
    projector: nn.Module,
    criterion: MVMRLoss,
    distillation: DistillationLoss | None,
    names: Iterable[str] | None,
) -> None:
    """Has no gradient of a projector whose embeddings no term of the loss has a weight for.

    DistributedDataParallel waits for the gradient of whatever asks for one, and fails without.

    Args:
        projector: From the backbone's features to embeddings.
        criterion: The loss of the embeddings.
        distillation: What is added on the features, or None.
        names: The representations'; None where they are not known.

    Examples:
        >>> projector = nn.Linear(2, 2)
        >>> nothing = dict.fromkeys(("invariance_weight", "variance_weight", "dependence_weight"), 0)
        >>> freeze_unused(projector, MVMRLoss(**nothing), None, ["hog"])
        >>> projector.weight.requires_grad
        True
        >>> freeze_unused(projector, MVMRLoss(**nothing), None, [])
        >>> projector.weight.requires_grad
        False
    """
    teachers = () if distillation is None else distillation.teacher_dims
    weights = criterion.representation_weights
    if names is None:
        met = list(weights.values()) if isinstance(weights, dict) else [weights]
    else:
        others = [name for name in names if name not in teachers]
        met = [weights.get(n, 0.0) if isinstance(weights, dict) else weights for n in others]
    own = ("invariance", "variance", "dependence", "identity", "covariance")
    if not any([*(getattr(criterion, f"{name}_weight") for name in own), *met]):
        projector.requires_grad_(False)
