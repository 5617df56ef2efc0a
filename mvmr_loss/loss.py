"""The MV-MR objective, and its representation terms alone."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from mvmr_loss._batch import Batch, check_weights, checked_batch, named_views
from mvmr_loss._checks import can_be_seen, check_bool, check_choice, check_finite, check_number
from mvmr_loss.dependence import DependenceMeasure
from mvmr_loss.dependence import dependence_measure as resolve_measure

Measure = str | Mapping[str, Any] | DependenceMeasure
Weights = float | Mapping[str, float]
# The embeddings that meet the representations: the augmented views', as published, or all.
RepresentationViews = Literal["augmented", "both"]

# On a CPU, batches of so many numbers are read in slices of columns that stay in the cache.
_SLICED_FROM = 2**17
_SLICE_COLUMNS = 1024

# Term -> the pairs that meet: an embedding, by its place, and another one or a representation, by name.
_Meetings = dict[str, list[tuple[int, int | str]]]


def invariance_loss(z: Tensor, z_augmented: Tensor) -> Tensor:
    """Computes the invariance term: the mean squared error between two views' embeddings.

    Source: MV-MR (arXiv 2303.12130), the invariance term, as in VICReg (arXiv 2105.04906).

    Args:
        z: Embeddings of the non-augmented view, shape (N, D). Half precision is raised to float32.
        z_augmented: Embeddings of the augmented view, shape (N, D).

    Returns:
        Scalar tensor, at least 0.

    Examples:
        >>> invariance_loss(torch.zeros(2, 2), torch.tensor([[1.0, 0.0], [0.0, 1.0]]))
        tensor(0.5000)
    """
    dtype = torch.promote_types(z.dtype, torch.float32)
    return F.mse_loss(z.to(dtype), z_augmented.to(dtype))


def variance_loss(z: Tensor, margin: float = 1.0, eps: float = 1e-4) -> Tensor:
    """Computes the variance term: how far each coordinate's standard deviation is below a margin.

    The standard deviation is taken over the batch (divided by N - 1), with ``eps`` inside the root
    so that the gradient stays finite when the embeddings collapse.

    Source: MV-MR (arXiv 2303.12130), the variance term, as in VICReg (arXiv 2105.04906), eq. 1.

    Args:
        z: Embeddings of one view, shape (N, D), N >= 2. Half precision is raised to float32.
        margin: The standard deviation below which a coordinate is penalised.
        eps: Added to the variance.

    Returns:
        Scalar tensor in [0, margin].

    Examples:
        >>> variance_loss(torch.tensor([[0.0, 0.0], [0.0, 2.0]]))  # std 0.01 (collapsed) and 1.41
        tensor(0.4950)
    """
    z = z.to(torch.promote_types(z.dtype, torch.float32))
    # Wide batches on a CPU: torch strides through memory, in up to four times the time.
    sliced = z.is_cpu and z.numel() >= _SLICED_FROM and can_be_seen(z)
    variance = _VarianceInSlices.apply(z) if sliced else z.var(dim=0)
    return F.relu(margin - torch.sqrt(variance + eps)).mean()


class _VarianceInSlices(torch.autograd.Function):
    """The columns are read in slices that stay in the cache; the backward is differentiable."""

    @staticmethod
    def forward(z: Tensor) -> Tensor:
        squares = [
            (part - part.mean(dim=0)).square().sum(dim=0) for part in z.split(_SLICE_COLUMNS, dim=1)
        ]
        return torch.cat(squares) / (len(z) - 1)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor], output: Tensor) -> None:
        ctx.save_for_backward(*inputs)
        ctx.save_for_forward(*inputs)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        (z,) = ctx.saved_tensors
        slope = 2 * grad / (len(z) - 1)
        return torch.addcmul(-slope * z.mean(dim=0), z, slope)

    @staticmethod
    def jvp(ctx: Any, tangent: Tensor) -> Tensor:
        (z,) = ctx.saved_tensors
        change: Tensor = ((z - z.mean(dim=0)) * tangent).sum(dim=0)
        return 2 * change / (len(z) - 1)


class LossComponents(NamedTuple):
    """The terms of a loss by name, each as it is before its weight, and their weighted sum.

    The names are ``invariance``, ``variance``, ``dependence`` and ``representations/NAME``. The last
    ones, and ``dependence``, are one minus the dependence, or the dependence itself where the weight
    is negative; 0 where it is 0.

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


