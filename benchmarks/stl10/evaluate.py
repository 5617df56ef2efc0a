"""What the frozen or fine-tuned backbone can do: kNN, linear, ten crops, few labels.

The classifiers are lightly's, with their losses and schedules, trained by Lightning; accuracies are
torchmetrics'. Nothing is chosen by test accuracy: the last epoch counts.
"""

from __future__ import annotations

import copy
import functools
import logging
import statistics
from collections.abc import Callable
from typing import Any

import numpy as np
import pytorch_lightning as pl
import torch
from lightly.utils.benchmarking import KNNClassifier, LinearClassifier
from lightly.utils.benchmarking.linear_classifier import FinetuneClassifier
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, TensorDataset
from torchmetrics.functional.classification import multiclass_accuracy
from torchvision.transforms import v2 as T

from benchmarks.common.evaluation import extract_features
from benchmarks.harness import progress
from benchmarks.stl10.data import Data, Transformed, finetuning, normalize, plain, subset
from benchmarks.stl10.settings import Settings

Accuracy = dict[str, float]
BATCH_SIZE = 256


class AdamLinearClassifier(LinearClassifier):  # type: ignore[misc]  # lightly is not typed
    """lightly's linear classifier with the paper's optimiser: Adam, cosine to 0."""

    def configure_optimizers(self) -> Any:
        """Returns Adam and its schedule."""
        optimizer = torch.optim.Adam(self.get_trainable_parameters(), lr=self.lr)
        steps = int(self.trainer.estimated_stepping_batches)
        scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
        return [optimizer], [{"scheduler": scheduler, "interval": "step"}]


def loader(
    dataset: Dataset[Any], settings: Settings, batch_size: int = BATCH_SIZE, **options: Any
) -> DataLoader[Any]:
    """Returns a loader with the run's worker processes."""
    return DataLoader(dataset, batch_size, num_workers=settings.num_workers, **options)


def features_of(
    backbone: nn.Module,
    images: Dataset[Any],
    settings: Settings,
    description: str | None = None,
    transform: Callable[[Any], Any] | None = None,
) -> tuple[Tensor, Tensor]:
    """Computes a backbone's features of all images.

    Args:
        backbone: On the device to compute on.
        images: Data set of (PIL image, label).
        settings: ``image_size``, ``normalization`` and ``num_workers`` are read.
        description: What a progress bar says.
        transform: From a PIL image to a tensor; None: the image as it is, resized and normalised.

    Returns:
        Features of shape (N, D), float32, and labels of shape (N,), both on the CPU.
    """
    labels: list[Tensor] = []

    def batches() -> Any:
        read = loader(Transformed(images, transform or plain(settings)), settings)
        for batch, batch_labels in progress(read, description, unit="batch"):
            labels.append(batch_labels)
            yield batch

    first = next(backbone.parameters(), None)
    device = None if first is None else first.device
    return extract_features(backbone, batches(), device), torch.cat(labels)


def accuracies(scores: Tensor, labels: Tensor) -> Accuracy:
    """Returns top-1 and top-5 accuracy in percent, of scores of shape (N, C)."""
    classes = scores.shape[1]
    return {
        f"top{k}": 100
        * multiclass_accuracy(
            scores, labels, classes, average="micro", top_k=min(k, classes)
        ).item()
        for k in (1, 5)
    }


def trainer(settings: Settings, epochs: int) -> pl.Trainer:
    """Returns a trainer for an evaluation, on one device, that writes nothing."""
    return pl.Trainer(
        max_epochs=epochs,
        accelerator=settings.accelerator,
        devices=1,
        logger=False,
        enable_checkpointing=False,
        enable_model_summary=False,
        enable_progress_bar=False,
        num_sanity_val_steps=0,
    )


def knn(train: TensorDataset, test: TensorDataset, classes: int, settings: Settings) -> Accuracy:
    """Returns the accuracy of lightly's weighted kNN on features."""
    classifier = KNNClassifier(
        model=None,
        num_classes=classes,
        knn_k=min(settings.knn_k, len(train)),
        knn_t=settings.knn_temperature,
        train_dataloader_idx=0,
        val_dataloader_idx=1,
        topk=(1, min(5, classes)),
    )
    loaders = [DataLoader(train, BATCH_SIZE), DataLoader(test, BATCH_SIZE)]
    _, found = trainer(settings, 1).validate(classifier, loaders, verbose=False)
    values = [100 * found[f"val_knn_top{k}/dataloader_idx_1"] for k in classifier.topk]
    return dict(zip(("top1", "top5"), values, strict=True))


def linear(train: TensorDataset, classes: int, settings: Settings) -> nn.Module:
    """Trains lightly's linear classifier on features and returns its layer, on the CPU."""
    pl.seed_everything(settings.seed, verbose=False)
    kind = {"sgd": LinearClassifier, "adam": AdamLinearClassifier}[settings.probe_optimizer]
    batch_size = min(BATCH_SIZE, len(train))
    classifier = kind(
        model=nn.Identity(),
        batch_size_per_device=batch_size,
        lr=settings.probe_learning_rate,
        feature_dim=train.tensors[0].shape[1],
        num_classes=classes,
        topk=(1, min(5, classes)),
    )
    batches = DataLoader(train, batch_size, shuffle=True)
    trainer(settings, settings.probe_epochs).fit(classifier, batches)
    layer: nn.Module = classifier.classification_head.cpu().eval().requires_grad_(False)
    return layer


