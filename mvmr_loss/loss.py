"""The MV-MR objective, and its terms."""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from mvmr_loss._checks import (
    can_be_seen,
    check_bool,
    check_choice,
    check_number,
    without_autocast,
)
from mvmr_loss._objective import (
    LossComponents,
    Measure,
    Meetings,
    Weights,
    check_views,
    check_weights,
    checked_batch,
    components,
    dependence_terms,
    mean_of,
    measure_of_batch,
    named_views,
    unit_length,
)
from mvmr_loss.dependence.matrices import WIDE
from mvmr_loss.dependence.measures import in_range
from mvmr_loss.dependence.registry import measure_of
from mvmr_loss.distributed import ALL_ROWS, Rows
from mvmr_loss.presets import IDENTITY_MEASURE, preset_settings

# The embeddings that meet the representations: the augmented views', as published, or all.
RepresentationViews = Literal["augmented", "both"]

# On a CPU, batches of so many numbers are read in slices of columns that stay in the cache.
_SLICED_FROM = 2**17
_SLICE_COLUMNS = 1024


def invariance_loss(z: Tensor, z_augmented: Tensor) -> Tensor:
    """Computes the invariance term: the mean squared error between two views' embeddings.

    Source: MV-MR (arXiv 2303.12130), the invariance term, as in VICReg (arXiv 2105.04906).

    Args:
        z: Embeddings of the non-augmented view, shape (N, D). Half precision is raised to float32.
        z_augmented: Embeddings of the augmented view, shape (N, D).

    Returns:
        Scalar tensor, at least 0.

    Raises:
        TypeError: If an input is not a floating-point tensor.
        ValueError: If the shapes do not fit.

    Examples:
        >>> invariance_loss(torch.zeros(2, 2), torch.tensor([[1.0, 0.0], [0.0, 1.0]]))
        tensor(0.5000)
    """
    check_views({"z": z, "z_augmented": z_augmented})
    dtype = functools.reduce(torch.promote_types, [z.dtype, z_augmented.dtype], torch.float32)
    return F.mse_loss(z.to(dtype), z_augmented.to(dtype))


def variance_loss(z: Tensor, margin: float = 1.0, eps: float = 1e-4) -> Tensor:
    """Computes the variance term: how far each coordinate's standard deviation is below a margin.

    The standard deviation is taken over the batch (divided by N - 1), with ``eps`` inside the root
    so that the gradient stays finite when the embeddings collapse.

    Source: MV-MR (arXiv 2303.12130), the variance term, as in VICReg (arXiv 2105.04906), eq. 1.

    Args:
        z: Embeddings of one view, shape (N, D), N >= 2. Half precision is raised to float32.
        margin: The standard deviation below which a coordinate is penalised, at least 0.
        eps: Added to the variance, above 0.

    Returns:
        Scalar tensor in [0, margin].

    Raises:
        TypeError: If ``z`` is not a floating-point tensor.
        ValueError: If it is not of shape (N, D) with N >= 2, or an option is out of range.

    Examples:
        >>> variance_loss(torch.tensor([[0.0, 0.0], [0.0, 2.0]]))  # std 0.01 (collapsed) and 1.41
        tensor(0.4950)
    """
    check_views({"z": z}, 2)
    if not margin >= 0:
        raise ValueError(f"margin must be at least 0 but is {margin}.")
    if not eps > 0:
        raise ValueError(f"eps must be above 0 but is {eps}.")
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


