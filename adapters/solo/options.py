"""The settings of a solo-learn configuration that concern MV-MR: defaults, checks, meaning."""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, ListConfig, OmegaConf
from torch import Tensor, nn

from mvmr_loss import MultiRepresentationRegularizer, MVMRLoss, MVMRProjectionHead, Representations
from mvmr_loss.cache import (
    CachedRepresentations,
    RepresentationCache,
    dataset_fingerprint,
)
from mvmr_loss.representations.registry import representation_class

# The node of the configuration that adds the representation terms to another method.
REGULARIZER = "mvmr_regularizer"

# What the authors' release trains with.
PAPER_REPRESENTATIONS = ("pixels", "scattering", "augmented_pixels", "hog", "local_std")

_RANDOM = (
    "color_jitter",
    "grayscale",
    "gaussian_blur",
    "solarization",
    "equalization",
    "horizontal_flip",
)


class SoloConfigError(AssertionError, ValueError):
    """A setting is wrong: an AssertionError, as solo-learn refuses its own, and a ValueError."""


def _keywords(function: Any) -> dict[str, Any]:
    """Returns keyword-only argument -> default."""
    parameters = inspect.signature(function).parameters.values()
    return {p.name: p.default for p in parameters if p.kind is inspect.Parameter.KEYWORD_ONLY}


LOSS_OPTIONS = _keywords(MVMRLoss)
REGULARIZER_OPTIONS = {"weights": 1.0, **_keywords(MultiRepresentationRegularizer)}
# A gradient to the images would go nowhere.
EXTRACTION_OPTIONS = {k: v for k, v in _keywords(Representations).items() if k != "differentiable"}

METHOD_DEFAULTS: dict[str, Any] = {
    "proj_hidden_dim": inspect.signature(MVMRProjectionHead).parameters["hidden_dim"].default,
    "proj_output_dim": inspect.signature(MVMRProjectionHead).parameters["output_dim"].default,
    "proj_num_layers": inspect.signature(MVMRProjectionHead).parameters["num_layers"].default,
    **LOSS_OPTIONS,
    "representations": list(PAPER_REPRESENTATIONS),
    **EXTRACTION_OPTIONS,
    "cache": None,
    "fill_cache": False,
}
REGULARIZER_DEFAULTS: dict[str, Any] = {
    **REGULARIZER_OPTIONS,
    "embeddings": "z",
    "representations": None,  # those of the paper or, without images, all of the cache
    **EXTRACTION_OPTIONS,
    "cache": None,
    "fill_cache": False,
}


def filled(given: object, defaults: Mapping[str, Any], node: str) -> dict[str, Any]:
    """Returns a node's settings with the defaults filled in.

    Args:
        given: The node, a mapping, or None.
        defaults: Every option and its default.
        node: The node's name, for errors.

    Returns:
        Option -> value, plain Python values.

    Raises:
        SoloConfigError: If the node is not a mapping or names an option that does not exist.

    Examples:
        >>> filled({"weights": 0.5}, {"weights": 1.0, "embeddings": "z"}, "mvmr_regularizer")
        {'weights': 0.5, 'embeddings': 'z'}
    """
    if isinstance(given, DictConfig):
        given = OmegaConf.to_container(given, resolve=True)
    given = {} if given is None else given
    if not isinstance(given, Mapping):
        raise SoloConfigError(f"{node} must be a mapping of options but is {given!r}.")
    unknown = [name for name in given if name not in defaults]
    if unknown:
        raise SoloConfigError(
            f"{node} has no option {unknown[0]!r}; its options are {', '.join(defaults)}."
        )
    return {**defaults, **given}


