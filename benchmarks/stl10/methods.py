"""The methods, as Lightning modules: the lightly adapter's MV-MR, and in it lightly's losses."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, ClassVar

import torch
import torchvision
from lightly.loss import BarlowTwinsLoss, NegativeCosineSimilarity, NTXentLoss, VICRegLoss
from lightly.models.modules import (
    BarlowTwinsProjectionHead,
    BYOLPredictionHead,
    BYOLProjectionHead,
    SimCLRProjectionHead,
)
from lightly.models.modules.heads import VICRegProjectionHead
from lightly.models.utils import deactivate_requires_grad, update_momentum
from lightly.utils.benchmarking import OnlineLinearClassifier
from lightly.utils.lars import LARS
from lightly.utils.scheduler import cosine_schedule
from torch import Tensor, nn

from benchmarks.common.encoder import SmallResNet
from benchmarks.stl10.settings import NORMALIZATIONS, Settings
from mvmr_loss import MultiRepresentationRegularizer
from mvmr_loss.adapters.lightly import MVMR
from mvmr_loss.adapters.lightly.backbone import build_backbone as shipped_backbone

SMALL_WIDTHS = (32, 64, 128)
# Option -> the one method that has it.
OPTIONS_OF = {
    **dict.fromkeys(("distillation", "objective", "view_terms"), "mvmr"),
    "temperature": "simclr",
    "momentum": "byol",
}
OPTIMIZERS: dict[str, Any] = {
    "adam": torch.optim.Adam,
    "adamw": torch.optim.AdamW,
    "sgd": partial(torch.optim.SGD, momentum=0.9),
    "lars": partial(LARS, momentum=0.9),
}

VIEW_TERMS = ("invariance_weight", "variance_weight", "dependence_weight", "identity_weight")
NO_VIEW_TERMS = dict.fromkeys(VIEW_TERMS, 0.0)


def build_backbone(settings: Settings) -> tuple[nn.Module, int]:
    """Returns the backbone without classifier and without weights of others, and its width.

    Its state dict has the names of torchvision's or timm's model of that name, so that the model
    itself loads it.

    Args:
        settings: ``backbone``, ``stem`` and ``image_size`` are read.

    Raises:
        ImportError: If the name may be one of timm's, which is not installed.
        ValueError: If the name is unknown, or the model does not give features of shape (N, D).

    Examples:
        >>> backbone, width = build_backbone(Settings(backbone="resnet18"))
        >>> width, backbone.conv1.stride
        (512, (1, 1))
    """
    if settings.backbone == "small":
        return SmallResNet(SMALL_WIDTHS), SMALL_WIDTHS[-1]
    backbone, _ = shipped_backbone(settings.backbone, 1)
    if settings.stem == "small" and isinstance(backbone, torchvision.models.ResNet):
        backbone.conv1 = nn.Conv2d(3, 64, kernel_size=3, stride=1, padding=1, bias=False)
        nn.init.kaiming_normal_(backbone.conv1.weight, mode="fan_out", nonlinearity="relu")
    side = settings.image_size
    with torch.no_grad():
        try:
            features = backbone.eval()(torch.zeros(1, 3, side, side))
        except (AssertionError, RuntimeError) as error:
            raise ValueError(
                f"backbone {settings.backbone!r} must take images of {side} pixels but does not: {error}"
            ) from error
    if not isinstance(features, Tensor) or features.flatten(1).shape != features.shape[:2]:
        got = tuple(features.shape) if isinstance(features, Tensor) else type(features).__name__
        raise ValueError(f"backbone must give features of shape (N, D) but gives {got}.")
    return backbone.train(), features.shape[1]


def loading_code(settings: Settings) -> list[str]:
    """Returns the lines of Python that build the model which loads an exported backbone's weights."""
    name = settings.backbone
    if name == "small":
        return [
            "import torch; from benchmarks.common.encoder import SmallResNet",
            f"model = SmallResNet({SMALL_WIDTHS})",
        ]
    if name in torchvision.models.list_models():
        lines = [f"import torch, torchvision; model = torchvision.models.get_model({name!r})"]
        if settings.stem == "small" and hasattr(torchvision.models.get_model(name), "conv1"):
            lines.append("model.conv1 = torch.nn.Conv2d(3, 64, 3, padding=1, bias=False)")
        return lines
    size = ", dynamic_img_size=True" if name.startswith("vit_") else ""
    return [f"import torch, timm; model = timm.create_model({name!r}, num_classes=0{size})"]


