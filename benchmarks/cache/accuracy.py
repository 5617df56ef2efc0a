"""Accuracy of training with representations from a store beside the exact ones computed live."""

from __future__ import annotations

import functools
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.cache.steps import CACHEABLE, normalized, store
from benchmarks.common.data import ImageFolder, image_tensor
from benchmarks.common.encoder import SmallResNet
from benchmarks.common.evaluation import evaluate_features, extract_features
from benchmarks.common.photographs import Photographs
from benchmarks.harness import Run, run_all
from benchmarks.harness import load as load_results
from benchmarks.plain_pytorch.training import adam_in_one_cycle, augmentation
from mvmr_loss import MVMRLoss, MVMRProjectionHead, Representations
from mvmr_loss.cache import fill

SIZE, BATCH_SIZE = 32, 128
# Configuration -> width of the sketches in the store; None computes exact ones live.
CONFIGURATIONS: dict[str, int | None] = {
    "none": None,
    "live, exact": None,
    "stored, sketch of 1024": 1024,
    "stored, sketch of 256": 256,
    "stored, sketch of 4096": 4096,
}
Data = tuple[Tensor, Tensor, Tensor, Tensor]
Features = Callable[[Tensor, Tensor], dict[str, Tensor]]


def load(folder: Path | None) -> Data:
    """Reads training and test images and labels.

    Args:
        folder: Holds ``train`` and ``test``, each with one folder of images a class; None means the
            photographs that come with scikit-image.

    Returns:
        Training images, uint8 of shape (N, 3, 32, 32), their labels, test images, their labels.
    """
    parts: list[Any]
    if folder is None:
        parts = [Photographs("train"), Photographs("test")]
    else:
        parts = [ImageFolder(folder / split, image_size=SIZE) for split in ("train", "test")]
    (x, y), (x_test, y_test) = (image_tensor(part, SIZE) for part in parts)
    return x, y, x_test, y_test


def train(
    configuration: str, data: Data, *, seed: int, epochs: int, learning_rate: float = 2e-3
) -> dict[str, Any]:
    """Trains the small ResNet by itself and evaluates its frozen features.

    With one seed, weights, order and augmentation are the same in every configuration.

    Args:
        configuration: A key of ``CONFIGURATIONS``.
        data: As :func:`load` gives it.
        seed: Of all that is drawn.
        epochs: Passes over the training images.
        learning_rate: Adam's largest.

    Returns:
        ``accuracy`` as of :func:`benchmarks.common.evaluation.evaluate_features`, the mean
        representation ``terms`` of the last epoch, ``training_cpu_seconds`` and
        ``filling_cpu_seconds``.
    """
    images, labels, test_images, test_labels = data
    with tempfile.TemporaryDirectory() as folder:
        clock = time.process_time()
        features = _features(configuration, images, Path(folder))
        filling = time.process_time() - clock
        torch.manual_seed(seed)
        encoder = SmallResNet().to(memory_format=torch.channels_last)
        head = MVMRProjectionHead(encoder.output_dim, hidden_dim=512, output_dim=512)
        clock = time.process_time()
        terms = _pretrain(encoder, head, images, features, epochs, learning_rate)
        training = time.process_time() - clock
    x, x_test = (
        extract_features(encoder, (_prepared(part) for part in whole.split(256)))
        for whole in (images, test_images)
    )
    return {
        "accuracy": evaluate_features(x, labels, x_test, test_labels, seed=seed),
        "terms": terms,
        "training_cpu_seconds": training,
        "filling_cpu_seconds": filling,
    }


def _features(configuration: str, images: Tensor, folder: Path) -> Features | None:
    """Returns what gives a batch's representations from its images and their indices."""
    if configuration == "none":
        return None
    sketch_dim = CONFIGURATIONS[configuration]
    if sketch_dim is None:
        live = Representations(CACHEABLE)
        return lambda batch, _: live(batch)
    ready = normalized(images.float() / 255)
    cached = store(folder, ready, SIZE, sketch_dim)
    fill(cached, ready)
    return lambda batch, indices: cached(batch, indices)


