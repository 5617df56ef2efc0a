"""The options of MV-MR in a solo-learn configuration: their names, defaults and ranges."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from typing import Any

from omegaconf import DictConfig, OmegaConf

from mvmr_loss import (
    DistillationLoss,
    MultiRepresentationRegularizer,
    MVMRLoss,
    MVMRProjectionHead,
    Normalization,
    Representations,
    preset_settings,
)
from mvmr_loss._checks import check_bool, check_int
from mvmr_loss.representations.registry import labelled, representation_class

from .. import (  # noqa: TID252 - of the same checkout
    GATHER_DISTRIBUTED,
    IMAGE_SIZE,
    check_loss_options,
    check_teachers,
    preset_distillation,
    with_preset,
)

# The node of the configuration that adds the representation terms to another method.
REGULARIZER = "mvmr_regularizer"


class SoloConfigError(AssertionError, ValueError):
    """A setting is wrong: an AssertionError, as solo-learn refuses its own, and a ValueError."""


def _keywords(function: Any, **others: Any) -> dict[str, Any]:
    """Returns keyword-only argument -> default, some of which are others here."""
    parameters = inspect.signature(function).parameters.values()
    keywords = {p.name: p.default for p in parameters if p.kind is inspect.Parameter.KEYWORD_ONLY}
    return {**keywords, **others}


LOSS_OPTIONS = _keywords(MVMRLoss, gather_distributed=GATHER_DISTRIBUTED)
REGULARIZER_OPTIONS = {
    "weights": 1.0,
    **_keywords(MultiRepresentationRegularizer, gather_distributed=GATHER_DISTRIBUTED),
}
# None is the normalisation of solo-learn's pipeline.
EXTRACTION_OPTIONS = _keywords(Representations, normalization=None)
del EXTRACTION_OPTIONS["differentiable"]  # a gradient to the images would go nowhere

METHOD_DEFAULTS: dict[str, Any] = {
    "proj_hidden_dim": inspect.signature(MVMRProjectionHead).parameters["hidden_dim"].default,
    "proj_output_dim": inspect.signature(MVMRProjectionHead).parameters["output_dim"].default,
    "proj_num_layers": inspect.signature(MVMRProjectionHead).parameters["num_layers"].default,
    "preset": "paper",
    **dict.fromkeys(LOSS_OPTIONS),  # None is the preset's
    "gather_distributed": GATHER_DISTRIBUTED,
    "distillation": None,  # the preset's
    "representations": None,  # the preset's
    **EXTRACTION_OPTIONS,
    "fill_cache": False,
}
REGULARIZER_DEFAULTS: dict[str, Any] = {
    **REGULARIZER_OPTIONS,
    "embeddings": "z",
    "representations": None,  # those of the paper or, without images, all of the cache
    **EXTRACTION_OPTIONS,
    "fill_cache": False,
}


def with_defaults(given: object, defaults: Mapping[str, Any], node: str) -> dict[str, Any]:
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
        >>> with_defaults({"weights": 0.5}, {"weights": 1.0, "embeddings": "z"}, "mvmr_regularizer")
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


def check_method_options(given: object, image_size: int = IMAGE_SIZE) -> dict[str, Any]:
    """Returns ``method_kwargs`` of ``method: mvmr``, filled and checked.

    Args:
        given: The node, a mapping, or None.
        image_size: The images' side, by which a preset knows the widths of its teachers.

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
    options = with_defaults(given, METHOD_DEFAULTS, node)
    for name in ("proj_hidden_dim", "proj_output_dim", "proj_num_layers"):
        _checked(node, check_int, f"{node}.{name}", options[name], minimum=1)
    preset = _checked(node, preset_settings, options["preset"])
    names = ("representations", "sketch_dim", "distillation")
    filled = _checked(node, with_preset, options["preset"], *[options[name] for name in names])
    options["representations"], options["sketch_dim"] = filled
    loss = {name: options[name] for name in LOSS_OPTIONS if options[name] is not None}
    for name, value in {**LOSS_OPTIONS, **preset.loss}.items():
        if options[name] is None:
            options[name] = value
    _checked(node, MVMRLoss, **select(options, LOSS_OPTIONS))
    labels = _check_representations(options, node)

    def sizes() -> dict[str, int]:
        if not options["representations"]:
            return {}
        built = Representations(options["representations"], sketch_dim=options["sketch_dim"])
        return built.sizes(3, image_size, image_size)

    options["distillation"] = _checked(
        node, preset_distillation, options["preset"], options["distillation"], sizes
    )
    if options["distillation"] is not None:
        place = f"{node}.distillation"
        if not isinstance(options["distillation"], Mapping):
            raise SoloConfigError(
                f"{place} must be a mapping of options of mvmr_loss.DistillationLoss but is "
                f"{options['distillation']!r}."
            )
        gathered = {"gather_distributed": options["gather_distributed"]}
        options["distillation"] = {**gathered, **options["distillation"]}
        teachers = _checked(place, DistillationLoss, 1, **options["distillation"]).teacher_dims
        _checked(place, check_teachers, labels, teachers)
        _checked(node, check_loss_options, options["preset"], loss, labels, teachers)
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
    options = with_defaults(given, REGULARIZER_DEFAULTS, REGULARIZER)
    if not isinstance(options["embeddings"], str):
        raise SoloConfigError(
            f"{REGULARIZER}.embeddings must name an output of the method's forward, such as 'z' or "
            f"'feats', but is {options['embeddings']!r}."
        )
    _checked(REGULARIZER, MultiRepresentationRegularizer, **select(options, REGULARIZER_OPTIONS))
    if options["representations"] is not None:
        _check_representations(options, REGULARIZER)
    if options["representations"] == []:
        raise SoloConfigError(
            f"{REGULARIZER}.representations must name at least one representation but is empty."
        )
    return options


def select(options: Mapping[str, Any], names: Mapping[str, Any]) -> dict[str, Any]:
    """Returns those of the options that are named.

    Examples:
        >>> select({"weights": 1.0, "cache": None}, REGULARIZER_OPTIONS)
        {'weights': 1.0}
    """
    return {name: value for name, value in options.items() if name in names}


def _checked(node: str, check: Callable[..., Any], *arguments: Any, **options: Any) -> Any:
    """Returns what a function makes of its arguments; what it refuses is an error of the node."""
    try:
        return check(*arguments, **options)
    except (TypeError, ValueError) as error:
        said = str(error)
        raise SoloConfigError(said if said.startswith(node) else f"{node}: {said}") from error


def _check_representations(options: Mapping[str, Any], node: str) -> list[str]:
    """Returns the representations' names without building any: a teacher is loaded at fit."""
    specification = options["representations"]
    # An empty list is none.
    named = {} if specification in ([], (), {}) else _checked(node, labelled, specification)
    for value in named.values():
        if isinstance(value, Mapping):
            _checked(f"{node}.representations", representation_class, value["name"])
    if options["normalization"] is not None:
        _checked(node, Normalization.of, options["normalization"])
    _checked(node, check_bool, f"{node}.fill_cache", options["fill_cache"])
    cache = options["cache"]
    path = cache.get("path") if isinstance(cache, Mapping) else cache
    if cache is not None and not isinstance(path, str):
        raise SoloConfigError(
            f"{node}.cache must be a path, or a mapping with a path, but is {cache!r}."
        )
    return list(named)
