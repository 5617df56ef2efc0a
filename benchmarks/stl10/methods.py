"""The methods: what each makes of the same batches, as Lightning modules."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any, ClassVar

import torch
from lightly.loss import BarlowTwinsLoss, NegativeCosineSimilarity, NTXentLoss, VICRegLoss
from lightly.models.modules import (
    BarlowTwinsProjectionHead,
    BYOLPredictionHead,
    BYOLProjectionHead,
    SimCLRProjectionHead,
)
from lightly.models.modules.heads import VICRegProjectionHead
from lightly.models.utils import (
    deactivate_requires_grad,
    get_weight_decay_parameters,
    update_momentum,
)
from lightly.utils.lars import LARS
from lightly.utils.scheduler import CosineWarmupScheduler, cosine_schedule
from pytorch_lightning import LightningModule
from pytorch_lightning.utilities.rank_zero import rank_zero_only
from torch import Tensor, nn

from benchmarks.stl10.backbones import build_backbone, feature_dim
from benchmarks.stl10.data import Normalize
from benchmarks.stl10.settings import MEAN_STD, Settings
from mvmr_loss import (
    DistillationLoss,
    LossComponents,
    MultiRepresentationRegularizer,
    MVMRLoss,
    MVMRProjectionHead,
    Representations,
)
from mvmr_loss.representations import augmented_pixels

# Each process and each use of random numbers has its own seed: seed * _SEEDS + one of them.
_SEEDS = 1_000_003
_SEEDS_PER_PROCESS = 8


class Method(LightningModule):
    """What the methods share: backbone, views, representations, optimiser, schedule.

    The batch comes as uint8 images; views are made on the device, a whole batch at a time, each
    image with draws of its own. All draws follow from the seed, the process and the step alone, so
    that a resumed run draws what the uninterrupted one would have drawn.

    Args:
        settings: The run's settings.
        steps: Steps of the whole pretraining, which the schedules need.
    """

    # MV-MR meets the non-augmented view; the others have two augmented ones.
    plain_first: ClassVar[bool] = False

    def __init__(self, settings: Settings, steps: int) -> None:
        super().__init__()
        self.settings, self.steps = settings, steps
        self.backbone = build_backbone(settings)
        self.normalize = Normalize(settings.normalization)
        self.dims = (
            feature_dim(self.backbone, settings.image_size),
            settings.projector_hidden_dim,
            settings.projector_output_dim,
        )
        mean, std = MEAN_STD[settings.normalization]
        self.augmentation: dict[str, Any] = {
            "normalization": (mean, std),
            "crop_scale": (settings.crop_scale_min, 1.0),
            "color_jitter": tuple(settings.color_jitter),
            "color_jitter_probability": settings.color_jitter_probability,
            "grayscale_probability": settings.grayscale_probability,
            "blur": settings.blur,
        }
        self.representations = self._representations(mean, std)
        self.regularizer = MultiRepresentationRegularizer(
            settings.representation_weight,
            dependence_measure=settings.dependence_measure,
            gather_distributed=True,
        )

    def _seed(self, use: int) -> int:
        """Returns the seed of one use of random numbers in this process."""
        return self.settings.seed * _SEEDS + rank_zero_only.rank * _SEEDS_PER_PROCESS + use

    def _representations(
        self, mean: Sequence[float], std: Sequence[float]
    ) -> Representations | None:
        """Returns the representations, which are told how the run's images are made."""
        told: dict[str, dict[str, Any]] = {
            # Augmented as the views are.
            "augmented_pixels": {"seed": self._seed(0), **self.augmentation},
            # A teacher has a normalisation of its own, for which that of the images is undone.
            "teacher": {"mean": mean, "std": std},
        }
        specification = []
        for item in self.settings.representation_names:
            item = {"name": item} if isinstance(item, str) else item
            if isinstance(item, dict):
                item = {**told.get(item.get("name", ""), {}), **item}
            specification.append(item)
        return Representations(specification) if specification else None

    def cache_representations(self, folder: str, images: int) -> None:
        """Keeps representations on disk instead of computing them in each step.

        Args:
            folder: Folder of the store; made if there is none.
            images: Number of images for pretraining.

        Raises:
            ValueError: If the method has no representations, none may be kept, or the store is of
                other images or settings.
            OSError: If the store is damaged.
        """
        if self.representations is None:
            raise ValueError(
                "representation_cache must be left out: the run has no representations to keep."
            )
        self.representations = Representations(
            dict(self.representations.by_name.items()),
            normalization=MEAN_STD[self.settings.normalization],
            cache={"path": folder, "num_samples": images},
        )

    def forward(self, images: Tensor) -> Tensor:
        """Computes the backbone's features of uint8 images.

        Args:
            images: uint8 of shape (N, 3, H, W).

        Returns:
            Features of shape (N, D).
        """
        features: Tensor = self.backbone(self.normalize(images))
        return features

    def terms(self, views: list[Tensor], representations: dict[str, Tensor]) -> dict[str, Tensor]:
        """Computes the weighted terms of the loss.

        Args:
            views: Two views of shape (N, 3, H, W).
            representations: Name -> tensor of shape (N, D_k), of the non-augmented images.

        Returns:
            Name -> scalar; their sum is the loss.
        """
        raise NotImplementedError

    def regularization(
        self, embeddings: list[Tensor], representations: dict[str, Tensor]
    ) -> dict[str, Tensor]:
        """Computes the representation terms of a method's embeddings.

        Args:
            embeddings: Of shape (N, D), one a view.
            representations: Name -> tensor of shape (N, D_k); may be empty.

        Returns:
            Name -> scalar.
        """
        if not representations:
            return {}
        return named_terms(self.regularizer.forward_components(embeddings, representations))

    def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
        """Makes what a backbone may draw, as dropout does, depend on the step alone."""
        torch.manual_seed(self._seed(4) + self.global_step * _SEEDS)

    def training_step(self, batch: tuple[Tensor, Tensor, Tensor], batch_idx: int) -> Tensor:
        """Computes the loss and logs each term.

        Args:
            batch: uint8 images of shape (N, 3, H, W), labels, which are not looked at, and the
                images' indices, shape (N,).
            batch_idx: Number of the batch in the epoch.

        Returns:
            Scalar tensor.
        """
        plain = self.normalize(batch[0])
        with torch.no_grad(), torch.autocast(plain.device.type, enabled=False):
            representations = self._represent(plain, batch[2])
            start = self.global_step * len(plain)
            first = 1 if self.plain_first else 0
            views = [plain] if self.plain_first else []
            views += [
                augmented_pixels(plain, self._seed(1 + view), start, **self.augmentation)
                for view in range(first, 2)
            ]
        terms = self.terms(views, representations)
        loss = torch.stack(list(terms.values())).sum()
        options: dict[str, Any] = {"on_epoch": True, "sync_dist": True, "batch_size": len(plain)}
        self.log("loss", loss, on_step=True, prog_bar=True, **options)
        self.log_dict(
            {f"loss_{name}": term for name, term in terms.items()}, on_step=False, **options
        )
        return loss

    def _represent(self, plain: Tensor, index: Tensor) -> dict[str, Tensor]:
        """Returns the representations of a batch, computed or read by the images' indices."""
        if self.representations is None:
            return {}
        values: dict[str, Tensor] = self.representations(plain, index)
        return values

    def trained_modules(self) -> list[nn.Module]:
        """Returns the modules that the optimiser trains."""
        raise NotImplementedError

    def configure_optimizers(self) -> Any:
        """Returns the optimiser and its schedule, the same for every method."""
        s = self.settings
        decayed, others = get_weight_decay_parameters(self.trained_modules())
        groups = [{"params": decayed}, {"params": others, "weight_decay": 0.0}]
        options: dict[str, Any] = {"lr": s.learning_rate, "weight_decay": s.weight_decay}
        optimizer: torch.optim.Optimizer
        if s.optimizer == "lars":
            optimizer = LARS(groups, momentum=0.9, **options)
        elif s.optimizer == "sgd":
            optimizer = torch.optim.SGD(groups, momentum=0.9, **options)
        else:
            kind = {"adam": torch.optim.Adam, "adamw": torch.optim.AdamW}[s.optimizer]
            optimizer = kind(groups, **options)
        scheduler = CosineWarmupScheduler(
            optimizer,
            warmup_epochs=min(round(self.steps / s.epochs * s.warmup_epochs), self.steps // 2),
            max_epochs=self.steps,
            end_value=s.final_learning_rate / s.learning_rate,
        )
        return [optimizer], [{"scheduler": scheduler, "interval": "step"}]


class _Siamese(Method):
    """A method with one backbone and one head for both views."""

    projection_head: nn.Module

    def trained_modules(self) -> list[nn.Module]:
        """Returns the backbone and the head."""
        return [self.backbone, self.projection_head]

    def embeddings(self, views: list[Tensor]) -> list[Tensor]:
        """Returns the float32 embeddings of two views, through BatchNorm as one batch."""
        z = self.projection_head(self.backbone(torch.cat(views))).float()
        return list(z.chunk(2))


class MVMR(_Siamese):
    """MV-MR: the non-augmented view and an augmented one."""

    plain_first = True

    def __init__(self, settings: Settings, steps: int) -> None:
        super().__init__(settings, steps)
        self.projection_head = MVMRProjectionHead(*self.dims)
        weight = float(settings.view_terms)
        self.criterion = MVMRLoss(
            invariance_weight=weight,
            variance_weight=weight,
            dependence_weight=weight,
            representation_weights=settings.representation_weight,
            dependence_measure=settings.dependence_measure,
            gather_distributed=True,
        )
        self.distillation: DistillationLoss | None = None
        if settings.distillation is not None:
            options = {"gather_distributed": True, **settings.distillation}
            self.distillation = DistillationLoss(self.dims[0], **options)

    def trained_modules(self) -> list[nn.Module]:
        """Returns the backbone and the heads."""
        heads = [] if self.distillation is None else [self.distillation]
        return [*super().trained_modules(), *heads]

    def on_train_start(self) -> None:
        """Takes the teachers' statistics from a store that has all images."""
        if self.distillation is not None and self.representations is not None:
            self.distillation.fit_if_full(self.representations)

    def terms(self, views: list[Tensor], representations: dict[str, Tensor]) -> dict[str, Tensor]:
        """Computes the weighted terms of the loss, as :meth:`Method.terms`."""
        features = self.backbone(torch.cat(views))
        distilled: dict[str, Tensor] = {}
        if self.distillation is not None:
            by_view = features.float().chunk(2)
            teachers, representations = self.distillation.split(representations)
            distilled = named_terms(self.distillation.forward_components(by_view, teachers))
            self.distillation.update(by_view, teachers)
        z, z_augmented = self.projection_head(features).float().chunk(2)
        terms = named_terms(self.criterion.forward_components(z, z_augmented, representations))
        return {**terms, **distilled}


class _TwoViews(_Siamese):
    """A method whose loss compares the embeddings of two augmented views."""

    criterion: nn.Module
    name: ClassVar[str]

    def terms(self, views: list[Tensor], representations: dict[str, Tensor]) -> dict[str, Tensor]:
        """Computes the weighted terms of the loss, as :meth:`Method.terms`."""
        z = self.embeddings(views)
        with torch.autocast(z[0].device.type, enabled=False):
            loss = self.criterion(*z)
        return {self.name: loss, **self.regularization(z, representations)}


class VICReg(_TwoViews):
    """VICReg with lightly's loss and head."""

    name = "vicreg"

    def __init__(self, settings: Settings, steps: int) -> None:
        super().__init__(settings, steps)
        self.projection_head = VICRegProjectionHead(*self.dims)
        self.criterion = VICRegLoss(gather_distributed=True)


class BarlowTwins(_TwoViews):
    """Barlow Twins with lightly's loss and head."""

    name = "barlowtwins"

    def __init__(self, settings: Settings, steps: int) -> None:
        super().__init__(settings, steps)
        self.projection_head = BarlowTwinsProjectionHead(*self.dims)
        self.criterion = BarlowTwinsLoss(gather_distributed=True)


class SimCLR(_TwoViews):
    """SimCLR with lightly's loss and head."""

    name = "simclr"

    def __init__(self, settings: Settings, steps: int) -> None:
        super().__init__(settings, steps)
        self.projection_head = SimCLRProjectionHead(*self.dims)
        self.criterion = NTXentLoss(settings.temperature, gather_distributed=True)


class BYOL(Method):
    """BYOL with lightly's loss and heads."""

    def __init__(self, settings: Settings, steps: int) -> None:
        super().__init__(settings, steps)
        self.projection_head = BYOLProjectionHead(*self.dims)
        output = settings.projector_output_dim
        self.prediction_head = BYOLPredictionHead(output, settings.projector_hidden_dim, output)
        self.teacher_backbone = copy.deepcopy(self.backbone)
        self.teacher_projection_head = copy.deepcopy(self.projection_head)
        deactivate_requires_grad(self.teacher_backbone)
        deactivate_requires_grad(self.teacher_projection_head)
        self.criterion = NegativeCosineSimilarity()

    def trained_modules(self) -> list[nn.Module]:
        """Returns the student's backbone and heads."""
        return [self.backbone, self.projection_head, self.prediction_head]

    def terms(self, views: list[Tensor], representations: dict[str, Tensor]) -> dict[str, Tensor]:
        """Computes the weighted terms of the loss, as :meth:`Method.terms`."""
        momentum = cosine_schedule(self.global_step, self.steps, self.settings.momentum, 1.0)
        update_momentum(self.backbone, self.teacher_backbone, momentum)
        update_momentum(self.projection_head, self.teacher_projection_head, momentum)
        projections, predictions, targets = [], [], []
        # One view after the other: the heads' BatchNorm sees each view by itself, as in the paper.
        for view in views:
            projections.append(self.projection_head(self.backbone(view)))
            predictions.append(self.prediction_head(projections[-1]).float())
            with torch.no_grad():
                targets.append(self.teacher_projection_head(self.teacher_backbone(view)).float())
        # The squared distance of unit vectors is 2 - 2 cosine: the paper's loss but for a constant.
        loss = 2 * sum(
            (self.criterion(p, t) for p, t in zip(predictions, reversed(targets), strict=True)),
            start=projections[0].new_zeros(()),
        )
        return {
            "byol": loss,
            **self.regularization([p.float() for p in projections], representations),
        }


METHOD_CLASSES: dict[str, type[Method]] = {
    "mvmr": MVMR,
    "vicreg": VICReg,
    "barlowtwins": BarlowTwins,
    "simclr": SimCLR,
    "byol": BYOL,
}


def build_method(settings: Settings, steps: int = 1) -> Method:
    """Returns the method that the settings name, its weights drawn from the seed.

    Args:
        settings: The run's settings.
        steps: Steps of the whole pretraining, for training it.

    Returns:
        The Lightning module.

    Raises:
        ImportError: If the backbone needs a package that is not installed.
        TypeError: If a representation has an unknown option.
        ValueError: If a name is unknown, or another method than mvmr is to distil.

    Examples:
        >>> method = build_method(Settings(method="simclr", backbone="small", image_size=32))
        >>> method(torch.zeros(2, 3, 32, 32, dtype=torch.uint8)).shape
        torch.Size([2, 128])
    """
    if settings.distillation is not None and settings.method != "mvmr":
        raise ValueError(f"distillation must be left out for {settings.method}: it is mvmr's.")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(settings.seed)
        return METHOD_CLASSES[settings.method](settings, steps)


def named_terms(components: LossComponents) -> dict[str, Tensor]:
    """Returns the weighted terms of a loss, a representation's under its own name."""
    weighted = components.as_dict()
    del weighted["loss"]
    return {name.removeprefix("representations/"): term for name, term in weighted.items()}
