"""The methods compared: heads and loss of each, from features of the views to a number."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from lightly.loss import BarlowTwinsLoss, LeJEPALoss, NegativeCosineSimilarity
from torch import Tensor, nn
from torch.nn import functional as F

from benchmarks.quality.measures import measure_of
from mvmr_loss import DistillationLoss, MVMRLoss, MVMRProjectionHead
from mvmr_loss.dependence import dependence_measure
from mvmr_loss.presets import IDENTITY_MEASURE

WIDTH = 512
Encode = Callable[[nn.Module, Sequence[Tensor]], list[Tensor]]


class Batch(NamedTuple):
    """What a method may look at.

    Attributes:
        features: The encoder's, of each view.
        representations: Of the images, by name.
        views: The images.
        encode: From an encoder and views to features.
    """

    features: list[Tensor]
    representations: Mapping[str, Tensor]
    views: list[Tensor]
    encode: Encode


def width_of(encoder: nn.Module) -> int:
    """Returns the number of an encoder's features."""
    return int(encoder.output_dim)  # type: ignore[arg-type]


def second_head(width: int) -> nn.Sequential:
    """Returns a small head whose embeddings meet the representations; thrown away after training."""
    return nn.Sequential(
        nn.Linear(width, 256), nn.BatchNorm1d(256), nn.ReLU(inplace=True), nn.Linear(256, 128)
    )


class Method(nn.Module):
    """From a :class:`Batch` to the loss and its terms by name.

    Attributes:
        projector: The head whose embeddings are judged.
        capturable: Whether a step can be a CUDA graph.
    """

    projector: nn.Module
    capturable = True


class Regressed(Method):
    """A method, and beside it what the encoder's features have to do with the representations.

    Args:
        method: Its loss, with a ``projector``.
        encoder: Maps images to features; has ``output_dim``.
        representations: All training images' representations, by whose statistics each coordinate is
            standardised.
        regression: Weight of the regression onto them.
        dependence: Weight of the dependence on them.
        stacked: Whether that is of all views as one batch, rather than of each.
        measure: What it is measured by.
        hidden_dim: Width of the heads between; None: the loss's own.
    """

    def __init__(
        self,
        method: Method,
        encoder: nn.Module,
        representations: Mapping[str, Tensor],
        *,
        regression: float = 0.0,
        dependence: float = 0.0,
        stacked: bool = False,
        measure: Any = "distance_correlation",
        hidden_dim: int | None = None,
    ) -> None:
        super().__init__()
        self.method = method
        self.projector = method.projector
        self.capturable = method.capturable
        self.regression = DistillationLoss(
            width_of(encoder),
            {name: y.shape[1] for name, y in representations.items()},
            regression_weight=regression,
            dependence_weight=dependence,
            scale="coordinate",
            stacked=stacked,
            dependence_measure=measure,
            hidden_dim=hidden_dim,
        ).fit(representations)

    def forward(self, batch: Batch) -> dict[str, Tensor]:
        """Computes the loss, and its terms by name."""
        terms = dict(self.method(batch))
        regressed = self.regression.forward_components(batch.features, batch.representations)
        return {**terms, **regressed.terms, "loss": terms["loss"] + regressed.total}


def embed(head: nn.Module, features: Sequence[Tensor]) -> list[Tensor]:
    """Returns the embeddings of each view; statistics of BatchNorm are those of all views."""
    return list(head(torch.cat(list(features))).chunk(len(features)))


class MVMR(Method):
    """A preset of the loss.

    Args:
        encoder: Maps images to features; has ``output_dim``.
        preset: One of :func:`mvmr_loss.list_presets`.
        head: Which embeddings meet the representations: the "same" as the views', or those of a
            "second" head.
        width: Of the projector.
        **options: Options of :class:`mvmr_loss.MVMRLoss` in the place of the preset's.
    """

    def __init__(
        self,
        encoder: nn.Module,
        *,
        preset: str,
        head: str = "same",
        width: int = WIDTH,
        **options: Any,
    ) -> None:
        super().__init__()
        features = width_of(encoder)
        self.projector = MVMRProjectionHead(features, width, width)
        self.second = second_head(features) if head == "second" else None
        if "identity_measure" in options:
            options["identity_measure"] = measure_of(options["identity_measure"])
        self.criterion = MVMRLoss.from_preset(preset, **options)

    def forward(self, batch: Batch) -> dict[str, Tensor]:
        """Computes the loss, and its terms by name."""
        z, *augmented = embed(self.projector, batch.features)
        second = None
        if self.second is not None and batch.representations:
            second = embed(self.second, batch.features)
        return self.criterion.forward_components(
            z, augmented, batch.representations, second
        ).as_dict()