def finetune(backbone: nn.Module, index: Any, data: Data, settings: Settings) -> Accuracy:
    """Fine-tunes a copy of the backbone on some labels, as lightly does; the last epoch counts.

    Args:
        backbone: The trained backbone.
        index: Which of the labelled training images to learn from.
        data: Labelled images.
        settings: The evaluation's settings.

    Returns:
        Accuracy on the test images.
    """
    pl.seed_everything(settings.seed, verbose=False)
    images = Transformed(subset(data, index), finetuning(settings))
    batch_size = min(settings.finetune_batch_size, len(images))
    model = copy.deepcopy(backbone).requires_grad_(True)
    with torch.no_grad():
        width = model.eval()(images[0][0][None].to(next(model.parameters()).device)).shape[1]
    classes = len(data.classes)
    classifier = FinetuneClassifier(
        model=model.train(),
        batch_size_per_device=batch_size,
        lr=settings.finetune_learning_rate,
        feature_dim=width,
        num_classes=classes,
        topk=(1, min(5, classes)),
    )
    batches = loader(images, settings, batch_size, shuffle=True, drop_last=True)
    trainer(settings, settings.finetune_epochs).fit(classifier, batches)
    return accuracies(*features_of(classifier, data.test, settings))


def crop_of_ten(i: int, settings: Settings) -> T.Compose:
    """Returns the transform to one of the ten crops; worker processes are sent it."""
    larger = round(settings.image_size * settings.ten_crop_resize)
    crop = T.Lambda(functools.partial(_crop, i=i, size=settings.image_size))
    return T.Compose(
        [
            *(T.Resize(larger), T.CenterCrop(larger), crop),
            *(T.ToTensor(), T.Normalize(**normalize(settings))),
        ]
    )


def _crop(image: Any, i: int, size: int) -> Any:
    return T.functional.ten_crop(image, [size])[i]


def label_subsets(part: float | str, data: Data, seed: int) -> list[np.ndarray[Any, Any]]:
    """Returns the indices of the labelled images that may be seen.

    Args:
        part: A fraction, taken of each class, at least one image; or "folds".
        data: Labelled images.
        seed: Draws the images of a fraction.

    Returns:
        One array of indices; or ten, STL10's folds.
    """
    if part == "folds":
        return data.folds
    draw = np.random.default_rng(seed)
    chosen = []
    for label in range(len(data.classes)):
        members = np.flatnonzero(data.labels == label)
        chosen.append(
            draw.choice(members, max(1, round(float(part) * len(members))), replace=False)
        )
    return [np.sort(np.concatenate(chosen))]


def evaluate(
    backbone: nn.Module, data: Data, settings: Settings
) -> tuple[dict[str, Any], Tensor, Tensor]:
    """Runs every evaluation that the settings ask for.

    Args:
        backbone: The trained backbone, on the device to compute on.
        data: Labelled images.
        settings: The evaluation's settings.

    Returns:
        Name of the evaluation -> ``{"top1": ..., "top5": ...}`` in percent; with few labels
        ``{"linear": ..., "finetune": ...}`` by part; and the features and labels of the test images.
    """
    logging.getLogger("pytorch_lightning").setLevel(logging.WARNING)
    classes = len(data.classes)
    train = TensorDataset(*features_of(backbone, data.train, settings, "features of train"))
    test, labels = features_of(backbone, data.test, settings, "features of test")
    layer = linear(train, classes, settings)
    logits = []
    for i in range(10):
        words, transform = f"crop {i + 1} of 10", crop_of_ten(i, settings)
        logits.append(layer(features_of(backbone, data.test, settings, words, transform)[0]))
    results: dict[str, Any] = {
        "knn": knn(train, TensorDataset(test, labels), classes, settings),
        "linear": accuracies(layer(test), labels),
        "linear_ten_crop": accuracies(torch.stack(logits).mean(dim=0), labels),
    }
    for part in settings.labels:
        subsets = label_subsets(part, data, settings.seed)
        few, finetuned = [], []
        for index in progress(subsets, f"labels {part}", unit="subset"):
            layer = linear(TensorDataset(*train[torch.from_numpy(index)]), classes, settings)
            few.append(accuracies(layer(test), labels))
            finetuned.append(finetune(backbone, index, data, settings))
        results[f"labels_{part}"] = {
            "images": len(subsets[0]),
            "subsets": len(subsets),
            "linear": _mean(few),
            "finetune": _mean(finetuned),
        }
    return results, test, labels


def _mean(results: list[Accuracy]) -> Accuracy:
    """Returns the mean over subsets, and the standard deviation of top-1 if there are several."""
    mean = {key: statistics.fmean(r[key] for r in results) for key in results[0]}
    if len(results) > 1:
        mean["top1_std"] = statistics.stdev(r["top1"] for r in results)
    return mean
