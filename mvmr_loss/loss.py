"""The MV-MR objective, and its representation terms alone."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from mvmr_loss._checks import check_finite, check_float_tensor, low_precision_to_float32
from mvmr_loss.dependence import DependenceMeasure
from mvmr_loss.dependence import dependence_measure as resolve_measure
from mvmr_loss.distributed import Gatherer

# On a CPU, embeddings are read in slices that stay in the cache.
_SLICE_ROWS = 32
_SLICE_COLUMNS = 1024


def invariance_loss(z: Tensor, z_augmented: Tensor) -> Tensor:
    """Computes the invariance term: the mean squared error between two views' embeddings.

    Source: MV-MR (arXiv 2303.12130), the invariance term, as in VICReg (arXiv 2105.04906).

    Args:
        z: Embeddings of the non-augmented view, shape (N, D).
        z_augmented: Embeddings of the augmented view, shape (N, D).

    Returns:
        Scalar tensor, at least 0.

    Examples:
        >>> invariance_loss(torch.zeros(2, 2), torch.tensor([[1.0, 0.0], [0.0, 1.0]]))
        tensor(0.5000)
    """
    loss: Tensor = _MeanSquaredError.apply(z, z_augmented)
    return loss


def _squared_norm(x: Tensor) -> Tensor:
    return torch.dot(x.flatten(), x.flatten())


class _MeanSquaredError(torch.autograd.Function):
    """``F.mse_loss``, which is several times slower on a CPU, where it stores all the squares.

    The backward is made of differentiable operations, so it can be differentiated in turn.
    """

    @staticmethod
    def forward(ctx: Any, z: Tensor, z_augmented: Tensor) -> Tensor:
        ctx.save_for_backward(z, z_augmented)
        if torch.compiler.is_compiling() or z.device.type != "cpu":
            return F.mse_loss(z, z_augmented)
        parts = zip(z.split(_SLICE_ROWS), z_augmented.split(_SLICE_ROWS), strict=True)
        return torch.stack([_squared_norm(a - b) for a, b in parts]).sum() / z.numel()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None]:
        z, z_augmented = ctx.saved_tensors
        slope = (z - z_augmented) * (2 * grad / z.numel())
        return (
            slope if ctx.needs_input_grad[0] else None,
            -slope if ctx.needs_input_grad[1] else None,
        )


def variance_loss(z: Tensor, margin: float = 1.0, eps: float = 1e-4) -> Tensor:
    """Computes the variance term: how far each coordinate's standard deviation is below a margin.

    The standard deviation is taken over the batch (divided by N - 1), with ``eps`` inside the root
    so that the gradient stays finite when the embeddings collapse.

    Source: MV-MR (arXiv 2303.12130), the variance term, as in VICReg (arXiv 2105.04906), eq. 1.

    Args:
        z: Embeddings of one view, shape (N, D), N >= 2.
        margin: The standard deviation below which a coordinate is penalised.
        eps: Added to the variance.

    Returns:
        Scalar tensor in [0, margin].

    Examples:
        >>> variance_loss(torch.tensor([[0.0, 0.0], [0.0, 2.0]]))  # std 0.01 (collapsed) and 1.41
        tensor(0.4950)
    """
    variance: Tensor = _BatchVariance.apply(z)
    return F.relu(margin - torch.sqrt(variance + eps)).mean()


class _BatchVariance(torch.autograd.Function):
    """``z.var(dim=0)``, which is several times slower on a CPU, where it strides through memory.

    The columns are read in slices that stay in the cache. The backward is made of differentiable
    operations, so it can be differentiated in turn.
    """

    @staticmethod
    def forward(ctx: Any, z: Tensor) -> Tensor:
        ctx.save_for_backward(z)
        if torch.compiler.is_compiling() or z.device.type != "cpu":
            return z.var(dim=0)
        squares = [
            (part - part.mean(dim=0)).square().sum(dim=0) for part in z.split(_SLICE_COLUMNS, dim=1)
        ]
        return torch.cat(squares) / (len(z) - 1)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        (z,) = ctx.saved_tensors
        slope = 2 * grad / (len(z) - 1)
        return torch.addcmul(-slope * z.mean(dim=0), z, slope)


class MVMRLossComponents(NamedTuple):
    """The weighted terms of the MV-MR loss; their sum is the loss.

    Attributes:
        invariance: Mean squared error between the views' embeddings.
        variance: Hinge on the standard deviation of each coordinate, of both views.
        dependence: One minus the dependence between the views' embeddings.
        representations: One minus the dependence between the augmented view's embeddings and each
            representation, by name.
    """

    invariance: Tensor
    variance: Tensor
    dependence: Tensor
    representations: dict[str, Tensor]

    @property
    def total(self) -> Tensor:
        """The loss: the sum of all terms."""
        total = self.invariance + self.variance + self.dependence
        for term in self.representations.values():
            total = total + term
        return total


class MultiRepresentationRegularizer(nn.Module):
    """The representation terms of MV-MR alone: dependence of any embeddings on representations.

    Computes the sum over k of ``w_k (1 - dependence(z, y_k))`` for ``w_k >= 0``. A negative weight
    rewards independence instead: it adds ``|w_k| dependence(z, y_k)``, as the authors' release does.
    The embeddings may come from any method: add the result to the loss of VICReg, SimCLR or a
    supervised one. Nothing is normalised over several representations: each brings its full weight.

    Source: MV-MR, Entropy 26(6):466, 2024 (arXiv 2303.12130), the multi-representation terms.

    Args:
        weights: One weight for all representations, or one a name. Signed; 0 leaves a term out.
        dependence_measure: A name (see :func:`mvmr_loss.dependence.dependence_measure`) or a
            :class:`~mvmr_loss.dependence.DependenceMeasure`.
        gather_distributed: If True, embeddings and representations of all processes are gathered,
            with gradient. No effect where no process group is initialised.

    Raises:
        TypeError: If a weight is not a number or the measure is neither a name nor a measure.
        ValueError: If a weight is not finite or the measure's name is unknown.

    Examples:
        >>> import torch
        >>> _ = torch.manual_seed(0)
        >>> z, pixels = torch.randn(8, 16), torch.randn(8, 3, 4, 4)
        >>> regularizer = MultiRepresentationRegularizer(dependence_measure="u_distance_correlation_sqr")
        >>> regularizer(z, {"itself": z, "pixels": pixels}).shape
        torch.Size([])
        >>> bool(regularizer(z, {"itself": z}).abs() < 1e-5)
        True
    """

    def __init__(
        self,
        weights: float | Mapping[str, float] = 1.0,
        *,
        dependence_measure: str | DependenceMeasure = "distance_correlation",
        gather_distributed: bool = False,
    ) -> None:
        super().__init__()
        self.weights = _check_weights("weights", weights)
        self.measure = resolve_measure(dependence_measure)
        self.gather_distributed = gather_distributed
        self._gather = Gatherer()

    def forward(
        self, embeddings: Tensor | Sequence[Tensor], representations: Mapping[str, Tensor]
    ) -> Tensor:
        """Computes the sum of the weighted representation terms.

        Args:
            embeddings: Embeddings of shape (N, D), or a list of them, one a view; each term is then
                the mean over views.
            representations: Name -> tensor of shape (N, ...), which is flattened; not empty.

        Returns:
            Scalar tensor.

        Raises:
            TypeError: If an input is not a floating-point tensor or ``representations`` no mapping.
            ValueError: If shapes or names do not fit, or, on a CPU, a value is not finite.
        """
        terms = self.forward_components(embeddings, representations)
        return torch.stack(list(terms.values())).sum()

    def forward_components(
        self, embeddings: Tensor | Sequence[Tensor], representations: Mapping[str, Tensor]
    ) -> dict[str, Tensor]:
        """Computes each weighted representation term.

        Args:
            embeddings: As in :meth:`forward`.
            representations: As in :meth:`forward`.

        Returns:
            Name -> scalar tensor.

        Raises:
            TypeError: As in :meth:`forward`.
            ValueError: As in :meth:`forward`.
        """
        views = _check_views("embeddings", embeddings)
        checked = _check_representations(representations, views[0], self.weights)
        if not checked:
            raise ValueError("representations must not be empty but is {}.")
        if self.gather_distributed:
            views, checked = _gather(self._gather, views, checked)
        _check_batch("embeddings", views[0], self.measure)
        with torch.autocast(views[0].device.type, enabled=False):
            return self.terms([self.measure.center(z, "embeddings") for z in views], checked)

    def terms(
        self, centered_embeddings: Sequence[Tensor], representations: Mapping[str, Tensor]
    ) -> dict[str, Tensor]:
        """Computes each weighted term from embeddings whose matrices are already centred.

        Args:
            centered_embeddings: A matrix of shape (N, N) a view, from the measure's ``center``.
            representations: Name -> tensor of shape (N, ...).

        Returns:
            Name -> scalar tensor.
        """
        terms = {}
        for name, y in representations.items():
            weight = self.weights[name] if isinstance(self.weights, Mapping) else self.weights
            if weight == 0:
                terms[name] = centered_embeddings[0].new_zeros(())
                continue
            b = self.measure.center(y, f"representations[{name!r}]")
            dependence = _mean(
                [self.measure.compare(a, b.to(a.dtype)) for a in centered_embeddings]
            )
            terms[name] = _signed_term(weight, dependence)
        return terms


class MVMRLoss(nn.Module):
    """The MV-MR loss: invariance, variance, dependence of the views and on representations.

    With z the embeddings of the non-augmented view, z~ of the augmented one, and y_k fixed
    representations of the non-augmented images::

        L =   invariance_weight  mse(z, z~)
            + variance_weight   [mean_d relu(margin - std_d(z)) + mean_d relu(margin - std_d(z~))]
            + dependence_weight (1 - dCor(z, z~))
            + sum_k w_k         (1 - dCor(z~, y_k))

    The loss knows nothing of images: live features, precomputed ones and a teacher's embeddings all
    go in as tensors, of any width. With several augmented views, every term that has z~ in it is the
    mean over the views. ``dependence_weight`` and the representations' weights are signed: a negative
    weight rewards independence by adding ``|w| dCor``.

    Everything is computed in float32 (float64 for float64 input), also under autocast.

    Source: MV-MR, Entropy 26(6):466, 2024 (arXiv 2303.12130).

    Args:
        invariance_weight: Weight of the invariance term, at least 0.
        variance_weight: Weight of the variance term, at least 0.
        dependence_weight: Weight of the dependence between the views, signed.
        representation_weights: One weight for all representations, or one a name; signed.
        variance_margin: Standard deviation below which a coordinate is penalised.
        dependence_measure: A name (see :func:`mvmr_loss.dependence.dependence_measure`) or a
            :class:`~mvmr_loss.dependence.DependenceMeasure`.
        gather_distributed: If True, embeddings and representations of all processes are gathered,
            with gradient, and the loss is that of the whole batch. Leave it to
            DistributedDataParallel to average the gradients; do not multiply by the world size. No
            effect where no process group is initialised.
        eps: Added to the variance inside the standard deviation.

    Raises:
        TypeError: If a weight is not a number or the measure is neither a name nor a measure.
        ValueError: If a weight is out of range or the measure's name is unknown.

    Examples:
        >>> import torch
        >>> _ = torch.manual_seed(0)
        >>> images = torch.rand(8, 3, 16, 16)
        >>> z, z_augmented = torch.randn(8, 32), torch.randn(8, 32)
        >>> criterion = MVMRLoss()
        >>> loss = criterion(z, z_augmented, {"pixels": images})
        >>> components = criterion.forward_components(z, z_augmented, {"pixels": images})
        >>> sorted(components.representations), bool(loss == components.total)
        (['pixels'], True)
    """

    def __init__(
        self,
        *,
        invariance_weight: float = 1.0,
        variance_weight: float = 1.0,
        dependence_weight: float = 1.0,
        representation_weights: float | Mapping[str, float] = 1.0,
        variance_margin: float = 1.0,
        dependence_measure: str | DependenceMeasure = "distance_correlation",
        gather_distributed: bool = False,
        eps: float = 1e-4,
    ) -> None:
        super().__init__()
        self.invariance_weight = _check_number("invariance_weight", invariance_weight, minimum=0.0)
        self.variance_weight = _check_number("variance_weight", variance_weight, minimum=0.0)
        self.dependence_weight = _check_number("dependence_weight", dependence_weight)
        self.variance_margin = _check_number("variance_margin", variance_margin, minimum=0.0)
        self.eps = _check_number("eps", eps, minimum=0.0)
        _check_weights("representation_weights", representation_weights)
        self.regularizer = MultiRepresentationRegularizer(
            representation_weights, dependence_measure=dependence_measure
        )
        self.gather_distributed = gather_distributed
        self._gather = Gatherer()

    def forward(
        self,
        z: Tensor,
        z_augmented: Tensor | Sequence[Tensor],
        representations: Mapping[str, Tensor] | None = None,
    ) -> Tensor:
        """Computes the loss.

        Args:
            z: Embeddings of the non-augmented view, shape (N, D), N >= 2.
            z_augmented: Embeddings of the augmented view, shape (N, D), or a list of them.
            representations: Name -> tensor of shape (N, ...), which is flattened: fixed features of
                the non-augmented images. None or empty: no representation terms.

        Returns:
            Scalar tensor.

        Raises:
            TypeError: If an input is not a floating-point tensor or ``representations`` no mapping.
            ValueError: If shapes or names do not fit, the batch is too small, the processes' shapes
                differ, or, on a CPU, a value is not finite.
        """
        return self.forward_components(z, z_augmented, representations).total

    def forward_components(
        self,
        z: Tensor,
        z_augmented: Tensor | Sequence[Tensor],
        representations: Mapping[str, Tensor] | None = None,
    ) -> MVMRLossComponents:
        """Computes each weighted term of the loss.

        Args:
            z: As in :meth:`forward`.
            z_augmented: As in :meth:`forward`.
            representations: As in :meth:`forward`.

        Returns:
            The weighted terms, whose sum is the loss.

        Raises:
            TypeError: As in :meth:`forward`.
            ValueError: As in :meth:`forward`.
        """
        (z,) = _check_views("z", check_float_tensor("z", z))
        views = _check_views("z_augmented", z_augmented, like=z)
        measure = self.regularizer.measure
        checked = _check_representations(
            {} if representations is None else representations, z, self.regularizer.weights
        )
        if self.gather_distributed:
            (z, *views), checked = _gather(self._gather, [z, *views], checked)
        _check_batch("z", z, measure)
        with torch.autocast(z.device.type, enabled=False):
            z, *views = [low_precision_to_float32(v) for v in (z, *views)]
            variance = variance_loss(z, self.variance_margin, self.eps) + _mean(
                [variance_loss(v, self.variance_margin, self.eps) for v in views]
            )
            # Each matrix is made once and met by all the others.
            centered_views = [measure.center(v, "z_augmented") for v in views]
            if self.dependence_weight == 0:
                dependence = z.new_zeros(())
            else:
                centered_z = measure.center(z, "z")
                dependence = _mean([measure.compare(centered_z, v) for v in centered_views])
            return MVMRLossComponents(
                invariance=self.invariance_weight * _mean([invariance_loss(z, v) for v in views]),
                variance=self.variance_weight * variance,
                dependence=_signed_term(self.dependence_weight, dependence),
                representations=self.regularizer.terms(centered_views, checked),
            )


def _mean(terms: Sequence[Tensor]) -> Tensor:
    """Returns the mean of scalar tensors."""
    return torch.stack(list(terms)).mean()


def _signed_term(weight: float, dependence: Tensor) -> Tensor:
    """Returns the term that rewards dependence for a positive weight, independence for a negative."""
    return weight * (1 - dependence) if weight >= 0 else -weight * dependence


def _check_number(name: str, value: float, minimum: float = -math.inf) -> float:
    """Returns a weight or margin as a float after checking it."""
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise TypeError(f"{name} must be a number but is a {type(value).__name__}.")
    if not math.isfinite(value) or value < minimum:
        needed = "finite" if minimum == -math.inf else f"finite and at least {minimum:g}"
        raise ValueError(f"{name} must be {needed} but is {value}.")
    return float(value)


def _check_weights(name: str, weights: float | Mapping[str, float]) -> float | dict[str, float]:
    """Returns one weight, or a weight a representation, as floats after checking them."""
    if isinstance(weights, Mapping):
        return {key: _check_number(f"{name}[{key!r}]", value) for key, value in weights.items()}
    return _check_number(name, weights)


def _check_views(
    name: str, views: Tensor | Sequence[Tensor], like: Tensor | None = None
) -> list[Tensor]:
    """Returns embeddings of one or several views as a list after checking them."""
    if isinstance(views, Tensor):
        views = [views]
    elif not isinstance(views, Sequence) or isinstance(views, str):
        raise TypeError(
            f"{name} must be a torch.Tensor or a list of them but is a {type(views).__name__}."
        )
    if not views:
        raise ValueError(f"{name} must not be empty but is [].")
    for i, view in enumerate(views):
        label = name if len(views) == 1 else f"{name}[{i}]"
        check_float_tensor(label, view)
        if view.ndim != 2 or view.shape[1] == 0:
            raise ValueError(f"{label} must have shape (N, D) but has shape {tuple(view.shape)}.")
        reference = views[0] if like is None else like
        if view.shape != reference.shape:
            raise ValueError(
                f"{label} must have the same shape as the other embeddings, "
                f"{tuple(reference.shape)}, but has shape {tuple(view.shape)}."
            )
        check_finite(label, view)
    return list(views)


def _check_representations(
    representations: Mapping[str, Tensor], embeddings: Tensor, weights: float | Mapping[str, float]
) -> dict[str, Tensor]:
    """Returns the representations after checking names, batch size and device."""
    if not isinstance(representations, Mapping):
        raise TypeError(
            "representations must be a mapping from name to tensor "
            f"but is a {type(representations).__name__}."
        )
    if isinstance(weights, Mapping) and set(weights) != set(representations) and representations:
        raise ValueError(
            "representations and their weights must have the same names but are "
            f"{sorted(representations)} and {sorted(weights)}."
        )
    for name, y in representations.items():
        label = f"representations[{name!r}]"
        check_float_tensor(label, y)
        if y.ndim < 1 or len(y) != len(embeddings) or y.numel() == 0:
            raise ValueError(
                f"{label} must have shape ({len(embeddings)}, ...), one row for each embedding, "
                f"but has shape {tuple(y.shape)}."
            )
        if y.device != embeddings.device:
            raise ValueError(
                f"{label} must be on {embeddings.device} like the embeddings but is on {y.device}."
            )
    return dict(representations)


def _check_batch(name: str, embeddings: Tensor, measure: DependenceMeasure) -> None:
    """Raises if the whole batch is too small for the dependence measure."""
    if len(embeddings) < measure.min_samples:
        raise ValueError(
            f"{name} must have at least {measure.min_samples} samples for "
            f"{type(measure).__name__} but has {len(embeddings)}; use a larger batch."
        )


def _gather(
    gatherer: Gatherer, views: list[Tensor], representations: dict[str, Tensor]
) -> tuple[list[Tensor], dict[str, Tensor]]:
    """Returns the views and representations of all processes."""
    gathered = gatherer([*views, *representations.values()])
    return gathered[: len(views)], dict(zip(representations, gathered[len(views) :], strict=True))