class IdentityAware(Method):
    """The identity term by a label that also tells how much alike images are.

    Args:
        encoder: Maps images to features; has ``output_dim``.
        share: How much of the label's squared distances is the representations'.
    """

    def __init__(self, encoder: nn.Module, *, share: float) -> None:
        super().__init__()
        self.projector = MVMRProjectionHead(width_of(encoder), WIDTH, WIDTH)
        self.measure = dependence_measure(IDENTITY_MEASURE)
        self.share = share

    def forward(self, batch: Batch) -> dict[str, Tensor]:
        """Computes the loss."""
        views = torch.stack(embed(self.projector, batch.features), dim=1)
        label = identity_aware_label(batch.representations, views.shape[1], self.share)
        return {"loss": 1 - self.measure(F.normalize(views, dim=-1).flatten(0, 1), label)}


def identity_aware_label(representations: Mapping[str, Tensor], count: int, share: float) -> Tensor:
    """Returns what tells stacked views their image, and of two images how much alike they are.

    Beside the one-hot label stand the representations, each coordinate standardised over the batch.
    The mean squared distance between two images stays 2.

    Args:
        representations: Of the images, each of shape (N, d).
        count: Number of views; those of an image stand together.
        share: How much of the squared distances is the representations', from 0 to 1.

    Returns:
        Shape (N * count, N + sum of d).

    Examples:
        >>> label = identity_aware_label({"pixels": torch.randn(8, 3)}, 2, 0.25)
        >>> torch.round(torch.cdist(label, label).square().sum() / (8 * 7 * 4), decimals=3)
        tensor(2.)
    """
    parts = []
    for y in representations.values():
        y = (y.float() - y.float().mean(0)) / (y.float().std(0) + 1e-6)
        # The mean squared distance is twice the sum of the variances.
        parts.append(y * (share / len(representations) / y.var(0).sum()).sqrt())
    one_hot = torch.eye(len(parts[0]), device=parts[0].device) * (1 - share) ** 0.5
    return torch.cat([one_hot, *parts], dim=1).repeat_interleave(count, dim=0)


class Peer(Method):
    """A loss of pairs of views; each view meets the first, and the mean is taken.

    Args:
        encoder: Maps images to features; has ``output_dim``.
        loss: The loss of two batches of embeddings.
    """

    def __init__(self, encoder: nn.Module, loss: nn.Module) -> None:
        super().__init__()
        width = width_of(encoder)
        self.projector = MVMRProjectionHead(width, WIDTH, WIDTH)
        self.loss = loss

    def forward(self, batch: Batch) -> dict[str, Tensor]:
        """Computes the loss."""
        return {"loss": self.compare(embed(self.projector, batch.features), batch)}

    def compare(self, embeddings: list[Tensor], batch: Batch) -> Tensor:
        """Computes the loss of the views' embeddings."""
        first, *others = embeddings
        return torch.stack([self.loss(first, other) for other in others]).mean()


class NTXent(nn.Module):
    """lightly's NTXentLoss, without the masks for which a GPU must be waited for.

    Source: SimCLR, Chen et al., ICML 2020 (arXiv 2002.05709), eq. 1.
    """

    def __init__(self, temperature: float = 0.5) -> None:
        super().__init__()
        self.temperature = temperature

    def forward(self, a: Tensor, b: Tensor) -> Tensor:
        """Computes the loss of two views, shapes (N, D)."""
        z = F.normalize(torch.cat([a, b]), dim=1)
        logits = z @ z.T / self.temperature
        itself = torch.eye(len(z), dtype=torch.bool, device=z.device)
        place = torch.arange(len(z), device=z.device)
        return F.cross_entropy(logits.masked_fill(itself, -torch.inf), place.roll(len(a)))