def covariance_loss(z: Tensor, rows: Rows = ALL_ROWS) -> Tensor:
    """Computes the covariance term: the squared covariances between coordinates, over the width.

    With K the Gram matrix about the mean, their sum is ``|K|^2 / (N - 1)^2`` less the squared variances,
    so that the cost grows with N^2 D, not with N D^2, for embeddings at least as wide as the batch; in
    float64.

    Source: VICReg (arXiv 2105.04906), eq. 4; by the Gram matrix as in Garrido et al., ICLR 2023
    (arXiv 2206.02574), lemma 3.1.

    Args:
        z: Embeddings of one view, shape (N, D), N >= 2. Half precision is raised to float32.
        rows: Which rows of the Gram matrix are computed in this process.

    Returns:
        Scalar tensor, at least 0; held within the dtype's range. It has no gradient
        where the fourth power of the largest deviation nears the end of that range (1e9 in float32).

    Raises:
        TypeError: If ``z`` is not a floating-point tensor.
        ValueError: If it is not of shape (N, D) with N >= 2.

    Examples:
        >>> covariance_loss(torch.tensor([[1.0, 1.0], [-1.0, -1.0]]))
        tensor(4.)
    """
    check_views({"z": z}, 2)
    z = z.to(torch.promote_types(z.dtype, torch.float32))
    n, width = z.shape
    # In units of the largest number: its fourth power, and even a sum, may leave the range of the type.
    peak = _peak(z)
    centered = z / peak
    centered = centered - centered.mean(dim=0)
    deviation = _peak(centered)
    centered, unit = centered / deviation, peak * deviation
    wide = WIDE.get(z.device.type, torch.float64)
    with without_autocast(z):
        if width < n and rows.stop is None:
            covariances = centered.T @ centered
            squares = (covariances - covariances.diagonal().diag()).square().sum()
        else:  # of one large coordinate the difference has none of float32's digits
            whole = centered.to(wide)
            gram = whole[rows.start : rows.stop] @ whole.T
            squares = rows.sum(gram.square().sum()) - whole.square().sum(dim=0).square().sum()
    value = squares / ((n - 1) ** 2 * width)
    # In these units a negative rounding is small, in the caller's it may be the largest number.
    value = value - value.detach().clamp(max=0)
    # On its way back the gradient is divided by the deviation; the margin is for its terms.
    beyond = unit.to(wide).pow(4) > deviation.to(wide) * (torch.finfo(z.dtype).max / 64)
    value = torch.where(beyond, value.detach(), value)
    return in_range(value.to(wide), unit.to(wide).pow(4), torch.finfo(z.dtype).max).to(z.dtype)


def identity_loss(
    views: Sequence[Tensor], measure: Measure = IDENTITY_MEASURE, rows: Rows = ALL_ROWS
) -> Tensor:
    """Computes the identity term: 1 minus the dependence of embeddings on which image they come from.

    The views are stacked, and each row is labelled with its image (one-hot): a representation that
    pulls the views of one image together and all images apart. Embeddings are scaled to length 1.

    Source: SSL-HSIC (Li et al., NeurIPS 2021, arXiv 2106.08320), eq. 4, whose HSIC is not
    normalised; here any dependence measure, by default the debiased CKA.

    Args:
        views: Embeddings of two or more views, each of shape (N, D). Half precision is raised to
            float32.
        measure: What compares the embeddings with the label; a name, a mapping with a ``name`` and
            options, or a measure. A bandwidth is in units of the length 1.
        rows: Which rows, of a view's N, are computed in this process.

    Returns:
        Scalar tensor, in [0, 2] for the default measure.

    Raises:
        TypeError: If a view is not a floating-point tensor.
        ValueError: If there are fewer than two views or than 2 images, or the shapes do not fit.

    Examples:
        >>> z = torch.eye(4)
        >>> same, shifted = identity_loss([z, z]), identity_loss([z, z.roll(1, 0)])
        >>> torch.round(same, decimals=3), torch.round(shifted, decimals=3)
        (tensor(0.), tensor(1.1670))
    """
    if len(views) < 2:
        raise ValueError(f"views must be two or more but are {len(views)}.")
    check_views({f"views[{i}]": view for i, view in enumerate(views)}, 2)
    unit = unit_length(torch.stack(list(views), dim=1))
    n, count = unit.shape[:2]
    label = torch.eye(n, dtype=unit.dtype, device=unit.device).repeat_interleave(count, dim=0)
    own = Rows(rows.start * count, None if rows.stop is None else rows.stop * count)
    return 1 - measure_of("measure", measure).compare([unit.flatten(0, 1), label], [(0, 1)], own)[0]


def _peak(z: Tensor) -> Tensor:
    """Returns the largest magnitude, without gradient; 1 where that is 0."""
    peak = z.detach().abs().amax()
    return torch.where(peak == 0, 1.0, peak)


