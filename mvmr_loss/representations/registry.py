"""The representations by name, and several of them as one module."""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Container, Mapping, Sequence
from typing import Any, TypeVar, cast

from torch import Tensor, nn

from mvmr_loss._checks import check_int
from mvmr_loss._random import check_seed
from mvmr_loss.normalization import Normalization, NormalizationLike
from mvmr_loss.representations.base import Representation, check_images, check_size
from mvmr_loss.representations.sketch import Sketched

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


class Representations(nn.Module):
    """Several representations of the same images, computed in slices of the batch.

    Built from names, or from names and options as read from a configuration file:

    - a list of names and of mappings with a ``name``: ``["pixels", {"name": "hog", "orientations": 9}]``
    - a mapping from name to options: ``{"pixels": None, "hog": {"orientations": 9}}``; a ``name``
      among the options lets the key be a label of one's own:
      ``{"fine": {"name": "hog", "pixels_per_cell": 4}, "coarse": {"name": "hog"}}``
    - a mapping may also hold :class:`~mvmr_loss.representations.Representation` objects.

    The images are those of the non-augmented view, normalised as the network sees them. How, is
    said once, by ``normalization``, and told to every representation named that asks for it: one
    with an argument ``normalization``, or ``mean`` and ``std``. An option of these names in the
    specification takes precedence; a representation given as an object keeps its own.

    Source: MV-MR, Entropy 26(6):466, 2024 (arXiv 2303.12130), the multi-representation terms.

    Args:
        specification: What to compute, as above; not empty.
        normalization: How the images were normalised: a
            :class:`~mvmr_loss.normalization.Normalization`, a pair (mean, std), ``"imagenet"``,
            ``"cifar10"``, ``"cifar100"``, ``"stl10"``, or ``"none"`` for images in [0, 1].
        slice_size: How many images are worked on at once; bounds the temporary memory.
        differentiable: If True, the gradient flows through to the images; an option of the same
            name in the specification takes precedence.
        sketch_dim: If given, every representation wider than this is replaced by its folded sign
            sketch of this width (:func:`~mvmr_loss.representations.folded_sign_sketch`), which nearly
            keeps the distances, all that the loss reads. None: exact.
        sketch_seed: Seed of the sketches' signs, at least 0.

    Examples:
        >>> import torch
        >>> representations = Representations(["pixels", {"name": "local_std", "window_size": 5}])
        >>> features = representations(torch.rand(4, 3, 32, 32))
        >>> {name: tuple(y.shape) for name, y in features.items()}
        {'pixels': (4, 3072), 'local_std': (4, 3072)}
        >>> representations.sizes(3, 96, 96)
        {'pixels': 27648, 'local_std': 27648}
        >>> Representations(["pixels", "local_std"], sketch_dim=1024).sizes(3, 96, 96)
        {'pixels': 1024, 'local_std': 1024}
    """

    def __init__(
        self,
        specification: Specification,
        *,
        normalization: NormalizationLike = "imagenet",
        slice_size: int = 32,
        differentiable: bool = False,
        sketch_dim: int | None = None,
        sketch_seed: int = 0,
    ) -> None:
        super().__init__()
        self.slice_size = check_int("slice_size", slice_size, minimum=1)
        self.normalization = Normalization.of(normalization)
        built = {
            label: value
            if isinstance(value, Representation)
            else _build(label, {"differentiable": differentiable, **value}, self.normalization)
            for label, value in _labelled(specification).items()
        }
        sketch_seed = check_seed(sketch_seed, "sketch_seed")
        if sketch_dim is not None:
            sketch_dim = check_int("sketch_dim", sketch_dim, minimum=1)
            built = {label: Sketched(r, sketch_dim, sketch_seed) for label, r in built.items()}
        self.by_name = nn.ModuleDict(built)

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        """Computes every representation of a batch of images.

        Args:
            images: Tensor of shape (N, C, H, W), or (C, H, W) for a single image.

        Returns:
            Name -> tensor of shape (N, D_k), float32 (float64 for float64 images).
        """
        images = check_images(images)
        return {
            name: self._in_slices(representation, images)
            for name, representation in self.by_name.items()
        }

    def _in_slices(self, representation: nn.Module, images: Tensor) -> Tensor:
        """Returns the flattened features, each slice written at once to where it stays."""
        first, *others = images.split(self.slice_size)
        part: Tensor = representation(first).flatten(1)
        features = part.new_empty(len(images), part.shape[1])
        features[: len(part)] = part
        for i, images_of_slice in enumerate(others, 1):
            part = representation(images_of_slice).flatten(1)
            features[i * self.slice_size : i * self.slice_size + len(part)] = part
        return features

    def sizes(self, channels: int, height: int, width: int) -> dict[str, int]:
        """Returns how many numbers D_k each representation has for one image, without running it."""
        sizes = {}
        for name, representation in cast("dict[str, Representation]", self.by_name).items():
            check_size(height, width, representation.minimum_size, f"images for {name}")
            sizes[name] = math.prod(representation.output_shape(channels, height, width))
        return sizes


def _labelled(specification: object) -> dict[str, Options | Representation]:
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
        pairs = [(item["name"], item) for item in items if item not in wrong]
    else:
        raise TypeError(
            "representations must be a list of names or a mapping from name to options "
            f"but is {specification!r}."
        )
    if wrong:
        raise TypeError(
            "each of representations must be a name, a mapping with a 'name', or a name with options "
            f"but {wrong[0]!r} is not."
        )
    if not pairs:
        raise ValueError("representations must not be empty; name at least one.")
    labels = [label for label, _ in pairs]
    for label in labels:
        if not isinstance(label, str) or not label or "." in label:
            raise ValueError(
                f"a representation's name must be a non-empty string without '.' but is {label!r}."
            )
        if labels.count(label) > 1:
            raise ValueError(
                f"representations must have different names but {label!r} occurs twice; "
                "give labels: {'fine': {'name': 'hog', ...}, 'coarse': {'name': 'hog', ...}}."
            )
    return dict(pairs)


def _build(label: str, options: Options, normalization: Normalization) -> Representation:
    """Returns the representation that the options name."""
    arguments = {key: value for key, value in options.items() if key != "name"}
    cls = representation_class(options["name"])
    known = inspect.signature(cls).parameters
    arguments = _with_normalization(label, arguments, known, normalization)
    if not any(p.kind is inspect.Parameter.VAR_KEYWORD for p in known.values()):
        for key in arguments:
            if key not in known and key != "differentiable":
                raise TypeError(
                    f"{label} has no option {key!r}; its options are {', '.join(known) or 'none'}."
                )
        arguments = {key: value for key, value in arguments.items() if key in known}
    return cls(**arguments)


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
