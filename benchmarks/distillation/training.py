"""Training of the teacher on labels, and of a student by any of the methods."""

from __future__ import annotations

import argparse
import hashlib
import time
from collections.abc import Mapping
from typing import Any

import kornia.augmentation as K
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from benchmarks.common.encoder import SmallResNet
from benchmarks.common.evaluation import extract_features, topk_accuracy
from benchmarks.distillation.methods import METHODS, Batch, Widths
from benchmarks.harness.loops import progress
from benchmarks.harness.records import atomic_path, portable
from benchmarks.plain_pytorch.training import (
    Data,
    adam_in_one_cycle,
    augmentation,
    epoch_means,
    evaluate,
    normalize,
    random_batches,
)
from mvmr_loss import Representations
from mvmr_loss.cache import fill

# The settings that make a teacher.
TEACHER_SETTINGS = (
    "train",
    "image_size",
    "limit",
    "batch_size",
    "teacher_widths",
    "teacher_epochs",
)


def train_teacher(data: Data, settings: argparse.Namespace) -> tuple[SmallResNet, dict[str, Any]]:
    """Trains the teacher on the labels of the training images.

    The recipe is a usual one for CIFAR, and was not tuned: SGD with Nesterov momentum 0.9, one
    cycle to 0.1, weight decay 5e-4, label smoothing 0.1, batches of 64, shifts by 4 pixels, flips.

    Args:
        data: Training images with labels, and those to evaluate on.
        settings: Of the command line.

    Returns:
        The network without its classifier, and its accuracies.
    """
    torch.manual_seed(0)
    size, device = data.train_images.shape[-1], settings.device
    encoder = SmallResNet(settings.teacher_widths)
    network = nn.Sequential(encoder, nn.Linear(encoder.output_dim, len(data.classes)))
    network = network.to(device, memory_format=torch.channels_last)
    augment = K.AugmentationSequential(
        K.RandomCrop((size, size), padding=size // 8), K.RandomHorizontalFlip()
    )
    recipe = argparse.Namespace(epochs=settings.teacher_epochs, batch_size=settings.batch_size // 2)
    steps = recipe.epochs * (len(data.train_images) // recipe.batch_size)
    optimizer = torch.optim.SGD(
        network.parameters(), lr=0.1, momentum=0.9, nesterov=True, weight_decay=5e-4
    )
    scheduler = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, 0.1, steps, pct_start=0.2, cycle_momentum=False
    )
    clocks = time.perf_counter(), time.process_time()
    for index in progress(random_batches(len(data.train_images), recipe), "teacher", steps):
        images = normalize(augment(data.train_images[index].to(device).float() / 255))
        labels = data.train_labels[index].to(device)
        loss = F.cross_entropy(network(images), labels, label_smoothing=0.1)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        scheduler.step()
    seconds, cpu_seconds = time.perf_counter() - clocks[0], time.process_time() - clocks[1]
    logits = extract_features(
        network, (normalize(x.float() / 255) for x in data.test_images.split(256)), device
    )
    return encoder, {
        "accuracy": {
            "classifier": topk_accuracy(logits, data.test_labels),
            **evaluate(encoder, data, argparse.Namespace(device=device, seed=0), "teacher"),
        },
        "parameters": sum(p.numel() for p in encoder.parameters()),
        "training_seconds": round(seconds, 1),
        "training_cpu_seconds": round(cpu_seconds, 1),
    }


def ready_teacher(data: Data, settings: argparse.Namespace) -> dict[str, Any]:
    """Trains the teacher, unless its file is there.

    Args:
        data: All images.
        settings: Of the command line.

    Returns:
        The record of its training, with a fingerprint of its weights.

    Raises:
        ValueError: If the file's teacher was trained with other settings.
    """
    weights = settings.work / "teacher.pt"
    wanted = {name: portable(getattr(settings, name)) for name in TEACHER_SETTINGS}
    if not weights.exists():
        encoder, record = train_teacher(data, settings)
        with atomic_path(weights) as path:
            record["settings"] = wanted
            torch.save({"state_dict": encoder.state_dict(), "record": record}, path)
    record = dict(torch.load(weights, weights_only=True)["record"])
    if record["settings"] != wanted:
        raise ValueError(
            f"{portable(weights)} has a teacher that other settings made; give another --work or "
            f"remove it. (They were {record['settings']} and are {wanted}.)"
        )
    return {**record, "fingerprint": hashlib.sha256(weights.read_bytes()).hexdigest()[:16]}


def teacher_embeddings(data: Data, settings: argparse.Namespace) -> Tensor:
    """Reads the teacher's embeddings of the training images as they are, computed once.

    Args:
        data: All images.
        settings: Of the command line.

    Returns:
        Tensor of shape (N, E).
    """
    teacher = {
        "name": "teacher",
        "source": "checkpoint",
        "model": "benchmarks.common.encoder:SmallResNet",
        "model_options": {"widths": list(settings.teacher_widths)},
        "weights": str(settings.work / "teacher.pt"),
    }
    images = normalize(data.train_images.float() / 255)
    representations = Representations([teacher], cache=settings.work / "embeddings")
    fill(representations, images, batch_size=256, device=settings.device)
    embeddings: Tensor = representations(None, torch.arange(len(images)))["teacher"]
    return embeddings


def train_student(
    method: str,
    options: Mapping[str, Any],
    data: Data,
    embeddings: Tensor,
    epochs: int,
    settings: argparse.Namespace,
) -> dict[str, Any]:
    """Trains a student from random weights and evaluates its features.

    Every method sees the same two views of the same batches, the images as they are and augmented,
    so each runs the student twice an image and epoch.

    Args:
        method: A key of :data:`METHODS`.
        options: Of the method's objective.
        data: Training images with labels, and those to evaluate on.
        embeddings: The teacher's of the training images, shape (N, E).
        epochs: Passes over the training images.
        settings: Of the command line, with ``seed``.

    Returns:
        Accuracies, the loss by epoch, and what it cost.
    """
    torch.manual_seed(settings.seed)
    device = settings.device
    encoder = SmallResNet(settings.student_widths).to(device, memory_format=torch.channels_last)
    widths = Widths(encoder.output_dim, embeddings.shape[1], len(data.classes))
    objective = METHODS[method].build(widths, **options).to(device)
    augment = augmentation(data.train_images.shape[-1], settings.color_jitter)
    recipe = argparse.Namespace(epochs=epochs, batch_size=settings.batch_size)
    steps_per_epoch = len(data.train_images) // recipe.batch_size
    steps = epochs * steps_per_epoch
    parameters = [*encoder.parameters(), *objective.parameters()]
    optimizer, scheduler = adam_in_one_cycle(parameters, settings.learning_rate, steps)
    # Methods draw different numbers of random weights; order and augmentation are equal again.
    torch.manual_seed(settings.seed)
    history: list[dict[str, float]] = []
    clocks = time.perf_counter(), time.process_time()
    for index in progress(random_batches(len(data.train_images), recipe), method, steps):
        images = data.train_images[index].to(device).float() / 255
        batch = Batch(
            encoder(normalize(images)),
            encoder(normalize(augment(images))),
            embeddings[index].to(device),
            data.train_labels[index].to(device),
        )
        loss = objective(batch)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        scheduler.step()
        history.append({"loss": loss.item()})
    seconds, cpu_seconds = time.perf_counter() - clocks[0], time.process_time() - clocks[1]
    return {
        "accuracy": evaluate(encoder, data, settings, method),
        "loss_per_epoch": [epoch["loss"] for epoch in epoch_means(history, steps_per_epoch)],
        "epochs": epochs,
        "student_passes": 2 * steps * recipe.batch_size,
        "parameters": sum(p.numel() for p in encoder.parameters()),
        "training_seconds": round(seconds, 1),
        "training_cpu_seconds": round(cpu_seconds, 1),
    }
