"""MV-MR as a LightningModule, in the form of the methods of lightly's ImageNet benchmarks."""

from __future__ import annotations

import math
import os
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from lightly.data import LightlyDataset
from lightly.models.utils import get_weight_decay_parameters
from lightly.utils.benchmarking import KNNClassifier, OnlineLinearClassifier
from lightly.utils.scheduler import CosineWarmupScheduler
from pytorch_lightning import LightningModule
from torch import Tensor, nn

from mvmr_loss import DistillationLoss, MVMRLoss, MVMRProjectionHead, Representations
from mvmr_loss._checks import check_bool, check_int, check_number
from mvmr_loss.normalization import NormalizationLike

from .. import (  # noqa: TID252 - of the same checkout
    GATHER_DISTRIBUTED,
    IMAGE_SIZE,
    check_cache,
    check_filled,
    check_loss_options,
    check_teachers,
    distil,
    fixed,
    freeze_unused,
    preset_distillation,
    with_preset,
)
from .backbone import build_backbone
from .hyperparameters import without_objects
from .transform import check_normalization, check_views


class MVMR(LightningModule):
    """MV-MR as a method for Lightning's Trainer and lightly's benchmark scripts.

    The batches are lightly's, ``(views, targets, ...)``, with the views of
    :class:`~mvmr_loss.adapters.lightly.MVMRTransform`: the non-augmented one first. The
    representations are computed from it on the device of the model. Under several processes the
    embeddings and representations are gathered, so that the loss is that of the whole batch.

    The defaults are those of the authors' release for ImageNet-1K: Adam, a learning rate that is
    not scaled by the batch size, ten epochs of linear warm-up (at most half of a short training),
    cosine to a hundredth. A linear classifier is trained online beside the method, on detached
    features; with ``knn_k``, a weighted kNN is evaluated in each validation as well, for which the
    trainer must be given two validation loaders, ``[train, val]``, as lightly's benchmark does.

    Checkpoints keep the arguments as plain values. One that is or holds an object (a module, a
    teacher in ``representations``, a measure in ``loss``) is left out of them: it must be given
    again, ``MVMR.load_from_checkpoint(path, representations=...)``.

    Source: MV-MR, Entropy 26(6):466, 2024 (arXiv 2303.12130), and the authors' release.

    Args:
        batch_size_per_device: Batch size of one process, which lightly's scripts tell a method.
        num_classes: Number of classes of the online classifiers.
        knn_k: Number of neighbours of the online kNN, at most the number of training images; None
            means no online kNN.
        knn_t: Temperature of the online kNN.
        backbone: A module from images to features, or the name of a torchvision or timm model,
            which is built without weights and without its classifier.
        feature_dim: Width of the backbone's features; needed only for a module that does not say
            it as ``num_features``.
        hidden_dim: Width of the projection head's hidden layers.
        output_dim: Width of the embeddings.
        representations: What :class:`~mvmr_loss.Representations` is built from, or a module of one's
            own from images to such a mapping, which is kept in eval mode and set to need no
            gradient, as a teacher is; empty means no representation terms and nothing that is
            distilled, None the preset's.
        sketch_dim: What :class:`~mvmr_loss.Representations` takes; None: exact, or the preset's.
        normalization: How the images are normalised, told to the representations; what
            :class:`~mvmr_loss.Representations` takes. An :class:`MVMRTransform` of the training data
            that normalises otherwise is refused.
        cache: What :class:`~mvmr_loss.Representations` takes: the folder of a store, from which they
            are read by the images' file names; the data set must be a ``LightlyDataset``. None: they
            are computed in each step.
        fill_cache: Whether the store is made if there is none, and filled in the first epoch.
        preset: Settings by name, one of :func:`mvmr_loss.list_presets`; ``"features"`` is what learned
            best here. The widths of its teachers are those of large images: for small ones, or a
            large ``sketch_dim``, give ``distillation={"teacher_dims": ...}``; the error of the first
            step says what.
        loss: Options of :class:`~mvmr_loss.MVMRLoss` in the place of the preset's;
            ``gather_distributed`` is True unless given. Where no weight is left on the embeddings, the
            projection head is not trained. What is about representations is refused where all of them
            are distilled, as in the preset ``"features"``: ``distillation`` says it then.
        distillation: Options of :class:`~mvmr_loss.DistillationLoss`, which is added, on the backbone's
            features: ``teacher_dims`` names those of the representations that are its teachers, and
            their widths; the other representations are the loss's. Its heads are trained with the
            method and are no part of the backbone. None: the preset's; in the others than ``"features"``
            every teacher is a representation of the loss.
        lr: Learning rate after the warm-up.
        weight_decay: Weight decay of all but biases, normalisation layers and the classifier.
        warmup_epochs: Length of the warm-up in epochs.
        classifier_lr: Learning rate of the online classifier, with the same schedule.

    Raises:
        ValueError: If an argument is out of range, the backbone's name is unknown, or a checkpoint
            is loaded without an argument that held an object.

    Examples:
        >>> model = MVMR(4, num_classes=10, backbone="resnet18", hidden_dim=64, output_dim=32)
        >>> model(torch.zeros(2, 3, 64, 64)).shape
        torch.Size([2, 512])
    """

    optimizer_class: type[torch.optim.Optimizer] = torch.optim.Adam
    image_size = IMAGE_SIZE  # a subclass that knows its images' may say it

    def __init__(
        self,
        batch_size_per_device: int,
        num_classes: int,
        knn_k: int | None = None,
        knn_t: float = 0.1,
        *,
        backbone: str | nn.Module = "resnet50",
        feature_dim: int | None = None,
        hidden_dim: int = 8192,
        output_dim: int = 8192,
        representations: Sequence[Any] | Mapping[str, Any] | nn.Module | None = None,
        sketch_dim: int | None = None,
        normalization: NormalizationLike = "imagenet",
        cache: str | os.PathLike[str] | Mapping[str, Any] | None = None,
        fill_cache: bool = False,
        preset: str = "paper",
        loss: Mapping[str, Any] | None = None,
        distillation: Mapping[str, Any] | None = None,
        lr: float = 1e-4,
        weight_decay: float = 1e-6,
        warmup_epochs: float = 10.0,
        classifier_lr: float = 1e-3,
    ) -> None:
        super().__init__()
        self.save_hyperparameters()
        self.batch_size_per_device = check_int(
            "batch_size_per_device", batch_size_per_device, minimum=1
        )
        check_int("num_classes", num_classes, minimum=2)
        if knn_k is not None:
            check_int("knn_k", knn_k, minimum=1)
        self.lr = check_number("lr", lr, minimum=0)
        self.classifier_lr = check_number("classifier_lr", classifier_lr, minimum=0)
        self.weight_decay = check_number("weight_decay", weight_decay, minimum=0)
        self.warmup_epochs = check_number("warmup_epochs", warmup_epochs, minimum=0)
        if not isinstance(loss, Mapping | None):
            raise TypeError(
                "loss must be a mapping of options of mvmr_loss.MVMRLoss, such as "
                f"{{'variance_weight': 2.0}}, but is a {type(loss).__name__}."
            )
        if not isinstance(distillation, Mapping | None):
            raise TypeError(
                "distillation must be a mapping of options of mvmr_loss.DistillationLoss, such as "
                f"{{'teacher_dims': {{'teacher': 512}}}}, but is a {type(distillation).__name__}."
            )
        if isinstance(representations, nn.Module):
            given = {
                "cache": (cache, None),
                "sketch_dim": (sketch_dim, None),
                "fill_cache": (fill_cache, False),
                "normalization": (normalization, "imagenet"),
            }
            for name, (value, usual) in given.items():
                if value != usual:
                    raise ValueError(
                        f"{name} must be left out where representations are a module, which may have "
                        f"one itself, but is {value!r}."
                    )
            # DistributedDataParallel would wait for a gradient, and there is none.
            representations.requires_grad_(False)
        representations, sketch_dim = with_preset(preset, representations, sketch_dim, distillation)

        self.backbone, feature_dim = build_backbone(backbone, feature_dim)
        self.feature_dim = feature_dim
        self.projection_head = MVMRProjectionHead(feature_dim, hidden_dim, output_dim)
        if cache is not None and not representations:
            raise ValueError(f"cache must be None without representations but is {cache!r}.")
        self.representations = (
            representations
            if isinstance(representations, nn.Module)
            else Representations(
                representations, normalization=normalization, sketch_dim=sketch_dim, cache=cache
            )
            if representations
            else None
        )
        self.cache, self.fill_cache = cache, check_bool("fill_cache", fill_cache)
        check_filled(cache, fill_cache)
        self._index: dict[str, int] | None = None
        gathered = {"gather_distributed": GATHER_DISTRIBUTED}
        self.criterion = MVMRLoss.from_preset(preset, **{**gathered, **(loss or {})})
        self.distillation: DistillationLoss | None = None
        options = preset_distillation(preset, distillation, self._sizes)
        if options is not None:
            self.distillation = DistillationLoss(feature_dim, **{**gathered, **options})
        # None: not known, of a module of one's own and of a store alone.
        named: Iterable[str] | None = () if self.representations is None else None
        if isinstance(self.representations, Representations):
            named = list(self.representations.by_name) or None
        if self.distillation is not None:
            check_teachers(named, self.distillation.teacher_dims)
            check_loss_options(preset, loss or {}, named, self.distillation.teacher_dims)
        freeze_unused(self.projection_head, self.criterion, self.distillation, named)

        # With fewer than five classes lightly's default top-5 accuracy does not exist.
        topk = (1, 5) if num_classes >= 5 else (1,)
        self.online_classifier = OnlineLinearClassifier(
            feature_dim=feature_dim, num_classes=num_classes, topk=topk
        )
        self.knn_classifier = (
            None
            if knn_k is None
            else _OnlineKNNClassifier(
                model=None,
                num_classes=num_classes,
                knn_k=knn_k,
                knn_t=knn_t,
                train_dataloader_idx=0,
                val_dataloader_idx=1,
                topk=topk,
            )
        )

    def _sizes(self) -> dict[str, int]:
        """Returns the representations' widths."""
        if not isinstance(self.representations, Representations):
            return {}
        return self.representations.sizes(3, self.image_size, self.image_size)

    def _set_hparams(self, hp: Any) -> None:
        """Keeps no objects, whichever class saves its arguments: they would be pickled."""
        super()._set_hparams(without_objects(self._to_hparams_dict(hp)))

    def forward(self, x: Tensor) -> Tensor:
        """Computes the backbone's features of images (N, C, H, W), shape (N, feature_dim, ...)."""
        features: Tensor = self.backbone(x)
        return features

    def on_train_start(self) -> None:
        """Compares the images' normalisation, and opens the store of representations, if there is one.

        Raises:
            TypeError: If there is to be a store and the data set is not a ``LightlyDataset``.
            ValueError: If the images are normalised otherwise than the representations were told,
                or the store is missing, or is of other images or settings.
        """
        dataset = getattr(self.trainer.train_dataloader, "dataset", None)
        if not isinstance(self.representations, Representations):
            return
        check_normalization(dataset, self.representations.normalization)
        if self.representations.cache is not None:
            if not isinstance(dataset, LightlyDataset):
                raise TypeError(
                    "cache needs a LightlyDataset, by whose file names images are known, but the "
                    f"data set is a {type(dataset).__name__}."
                )
            check_cache(self.cache, self.fill_cache)
            self.representations.open_cache(dataset)
            self._index = {name: i for i, name in enumerate(dataset.get_filenames())}
        # A training that is resumed has its statistics, though the store has become full meanwhile.
        if self.distillation is not None and self.trainer.global_step == 0:
            self.distillation.fit_if_full(self.representations)

    def _represent(self, batch: Sequence[Any]) -> dict[str, Tensor] | None:
        """Returns the representations of a batch, computed or read by the images' file names."""
        if self.representations is None:
            return None
        read = () if self._index is None else ([self._index[name] for name in batch[2]],)
        return fixed(self.representations, batch[0][0], *read)

    def training_step(self, batch: Sequence[Any], batch_idx: int) -> Tensor:
        """Computes the loss of MV-MR and that of the online classifier, and logs each term.

        Args:
            batch: ``(views, targets, ...)``: a list of two or more views, each of shape
                (N, C, H, W), the non-augmented one first, and labels of shape (N,).
            batch_idx: Number of the batch.

        Returns:
            Scalar tensor, the sum of both losses.
        """
        views, targets = check_views(batch[0]), batch[1]
        features = self.forward(torch.cat(views)).flatten(start_dim=1)
        if features.shape[1] != self.feature_dim:
            raise ValueError(
                f"feature_dim must be {features.shape[1]}, the width of the backbone's features, but is "
                f"{self.feature_dim}."
            )
        z, *z_augmented = self.projection_head(features).chunk(len(views))
        distilled, represented = distil(
            self.distillation, features.chunk(len(views)), self._represent(batch) or {}
        )
        terms = self.criterion.forward_components(z, z_augmented, represented)
        named, loss = terms.as_dict("train_"), terms.total
        if distilled is not None:
            named, loss = distilled.as_dict("train_") | named, loss + distilled.total
        del named["train_loss"]
        self.log(
            "train_loss",
            loss,
            prog_bar=True,
            sync_dist=True,
            batch_size=len(targets),
        )
        self.log_dict(named, sync_dist=True, batch_size=len(targets))

        cls_loss, cls_log = self.online_classifier.training_step(
            (features.detach(), targets.repeat(len(views))), batch_idx
        )
        self.log_dict(cls_log, sync_dist=True, batch_size=len(targets))
        total: Tensor = loss + cls_loss
        return total

    def on_validation_start(self) -> None:
        """Raises if the online kNN has not its two loaders."""
        loaders = self.trainer.num_val_batches
        if self.knn_classifier is not None and len(loaders) != 2:
            raise ValueError(
                "the online kNN needs two validation dataloaders, [train, val], but there are "
                f"{len(loaders)}; give both to the trainer, or leave out knn_k."
            )

    def validation_step(
        self, batch: Sequence[Any], batch_idx: int, dataloader_idx: int = 0
    ) -> Tensor | None:
        """Evaluates the online classifier and, if there is one, the online kNN.

        Args:
            batch: ``(images, targets, ...)``: shapes (N, C, H, W) and (N,).
            batch_idx: Number of the batch.
            dataloader_idx: With the online kNN, 0 for training images and 1 for validation images.
        """
        images, targets = batch[0], batch[1]
        features = self.forward(images).flatten(start_dim=1).detach()
        log = {}
        if self.knn_classifier is not None:
            knn_log = self.knn_classifier.validation_step(
                (features.float(), targets), batch_idx, dataloader_idx
            )
            if dataloader_idx == 0:
                return None
            log.update(knn_log)
        cls_loss, cls_log = self.online_classifier.validation_step((features, targets), batch_idx)
        log.update(cls_log)
        # Only one loader is logged: its number is no part of the names, by which lightly's scripts
        # and checkpoints find them.
        self.log_dict(
            log, prog_bar=True, sync_dist=True, batch_size=len(targets), add_dataloader_idx=False
        )
        loss: Tensor = cls_loss
        return loss

    def on_validation_epoch_end(self) -> None:
        """Frees the features that the online kNN has kept."""
        if self.knn_classifier is not None:
            self.knn_classifier.reset_storage()

    def configure_optimizers(self) -> Any:
        """Returns the optimiser, with its groups of parameters, and the schedule."""
        # As in lightly's methods: none for normalisation layers, biases and the classifier.
        heads = [] if self.distillation is None else [self.distillation]
        params, params_no_weight_decay = get_weight_decay_parameters(
            [self.backbone, self.projection_head, *heads]
        )
        optimizer = self.optimizer_class(
            [
                {"name": "mvmr", "params": params, "weight_decay": self.weight_decay},
                {
                    "name": "mvmr_no_weight_decay",
                    "params": params_no_weight_decay,
                    "weight_decay": 0.0,
                },
                {
                    "name": "online_classifier",
                    "params": self.online_classifier.parameters(),
                    "weight_decay": 0.0,
                    "lr": self.classifier_lr,
                },
            ],
            lr=self.lr,  # type: ignore[call-arg]
        )
        steps = self.trainer.estimated_stepping_batches
        if not math.isfinite(steps):
            raise ValueError(
                "MVMR needs a training of known length for its schedule but the trainer has none; "
                "give it max_epochs or max_steps."
            )
        if self.trainer.train_dataloader is None:
            # Lightning does not look at the data to tell a number of steps that it was given.
            self.trainer.fit_loop.setup_data()
        epoch = self.trainer.num_training_batches / self.trainer.accumulate_grad_batches
        scheduler = {
            "scheduler": CosineWarmupScheduler(
                optimizer=optimizer,
                warmup_epochs=int(min(self.warmup_epochs * epoch, steps / 2)),
                max_epochs=int(steps),
                end_value=0.01,
            ),
            "interval": "step",
        }
        return [optimizer], [scheduler]


class MVMRViT(MVMR):
    """MV-MR with the backbone and optimiser of lightly's ViT benchmarks, a ViT-S/16 and AdamW.

    The paper trains no ViT: AdamW's learning rate and weight decay are those of lightly's LeJEPA
    benchmark, the temperature of the kNN that of its ViTs.

    Args:
        batch_size_per_device, num_classes, knn_k, knn_t, options: As in :class:`MVMR`.
    """

    optimizer_class = torch.optim.AdamW

    def __init__(
        self,
        batch_size_per_device: int,
        num_classes: int,
        knn_k: int | None = None,
        knn_t: float = 0.07,
        **options: Any,
    ) -> None:
        defaults = {"backbone": "vit_small_patch16_224", "lr": 5e-4, "weight_decay": 5e-2}
        super().__init__(
            batch_size_per_device, num_classes, knn_k, knn_t, **{**defaults, **options}
        )


class _OnlineKNNClassifier(KNNClassifier):  # type: ignore[misc]  # lightly is not typed
    """lightly's kNN as a part of a method, which logs the accuracies that it returns."""

    def log_dict(self, *args: Any, **kwargs: Any) -> None:
        """Does nothing: Lightning refuses what a part logs during its method's step."""