class _OnlineClassifier(OnlineLinearClassifier):  # type: ignore[misc]  # lightly is not typed
    """lightly's online classifier, which leaves out images without a label (-1)."""

    def training_step(self, batch: Sequence[Tensor], batch_idx: int) -> Any:
        """Computes the loss of the labelled images; 0 if there are none."""
        features, targets = batch
        known = targets >= 0
        if known.any():
            return super().training_step((features[known], targets[known]), batch_idx)
        return 0.0 * self.classification_head(features).sum(), {}


class Pretraining(MVMR):
    """MV-MR as the lightly adapter has it, with the settings of this benchmark.

    Args:
        settings: The run's settings.
        num_classes: Number of classes of the online classifier.
        knn_k: Neighbours of the online kNN.
    """

    def __init__(self, settings: Settings, num_classes: int, knn_k: int | None = None) -> None:
        backbone, width = build_backbone(settings)
        self.optimizer_class = OPTIMIZERS[settings.optimizer]
        self.image_size = settings.image_size
        weight = settings.representation_weight
        super().__init__(
            settings.batch_size // settings.devices,
            num_classes,
            knn_k,
            settings.knn_temperature,
            backbone=backbone,
            feature_dim=width,
            hidden_dim=settings.projector_hidden_dim,
            output_dim=settings.projector_output_dim,
            representations=_representations(settings),
            normalization=NORMALIZATIONS[settings.normalization],
            cache=settings.cache,
            fill_cache=settings.cache is not None,
            preset=settings.objective,
            loss={
                **({} if weight is None else {"representation_weights": weight}),
                "dependence_measure": settings.dependence_measure,
                **({} if settings.view_terms else NO_VIEW_TERMS),
            },
            distillation=settings.distillation,
            lr=settings.learning_rate,
            weight_decay=settings.weight_decay,
            warmup_epochs=settings.warmup_epochs,
        )
        self.settings, self.width = settings, width
        topk = self.online_classifier.topk
        self.online_classifier = _OnlineClassifier(width, num_classes, topk)


class TwoViews(Pretraining):
    """A method with lightly's loss and head, in the place of MV-MR's, on two augmented views.

    The representations, if there are any, are those of the non-augmented view.
    """

    # Method -> its head, from three widths; its loss.
    PARTS: ClassVar[dict[str, tuple[Callable[..., nn.Module], Callable[..., nn.Module]]]] = {
        "vicreg": (VICRegProjectionHead, VICRegLoss),
        "barlowtwins": (BarlowTwinsProjectionHead, BarlowTwinsLoss),
        "simclr": (SimCLRProjectionHead, NTXentLoss),
    }

    def __init__(self, settings: Settings, num_classes: int, knn_k: int | None = None) -> None:
        super().__init__(settings, num_classes, knn_k)
        self.build(self.width, settings.projector_hidden_dim, settings.projector_output_dim)
        self.regularizer = MultiRepresentationRegularizer(
            1.0 if settings.representation_weight is None else settings.representation_weight,
            dependence_measure=settings.dependence_measure,
            gather_distributed=True,
        )

    def build(self, *dims: int) -> None:
        """Makes the head and the loss, from the widths of the features, the hidden layer, the output."""
        head, loss = self.PARTS[self.settings.method]
        self.projection_head = head(*dims)
        simclr = {"temperature": self.settings.temperature} if loss is NTXentLoss else {}
        self.criterion = loss(gather_distributed=True, **simclr)

    def compare(self, views: list[Tensor]) -> tuple[Tensor, list[Tensor], Tensor]:
        """Returns the method's loss, the views' embeddings, and features of shape (2 N, D)."""
        features = self.forward(torch.cat(views)).flatten(start_dim=1)
        z = list(self.projection_head(features).float().chunk(2))
        with torch.autocast(z[0].device.type, enabled=False):
            return self.criterion(*z), z, features

    def training_step(self, batch: Sequence[Any], batch_idx: int) -> Tensor:
        """Computes the loss of the method, its representations' and the online classifier's."""
        (_, *views), targets = batch[0], batch[1]
        loss, z, features = self.compare(views)
        terms = {f"train_{self.settings.method}": loss}
        representations = self._represent(batch)
        if representations:
            added = self.regularizer.forward_components(z, representations)
            terms |= {k: v for k, v in added.as_dict("train_").items() if k != "train_loss"}
            loss = loss + added.total
        cls_loss, cls_log = self.online_classifier.training_step(
            (features.detach(), targets.repeat(2)), batch_idx
        )
        logged = {"train_loss": loss, **terms, **cls_log}
        self.log_dict(logged, sync_dist=True, batch_size=len(targets))
        return loss + cls_loss