def _pretrain(
    encoder: nn.Module,
    head: nn.Module,
    images: Tensor,
    features: Features | None,
    epochs: int,
    learning_rate: float,
) -> dict[str, float]:
    """Trains in place; returns the mean of each representation term in the last epoch."""
    augment = augmentation(SIZE, 0.4)
    criterion = MVMRLoss()
    parameters = [*encoder.parameters(), *head.parameters()]
    steps = len(images) // BATCH_SIZE
    optimizer, scheduler = adam_in_one_cycle(parameters, learning_rate, epochs * steps)
    encoder.train()
    last: list[dict[str, Tensor]] = []
    for _ in range(epochs):
        last.clear()
        for indices in torch.randperm(len(images))[: steps * BATCH_SIZE].split(BATCH_SIZE):
            batch = images[indices].float() / 255
            view, view_augmented = normalized(batch), normalized(augment(batch))
            z, z_augmented = (
                head(encoder(v.contiguous(memory_format=torch.channels_last)))
                for v in (view, view_augmented)
            )
            terms = criterion.forward_components(
                z, z_augmented, features(view, indices) if features else None
            )
            optimizer.zero_grad()
            terms.total.backward()
            optimizer.step()
            scheduler.step()
            last.append(
                {
                    name.removeprefix("representations/"): term.detach()
                    for name, term in terms.terms.items()
                    if name.startswith("representations/")
                }
            )
    return {name: torch.stack([t[name] for t in last]).mean().item() for name in last[0]}


def _prepared(images: Tensor) -> Tensor:
    """Returns images as the encoder wants them."""
    return normalized(images.float() / 255).contiguous(memory_format=torch.channels_last)


def run_name(configuration: str, seed: int) -> str:
    """Returns the name of one run."""
    words = "".join(c if c.isalnum() else " " for c in configuration).split()
    return f"accuracy/{'-'.join(words)}-seed{seed}"


def run_missing(
    folder: Path | None,
    results: Path,
    *,
    epochs: int,
    seeds: Sequence[int] = (0, 1, 2),
    configurations: Sequence[str] = tuple(CONFIGURATIONS),
) -> None:
    """Trains every configuration and seed that has no result yet.

    Args:
        folder: As of :func:`load`.
        results: Folder of all results; what is there is kept.
        epochs: Passes over the training images.
        seeds: One run each, of each configuration.
        configurations: Keys of ``CONFIGURATIONS``.

    Raises:
        ValueError: If a result is there that other settings made.
    """
    common = {
        "images": folder or "photographs of scikit-image",
        "epochs": epochs,
        "batch_size": BATCH_SIZE,
        "image_size": SIZE,
    }
    plan = [
        Run(run_name(configuration, seed), {"configuration": configuration, **common}, seed)
        for seed in seeds
        for configuration in configurations
    ]
    read = functools.cache(lambda: load(folder))

    def run_one(run: Run) -> dict[str, Any]:
        data = read()
        figures = train(run.settings["configuration"], data, seed=run.seed or 0, epochs=epochs)
        return {**figures, "images": {"train": len(data[0]), "test": len(data[2])}}

    run_all(plan, results, run_one)


def summarize(results: Path) -> dict[str, dict[str, Any]]:
    """Returns what the runs' files say.

    Args:
        results: Folder of all results.

    Returns:
        Configuration -> ``seeds``, ``terms`` and ``training_cpu_seconds`` (means), and for each of
        ``knn`` and ``linear`` the top-1 accuracies' ``values``, and ``differences`` to the run with
        live representations of the same seed, where there is one.
    """
    runs: dict[str, dict[int, dict[str, Any]]] = {name: {} for name in CONFIGURATIONS}
    for record in load_results(results, "accuracy/*.json"):
        runs[record["settings"]["configuration"]][record["seed"]] = record["figures"]
    summary: dict[str, dict[str, Any]] = {}
    for name, by_seed in runs.items():
        if not by_seed:
            continue
        chosen = list(by_seed.values())
        summary[name] = {
            "seeds": list(by_seed),
            "training_cpu_seconds": statistics.mean(r["training_cpu_seconds"] for r in chosen),
            "terms": {
                term: statistics.mean(run["terms"][term] for run in chosen)
                for term in chosen[0]["terms"]
            },
        }
        for probe in ("knn", "linear"):
            summary[name][probe] = {
                "values": [run["accuracy"][probe]["top1"] for run in chosen],
                "differences": [
                    run["accuracy"][probe]["top1"]
                    - runs["live, exact"][seed]["accuracy"][probe]["top1"]
                    for seed, run in by_seed.items()
                    if seed in runs["live, exact"]
                ],
            }
    return summary