def check_method_options(given: object) -> dict[str, Any]:
    """Returns ``method_kwargs`` of ``method: mvmr``, filled and checked.

    Args:
        given: The node, a mapping, or None.

    Returns:
        Every option of the loss, the projector and the representations.

    Raises:
        SoloConfigError: If an option does not exist or its value is of a wrong type or range.

    Examples:
        >>> options = check_method_options({"proj_output_dim": 512, "representations": ["pixels"]})
        >>> options["proj_hidden_dim"], options["proj_output_dim"], options["invariance_weight"]
        (8192, 512, 1.0)
    """
    node = "method_kwargs"
    options = filled(given, METHOD_DEFAULTS, node)
    for name in ("proj_hidden_dim", "proj_output_dim", "proj_num_layers"):
        value = options[name]
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            raise SoloConfigError(f"{node}.{name} must be an int of at least 1 but is {value!r}.")
    _check_switches(options, node)
    try:
        MVMRLoss(**chosen(options, LOSS_OPTIONS))
    except (TypeError, ValueError) as error:
        raise SoloConfigError(f"{node}: {error}") from error
    _check_representations(options, node)
    return options


def check_regularizer_options(given: object) -> dict[str, Any]:
    """Returns the node ``mvmr_regularizer``, filled and checked.

    Args:
        given: The node, a mapping, or None.

    Returns:
        Every option of the regulariser and the representations.

    Raises:
        SoloConfigError: If an option does not exist or its value is of a wrong type or range.

    Examples:
        >>> check_regularizer_options({"representations": ["pixels"]})["embeddings"]
        'z'
    """
    options = filled(given, REGULARIZER_DEFAULTS, REGULARIZER)
    if not isinstance(options["embeddings"], str):
        raise SoloConfigError(
            f"{REGULARIZER}.embeddings must name an output of the method's forward, such as 'z' or "
            f"'feats', but is {options['embeddings']!r}."
        )
    _check_switches(options, REGULARIZER)
    try:
        MultiRepresentationRegularizer(**chosen(options, REGULARIZER_OPTIONS))
    except (TypeError, ValueError) as error:
        raise SoloConfigError(f"{REGULARIZER}: {error}") from error
    if options["representations"] is not None:
        _check_representations(options, REGULARIZER)
    if options["representations"] == []:
        raise SoloConfigError(
            f"{REGULARIZER}.representations must name at least one representation but is empty."
        )
    return options


def chosen(options: Mapping[str, Any], names: Mapping[str, Any]) -> dict[str, Any]:
    """Returns those of the options that are named.

    Examples:
        >>> chosen({"weights": 1.0, "cache": None}, REGULARIZER_OPTIONS)
        {'weights': 1.0}
    """
    return {name: value for name, value in options.items() if name in names}


def _check_switches(options: Mapping[str, Any], node: str) -> None:
    """Raises unless what is on or off is a bool (any string would count as on)."""
    for name in ("gather_distributed", "fill_cache"):
        if not isinstance(options[name], bool):
            raise SoloConfigError(f"{node}.{name} must be True or False but is {options[name]!r}.")


