"""Checks of a whole pretraining configuration: its pipelines, its options, its store."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from omegaconf import DictConfig, ListConfig, OmegaConf

from .. import check_cache  # noqa: TID252 - of the same checkout
from .options import (
    EXTRACTION_OPTIONS,
    REGULARIZER,
    REGULARIZER_DEFAULTS,
    SoloConfigError,
    check_method_options,
    check_regularizer_options,
)

_RANDOM = (
    "color_jitter",
    "grayscale",
    "gaussian_blur",
    "solarization",
    "equalization",
    "horizontal_flip",
)


def is_non_augmented(pipeline: DictConfig) -> bool:
    """Tells whether a pipeline of ``augmentations`` only resizes and normalises.

    Examples:
        >>> is_non_augmented(OmegaConf.create({"rrc": {"enabled": False}, "crop_size": 96}))
        True
        >>> is_non_augmented(OmegaConf.create({"rrc": {"enabled": True}, "crop_size": 96}))
        False
    """
    return not _randomness(pipeline)


def _randomness(pipeline: DictConfig) -> list[str]:
    """Returns what a pipeline does at random."""
    found = ["rrc.enabled"] if OmegaConf.select(pipeline, "rrc.enabled", default=False) else []
    probabilities = [f"{name}.prob" for name in _RANDOM]
    return found + [p for p in probabilities if OmegaConf.select(pipeline, p, default=0.0)]


def check_pipelines(augmentations: ListConfig) -> None:
    """Raises unless the first pipeline is non-augmented and all others are augmented.

    solo-learn counts the crops of the first pipeline's size as large and allows two of them.
    Further augmented views are its small crops: further pipelines of another size.

    Args:
        augmentations: The pipelines of the configuration.

    Raises:
        SoloConfigError: If their number, order, crop sizes or numbers of crops are others.

    Examples:
        >>> plain = {"rrc": {"enabled": False}, "crop_size": 96, "num_crops": 1}
        >>> check_pipelines(OmegaConf.create([plain, {**plain, "rrc": {"enabled": True}}]))
    """
    if len(augmentations) < 2:
        raise SoloConfigError(
            "augmentations must hold at least two pipelines for method 'mvmr', the non-augmented "
            f"one and then an augmented one, but holds {len(augmentations)}; see the shipped "
            "configurations mvmr_*.yaml."
        )
    first, second, *more = augmentations
    if _randomness(first):
        elsewhere = [i for i, p in enumerate(augmentations) if is_non_augmented(p)]
        remedy = (
            f"augmentations[{elsewhere[0]}] is: put it first."
            if elsewhere
            else "set rrc.enabled to False and every prob to 0 in it."
        )
        raise SoloConfigError(
            "augmentations[0] must be the non-augmented pipeline for method 'mvmr' but has "
            f"{', '.join(_randomness(first))}; {remedy}"
        )
    for i, pipeline in enumerate(augmentations[1:], start=1):
        if is_non_augmented(pipeline):
            raise SoloConfigError(
                f"augmentations[{i}] must be an augmented pipeline for method 'mvmr' but only resizes "
                "and normalises; set rrc.enabled to True or a prob above 0 in it."
            )
    if second.crop_size != first.crop_size:
        raise SoloConfigError(
            "augmentations[1].crop_size must equal augmentations[0].crop_size, "
            f"{first.crop_size}, but is {second.crop_size}; only further augmented pipelines may "
            "have another crop size."
        )
    if first.num_crops != 1 or second.num_crops != 1:
        raise SoloConfigError(
            "num_crops must be 1 in augmentations[0] and augmentations[1] for method 'mvmr' but is "
            f"{first.num_crops} and {second.num_crops}; give further augmented views a pipeline of "
            "another crop size."
        )
    for i, pipeline in enumerate(more, start=2):
        if pipeline.crop_size == first.crop_size:
            raise SoloConfigError(
                f"augmentations[{i}].crop_size must not be {first.crop_size} as that of the first "
                "two, for solo-learn allows two crops of one size; choose another, even "
                f"{first.crop_size - 1}."
            )


def has_non_augmented_view(augmentations: ListConfig) -> bool:
    """Tells whether the last pipeline is the regulariser's non-augmented view.

    It is, if it only resizes and normalises and its crop size is not that of the first pipeline.

    Examples:
        >>> plain = {"rrc": {"enabled": False}, "crop_size": 95, "num_crops": 1}
        >>> augmented = {"rrc": {"enabled": True}, "crop_size": 96, "num_crops": 2}
        >>> has_non_augmented_view(OmegaConf.create([augmented, plain]))
        True
    """
    first, last = augmentations[0], augmentations[-1]
    return is_non_augmented(last) and bool(last.crop_size != first.crop_size)


def check_regularizer_pipelines(augmentations: ListConfig, options: Mapping[str, Any]) -> None:
    """Raises unless the regulariser can get its representations.

    Args:
        augmentations: The pipelines of the configuration.
        options: The filled options of the regulariser.

    Raises:
        SoloConfigError: If there is neither a non-augmented view nor a cache, or something must be
            computed without the view.

    Examples:
        >>> augmented = {"rrc": {"enabled": True}, "crop_size": 96, "num_crops": 2}
        >>> options = check_regularizer_options({"cache": "features"})
        >>> check_regularizer_pipelines(OmegaConf.create([augmented]), options)
    """
    if has_non_augmented_view(augmentations):
        if augmentations[-1].num_crops != 1:
            raise SoloConfigError(
                f"num_crops of the last pipeline must be 1 for {REGULARIZER} but is "
                f"{augmentations[-1].num_crops}."
            )
        return
    if options["cache"] is None:
        size = augmentations[0].crop_size
        raise SoloConfigError(
            f"{REGULARIZER} needs the non-augmented image or a cache: append to augmentations a "
            "pipeline with rrc.enabled False, every prob 0, num_crops 1 and a crop_size other than "
            f"{size} (solo-learn allows two crops of one size), or set {REGULARIZER}.cache."
        )
    for name in ("representations", *EXTRACTION_OPTIONS, "fill_cache"):
        if name != "cache" and options[name] != REGULARIZER_DEFAULTS[name]:
            raise SoloConfigError(
                f"{REGULARIZER}.{name} must be left out without a non-augmented pipeline, where all "
                f"that is in the cache is read and nothing is computed, but is {options[name]!r}."
            )


def check_pretraining(cfg: DictConfig) -> None:
    """Checks what a pretraining configuration says of MV-MR, before solo-learn's own checks.

    Args:
        cfg: The whole configuration. One that neither pretrains ``mvmr`` nor carries the
            regulariser passes.

    Raises:
        SoloConfigError: If a setting is wrong or a cache is missing.

    Examples:
        >>> check_pretraining(OmegaConf.create({"method": "vicreg"}))
    """
    regularized = OmegaConf.select(cfg, REGULARIZER) is not None
    if cfg.method == "mvmr":
        if regularized:
            raise SoloConfigError(
                f"{REGULARIZER} must not be given with method 'mvmr', which has these terms: use "
                "method_kwargs.representations and method_kwargs.representation_weights."
            )
        check_pipelines(cfg.augmentations)
        size = cfg.augmentations[0].crop_size
        options = check_method_options(OmegaConf.select(cfg, "method_kwargs"), size)
    elif regularized:
        options = check_regularizer_options(cfg[REGULARIZER])
        check_regularizer_pipelines(cfg.augmentations, options)
    else:
        return
    try:
        check_cache(options["cache"], options["fill_cache"])
    except ValueError as error:
        raise SoloConfigError(str(error)) from error