class VICReg(nn.Module):
    """lightly's VICRegLoss, likewise.

    Source: VICReg, Bardes et al., ICLR 2022 (arXiv 2105.04906), eq. 6.
    """

    def __init__(
        self, lambda_param: float = 25.0, mu_param: float = 25.0, nu_param: float = 1.0
    ) -> None:
        super().__init__()
        self.weights = lambda_param, mu_param, nu_param

    def forward(self, a: Tensor, b: Tensor) -> Tensor:
        """Computes the loss of two views, shapes (N, D)."""
        invariance, variance, covariance = self.weights
        spread = torch.stack([F.relu(1 - (z.var(dim=0) + 1e-4).sqrt()).mean() for z in (a, b)])
        between = torch.stack([_covariance(z) for z in (a, b)])
        return invariance * F.mse_loss(a, b) + variance * spread.mean() + covariance * between.sum()


def _covariance(z: Tensor) -> Tensor:
    z = z - z.mean(dim=0)
    squares = (z.T @ z / (len(z) - 1)).square()
    return (squares.sum() - squares.diagonal().sum()) / z.shape[1]


class LeJEPA(Peer):
    """LeJEPA, which takes all views at once: the first is global, the others local."""

    def compare(self, embeddings: list[Tensor], batch: Batch) -> Tensor:
        """Computes the loss."""
        first, *others = embeddings
        loss: Tensor = self.loss(local_proj=torch.stack(others), global_proj=first[None])
        return loss


class BYOL(Peer):
    """BYOL: a predictor, and a moving average of the encoder that sees the full views."""

    def __init__(self, encoder: nn.Module, *, momentum: float = 0.99) -> None:
        super().__init__(encoder, NegativeCosineSimilarity())
        self.momentum = momentum
        self.online = [encoder]  # in a list: its parameters are not this module's
        self.predictor = MVMRProjectionHead(WIDTH, WIDTH, WIDTH, num_layers=2)
        self.target = nn.ModuleList([copy.deepcopy(encoder), copy.deepcopy(self.projector)])
        self.target.requires_grad_(False)

    def compare(self, embeddings: list[Tensor], batch: Batch) -> Tensor:
        """Computes the loss after a step of the moving average."""
        self._follow(self.online[0], self.target[0])
        self._follow(self.projector, self.target[1])
        full = [view for view in batch.views if view.shape == batch.views[0].shape]
        with torch.no_grad():
            targets = embed(self.target[1], batch.encode(self.target[0], full))
        predictions = embed(self.predictor, embeddings)
        losses = [
            self.loss(prediction, target)
            for i, prediction in enumerate(predictions)
            for j, target in enumerate(targets)
            if i != j
        ]
        return torch.stack(losses).mean()

    @torch.no_grad()
    def _follow(self, online: nn.Module, target: nn.Module) -> None:
        """Moves the average, in place as a CUDA graph must."""
        ends = [list(module.parameters()) for module in (target, online)]
        torch._foreach_lerp_(*ends, 1 - self.momentum)


def build(
    name: str,
    encoder: nn.Module,
    options: Mapping[str, Any],
    representations: Mapping[str, Tensor] | None = None,
) -> Method:
    """Returns the method of a name.

    Args:
        name: "mvmr", "identity_aware", "vicreg", "simclr", "barlow_twins", "byol" or "lejepa".
        encoder: Maps images to features; has ``output_dim``.
        options: ``preset``, ``head``, ``width`` and those of the loss; for the others the loss's own;
            for all those of :class:`Regressed`.
        representations: All training images', for the regression.

    Raises:
        ValueError: If there is no such method.
    """
    beside = ("regression", "dependence", "stacked", "measure", "hidden_dim")
    regressed = {option: value for option, value in options.items() if option in beside}
    options = {option: value for option, value in options.items() if option not in beside}
    if regressed.get("regression") or regressed.get("dependence"):
        method = build(name, encoder, options)
        return Regressed(method, encoder, representations or {}, **regressed)
    if name == "mvmr":
        return MVMR(encoder, **options)
    if name == "identity_aware":
        return IdentityAware(encoder, **options)
    if name == "byol":
        return BYOL(encoder, **options)
    if name == "lejepa":
        return LeJEPA(encoder, LeJEPALoss(**options))
    losses: dict[str, Any] = {"vicreg": VICReg, "simclr": NTXent, "barlow_twins": BarlowTwinsLoss}
    if name not in losses:
        known = ", ".join(["mvmr", "identity_aware", "byol", "lejepa", *losses])
        raise ValueError(f"method must be one of {known} but is {name!r}.")
    return Peer(encoder, losses[name](**options))
