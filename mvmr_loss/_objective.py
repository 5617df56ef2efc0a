"""What the loss and the regulariser share: a checked batch, its dependence terms, and their sum."""

from __future__ import annotations

import functools
import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from mvmr_loss._checks import can_be_seen, check_batch, check_finite, check_number
from mvmr_loss.dependence import DependenceMeasure, TokenDistanceCorrelation
from mvmr_loss.dependence.registry import measure_of
from mvmr_loss.distributed import ALL_ROWS, Rows, gather

Measure = str | Mapping[str, Any] | DependenceMeasure
Weights = float | Mapping[str, float]
# Term -> the pairs that meet, embeddings or representations, by what they are called in errors.
Meetings = dict[str, list[tuple[str, str]]]


class Batch(NamedTuple):
    """What the loss is computed of, checked.

    Attributes:
        views: Embeddings of shape (N, D), float32 at least, the non-augmented view's first if given,
            then those of a second head, by what to call them in errors.
        labels: Name of each representation -> what to call it in errors.
        rows: Which rows of the matrices are computed in this process.
        named: Embeddings as they came and representations, by what to call them in errors.
        weights: The term of each representation -> its weight.
    """

    views: dict[str, Tensor]
    labels: dict[str, str]
    rows: Rows
    named: dict[str, Tensor]
    weights: dict[str, float]


def measure_of_batch(argument: str, measure: Any) -> DependenceMeasure:
    """Returns the measure of a name, which must compare images of a batch with one another."""
    resolved = measure_of(argument, measure)
    if isinstance(resolved, TokenDistanceCorrelation):
        raise ValueError(
            f"{argument} must compare images, of shape (N, D), but is {resolved!r}, which compares the "
            "tokens of each; add it as a term of its own: loss + 1 - measure(tokens, teacher_tokens)."
        )
    return resolved


def check_weights(name: str, weights: Any) -> float | dict[str, float]:
    """Returns one weight, or a weight per representation, as floats after checking them."""
    if isinstance(weights, Mapping):
        for key in weights:
            if not isinstance(key, str):
                raise TypeError(f"{name} must be named by strings but has the name {key!r}.")
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


def check_views(named: Mapping[str, Tensor], min_samples: int = 1) -> None:
    """Raises unless all are embeddings of shape (N, D), as large as the first."""
    z = next(iter(named.values()))
    for label, view in named.items():
        check_batch(label, view, min_samples)
        if view.ndim != 2:
            raise ValueError(f"{label} must have shape (N, D) but has shape {tuple(view.shape)}.")
        if view.shape != z.shape:
            raise ValueError(
                f"{label} must have the same shape as the other embeddings, "
                f"{tuple(z.shape)}, but has shape {tuple(view.shape)}."
            )


def checked_batch(
    named: Mapping[str, Tensor],
    representations: Any,
    weights: float | dict[str, float],
    measure: DependenceMeasure,
    *,
    second: Mapping[str, Tensor] | None = None,
    argument: str = "representations",
    gather_distributed: bool,
) -> Batch:
    """Returns checked views and representations, of all processes if asked for.

    Args:
        named: The views by what to call them in errors.
        representations: What the user gave, or nothing.
        weights: One for all representations, or one per name.
        measure: What is to compare them.
        second: Embeddings of a second head by what to call them in errors.
        argument: What the representations are called in errors.
        gather_distributed: Whether to gather them from all processes.

    Returns:
        The batch.
    """
    check_views(named)
    first = next(iter(named))
    z = named[first]
    for label, view in (second or {}).items():
        check_batch(label, view)
        if view.ndim != 2 or len(view) != len(z):
            raise ValueError(
                f"{label} must have shape ({len(z)}, E) but has shape {tuple(view.shape)}."
            )
    named = {**named, **(second or {})}
    if not torch.compiler.is_compiling():
        # What was made in inference mode cannot be kept for a gradient.
        named = {label: x.clone() if x.is_inference() else x for label, x in named.items()}
    if not isinstance(representations, Mapping):
        raise TypeError(
            f"{argument} must be a mapping from name to tensor "
            f"but is a {type(representations).__name__}."
        )
    if isinstance(weights, dict) and representations and set(weights) != set(representations):
        raise ValueError(
            "representations and their weights must have the same names but are "
            f"{sorted(representations)} and {sorted(weights)}."
        )
    for name, y in representations.items():
        if not isinstance(name, str):
            raise TypeError(f"{argument} must be named by strings but has the name {name!r}.")
        label = f"{argument}[{name!r}]"
        check_batch(label, y)
        if len(y) != len(z):
            raise ValueError(
                f"{label} must have shape ({len(z)}, ...), one row for each embedding, "
                f"but has shape {tuple(y.shape)}."
            )
    # In one order in all processes: sums of all terms are exchanged together.
    names = sorted(representations) if gather_distributed else list(representations)
    labels = {name: f"{argument}[{name!r}]" for name in names}
    tensors, rows = {**named, **{labels[name]: representations[name] for name in names}}, ALL_ROWS
    for label, x in tensors.items():
        if x.device != z.device:
            raise ValueError(
                f"{label} must be on {z.device} like the embeddings but is on {x.device}."
            )
    if gather_distributed:
        tensors, rows = gather(tensors)
    dtype = functools.reduce(torch.promote_types, [x.dtype for x in named.values()], torch.float32)
    views = {label: tensors[label].to(dtype) for label in named}
    if len(views[first]) < measure.min_samples:
        called = getattr(measure, "name", type(measure).__name__)
        raise ValueError(
            f"{first} must have at least {measure.min_samples} samples for {called} but has "
            f"{len(views[first])}; use a larger batch."
        )
    by_term = {
        f"representations/{name}": weights[name] if isinstance(weights, dict) else weights
        for name in labels
    }
    return Batch(views, labels, rows, tensors, by_term)


