"""The methods compared: heads and loss of each, from features of the views to a number."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from lightly.loss import (
    BarlowTwinsLoss,
    LeJEPALoss,
    NegativeCosineSimilarity,
    NTXentLoss,
    VICRegLoss,
)
from lightly.models.utils import update_momentum
from torch import Tensor, nn

from mvmr_loss import (
    DistillationLoss,
    MultiRepresentationRegularizer,
    MVMRLoss,
    MVMRProjectionHead,
)

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


class Regressed(nn.Module):
    """A method, and beside it what the encoder's features have to do with the representations.

    Args:
        method: Its loss, with a ``projector``.
        encoder: Maps images to features; has ``output_dim``.
        representations: All training images' representations, by whose statistics each coordinate is
            standardised.
        regression: Weight of the regression onto them.
        dependence: Weight of the dependence on them.
    """

    def __init__(
        self,
        method: nn.Module,
        encoder: nn.Module,
        representations: Mapping[str, Tensor],
        regression: float,
        dependence: float,
    ) -> None:
        super().__init__()
        self.method = method
        self.projector = method.projector
        self.regression = DistillationLoss(
            width_of(encoder),
            {name: y.shape[1] for name, y in representations.items()},
            regression_weight=regression,
            dependence_weight=dependence,
            scale="coordinate",
            stacked=False,
        ).fit(representations)

    def forward(self, batch: Batch) -> dict[str, Tensor]:
        """Computes the loss, and its terms by name."""
        terms = dict(self.method(batch))
        regressed = self.regression.forward_components(batch.features, batch.representations)
        return {**terms, **regressed.terms, "loss": terms["loss"] + regressed.total}


def embed(head: nn.Module, features: Sequence[Tensor]) -> list[Tensor]:
    """Returns the embeddings of each view; statistics of BatchNorm are those of all views."""
    return list(head(torch.cat(list(features))).chunk(len(features)))


class MVMR(nn.Module):
    """A preset of the loss.

    Args:
        encoder: Maps images to features; has ``output_dim``.
        preset: One of :func:`mvmr_loss.list_presets`.
        head: Which embeddings meet the representations: the "same" as the views', or those of a
            "second" head.
        **options: Options of :class:`mvmr_loss.MVMRLoss` in the place of the preset's.
    """

    def __init__(
        self, encoder: nn.Module, *, preset: str, head: str = "same", **options: Any
    ) -> None:
        super().__init__()
        width = width_of(encoder)
        self.projector = MVMRProjectionHead(width, WIDTH, WIDTH)
        self.second = second_head(width) if head == "second" else None
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


class Peer(nn.Module):
    """A loss of pairs of views, as lightly has it; each view meets the first, and the mean is taken.

    Args:
        encoder: Maps images to features; has ``output_dim``.
        loss: The loss of two batches of embeddings.
        regularizer: Weight of the representation terms on top; 0 leaves them out.
        head: As in :class:`MVMR`, for the representation terms.
    """

    def __init__(
        self, encoder: nn.Module, loss: nn.Module, *, regularizer: float = 0.0, head: str = "second"
    ) -> None:
        super().__init__()
        width = width_of(encoder)
        self.projector = MVMRProjectionHead(width, WIDTH, WIDTH)
        self.loss = loss
        self.regularizer = MultiRepresentationRegularizer(regularizer) if regularizer else None
        self.second = second_head(width) if regularizer and head == "second" else None

    def forward(self, batch: Batch) -> dict[str, Tensor]:
        """Computes the loss, and its terms by name."""
        embeddings = embed(self.projector, batch.features)
        own = self.compare(embeddings, batch)
        if self.regularizer is None:
            return {"loss": own}
        met = embeddings if self.second is None else embed(self.second, batch.features)
        terms = self.regularizer.forward_components(met, batch.representations)
        return {**terms.as_dict(), "own": own, "loss": own + terms.total}

    def compare(self, embeddings: list[Tensor], batch: Batch) -> Tensor:
        """Computes the peer's own loss."""
        first, *others = embeddings
        return torch.stack([self.loss(first, other) for other in others]).mean()


class LeJEPA(Peer):
    """LeJEPA, which takes all views at once: the first is global, the others local."""

    def compare(self, embeddings: list[Tensor], batch: Batch) -> Tensor:
        """Computes the loss."""
        first, *others = embeddings
        loss: Tensor = self.loss(local_proj=torch.stack(others), global_proj=first[None])
        return loss


class BYOL(Peer):
    """BYOL: a predictor, and a moving average of the encoder that sees the full views."""

    def __init__(self, encoder: nn.Module, *, momentum: float = 0.99, **options: Any) -> None:
        super().__init__(encoder, NegativeCosineSimilarity(), **options)
        self.momentum = momentum
        self.online = [encoder]  # in a list: its parameters are not this module's
        self.predictor = MVMRProjectionHead(WIDTH, WIDTH, WIDTH, num_layers=2)
        self.target = nn.ModuleList([copy.deepcopy(encoder), copy.deepcopy(self.projector)])
        self.target.requires_grad_(False)

    def compare(self, embeddings: list[Tensor], batch: Batch) -> Tensor:
        """Computes the loss after a step of the moving average."""
        update_momentum(self.online[0], self.target[0], self.momentum)
        update_momentum(self.projector, self.target[1], self.momentum)
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


def build(
    name: str,
    encoder: nn.Module,
    options: Mapping[str, Any],
    representations: Mapping[str, Tensor] | None = None,
) -> nn.Module:
    """Returns the method of a name.

    Args:
        name: "mvmr", "vicreg", "simclr", "barlow_twins", "byol" or "lejepa".
        encoder: Maps images to features; has ``output_dim``.
        options: ``preset``, ``head`` and those of the loss; for the others the loss's own, and
            ``regularizer`` and ``head``; for all ``regression`` and ``dependence``, see
            :class:`Regressed`.
        representations: All training images', for the regression.

    Returns:
        A module from a :class:`Batch` to the loss and its terms by name.

    Raises:
        ValueError: If there is no such method.
    """
    options = dict(options)
    weights = [options.pop(term, 0.0) for term in ("regression", "dependence")]
    if any(weights):
        method = build(name, encoder, options)
        return Regressed(method, encoder, representations or {}, *weights)
    on_top = {key: options.pop(key) for key in ("regularizer", "head") if key in options}
    if name == "mvmr":
        return MVMR(encoder, **on_top, **options)
    if name == "byol":
        return BYOL(encoder, **on_top, **options)
    if name == "lejepa":
        return LeJEPA(encoder, LeJEPALoss(**options), **on_top)
    losses = {"vicreg": VICRegLoss, "simclr": NTXentLoss, "barlow_twins": BarlowTwinsLoss}
    if name not in losses:
        raise ValueError(
            f"method must be one of mvmr, byol, lejepa, {', '.join(losses)} but is {name!r}."
        )
    return Peer(encoder, losses[name](**options), **on_top)
