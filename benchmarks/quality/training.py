"""One run: training without labels on a set of images, and evaluation of the frozen features."""

from __future__ import annotations

import functools
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.common.augmentation import augment
from benchmarks.common.data import Data, ImageFolder, image_tensor
from benchmarks.common.encoder import SmallResNet
from benchmarks.common.evaluation import extract_features
from benchmarks.common.frozen import evaluate_frozen
from benchmarks.common.photographs import Photographs
from benchmarks.harness import RepeatedStep, progress
from benchmarks.plain_pytorch.training import adam_in_one_cycle
from benchmarks.quality import representations as _registered  # noqa: F401
from benchmarks.quality.methods import Batch, Method, build
from benchmarks.quality.plan import BATCH_SIZE
from mvmr_loss import Normalization, Representations

SIZE, SKETCH_DIM = 32, 1024
NORMALIZATION = Normalization.cifar10()
VALIDATION_PER_CLASS = 100


@functools.cache
def read(folder: Path | None) -> Data:
    """Reads all images, once a process; see :func:`load`."""
    parts: list[Any]
    if folder is None:
        parts = [Photographs("train"), Photographs("test")]
    else:
        parts = [ImageFolder(folder / part, image_size=SIZE) for part in ("train", "test")]
    return Data(*(x for part in parts for x in image_tensor(part, SIZE)), parts[0].classes)


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
    x, y, x_test, y_test, classes = read(folder)
    places = [torch.nonzero(y == label)[:, 0] for label in y.unique()]
    if split == "validation":
        held_out = torch.cat([place[-VALIDATION_PER_CLASS:] for place in places])
        x_test, y_test = x[held_out], y[held_out]
        places = [place[:-VALIDATION_PER_CLASS] for place in places]
    kept = torch.cat([place[:per_class] for place in places])
    # Labels are for the classifiers, which stay on the CPU.
    return Data(x[kept].to(device), y[kept], x_test.to(device), y_test, classes)


def make_encoder(name: str) -> nn.Module:
    """Returns an encoder with ``output_dim``: "small", "resnet18" (11M parameters) or "vit" (0.15M)."""
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
    if name == "vit":
        from timm.models import VisionTransformer

        transformer = VisionTransformer(
            img_size=SIZE,
            patch_size=4,
            embed_dim=64,
            depth=3,
            num_heads=4,
            num_classes=0,
            global_pool="avg",
            dynamic_img_size=True,  # small crops
        )
        transformer.output_dim = 64
        return transformer
    raise ValueError(f"encoder must be small, resnet18 or vit but is {name!r}.")


def make_views(kind: str, images: Tensor) -> list[Tensor]:
    """Returns normalised views of images in [0, 1].

    Args:
        kind: "plain" (the images, and a crop), "two" (crops), or "crops": one, and four of half the
            side, which cost as much as a second one.
        images: Shape (N, 3, 32, 32).
    """
    if kind == "plain":
        views = [images, augment(images, grey=0.2)]
    elif kind == "two":
        views = list(augment(images.repeat(2, 1, 1, 1), grey=0.2).chunk(2))
    elif kind == "crops":
        repeated, side = images.repeat(4, 1, 1, 1), images.shape[-1] // 2
        small = augment(repeated, size=side, scale=(0.08, 0.5), grey=0.2)
        views = [augment(images, grey=0.2), *small.chunk(4)]
    else:
        raise ValueError(f"views must be plain, two or crops but are {kind!r}.")
    return [normalized(view) for view in views]


def normalized(images: Tensor) -> Tensor:
    """Returns images in [0, 1], normalised; channels come last in memory, which is faster."""
    return NORMALIZATION.apply(images).contiguous(memory_format=torch.channels_last)


def encode(encoder: nn.Module, views: Sequence[Tensor], *, bf16: bool = False) -> list[Tensor]:
    """Returns the features of each view, of which those of one size go through together."""
    features: dict[int, Tensor] = {}
    for size in sorted({view.shape[-1] for view in views}):
        same = [i for i, view in enumerate(views) if view.shape[-1] == size]
        with torch.autocast(views[0].device.type, torch.bfloat16, enabled=bf16):
            found = encoder(torch.cat([views[i] for i in same]))
        parts = found.float().chunk(len(same))
        features |= dict(zip(same, parts, strict=True))
    return [features[i] for i in range(len(views))]