class MVMRLoss(nn.Module):
    """The MV-MR loss: invariance, variance, dependence of the views and on representations.

    With z the embeddings of the non-augmented view, z~ of the augmented one, and y_k fixed
    representations of the non-augmented images::

        L =   invariance_weight  mse(z, z~)
            + variance_weight   [mean_d relu(margin - std_d(z)) + mean_d relu(margin - std_d(z~))]
            + dependence_weight (1 - dCor(z, z~))
            + sum_k w_k         (1 - dCor(z~, y_k))
            + identity_weight   identity_loss([z, z~])
            + covariance_weight [covariance_loss(z) + covariance_loss(z~)]

    The last two are not the paper's, and their weights are 0 but for presets, see :meth:`from_preset`.
    The loss knows nothing of images: live features, precomputed ones and a teacher's embeddings all
    go in as tensors, of any width; a gradient flows to those that require one. With several augmented
    views, every term that has z~ in it is the mean over the views, but for the identity term, which is
    one of all views. ``dependence_weight`` and the representations' weights are signed: a negative
    weight rewards independence by adding ``|w| dCor``.

    Everything is computed in float32 or better (float64 for float64 input), also under autocast. In
    float32 the loss is infinite where the sum of all squares leaves the range, as for 256 embeddings of
    width 8192 from 1e16 on, with the covariance term from 1e9 on. A gradient of float16 embeddings is
    infinite where it is beyond 65504, as for embeddings of 1e-7: that is what a GradScaler looks for.

    Source: MV-MR, Entropy 26(6):466, 2024 (arXiv 2303.12130).

    Args:
        invariance_weight: Weight of the invariance term, at least 0.
        variance_weight: Weight of the variance term, at least 0.
        dependence_weight: Weight of the dependence between the views, signed.
        representation_weights: One weight for all representations, or one per name; signed.
        representation_views: Which embeddings meet the representations: the "augmented" views', as
            published, or "both", those of the non-augmented view too; each term is the mean.
        identity_weight: Weight of the identity term, see :func:`.identity_loss`, at least 0.
        covariance_weight: Weight of the covariance term, see :func:`.covariance_loss`, at least 0.
        variance_margin: Standard deviation below which a coordinate is penalised.
        dependence_measure: A name, a mapping with a ``name`` and options, or a measure, see
            :func:`mvmr_loss.dependence.dependence_measure`.
        identity_measure: The measure of the identity term.
        gather_distributed: If True, embeddings and representations of all processes are gathered,
            with gradient, and the loss is that of the whole batch; each process computes its own
            rows of the matrices. Leave it to DistributedDataParallel to average the gradients; do
            not multiply by the world size. Every process must call the loss equally often with
            batches of one size (``drop_last=True``): ``DDP.join()``, which lets some processes stop
            before others, does not know of the exchange and would leave the others waiting. No
            effect where no process group is initialised.
        eps: Added to the variance inside the standard deviation, above 0: the root of a collapsed
            coordinate's variance has no finite gradient.

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
        identity_weight: float = 0.0,
        covariance_weight: float = 0.0,
        variance_margin: float = 1.0,
        dependence_measure: Measure = "distance_correlation",
        identity_measure: Measure = IDENTITY_MEASURE,
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
        self.identity_weight = check_number("identity_weight", identity_weight, minimum=0)
        self.covariance_weight = check_number("covariance_weight", covariance_weight, minimum=0)
        self.variance_margin = check_number("variance_margin", variance_margin, minimum=0)
        self.eps = check_number("eps", eps, above=0)
        self.measure = measure_of_batch("dependence_measure", dependence_measure)
        self.identity_measure = measure_of_batch("identity_measure", identity_measure)
        self.gather_distributed = check_bool("gather_distributed", gather_distributed)

    @classmethod
    def from_preset(cls, preset: str, **options: Any) -> MVMRLoss:
        """Returns the loss of a preset, see :func:`mvmr_loss.preset_settings`.

        Of ``features`` and ``distillation`` it is the part on the embeddings, which looks at no
        representations: those are for the preset's :class:`~mvmr_loss.DistillationLoss`, to be added.

        Args:
            preset: Its name, one of :func:`mvmr_loss.list_presets`.
            **options: Options of the loss that take the place of the preset's.

        Examples:
            >>> MVMRLoss.from_preset("identity", representation_weights=0.1).identity_weight
            1.0
        """
        return cls(**{**preset_settings(preset).loss, **options})

    def extra_repr(self) -> str:
        """Returns the arguments, for printing."""
        names = (
            *("invariance_weight", "variance_weight", "dependence_weight"),
            *("representation_weights", "representation_views", "identity_weight"),
            *("covariance_weight", "variance_margin", "gather_distributed", "eps"),
        )
        return ", ".join(f"{name}={getattr(self, name)!r}" for name in names)

    def forward(
        self,
        z: Tensor,
        z_augmented: Tensor | Sequence[Tensor],
        representations: Mapping[str, Tensor] | None = None,
        representation_embeddings: Tensor | Sequence[Tensor] | None = None,
    ) -> Tensor:
        """Computes the loss.

        Args:
            z: Embeddings of the non-augmented view, shape (N, D), N >= 2.
            z_augmented: Embeddings of the augmented view, shape (N, D), or a list of them.
            representations: Name -> tensor of shape (N, ...), which is flattened: fixed features of
                the non-augmented images. None or empty: no representation terms.
            representation_embeddings: Embeddings of shape (N, E), or a list of them, that meet the
                representations in the place of the others: those of a second projection head, which
                need not be invariant.

        Returns:
            Scalar tensor.

        Raises:
            TypeError: If an input is not a floating-point tensor or ``representations`` no mapping.
            ValueError: If shapes or names do not fit, the batch is too small, the processes' tensors
                differ, or, on a CPU, a value is not finite.
        """
        return self.forward_components(
            z, z_augmented, representations, representation_embeddings
        ).total

    def forward_components(
        self,
        z: Tensor,
        z_augmented: Tensor | Sequence[Tensor],
        representations: Mapping[str, Tensor] | None = None,
        representation_embeddings: Tensor | Sequence[Tensor] | None = None,
    ) -> LossComponents:
        """Computes each term of the loss; arguments and errors as of :meth:`forward`."""
        named = {"z": z, **named_views("z_augmented", z_augmented)}
        second = (
            {}
            if representation_embeddings is None
            else named_views("representation_embeddings", representation_embeddings)
        )
        batch = checked_batch(
            named,
            {} if representations is None else representations,
            self.representation_weights,
            self.measure,
            second=second,
            gather_distributed=self.gather_distributed,
        )
        views = [batch.views[label] for label in named]
        weights = {
            "invariance": self.invariance_weight,
            "variance": self.variance_weight,
            "dependence": self.dependence_weight,
            **batch.weights,
        }
        augmented = list(named)[1:]
        meeting = list(second) or (
            list(named) if self.representation_views == "both" else augmented
        )
        met: Meetings = {"dependence": [("z", view) for view in augmented]}
        for term, label in zip(batch.weights, batch.labels.values(), strict=True):
            met[term] = [(view, label) for view in meeting]
        terms: dict[str, Tensor] = {}
        for name in ("invariance", "variance"):
            if weights[name] == 0:
                terms[name] = views[0].new_zeros(())
            elif name == "invariance":
                terms[name] = mean_of([invariance_loss(views[0], view) for view in views[1:]])
            else:
                spread = [variance_loss(view, self.variance_margin, self.eps) for view in views]
                terms[name] = spread[0] + mean_of(spread[1:])
        terms.update(dependence_terms(self.measure, batch, met, weights))
        if self.identity_weight != 0:
            weights["identity"] = self.identity_weight
            terms["identity"] = identity_loss(views, self.identity_measure, batch.rows)
        if self.covariance_weight != 0:
            weights["covariance"] = self.covariance_weight
            spread = [covariance_loss(view, batch.rows) for view in views]
            terms["covariance"] = spread[0] + mean_of(spread[1:])
        return components(terms, weights, batch)