def _check_representations(options: Mapping[str, Any], node: str) -> None:
    """Raises if a representation is unknown, without building any: a teacher is loaded at fit."""
    specification = options["representations"]
    named: list[Any]
    if isinstance(specification, Mapping):
        named = [(value or {}).get("name", key) for key, value in specification.items()]
    elif isinstance(specification, Sequence) and not isinstance(specification, str):
        named = [i.get("name", "") if isinstance(i, Mapping) else i for i in specification]
    else:
        raise SoloConfigError(
            f"{node}.representations must be a list of names or a mapping from name to options "
            f"but is {specification!r}."
        )
    try:
        for name in named:
            representation_class(name)
    except ValueError as error:
        raise SoloConfigError(f"{node}.representations: {error}") from error
    cache = options["cache"]
    if cache is not None and not isinstance(cache, str):
        raise SoloConfigError(f"{node}.cache must be a path but is {cache!r}.")


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
    """Raises unless the first pipeline is non-augmented and the second one augmented.

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
    for name in ("representations", "fill_cache"):
        if options[name]:
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
        options = check_method_options(OmegaConf.select(cfg, "method_kwargs"))
    elif regularized:
        options = check_regularizer_options(cfg[REGULARIZER])
        check_regularizer_pipelines(cfg.augmentations, options)
    else:
        return
    _check_cache_exists(options)


def _check_cache_exists(options: Mapping[str, Any]) -> None:
    """Raises if the store is not there and shall not be made."""
    if options["cache"] is None or options["fill_cache"] or Path(options["cache"]).exists():
        return
    raise SoloConfigError(
        "cache must be the folder of a store of representations but there is none at "
        f"{options['cache']!r}; set fill_cache to True to have it made and filled in the first "
        "epoch, or leave cache out."
    )


def taken_out(state: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    """Takes what belongs to one module out of a state dict.

    The representations are built when training starts, after a checkpoint was loaded: their state,
    such as how many augmentations were drawn, is kept until then.

    Args:
        state: Name -> tensor; what is taken is removed.
        prefix: The module's name and a dot.

    Returns:
        Name within the module -> tensor.

    Examples:
        >>> import torch
        >>> state = {"projector.weight": torch.ones(1), "representations.drawn": torch.ones(1)}
        >>> list(taken_out(state, "representations.")), list(state)
        (['drawn'], ['projector.weight'])
    """
    names = [name for name in state if name.startswith(prefix)]
    return {name.removeprefix(prefix): state.pop(name) for name in names}


class _Live(nn.Module):
    """Representations computed from the images, in the form of cached ones."""

    def __init__(self, representations: Representations) -> None:
        super().__init__()
        self.representations = representations

    def forward(self, images: Tensor, indices: Tensor) -> dict[str, Tensor]:
        representations: dict[str, Tensor] = self.representations(images)
        return representations


def representation_source(
    options: Mapping[str, Any], dataset: Any = None, *, has_images: bool = True
) -> nn.Module | None:
    """Builds what turns images and sample indexes into representations.

    Args:
        options: Filled options with ``representations``, ``cache`` and ``fill_cache``.
        dataset: The data set whose samples the indexes count; needed with a cache.
        has_images: Whether non-augmented images will be given. Without, everything in the store is
            read, and ``representations`` is not looked at.

    Returns:
        A module called with images (N, C, H, W), or None, and sample indexes (N,), which returns
        name -> tensor of shape (N, D_k); None where no representation is wanted.

    Raises:
        SoloConfigError: If the representations cannot be built, or the store is missing or does not
            belong to them and the data set.

    Examples:
        >>> import torch
        >>> options = check_method_options({"representations": ["pixels"]})
        >>> source = representation_source(options)
        >>> source(torch.rand(4, 3, 8, 8), torch.arange(4))["pixels"].shape
        torch.Size([4, 192])
    """
    specification = options["representations"]
    if specification is None:
        specification = PAPER_REPRESENTATIONS
    if not specification:
        return None
    _check_cache_exists(options)
    try:
        representations = None
        if has_images:
            extraction = chosen(options, EXTRACTION_OPTIONS)
            representations = Representations(specification, **extraction)
        if options["cache"] is not None:
            return _cached(representations, Path(options["cache"]), dataset)
    except (TypeError, ValueError) as error:
        raise SoloConfigError(f"representations: {error}") from error
    assert representations is not None
    return _Live(representations)


def _cached(representations: Representations | None, path: Path, dataset: Any) -> nn.Module:
    """Opens or creates a store of a data set's representations."""
    if not hasattr(dataset, "__len__"):
        raise ValueError(
            f"cache needs a data set with a length and sample indexes but the loader's is {dataset!r}"
            "; use data.format image_folder."
        )
    settings = RepresentationCache(path).settings if (path / "metadata.json").exists() else None
    identity: dict[str, Any] = {"num_samples": len(dataset)}
    # What an existing store was not told cannot be compared. The normalisation is found nowhere in
    # solo-learn's configuration, but a wrong one shows in the features, which are compared.
    if settings is None or settings.get("fingerprint") is not None:
        identity["fingerprint"] = dataset_fingerprint(dataset)
    if settings is not None:
        identity["normalization"] = settings.get("normalization")
    return CachedRepresentations(representations, path, **identity)