def train(
    settings: Mapping[str, Any], seed: int, folder: Path | None, device: str
) -> dict[str, Any]:
    """Trains and evaluates.

    Args:
        settings: Of the plan: ``method``, ``options``, ``representations``, ``views``, ``encoder``,
            ``epochs``, ``split``, ``per_class``, ``learning_rate``, ``looks``,
            ``bf16``: whether the encoder runs in bfloat16 where autocast has it so;
            ``batch_size``, if not :data:`BATCH_SIZE`.
        seed: Of all that is drawn.
        folder: As in :func:`load`.
        device: Where everything is computed.

    Returns:
        Figures: accuracies in percent, as of :func:`evaluate_frozen`, and effective rank of features
        and embeddings at the end; ``curve`` has them, and the terms of the loss, at equally many
        ``looks`` over the training; seconds an epoch.
    """
    data = load(folder, settings["split"], settings["per_class"], device)
    torch.manual_seed(seed)
    encoder = make_encoder(settings["encoder"]).to(device, memory_format=torch.channels_last)
    features = represent(settings["representations"], data.train_images)
    method = build(settings["method"], encoder, settings["options"], features).to(device)
    live = Representations(["augmented_pixels"], normalization=NORMALIZATION).to(device)
    parameters = [p for p in (*encoder.parameters(), *method.parameters()) if p.requires_grad]
    batch_size = settings.get("batch_size", BATCH_SIZE)
    steps = settings["epochs"] * (len(data.train_images) // batch_size)
    optimizer, scheduler = adam_in_one_cycle(parameters, settings["learning_rate"], steps)
    # What a step reads and writes stays where it is, so that a GPU can repeat it as one graph.
    index = torch.zeros(batch_size, dtype=torch.long, device=device)
    changing: dict[str, Tensor] = {}
    sums: dict[str, Tensor] = {}
    through = functools.partial(encode, bf16=settings["bf16"])

    def step() -> None:
        images = data.train_images[index].float() / 255
        views = make_views(settings["views"], images)
        met = {name: values[index] for name, values in features.items()} | changing
        terms = method(Batch(through(encoder, views), met, views, through))
        optimizer.zero_grad()
        terms["loss"].backward()
        optimizer.step()
        for name, term in terms.items():
            if name not in sums:
                sums[name] = torch.zeros_like(term)
            sums[name] += term.detach()

    repeated = RepeatedStep(step, device, captured=method.capturable)
    curve: list[dict[str, Any]] = []
    seconds: list[tuple[float, float]] = []
    count = settings["looks"]
    looks = {round(settings["epochs"] * part / count) for part in range(1, count + 1)}
    for epoch in progress(range(1, settings["epochs"] + 1), settings["method"], unit="epoch"):
        clocks = time.perf_counter(), time.process_time()
        for total in sums.values():
            total.zero_()
        order = torch.randperm(len(data.train_images)).to(device)
        for batch in order[: len(order) - len(order) % batch_size].split(batch_size):
            index.copy_(batch)
            if "augmented_pixels" in settings["representations"]:
                for name, values in live(
                    normalized(data.train_images[index].float() / 255)
                ).items():
                    changing.setdefault(name, torch.empty_like(values)).copy_(values)
            repeated()
            scheduler.step()
        seconds.append((time.perf_counter() - clocks[0], time.process_time() - clocks[1]))
        if epoch in looks:
            count = len(order) // batch_size
            means = {name: total.item() / count for name, total in sums.items()}
            # What options are chosen by needs no more.
            last = epoch == settings["epochs"] and settings["split"] == "test"
            found = evaluate(encoder, method, data, seed, damaged=last)
            curve.append({"epoch": epoch, "terms": means, **found})
    wall, cpu = (sum(parts) / len(parts) for parts in zip(*seconds, strict=True))
    return {
        **curve[-1],
        "curve": curve,
        "seconds_per_epoch": wall,
        "cpu_seconds_per_epoch": cpu,
    }


def represent(names: Sequence[str], images: Tensor) -> dict[str, Tensor]:
    """Returns sketches of the representations of all images, which never change."""
    kept = [name for name in names if name != "augmented_pixels"]
    if not kept:
        return {}
    represent = Representations(kept, normalization=NORMALIZATION, sketch_dim=SKETCH_DIM)
    represent = represent.to(images.device)
    parts = [represent(normalized(part.float() / 255)) for part in images.split(256)]
    return {name: torch.cat([part[name] for part in parts]) for name in parts[0]}


def evaluate(
    encoder: nn.Module, method: Method, data: Data, seed: int, *, damaged: bool
) -> dict[str, Any]:
    """Returns accuracies in percent on frozen features, and effective ranks (RankMe)."""
    device = data.test_images.device
    accuracy = evaluate_frozen(encoder, data, normalized, damaged=damaged, device=device, seed=seed)
    images = data.test_images[:2048].float() / 255
    x = extract_features(encoder, [normalized(images)])
    method.eval()
    with torch.no_grad():
        z = method.projector(x.to(device))
    method.train()
    return {
        **accuracy,
        "rank_of_features": effective_rank(x),
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
