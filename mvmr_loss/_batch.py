"""What the loss is computed of: embeddings and representations, checked, and those of all processes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from mvmr_loss._checks import check_batch, check_number
from mvmr_loss.dependence import DependenceMeasure
from mvmr_loss.distributed import ALL_ROWS, Rows, gather


class Batch(NamedTuple):
    """What the loss is computed of, checked.

    Attributes:
        views: Embeddings of shape (N, D), float32 at least, the non-augmented view's first if given.
        features: Representations by name.
        rows: Which rows of the matrices are computed in this process.
        named: All of them by what to call them in errors.
    """

    views: list[Tensor]
    features: dict[str, Tensor]
    rows: Rows
    named: dict[str, Tensor]


def check_weights(name: str, weights: Any) -> float | dict[str, float]:
    """Returns one weight, or a weight per representation, as floats after checking them."""
    if isinstance(weights, Mapping):
        return {key: check_number(f"{name}[{key!r}]", value) for key, value in weights.items()}
    if isinstance(weights, Sequence) and not isinstance(weights, str):
        raise TypeError(
            f"{name} must be a number or a mapping from the representations' names to numbers but "
            f"is a {type(weights).__name__}; for example {{'pixels': 1.0, 'hog': 0.5}}."
        )
    return check_number(name, weights)


def named_views(name: str, views: Any) -> dict[str, Tensor]:
    """Returns embeddings of one or several views by what to call them in errors."""
    if isinstance(views, Tensor):
        return {name: views}
    if not isinstance(views, Sequence) or isinstance(views, str):
        raise TypeError(
            f"{name} must be a torch.Tensor or a list of them but is a {type(views).__name__}."
        )
    if not views:
        raise ValueError(f"{name} must not be empty but is [].")
    if len(views) == 1:
        return {name: views[0]}
    return {f"{name}[{i}]": view for i, view in enumerate(views)}


def checked_batch(
    named: Mapping[str, Tensor],
    representations: Any,
    weights: float | dict[str, float],
    measure: DependenceMeasure,
    *,
    gather_distributed: bool,
) -> Batch:
    """Returns checked views and representations, of all processes if asked for.

    Args:
        named: The views by what to call them in errors.
        representations: What the user gave, or nothing.
        weights: One for all representations, or one per name.
        measure: What is to compare them.
        gather_distributed: Whether to gather them from all processes.

    Returns:
        The batch.
    """
    first = next(iter(named))
    for label, view in named.items():
        check_batch(label, view)
        if view.ndim != 2:
            raise ValueError(f"{label} must have shape (N, D) but has shape {tuple(view.shape)}.")
        if view.shape != named[first].shape:
            raise ValueError(
                f"{label} must have the same shape as the other embeddings, "
                f"{tuple(named[first].shape)}, but has shape {tuple(view.shape)}."
            )
    z = named[first]
    if not isinstance(representations, Mapping):
        raise TypeError(
            "representations must be a mapping from name to tensor "
            f"but is a {type(representations).__name__}."
        )
    if isinstance(weights, dict) and representations and set(weights) != set(representations):
        raise ValueError(
            "representations and their weights must have the same names but are "
            f"{sorted(representations)} and {sorted(weights)}."
        )
    for name, y in representations.items():
        label = f"representations[{name!r}]"
        check_batch(label, y)
        if len(y) != len(z):
            raise ValueError(
                f"{label} must have shape ({len(z)}, ...), one row for each embedding, "
                f"but has shape {tuple(y.shape)}."
            )
        if y.device != z.device:
            raise ValueError(
                f"{label} must be on {z.device} like the embeddings but is on {y.device}."
            )
    # In one order in all processes: sums of all terms are exchanged together.
    names = sorted(representations) if gather_distributed else list(representations)
    labels = {name: f"representations[{name!r}]" for name in names}
    tensors, rows = {**named, **{labels[name]: representations[name] for name in names}}, ALL_ROWS
    if gather_distributed:
        tensors, rows = gather(tensors)
    views = [tensors[label].to(torch.promote_types(z.dtype, torch.float32)) for label in named]
    if len(views[0]) < measure.min_samples:
        called = getattr(measure, "name", type(measure).__name__)
        raise ValueError(
            f"{first} must have at least {measure.min_samples} samples for {called} but has "
            f"{len(views[0])}; use a larger batch."
        )
    return Batch(views, {name: tensors[label] for name, label in labels.items()}, rows, tensors)