class MultiRepresentationRegularizer(nn.Module):
    """The representation terms of MV-MR alone: dependence of any embeddings on representations.

    Computes the sum over k of ``w_k (1 - dependence(z, y_k))`` for ``w_k >= 0``. A negative weight
    rewards independence instead: it adds ``|w_k| dependence(z, y_k)``, as the authors' release does.
    The embeddings may come from any method: add the result to the loss of VICReg, SimCLR or a
    supervised one. Nothing is normalised over several representations: each brings its full weight.

    Source: MV-MR, Entropy 26(6):466, 2024 (arXiv 2303.12130), the multi-representation terms.

    Args:
        weights: One weight for all representations, or one per name. Signed; 0 leaves a term out.
        dependence_measure: A name, a mapping with a ``name`` and options, or a measure, see
            :func:`mvmr_loss.dependence.dependence_measure`.
        gather_distributed: If True, embeddings and representations of all processes are gathered,
            with gradient, by their names. No effect where no process group is initialised.

    Raises:
        TypeError: If a weight is not a number or the measure is of no known form.
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
        weights: Weights = 1.0,
        *,
        dependence_measure: Measure = "distance_correlation",
        gather_distributed: bool = False,
    ) -> None:
        super().__init__()
        self.weights = check_weights("weights", weights)
        self.measure = resolve_measure(dependence_measure)
        self.gather_distributed = check_bool("gather_distributed", gather_distributed)

    def extra_repr(self) -> str:
        """Returns the arguments, for printing."""
        return f"weights={self.weights}, gather_distributed={self.gather_distributed}"

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
        return self.forward_components(embeddings, representations).total

    def forward_components(
        self, embeddings: Tensor | Sequence[Tensor], representations: Mapping[str, Tensor]
    ) -> LossComponents:
        """Computes each representation term; arguments and errors as of :meth:`forward`."""
        named = named_views("embeddings", embeddings)
        if representations == {}:
            raise ValueError("representations must not be empty but is {}.")
        batch = checked_batch(
            named,
            representations,
            self.weights,
            self.measure,
            gather_distributed=self.gather_distributed,
        )
        weights = _weights_by_term(self.weights, batch.features)
        met: _Meetings = {}
        for term, name in zip(weights, batch.features, strict=True):
            met[term] = [(i, name) for i in range(len(batch.views))]
        return _components(_dependence_terms(self.measure, batch, met, weights), weights, batch)


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

    Everything is computed in float32 or better (float64 for float64 input), also under autocast.

    Source: MV-MR, Entropy 26(6):466, 2024 (arXiv 2303.12130).

    Args:
        invariance_weight: Weight of the invariance term, at least 0.
        variance_weight: Weight of the variance term, at least 0.
        dependence_weight: Weight of the dependence between the views, signed.
        representation_weights: One weight for all representations, or one per name; signed.
        representation_views: Which embeddings meet the representations: the "augmented" views', as
            published, or "both", those of the non-augmented view too; each term is the mean.
        variance_margin: Standard deviation below which a coordinate is penalised.
        dependence_measure: A name, a mapping with a ``name`` and options, or a measure, see
            :func:`mvmr_loss.dependence.dependence_measure`.
        gather_distributed: If True, embeddings and representations of all processes are gathered,
            with gradient, and the loss is that of the whole batch; each process computes its own
            rows of the matrices. Leave it to DistributedDataParallel to average the gradients; do
            not multiply by the world size. Every process must call the loss equally often with
            batches of one size (``drop_last=True``): ``DDP.join()``, which lets some processes stop
            before others, does not know of the exchange and would leave the others waiting. No
            effect where no process group is initialised.
        eps: Added to the variance inside the standard deviation.

    Raises:
        TypeError: If a weight is not a number or the measure is of no known form.
        ValueError: If a weight is out of range or the measure's name is unknown.

    Examples:
        >>> import torch
        >>> _ = torch.manual_seed(0)
        >>> images = torch.rand(8, 3, 16, 16)
        >>> z, z_augmented = torch.randn(8, 32), torch.randn(8, 32)
        >>> criterion = MVMRLoss()
        >>> loss = criterion(z, z_augmented, {"pixels": images})
        >>> components = criterion.forward_components(z, z_augmented, {"pixels": images})
        >>> bool(loss == components.total), list(components.as_dict("train/"))[-1]
        (True, 'train/representations/pixels')
    """

    def __init__(
        self,
        *,
        invariance_weight: float = 1.0,
        variance_weight: float = 1.0,
        dependence_weight: float = 1.0,
        representation_weights: Weights = 1.0,
        representation_views: RepresentationViews = "augmented",
        variance_margin: float = 1.0,
        dependence_measure: Measure = "distance_correlation",
        gather_distributed: bool = False,
        eps: float = 1e-4,
    ) -> None:
        super().__init__()
        self.invariance_weight = check_number("invariance_weight", invariance_weight, minimum=0)
        self.variance_weight = check_number("variance_weight", variance_weight, minimum=0)
        self.dependence_weight = check_number("dependence_weight", dependence_weight)
        self.representation_weights = check_weights(
            "representation_weights", representation_weights
        )
        self.representation_views = check_choice(
            "representation_views", representation_views, ("augmented", "both")
        )
        self.variance_margin = check_number("variance_margin", variance_margin, minimum=0)
        self.eps = check_number("eps", eps, minimum=0)
        self.measure = resolve_measure(dependence_measure)
        self.gather_distributed = check_bool("gather_distributed", gather_distributed)

    def extra_repr(self) -> str:
        """Returns the arguments, for printing."""
        names = (
            *("invariance_weight", "variance_weight", "dependence_weight"),
            *("representation_weights", "representation_views", "variance_margin"),
            *("gather_distributed", "eps"),
        )
        return ", ".join(f"{name}={getattr(self, name)!r}" for name in names)

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
            ValueError: If shapes or names do not fit, the batch is too small, the processes' tensors
                differ, or, on a CPU, a value is not finite.
        """
        return self.forward_components(z, z_augmented, representations).total

    def forward_components(
        self,
        z: Tensor,
        z_augmented: Tensor | Sequence[Tensor],
        representations: Mapping[str, Tensor] | None = None,
    ) -> LossComponents:
        """Computes each term of the loss; arguments and errors as of :meth:`forward`."""
        named = {"z": z, **named_views("z_augmented", z_augmented)}
        batch = checked_batch(
            named,
            {} if representations is None else representations,
            self.representation_weights,
            self.measure,
            gather_distributed=self.gather_distributed,
        )
        views = batch.views
        by_representation = _weights_by_term(self.representation_weights, batch.features)
        weights = {
            "invariance": self.invariance_weight,
            "variance": self.variance_weight,
            "dependence": self.dependence_weight,
            **by_representation,
        }
        first = 0 if self.representation_views == "both" else 1
        met: _Meetings = {"dependence": [(0, i) for i in range(1, len(views))]}
        for term, name in zip(by_representation, batch.features, strict=True):
            met[term] = [(i, name) for i in range(first, len(views))]
        spread = [variance_loss(view, self.variance_margin, self.eps) for view in views]
        terms = {
            "invariance": _mean([invariance_loss(views[0], view) for view in views[1:]]),
            "variance": spread[0] + _mean(spread[1:]),
        }
        terms |= _dependence_terms(self.measure, batch, met, weights)
        return _components(terms, weights, batch)


def _dependence_terms(
    measure: DependenceMeasure, batch: Batch, met: _Meetings, weights: Mapping[str, float]
) -> dict[str, Tensor]:
    """Returns what rewards dependence, or independence for a negative weight: means over the pairs.

    Each matrix is made once and met by all the others.
    """
    views, features = batch.views, batch.features
    wanted = {term: pairs for term, pairs in met.items() if weights[term] != 0}
    terms = {term: views[0].new_zeros(()) for term in met if term not in wanted}
    if wanted:
        sides = {side for pairs in wanted.values() for pair in pairs for side in pair}
        order = [side for side in (*range(len(views)), *features) if side in sides]
        place = {side: i for i, side in enumerate(order)}
        batches = [views[s] if isinstance(s, int) else features[s].flatten(1) for s in order]
        pairs = [(place[a], place[b]) for pairs in wanted.values() for a, b in pairs]
        values = measure.compare(batches, pairs, batch.rows).to(views[0].dtype)
        counts = [len(pairs) for pairs in wanted.values()]
        for term, value, lack in zip(
            wanted, values.split(counts), (1 - values).split(counts), strict=True
        ):
            chosen = lack if weights[term] > 0 else value
            terms[term] = chosen.mean() if len(chosen) > 1 else chosen[0]
    return {term: terms[term] for term in met}


def _components(
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


def _mean(terms: Sequence[Tensor]) -> Tensor:
    """Returns the mean of scalar tensors."""
    return torch.stack(list(terms)).mean() if len(terms) > 1 else terms[0]


def _weights_by_term(
    weights: float | dict[str, float], features: Mapping[str, Tensor]
) -> dict[str, float]:
    """Returns the weight of each representation's term."""
    return {
        f"representations/{name}": weights[name] if isinstance(weights, dict) else weights
        for name in features
    }