class LossComponents(NamedTuple):
    """The terms of a loss by name, each as it is before its weight, and their weighted sum.

    The names are ``invariance``, ``variance``, ``dependence`` and ``representations/NAME``, where they
    have a weight ``identity`` and ``covariance``, and ``regression/NAME`` and ``dependence/NAME`` of a
    distillation. Those of dependence are one minus the dependence, or the dependence itself where the
    weight is negative; 0 where it is 0.

    Attributes:
        total: The loss: the sum of each term times its weight.
        terms: Name -> scalar tensor.
        weights: Name -> the magnitude of the weight.
    """

    total: Tensor
    terms: dict[str, Tensor]
    weights: dict[str, float]

    def as_dict(self, prefix: str = "", *, weighted: bool = True) -> dict[str, Tensor]:
        """Returns the loss and its terms flat and by name, as loggers want them.

        Args:
            prefix: Put before each name.
            weighted: Whether each term is multiplied by its weight, so that they add up to the loss.

        Returns:
            ``loss`` and the names of the terms -> scalar tensor.
        """
        scales = self.weights if weighted else dict.fromkeys(self.terms, 1.0)
        named = {prefix + name: scales[name] * term for name, term in self.terms.items()}
        return {f"{prefix}loss": self.total, **named}


def dependence_terms(
    measure: DependenceMeasure, batch: Batch, met: Meetings, weights: Mapping[str, float]
) -> dict[str, Tensor]:
    """Returns what rewards dependence, or independence for a negative weight: means over the pairs.

    Each matrix is made once and met by all the others.
    """
    z = next(iter(batch.views.values()))
    wanted = {term: pairs for term, pairs in met.items() if weights[term] != 0}
    terms = {term: z.new_zeros(()) for term in met if term not in wanted}
    if wanted:
        sides = {side for pairs in wanted.values() for pair in pairs for side in pair}
        tensors = {**batch.named, **batch.views}
        sided: list[Tensor] = []
        place: dict[str, int] = {}
        for label in (label for label in batch.named if label in sides):
            # One that has two names has one matrix, and compilers refuse it twice.
            same = [i for i, x in enumerate(sided) if x is tensors[label]]
            place[label] = same[0] if same else len(sided)
            if not same:
                sided.append(tensors[label])
        batches = [x if x.ndim == 2 else x.reshape(len(z), -1) for x in sided]
        pairs = [(place[a], place[b]) for pairs in wanted.values() for a, b in pairs]
        values = measure.compare(batches, pairs, batch.rows).to(z.dtype)
        counts = [len(pairs) for pairs in wanted.values()]
        for term, value, lack in zip(
            wanted, values.split(counts), (1 - values).split(counts), strict=True
        ):
            chosen = lack if weights[term] > 0 else value
            terms[term] = chosen.mean() if len(chosen) > 1 else chosen[0]
    return {term: terms[term] for term in met}


def components(
    terms: dict[str, Tensor], weights: Mapping[str, float], batch: Batch
) -> LossComponents:
    """Returns all terms and their weighted sum.

    Any value of the batch that is not finite makes it NaN, so that the batch is looked at only then.
    """
    magnitudes = {name: abs(weight) for name, weight in weights.items()}
    equal: dict[float, list[Tensor]] = {}
    for name, term in terms.items():
        equal.setdefault(magnitudes[name], []).append(term)
    # As vectors of one number: torch gives the forward derivative of a number times a scalar in float64.
    total = torch.cat([torch.stack(same).sum()[None] * weight for weight, same in equal.items()])
    loss = total.sum()
    if can_be_seen(loss) and not math.isfinite(loss.item()):
        for label, tensor in batch.named.items():
            check_finite(label, tensor)
    return LossComponents(loss, terms, magnitudes)


def mean_of(terms: Sequence[Tensor]) -> Tensor:
    """Returns the mean of scalar tensors."""
    return torch.stack(list(terms)).mean() if len(terms) > 1 else terms[0]


def unit_length(z: Tensor) -> Tensor:
    """Returns rows scaled to length 1; 0, without gradient, where their length is about 0."""
    z = z.to(torch.promote_types(z.dtype, torch.float32))
    peak = z.detach().abs().amax(dim=-1, keepdim=True)
    nothing = peak < 65536 * torch.finfo(z.dtype).tiny
    # What divides by infinity is 0, and so is its gradient.
    scaled = z / torch.where(nothing, torch.inf, peak)
    square = scaled.square().sum(dim=-1, keepdim=True)
    return scaled * torch.where(nothing, 1.0, square).rsqrt()
