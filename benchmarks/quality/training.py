"""One run: training without labels on a set of images, and evaluation of the frozen features."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import kornia.augmentation as K
import torch
from torch import Tensor, nn

from benchmarks.common.data import ImageFolder, image_tensor
from benchmarks.common.encoder import SmallResNet
from benchmarks.common.evaluation import evaluate_features, extract_features
from benchmarks.common.photographs import Photographs
from benchmarks.harness import progress
from benchmarks.quality.methods import Batch, build
from mvmr_loss import Normalization, Representations

SIZE, BATCH_SIZE, SKETCH_DIM = 32, 256, 1024
NORMALIZATION = Normalization.cifar10()
VALIDATION_PER_CLASS = 100


class Data(NamedTuple):
    """Images, uint8 of shape (N, 3, 32, 32), and labels of what is trained and evaluated on."""

    train_images: Tensor
    train_labels: Tensor
    test_images: Tensor
    test_labels: Tensor


def load(folder: Path | None, split: str, per_class: int | None, device: str) -> Data:
    """Reads the images.

    Args:
        folder: Holds ``train`` and ``test``, each with one folder of images a class; None: the
            photographs that come with scikit-image.
        split: "test", or "validation": the last 100 training images of each class in the place of the
            test images, and not trained on.
        per_class: Trains on the first so many images of each class; None: all.
        device: Where they are put.
    """
    parts: list[Any]
    if folder is None:
        parts = [Photographs("train"), Photographs("test")]
    else:
        parts = [ImageFolder(folder / part, image_size=SIZE) for part in ("train", "test")]
    (x, y), (x_test, y_test) = (image_tensor(part, SIZE) for part in parts)
    places = [torch.nonzero(y == label)[:, 0] for label in y.unique()]
    if split == "validation":
        held_out = torch.cat([place[-VALIDATION_PER_CLASS:] for place in places])
        x_test, y_test = x[held_out], y[held_out]
        places = [place[:-VALIDATION_PER_CLASS] for place in places]
    kept = torch.cat([place[:per_class] for place in places])
    tensors = (x[kept], y[kept], x_test, y_test)
    return Data(*(tensor.to(device) for tensor in tensors))


def make_encoder(name: str) -> nn.Module:
    """Returns an encoder with ``output_dim``: "small" (0.3M parameters) or "resnet18" (11M)."""
    if name == "small":
        return SmallResNet((32, 64, 128))
    if name == "resnet18":
        from torchvision.models import resnet18

        network = resnet18()
        network.conv1 = nn.Conv2d(3, 64, 3, 1, 1, bias=False)
        network.maxpool = nn.Identity()  # type: ignore[assignment]
        network.fc = nn.Identity()  # type: ignore[assignment]
        network.output_dim = 512
        return network
    raise ValueError(f"encoder must be 'small' or 'resnet18' but is {name!r}.")


def augmentation(size: int, scale: tuple[float, float]) -> nn.Module:
    """Returns crops of a part of the area, flips and colours, for images in [0, 1]."""
    return K.AugmentationSequential(
        K.RandomResizedCrop((size, size), scale=scale),
        K.RandomHorizontalFlip(),
        K.ColorJitter(0.4, 0.4, 0.4, 0.1, p=0.8),
        K.RandomGrayscale(p=0.2),
    )


FULL, SMALL = augmentation(SIZE, (0.2, 1.0)), augmentation(SIZE // 2, (0.08, 0.5))


def make_views(kind: str, images: Tensor) -> list[Tensor]:
    """Returns normalised views of images in [0, 1].

    Args:
        kind: "plain" (the images, and a crop), "two" (crops), or "crops": one, and four of half the
            side, which cost as much as a second one.
        images: Shape (N, 3, 32, 32).
    """
    if kind == "plain":
        views = [images, FULL(images)]
    elif kind == "two":
        views = list(FULL(images.repeat(2, 1, 1, 1)).chunk(2))
    elif kind == "crops":
        views = [FULL(images), *SMALL(images.repeat(4, 1, 1, 1)).chunk(4)]
    else:
        raise ValueError(f"views must be plain, two or crops but are {kind!r}.")
    return [normalized(view) for view in views]


def normalized(images: Tensor) -> Tensor:
    """Returns images in [0, 1], normalised; channels come last in memory, which is faster."""
    return NORMALIZATION.apply(images).contiguous(memory_format=torch.channels_last)


def encode(encoder: nn.Module, views: Sequence[Tensor]) -> list[Tensor]:
    """Returns the features of each view, of which those of one size go through together."""
    features: dict[int, Tensor] = {}
    for size in sorted({view.shape[-1] for view in views}):
        same = [i for i, view in enumerate(views) if view.shape[-1] == size]
        parts = encoder(torch.cat([views[i] for i in same])).chunk(len(same))
        features |= dict(zip(same, parts, strict=True))
    return [features[i] for i in range(len(views))]


def train(
    settings: Mapping[str, Any], seed: int, folder: Path | None, device: str
) -> dict[str, Any]:
    """Trains and evaluates.

    Args:
        settings: Of the plan: ``method``, ``options``, ``representations``, ``views``, ``encoder``,
            ``epochs``, ``split``, ``per_class``.
        seed: Of all that is drawn.
        folder: As in :func:`load`.
        device: Where everything is computed.

    Returns:
        Figures: accuracies in percent after each fifth of the epochs and at the end, effective rank of
        features and embeddings, the terms of the loss, seconds an epoch.
    """
    data = load(folder, settings["split"], settings["per_class"], device)
    torch.manual_seed(seed)
    encoder = make_encoder(settings["encoder"]).to(device, memory_format=torch.channels_last)
    features = _represent(settings["representations"], data.train_images)
    method = build(settings["method"], encoder, settings["options"], features).to(device)
    live = Representations(["augmented_pixels"], normalization=NORMALIZATION).to(device)
    parameters = [p for p in (*encoder.parameters(), *method.parameters()) if p.requires_grad]
    steps = settings["epochs"] * (len(data.train_images) // BATCH_SIZE)
    optimizer = torch.optim.Adam(parameters, lr=1e-3, weight_decay=1e-6)
    scheduler = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, 1e-3, steps, pct_start=0.1, cycle_momentum=False
    )
    curve: list[dict[str, Any]] = []
    seconds: list[float] = []
    looks = {round(settings["epochs"] * part / 5) for part in range(1, 6)}
    for epoch in progress(range(1, settings["epochs"] + 1), settings["method"], unit="epoch"):
        clocks = time.perf_counter(), time.process_time()
        sums: dict[str, Tensor] = {}
        order = torch.randperm(len(data.train_images))
        for index in order[: len(order) - len(order) % BATCH_SIZE].split(BATCH_SIZE):
            images = data.train_images[index].float() / 255
            views = make_views(settings["views"], images)
            met = {name: values[index] for name, values in features.items()}
            if "augmented_pixels" in settings["representations"]:
                met |= live(normalized(images))
            terms = method(Batch(encode(encoder, views), met, views, encode))
            optimizer.zero_grad()
            terms["loss"].backward()
            optimizer.step()
            scheduler.step()
            for name, term in terms.items():
                sums[name] = sums.get(name, torch.zeros_like(term)) + term.detach()
        seconds.append(time.process_time() - clocks[1])
        if epoch in looks:
            count = len(order) // BATCH_SIZE
            means = {name: total.item() / count for name, total in sums.items()}
            curve.append({"epoch": epoch, "terms": means, **evaluate(encoder, method, data, seed)})
    return {**curve[-1], "curve": curve, "cpu_seconds_per_epoch": sum(seconds) / len(seconds)}


def _represent(names: Sequence[str], images: Tensor) -> dict[str, Tensor]:
    """Returns sketches of the representations of all images, which never change."""
    kept = [name for name in names if name != "augmented_pixels"]
    if not kept:
        return {}
    represent = Representations(kept, normalization=NORMALIZATION, sketch_dim=SKETCH_DIM)
    represent = represent.to(images.device)
    parts = [represent(normalized(part.float() / 255)) for part in images.split(256)]
    return {name: torch.cat([part[name] for part in parts]) for name in parts[0]}


def evaluate(encoder: nn.Module, method: nn.Module, data: Data, seed: int) -> dict[str, Any]:
    """Returns accuracies in percent on frozen features, and effective ranks (RankMe)."""
    x, x_test = (
        extract_features(encoder, (normalized(part.float() / 255) for part in images.split(512)))
        for images in (data.train_images, data.test_images)
    )
    accuracy = evaluate_features(
        x, data.train_labels.cpu(), x_test, data.test_labels.cpu(), seed=seed
    )
    method.eval()
    with torch.no_grad():
        z = method.projector(x_test[:2048].to(data.test_images.device))  # type: ignore[operator]
    method.train()
    return {
        "linear": accuracy["linear"]["top1"],
        "knn": accuracy["knn"]["top1"],
        "rank_of_features": effective_rank(x_test),
        "rank_of_embeddings": effective_rank(z),
    }


def effective_rank(features: Tensor) -> float:
    """Returns the exponential of the entropy of the singular values.

    Source: RankMe (Garrido et al., ICML 2023, arXiv 2210.02885), eq. 1.

    Examples:
        >>> round(effective_rank(torch.eye(4)), 3)
        4.0
    """
    values = torch.linalg.svdvals(features.double())
    p = values / values.sum() + 1e-12
    return float(torch.exp(-(p * p.log()).sum()))
