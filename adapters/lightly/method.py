"""MV-MR as a LightningModule, in the form of the methods of lightly's ImageNet benchmarks."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torchvision
from lightly.data import LightlyDataset
from lightly.models.utils import get_weight_decay_parameters
from lightly.utils.benchmarking import KNNClassifier, OnlineLinearClassifier
from lightly.utils.scheduler import CosineWarmupScheduler
from pytorch_lightning import LightningModule
from torch import Tensor, nn

from mvmr_loss import MVMRLoss, MVMRProjectionHead, Representations
from mvmr_loss.cache import CachedRepresentations, dataset_fingerprint

# The five that the authors' release trains with.
REPRESENTATIONS = ("pixels", "augmented_pixels", "scattering", "hog", "local_std")


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
        representations: What :class:`~mvmr_loss.Representations` is built from, or such a module;
            empty means no representation terms.
        representation_cache: Folder in which the representations, a teacher's among them, are kept
            once computed, and from which later epochs and trainings read them by the images' file
            names; the data set must be a ``LightlyDataset``. None: they are computed in each step.
        loss: Options of :class:`~mvmr_loss.MVMRLoss`; ``gather_distributed`` is True unless given.
        lr: Learning rate after the warm-up.
        weight_decay: Weight decay of all but biases, normalisation layers and the classifier.
        warmup_epochs: Length of the warm-up in epochs.
        classifier_lr: Learning rate of the online classifier, with the same schedule.

    Raises:
        TypeError: If an option of the loss or of a representation is unknown.
        ValueError: If an argument is out of range or the backbone's name is unknown.

    Examples:
        >>> model = MVMR(4, num_classes=10, backbone="resnet18", hidden_dim=64, output_dim=32)
        >>> model(torch.zeros(2, 3, 64, 64)).shape
        torch.Size([2, 512])
    """

    optimizer_class: type[torch.optim.Optimizer] = torch.optim.Adam

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
        representations: Sequence[Any] | Mapping[str, Any] | nn.Module = REPRESENTATIONS,
        representation_cache: str | None = None,
        loss: Mapping[str, Any] | None = None,
        lr: float = 1e-4,
        weight_decay: float = 1e-6,
        warmup_epochs: float = 10.0,
        classifier_lr: float = 1e-3,
    ) -> None:
        super().__init__()
        # Modules are in the checkpoint as weights; among the hyperparameters they would be pickled.
        modules = {"backbone": backbone, "representations": representations}
        self.save_hyperparameters(
            ignore=[name for name, value in modules.items() if isinstance(value, nn.Module)]
        )
        for name, value in {"batch_size_per_device": batch_size_per_device, "knn_k": knn_k}.items():
            if value is not None and value < 1:
                raise ValueError(f"{name} must be at least 1 but is {value}.")
        if num_classes < 2:
            raise ValueError(f"num_classes must be at least 2 but is {num_classes}.")
        rates = {"lr": lr, "classifier_lr": classifier_lr, "weight_decay": weight_decay}
        for name, rate in {**rates, "warmup_epochs": warmup_epochs}.items():
            if not 0 <= rate < math.inf:
                raise ValueError(f"{name} must be at least 0 and finite but is {rate}.")
        self.batch_size_per_device = batch_size_per_device
        self.lr, self.classifier_lr, self.weight_decay = lr, classifier_lr, weight_decay
        self.warmup_epochs = warmup_epochs

        self.backbone, feature_dim = _backbone(backbone, feature_dim)
        self.projection_head = MVMRProjectionHead(feature_dim, hidden_dim, output_dim)
        self.representations = (
            representations
            if isinstance(representations, nn.Module)
            else Representations(representations)
            if representations
            else None
        )
        if representation_cache is not None and not isinstance(
            self.representations, Representations
        ):
            raise ValueError(
                "representation_cache must be None where there are no mvmr_loss.Representations to "
                f"keep, but is {representation_cache!r}."
            )
        self.representation_cache = representation_cache
        self._kept: _KeptRepresentations | None = None
        self.criterion = MVMRLoss(**{"gather_distributed": True, **(loss or {})})

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

    def forward(self, x: Tensor) -> Tensor:
        """Computes the backbone's features.

        Args:
            x: Images of shape (N, C, H, W).

        Returns:
            Features of shape (N, feature_dim), or (N, feature_dim, 1, 1) where the backbone gives
            such.
        """
        features: Tensor = self.backbone(x)
        return features

    def on_train_start(self) -> None:
        """Opens the store of representations, if there is to be one.

        Raises:
            TypeError: If the data set is not a ``LightlyDataset``.
            ValueError: If the store is of other images or settings.
            OSError: If the store is damaged.
        """
        if self.representation_cache is not None:
            self._kept = _KeptRepresentations(
                self.representations,
                self.representation_cache,
                getattr(self.trainer.train_dataloader, "dataset", None),
            )

    def _represent(self, batch: Sequence[Any]) -> dict[str, Tensor] | None:
        """Returns the representations of a batch, computed or read by the images' file names."""
        views = batch[0]
        if self.representations is None:
            return None
        values: dict[str, Tensor] = (
            self.representations(views[0]) if self._kept is None else self._kept(views[0], batch[2])
        )
        return values

    def training_step(self, batch: Sequence[Any], batch_idx: int) -> Tensor:
        """Computes the loss of MV-MR and that of the online classifier, and logs each term.

        Args:
            batch: ``(views, targets, ...)``: a list of two or more views, each of shape
                (N, C, H, W), the non-augmented one first, and labels of shape (N,).
            batch_idx: Number of the batch.

        Returns:
            Scalar tensor, the sum of both losses.

        Raises:
            TypeError: If the views are no list of tensors.
            ValueError: If there are fewer than two views, or their shapes differ.
        """
        views, targets = _check_views(batch[0]), batch[1]
        features = self.forward(torch.cat(views)).flatten(start_dim=1)
        z, *z_augmented = self.projection_head(features).chunk(len(views))
        terms = self.criterion.forward_components(z, z_augmented, self._represent(batch))
        loss = terms.total
        named = terms.as_dict("train_")
        self.log(
            "train_loss",
            named.pop("train_loss"),
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
        """Checks that the online kNN has its two loaders.

        Raises:
            ValueError: If ``knn_k`` was given and there are not two validation loaders.
        """
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

        Returns:
            The online classifier's loss; None for the training images of the kNN.
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
        """Returns the optimiser, with its groups of parameters, and the schedule.

        Raises:
            ValueError: If the trainer has no end, so that there is no schedule.
        """
        # As in lightly's methods: none for normalisation layers, biases and the classifier.
        params, params_no_weight_decay = get_weight_decay_parameters(
            [self.backbone, self.projection_head]
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
    benchmark. All arguments of :class:`MVMR` may be given.

    Source: MV-MR, Entropy 26(6):466, 2024 (arXiv 2303.12130), with lightly's settings for ViTs.

    Args:
        batch_size_per_device: As in :class:`MVMR`.
        num_classes: As in :class:`MVMR`.
        knn_k: As in :class:`MVMR`.
        knn_t: As in :class:`MVMR`; lightly's ViT benchmarks' by default.
        **options: The further arguments of :class:`MVMR`.

    Raises:
        ImportError: If timm is not installed.
        TypeError: As in :class:`MVMR`.
        ValueError: As in :class:`MVMR`.
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


class _KeptRepresentations:
    """Representations kept on disk, of images that are known by their file names."""

    def __init__(self, representations: Any, folder: str, dataset: Any) -> None:
        if not isinstance(dataset, LightlyDataset):
            raise TypeError(
                "representation_cache needs a LightlyDataset, by whose file names images are known, "
                f"but the data set is a {type(dataset).__name__}."
            )
        self.index = {name: i for i, name in enumerate(dataset.get_filenames())}
        self.representations = CachedRepresentations(
            representations,
            folder,
            num_samples=len(dataset),
            fingerprint=dataset_fingerprint(dataset),
        )

    def __call__(self, images: Tensor, names: Sequence[str]) -> dict[str, Tensor]:
        values: dict[str, Tensor] = self.representations(
            images, [self.index[name] for name in names]
        )
        return values


class _OnlineKNNClassifier(KNNClassifier):  # type: ignore[misc]  # lightly is not typed
    """lightly's kNN as a part of a method, which logs the accuracies that it returns."""

    def log_dict(self, *args: Any, **kwargs: Any) -> None:
        """Does nothing: Lightning refuses what a part logs during its method's step."""


def _check_views(views: object) -> list[Tensor]:
    """Returns the views of a batch after checking them."""
    remedy = "use MVMRTransform as the data set's transform"
    if not isinstance(views, (list, tuple)) or not all(isinstance(v, Tensor) for v in views):
        raise TypeError(
            "the batch's views must be a list of tensors but are a "
            f"{type(views).__name__}; {remedy}."
        )
    if len(views) < 2:
        raise ValueError(
            "the batch must have at least two views, the non-augmented one first, "
            f"but has {len(views)}; {remedy}."
        )
    shapes = [tuple(view.shape) for view in views]
    if any(len(shape) != 4 or shape != shapes[0] for shape in shapes):
        raise ValueError(
            "the batch's views must all have the same shape (N, C, H, W) but have shapes "
            f"{shapes}; {remedy}, which gives all views one input_size."
        )
    return list(views)


def _backbone(backbone: str | nn.Module, feature_dim: int | None) -> tuple[nn.Module, int]:
    """Returns the backbone without classifier and the width of its features."""
    if isinstance(backbone, str):
        if backbone in torchvision.models.list_models():
            backbone, known = _torchvision_backbone(backbone)
        else:
            backbone, known = _timm_backbone(backbone)
    elif isinstance(backbone, nn.Module):
        known = getattr(backbone, "num_features", None)
    else:
        raise TypeError(
            f"backbone must be a name or a torch.nn.Module but is a {type(backbone).__name__}."
        )
    width = known if feature_dim is None else feature_dim
    if isinstance(width, bool) or not isinstance(width, int):
        raise ValueError(
            "feature_dim must be given for a backbone that has no num_features: the width of its "
            f"features, an int, but it is {width!r}."
        )
    return backbone, width


def _torchvision_backbone(name: str) -> tuple[nn.Module, int | None]:
    """Returns a torchvision model whose classifier is replaced by the identity."""
    # The release's residual branches start at zero.
    options = {"zero_init_residual": True} if name.startswith(("resne", "wide_resnet")) else {}
    model = torchvision.models.get_model(name, weights=None, **options)
    for attribute in ("fc", "classifier", "heads", "head"):
        if isinstance(classifier := getattr(model, attribute, None), nn.Module):
            linear = [m.in_features for m in classifier.modules() if isinstance(m, nn.Linear)]
            setattr(model, attribute, nn.Identity())
            return model, linear[0] if linear else None
    return model, None


def _timm_backbone(name: str) -> tuple[nn.Module, int | None]:
    """Returns a timm model without classifier."""
    try:
        import timm
    except ImportError as error:
        raise ImportError(
            f"backbone {name!r} is no torchvision model, and timm, where it may be one, is not "
            "installed; install it with: pip install timm"
        ) from error
    if not timm.is_model(name):
        raise ValueError(
            "backbone must be the name of a torchvision or timm model, or a torch.nn.Module, but "
            f"is {name!r}."
        )
    # ViTs of lightly's benchmarks take images of any size, and drop paths while they train.
    vit: dict[str, Any] = {"dynamic_img_size": True, "drop_path_rate": 0.1}
    model: Any = timm.create_model(name, num_classes=0, **vit if name.startswith("vit_") else {})
    return model, model.num_features
