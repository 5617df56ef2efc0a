"""What frozen features are good for: the images' classes, few labels, damage, photographs."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Mapping

import torch
from kornia.filters import gaussian_blur2d
from torch import Tensor, nn

from benchmarks.common.data import Data, image_tensor
from benchmarks.common.evaluation import (
    extract_features,
    knn_scores,
    topk_accuracy,
    train_linear_probe,
)
from benchmarks.common.photographs import PHOTOGRAPHS, Photographs

LABELS_A_CLASS = 10
DRAWS = 5


def _noise(images: Tensor) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    return (images + 0.08 * torch.randn(images.shape, generator=generator).to(images)).clamp(0, 1)


# Of images in [0, 1]; strong enough to cost accuracy, not to hide what is seen.
DAMAGES: Mapping[str, Callable[[Tensor], Tensor]] = {
    "noise": _noise,
    "blur": lambda images: gaussian_blur2d(images, (5, 5), (1.0, 1.0)),
    "contrast": lambda images: 0.5 + 0.4 * (images - 0.5),
}


def evaluate_frozen(
    encoder: nn.Module,
    data: Data,
    normalize: Callable[[Tensor], Tensor],
    *,
    photographs: Data | None = None,
    damaged: bool = True,
    device: str | torch.device = "cpu",
    seed: int = 0,
) -> dict[str, float]:
    """Computes top-1 accuracies in percent.

    Args:
        encoder: From images to features, shape (N, D).
        data: To learn on and to test on.
        normalize: From images in [0, 1] to what the encoder takes.
        photographs: Those of :func:`load_photographs`, to learn on and to test on as well.
        damaged: Whether to go on after kNN and linear.
        device: Where the encoder computes.
        seed: Of the linear classifiers.

    Returns:
        ``knn``, ``linear``, ``few_labels`` (a linear classifier on 10 images a class, mean over
        five draws), ``noise``, ``blur``, ``contrast`` (the linear classifier on damaged test
        images), ``photographs`` (a linear classifier on those).
    """

    def features(images: Tensor, damage: Callable[[Tensor], Tensor] | None = None) -> Tensor:
        parts = (part.float() / 255 for part in images.split(256))
        parts = (normalize(part if damage is None else damage(part)) for part in parts)
        return extract_features(encoder, parts, device).to(device)

    train, test = features(data.train_images), features(data.test_images)
    labels, test_labels = data.train_labels.to(device), data.test_labels.to(device)
    probe = train_linear_probe(train, labels, seed=seed)

    def top1(scores: Tensor, of: Tensor = test_labels) -> float:
        return topk_accuracy(scores, of)["top1"]

    accuracy = {"knn": top1(knn_scores(train, labels, test)), "linear": top1(probe(test))}
    if not damaged:
        return accuracy
    accuracy["few_labels"] = statistics.mean(
        top1(_few(train, data.train_labels, draw)(test)) for draw in range(DRAWS)
    )
    for name, damage in DAMAGES.items():
        accuracy[name] = top1(probe(features(data.test_images, damage)))
    if photographs is None:
        return accuracy
    probe = train_linear_probe(
        features(photographs.train_images), photographs.train_labels.to(device), seed=seed
    )
    accuracy["photographs"] = top1(
        probe(features(photographs.test_images)), photographs.test_labels.to(device)
    )
    return accuracy


def _few(features: Tensor, labels: Tensor, draw: int) -> nn.Module:
    """Trains a linear classifier on a draw of few images a class."""
    generator = torch.Generator().manual_seed(draw)
    order = torch.randperm(len(labels), generator=generator)
    chosen = torch.cat([order[labels[order] == c][:LABELS_A_CLASS] for c in labels.unique()])
    some = labels[chosen].to(features.device)
    return train_linear_probe(features[chosen], some, epochs=200, learning_rate=3e-3, seed=draw)


def load_photographs(size: int, limit: int | None = None) -> Data:
    """Reads crops of the photographs that come with scikit-image, whose classes they are.

    Args:
        size: Side in pixels that crops are resized to.
        limit: About so many of each split; None: all.

    Returns:
        Both splits.
    """
    crops = None if limit is None else max(1, limit // len(PHOTOGRAPHS))
    train, test = (Photographs(split, crops_per_class=crops) for split in ("train", "test"))
    return Data(*image_tensor(train, size), *image_tensor(test, size), train.classes)
