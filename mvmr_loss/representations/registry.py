"""The representations by name: from a name and options to a module, and back."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Container, Mapping, Sequence
from typing import Any, TypeVar

import torch

from mvmr_loss._checks import check_bool, check_module_name
from mvmr_loss.normalization import Normalization
from mvmr_loss.representations.base import Representation

_REGISTRY: dict[str, type[Representation]] = {}

R = TypeVar("R", bound=type[Representation])


def register_representation(name: str) -> Callable[[R], R]:
    """Registers a :class:`Representation` subclass under a name, as a class decorator.

    Args:
        name: The name by which :class:`~mvmr_loss.Representations` and configuration files know it.

    Raises:
        ValueError: If the name is already another class's.

    Examples:
        >>> import torch
        >>> from mvmr_loss import Representations, register_representation
        >>> from mvmr_loss.representations import Representation
        >>> @register_representation("mean_color")
        ... class MeanColor(Representation):
        ...     def extract(self, images):
        ...         return images.mean(dim=(-2, -1))
        ...     def output_shape(self, channels, height, width):
        ...         return (channels,)
        >>> Representations(["mean_color"])(torch.ones(2, 3, 8, 8))["mean_color"].shape
        torch.Size([2, 3])
    """
    if not isinstance(name, str) or not name:
        raise ValueError(f"name must be a non-empty string but is {name!r}.")

    def register(cls: R) -> R:
        if not (isinstance(cls, type) and issubclass(cls, Representation)):
            raise TypeError(
                f"{cls!r} must be a subclass of mvmr_loss.representations.Representation."
            )
        taken = _REGISTRY.get(name)
        if taken is not None and (taken.__module__, taken.__qualname__) != (
            cls.__module__,
            cls.__qualname__,
        ):
            raise ValueError(
                f"name must be free but {name!r} is already {taken.__module__}."
                f"{taken.__qualname__}; choose another name."
            )
        _REGISTRY[name] = cls
        return cls

    return register


def list_representations() -> list[str]:
    """Returns the names that :class:`~mvmr_loss.Representations` knows, one's own included.

    Examples:
        >>> {"augmented_pixels", "dct", "hog"} <= set(list_representations())
        True
    """
    return sorted(_REGISTRY)


def representation_class(name: str) -> type[Representation]:
    """Returns the class registered under a name."""
    if name not in _REGISTRY:
        raise ValueError(
            f"representation must be one of {', '.join(list_representations())} but is {name!r}; "
            "one's own is added with mvmr_loss.register_representation."
        )
    return _REGISTRY[name]


Options = Mapping[str, Any]
Specification = Sequence["str | Options"] | Mapping[str, "Options | Representation | None"]


def labelled(specification: object) -> dict[str, Options | Representation]:
    """Returns label -> options or object from any form of specification."""
    pairs: list[tuple[Any, Any]]
    if isinstance(specification, Mapping):
        pairs = [
            (key, value if isinstance(value, Representation) else {"name": key, **(value or {})})
            for key, value in specification.items()
            if isinstance(value, (Mapping, Representation)) or value is None
        ]
        wrong = [key for key in specification if key not in dict(pairs)]
    elif isinstance(specification, Sequence) and not isinstance(specification, str):
        items = [{"name": item} if isinstance(item, str) else item for item in specification]
        wrong = [item for item in items if not isinstance(item, Mapping) or "name" not in item]
        pairs = [(item["name"], item) for item in items if not any(item is w for w in wrong)]
    else:
        raise TypeError(
            "representations must be a list of names or a mapping from name to options but is "
            f"{_shown(specification)}."
        )
    if wrong:
        value, which = wrong[0], "one"
        if isinstance(specification, Mapping):
            value, which = specification[value], f"that of {value!r}"
        raise TypeError(
            "each of representations must be a name, a mapping with a 'name', or a name with options "
            f"but {which} is {_shown(value)}."
        )
    if not pairs:
        raise ValueError("representations must not be empty; name at least one.")
    labels = [label for label, _ in pairs]
    for label in labels:
        check_module_name("representations", label)
        if labels.count(label) > 1:
            raise ValueError(
                f"representations must have different names but {label!r} occurs twice; "
                "give labels: {'fine': {'name': 'hog', ...}, 'coarse': {'name': 'hog', ...}}."
            )
    return dict(pairs)


def _shown(value: object) -> str:
    """Returns what was given, and how to give it where it is a representation or a network."""
    cls = value if isinstance(value, type) else type(value)
    if issubclass(cls, Representation):
        name = next((n for n, known in _REGISTRY.items() if known is cls), "name")
        what = "the class" if cls is value else "a"
        return (
            f"{what} {cls.__name__}; give an object under a name: {{{name!r}: {cls.__name__}(...)}}"
        )
    if callable(value):
        return f"a {type(value).__name__}; give a network as {{'teacher': Teacher(network)}}"
    if hasattr(value, "shape"):
        return (
            f"a {type(value).__name__}; features that are there already go to the loss as they are"
        )
    return repr(value)


def build(label: str, options: Options, normalization: Normalization) -> Representation:
    """Returns the representation that the options name."""
    arguments = {key: value for key, value in options.items() if key != "name"}
    cls = representation_class(options["name"])
    known = inspect.signature(cls).parameters
    arguments = _with_normalization(label, arguments, known, normalization)
    differentiable = False
    if not any(p.kind is inspect.Parameter.VAR_KEYWORD for p in known.values()):
        if "differentiable" not in known:  # The base class knows it.
            differentiable = check_bool("differentiable", arguments.pop("differentiable", False))
        for key in arguments:
            if key not in known:
                raise TypeError(
                    f"{label} has no option {key!r}; its options are {', '.join(known) or 'none'}."
                )
    representation = cls(**arguments)
    if differentiable:
        representation.differentiable = True
    return representation


def _with_normalization(
    label: str, arguments: dict[str, Any], known: Container[str], default: Normalization
) -> dict[str, Any]:
    """Returns the arguments with the normalisation in the form that a class takes."""
    as_one = "normalization" in known
    if not as_one and not ("mean" in known and "std" in known):
        return arguments
    given = {key: arguments[key] for key in ("normalization", "mean", "std") if key in arguments}
    if not given:
        stated = default
    elif set(given) == {"normalization"}:
        stated = Normalization.of(given["normalization"])
    elif set(given) == {"mean", "std"}:
        stated = Normalization(**given)
    else:
        raise ValueError(
            f"{label} must be given normalization, or both mean and std, but is given "
            f"{' and '.join(given)}."
        )
    others = {key: value for key, value in arguments.items() if key not in given}
    if as_one:
        return {**others, "normalization": stated}
    return {**others, "mean": stated.mean, "std": stated.std}


def describe(value: Any) -> Any:
    """Returns a representation's class and options, or an option, as JSON can write it."""
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    if isinstance(value, Mapping):
        return {str(key): describe(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [describe(item) for item in value]
    if isinstance(value, Representation):
        options = {
            name: describe(getattr(value, name))
            for name in inspect.signature(type(value)).parameters
            if hasattr(value, name)
        }
        return {"class": f"{type(value).__module__}.{type(value).__qualname__}", **options}
    if isinstance(value, (torch.dtype, torch.device)):
        return str(value)
    return f"{type(value).__module__}.{type(value).__qualname__}"
