"""What the frozen or fine-tuned backbone can do: kNN, linear probe, ten crops, few labels."""

from __future__ import annotations

import copy
import statistics
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import torch
from lightly.utils.scheduler import CosineWarmupScheduler
from torch import Tensor, nn
from torch.nn import functional as F
from torchvision.transforms.v2 import functional as TF

from benchmarks.common.evaluation import (
    extract_features,
    knn_scores,
    topk_accuracy,
    train_linear_probe,
)
from benchmarks.harness.loops import progress
from benchmarks.stl10.data import Data, EpochSampler, Images, Part, in_order, train_loader
from benchmarks.stl10.methods import Method
from benchmarks.stl10.settings import Settings
from mvmr_loss.representations import augmented_pixels

Accuracy = dict[str, float]


def read_features(
    method: Method, images: Images, settings: Settings, description: str, crop: int | None = None
) -> tuple[Tensor, Tensor]:
    """Computes the backbone's features of all images.

    Args:
        method: The trained method, on the device to compute on.
        images: The images.
        settings: ``ten_crop_resize``, ``image_size`` and ``num_workers`` are read.
        description: Title of the progress bar.
        crop: None for the whole image, or which of the ten crops, 0 to 9.

    Returns:
        Features of shape (N, D), float32, and labels of shape (N,), both on the CPU.
    """
    labels: list[Tensor] = []
    size = settings.image_size
    larger = round(size * settings.ten_crop_resize)

    def batches() -> Iterator[Tensor]:
        loader = in_order(images, settings.num_workers)
        for batch, batch_labels in progress(loader, description, unit="batch"):
            labels.append(batch_labels)
            yield batch if crop is None else TF.ten_crop(TF.resize(batch, [larger]), [size])[crop]

    features = extract_features(method, batches(), method.device)
    return features, torch.cat(labels)


def evaluate(
    method: Method, data: Data, settings: Settings
) -> tuple[dict[str, Any], Tensor, Tensor]:
    """Runs every evaluation that the settings ask for. Nothing is chosen by test accuracy.

    Args:
        method: The trained method, on the device to compute on.
        data: Labelled images.
        settings: The evaluation's settings.

    Returns:
        Name of the evaluation -> ``{"top1": ..., "top5": ...}`` in percent; with few labels
        ``{"linear": ..., "finetune": ...}`` by part; and the features and labels of the test images.
    """
    device = method.device
    train, train_labels = read_features(method, data.train, settings, "features of train")
    test, test_labels = read_features(method, data.test, settings, "features of test")
    options: dict[str, Any] = {
        "num_classes": len(data.classes),
        "epochs": settings.probe_epochs,
        "learning_rate": settings.probe_learning_rate,
        "seed": settings.seed,
    }
    probe = train_linear_probe(train.to(device), train_labels.to(device), **options).cpu()
    scores = knn_scores(
        train,
        train_labels,
        test,
        k=settings.knn_k,
        temperature=settings.knn_temperature,
        num_classes=len(data.classes),
    )
    results: dict[str, Any] = {
        "knn": topk_accuracy(scores, test_labels),
        "linear": topk_accuracy(probe(test), test_labels),
    }
    logits = [
        probe(read_features(method, data.test, settings, f"crop {crop + 1} of 10", crop)[0])
        for crop in range(10)
    ]
    results["linear_ten_crop"] = topk_accuracy(torch.stack(logits).mean(dim=0), test_labels)
    for part in settings.labels:
        subsets = label_subsets(part, data, settings.seed)
        linear, finetuned = [], []
        for i, index in enumerate(subsets):
            few = train_linear_probe(train[index], train_labels[index], **options)
            linear.append(topk_accuracy(few(test), test_labels))
            name = f"fine-tuning, labels {part}" + (f", fold {i}" if len(subsets) > 1 else "")
            finetuned.append(finetune(method, index, data, settings, name))
        results[f"labels_{part}"] = {
            "images": len(subsets[0]),
            "subsets": len(subsets),
            "linear": _mean(linear),
            "finetune": _mean(finetuned),
        }
    return results, test, test_labels


def label_subsets(part: float | str, data: Data, seed: int) -> list[np.ndarray[Any, Any]]:
    """Returns the indices of the labelled images that fine-tuning may see.

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
        members = np.flatnonzero(data.train_labels == label)
        count = max(1, round(float(part) * len(members)))
        chosen.append(draw.choice(members, min(count, len(members)), replace=False))
    return [np.sort(np.concatenate(chosen))]


def finetune(
    method: Method,
    index: Sequence[int] | np.ndarray[Any, Any],
    data: Data,
    settings: Settings,
    name: str,
) -> Accuracy:
    """Fine-tunes a copy of the backbone with a linear classifier; the last epoch counts.

    Adam with the cosine schedule; the classifier's learning rate is the settings', the backbone's a
    tenth. Images are cropped and flipped at random, colours are left alone.

    Args:
        method: The trained method.
        index: Which of the labelled training images to learn from.
        data: Labelled images.
        settings: The evaluation's settings.
        name: Title of the progress bar.

    Returns:
        ``{"top1": ..., "top5": ...}`` on the test images, in percent.
    """
    device = method.device
    backbone, normalize = copy.deepcopy(method.backbone).train(), method.normalize
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(settings.seed)
        classifier = nn.Linear(method.dims[0], len(data.classes)).to(device)
    rate, epochs = settings.finetune_learning_rate, settings.finetune_epochs
    optimizer = torch.optim.Adam(
        [{"params": backbone.parameters(), "lr": rate / 10}, {"params": classifier.parameters()}],
        lr=rate,
    )
    images = Part(data.train, index)
    batch_size = min(settings.finetune_batch_size, len(images))
    sampler = EpochSampler(len(images), batch_size, settings.seed)
    steps = epochs * len(sampler)
    scheduler = CosineWarmupScheduler(optimizer, 0, steps, end_value=1e-3)
    augmentation = {
        **method.augmentation,
        "color_jitter_probability": 0.0,
        "grayscale_probability": 0.0,
        "blur": False,
    }
    # The readers last for one epoch's order at a time: few labels are read in no time.
    loader = train_loader(images, sampler, num_workers=0)
    seen = 0
    for epoch in progress(range(epochs), name, unit="epoch"):
        sampler.set_epoch(epoch)
        for batch, labels in loader:
            x = normalize(batch.to(device))
            x = augmented_pixels(x, settings.seed, seen, **augmentation)
            seen += len(x)
            loss = F.cross_entropy(classifier(backbone(x)), labels.to(device))
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            scheduler.step()
    backbone.eval()
    scores, test_labels = [], []
    with torch.no_grad():
        for batch, labels in in_order(data.test, settings.num_workers):
            scores.append(classifier(backbone(normalize(batch.to(device)))).cpu())
            test_labels.append(labels)
    return topk_accuracy(torch.cat(scores), torch.cat(test_labels))


def _mean(results: list[Accuracy]) -> Accuracy:
    """Returns the mean over subsets, and the standard deviation of top-1 if there are several."""
    mean = {key: statistics.fmean(r[key] for r in results) for key in results[0]}
    if len(results) > 1:
        mean["top1_std"] = statistics.stdev(r["top1"] for r in results)
    return mean