class BYOL(TwoViews):
    """BYOL with lightly's heads and loss, as in lightly's benchmark."""

    def build(self, *dims: int) -> None:
        """Makes the heads, the momentum encoder and the loss."""
        predictor = BYOLPredictionHead(dims[2], dims[1], dims[2])
        # Both are the projection head to the adapter, which trains what is in it.
        self.projection_head = nn.ModuleDict(
            {"projector": BYOLProjectionHead(*dims), "predictor": predictor}
        )
        self.teacher = copy.deepcopy(
            nn.ModuleList([self.backbone, self.projection_head["projector"]])
        )
        deactivate_requires_grad(self.teacher)
        self.criterion = NegativeCosineSimilarity()

    def compare(self, views: list[Tensor]) -> tuple[Tensor, list[Tensor], Tensor]:
        """Returns the method's loss, the views' embeddings, and features of shape (2 N, D)."""
        projector, predictor = self.projection_head["projector"], self.projection_head["predictor"]
        steps = int(self.trainer.estimated_stepping_batches)
        momentum = cosine_schedule(self.trainer.global_step, steps, self.settings.momentum, 1.0)
        for student, teacher in zip([self.backbone, projector], self.teacher, strict=True):
            update_momentum(student, teacher, m=momentum)
        # One view after the other: the heads' BatchNorm sees each view by itself, as in the paper.
        features = [self.forward(view).flatten(start_dim=1) for view in views]
        z = [projector(f) for f in features]
        with torch.no_grad():
            targets = [self.teacher[1](self.teacher[0](view).flatten(1)) for view in views]
        # The squared distance of unit vectors is 2 - 2 cosine: the paper's loss but for a constant.
        first, second = (
            2 * self.criterion(target.float(), predictor(p).float())
            for target, p in zip(targets, reversed(z), strict=True)
        )
        return first + second, [p.float() for p in z], torch.cat(features)


def build_method(settings: Settings, num_classes: int, knn_k: int | None = None) -> Pretraining:
    """Returns the method that the settings name, its weights drawn from the seed.

    Args:
        settings: The run's settings.
        num_classes: Number of classes of the online classifier.
        knn_k: Neighbours of the online kNN; None means there is none.

    Raises:
        ImportError: If the backbone needs a package that is not installed.
        TypeError: If a representation has an unknown option.
        ValueError: If a name is unknown, an option is another method's, or one is about
            representations and there are none.

    Examples:
        >>> method = build_method(Settings(method="simclr", backbone="small", image_size=32), 10)
        >>> method(torch.zeros(2, 3, 32, 32)).shape
        torch.Size([2, 128])
    """
    for name, method in OPTIONS_OF.items():
        given = getattr(settings, name)
        if settings.method != method and given != getattr(Settings, name):
            raise ValueError(
                f"{name} must be left out for {settings.method}, for it is {method}'s, but is {given!r}."
            )
    if not settings.representation_names:
        # mvmr's term between the views has the measure, too.
        measure = () if settings.method == "mvmr" else ("dependence_measure",)
        for name in ("representation_weight", "view_terms", *measure):
            given = getattr(settings, name)
            if given != getattr(Settings, name):
                raise ValueError(
                    f"{name} must be left out where there are no representations, but is {given!r}; "
                    "name them by representations."
                )
    kind = {"mvmr": Pretraining, "byol": BYOL}.get(settings.method, TwoViews)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(settings.seed)
        return kind(settings, num_classes, knn_k)


def _representations(settings: Settings) -> list[Any]:
    """Returns the representations, of which the augmented one is augmented as the views are."""
    augmented = {
        "seed": settings.seed,
        "crop_scale": (settings.crop_scale_min, 1.0),
        "color_jitter": tuple(settings.color_jitter),
        "color_jitter_probability": settings.color_jitter_probability,
        "grayscale_probability": settings.grayscale_probability,
        "blur": settings.blur,
    }
    items = [{"name": i} if isinstance(i, str) else i for i in settings.representation_names]
    return [
        {**augmented, **i} if isinstance(i, dict) and i.get("name") == "augmented_pixels" else i
        for i in items
    ]
