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

from benchmarks.common.augmentation import augment
from benchmarks.common.checkpoints import contents_of
from benchmarks.common.encoder import SmallResNet
from benchmarks.common.evaluation import extract_features, topk_accuracy
from benchmarks.distillation.methods import METHODS, Batch, Widths
from benchmarks.distillation.teachers import efficientnet_lite0
from benchmarks.harness import RepeatedStep, atomic_path, portable, progress
from benchmarks.plain_pytorch.training import (
    Data,
    adam_in_one_cycle,
    evaluate,
    normalize,
    random_batches,
)
from mvmr_loss import Normalization, Representations
from mvmr_loss.cache import fill

# What the students' images are normalised with.
MEAN, STD = Normalization.imagenet().mean, Normalization.imagenet().std
# Parameters of a SmallResNet -> its widths.
STUDENTS = {"77k": (16, 32, 64), "938k": (56, 112, 224)}
TEACHERS = ("efficientnet_lite0", "small_resnet")

# The settings that make the teacher that is trained here.
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
        ValueError: If the file's teacher was trained with other settings, or it is damaged or holds
            something else.
    """
    weights = settings.work / "teacher.pt"
    wanted = {name: portable(getattr(settings, name)) for name in TEACHER_SETTINGS}
    if not weights.exists():
        encoder, record = train_teacher(data, settings)
        with atomic_path(weights) as path:
            record["settings"] = wanted
            torch.save({"state_dict": encoder.state_dict(), "record": record}, path)
    with contents_of(weights, "the teacher that this command trains") as content:
        record = dict(content["record"])
        made_with = dict(record["settings"])
        if made_with == wanted:  # Else the sizes may be others.
            SmallResNet(settings.teacher_widths).load_state_dict(content["state_dict"])
    if made_with != wanted:
        raise ValueError(
            f"{portable(weights)} has a teacher that other settings made; give another --work or "
            f"remove it. (They were {made_with} and are {wanted}.)"
        )
    return {**record, "fingerprint": hashlib.sha256(weights.read_bytes()).hexdigest()[:16]}


def teacher_embeddings(
    name: str, images: Tensor, split: str, settings: argparse.Namespace
) -> Tensor:
    """Reads the teacher's embeddings of images as they are, computed once.

    Args:
        name: One of :data:`TEACHERS`.
        images: uint8, of shape (N, 3, S, S).
        split: What they are called.
        settings: Of the command line.

    Returns:
        Tensor of shape (N, E).
    """
    if name == "efficientnet_lite0":
        teacher = efficientnet_lite0(MEAN, STD)
    else:
        teacher = {
            "name": "teacher",
            "source": "checkpoint",
            "model": "benchmarks.common.encoder:SmallResNet",
            "model_options": {"widths": list(settings.teacher_widths)},
            "weights": str(settings.work / "teacher.pt"),
        }
    images = normalize(images.float() / 255)
    representations = Representations(
        [teacher], slice_size=64, cache=settings.work / f"{name}-{split}"
    )
    fill(representations, images, batch_size=256, device=settings.device)
    return representations(None, torch.arange(len(images)))["teacher"]


def train_student(
    run: Mapping[str, Any], data: Data, embeddings: Tensor, seed: int, device: str
) -> tuple[SmallResNet, dict[str, Any]]:
    """Trains a student from random weights.

    Every method sees the same two views of the same batches, the images as they are and augmented,
    so each runs the student twice an image and epoch.

    Args:
        run: Its ``student``, ``epochs``, ``method``, ``options``, ``batch_size``, ``learning_rate``
            and ``color_jitter``; ``bf16``: whether the student runs in bfloat16 where autocast
            has it so.
        data: Training images with labels.
        embeddings: The teacher's of the training images, shape (N, E).
        seed: Of the weights, the order and the augmentations.
        device: Where to compute.

    Returns:
        The student, and the loss by epoch and what it cost.
    """
    torch.manual_seed(seed)
    method = run["method"]
    encoder = SmallResNet(STUDENTS[run["student"]])
    encoder = encoder.to(device, memory_format=torch.channels_last)
    widths = Widths(encoder.output_dim, embeddings.shape[1], len(data.classes))
    objective = METHODS[method].build(widths, **run["options"]).to(device)
    embeddings = embeddings.to(device)
    objective.fit(embeddings)
    recipe = argparse.Namespace(epochs=run["epochs"], batch_size=run["batch_size"])
    steps_per_epoch = len(data.train_images) // recipe.batch_size
    steps = recipe.epochs * steps_per_epoch
    parameters = [*encoder.parameters(), *objective.parameters()]
    optimizer, scheduler = adam_in_one_cycle(parameters, run["learning_rate"], steps)
    images, labels = data.train_images.to(device), data.train_labels.to(device)
    # What a step reads and writes stays where it is, so that a GPU can repeat it as one graph.
    chosen = torch.zeros(recipe.batch_size, dtype=torch.long, device=device)
    latest: list[Batch] = []
    loss = torch.zeros((), device=device)
    device_type = torch.device(device).type

    def step() -> None:
        plain = images[chosen].float() / 255
        with torch.autocast(device_type, torch.bfloat16, enabled=run.get("bf16", False)):
            view = encoder(normalize(plain))
            augmented = encoder(normalize(augment(plain, run["color_jitter"])))
        batch = Batch(view.float(), augmented.float(), embeddings[chosen], labels[chosen])
        optimizer.zero_grad()
        value = objective(batch)
        value.backward()
        optimizer.step()
        loss.copy_(value.detach())
        latest[:] = [batch]

    repeated = RepeatedStep(step, device, captured=objective.capturable)
    # Methods draw different numbers of random weights; order and augmentation are equal again.
    torch.manual_seed(seed)
    losses: list[Tensor] = []
    clocks = time.perf_counter(), time.process_time()
    for index in progress(random_batches(len(data.train_images), recipe), method, steps):
        chosen.copy_(index)
        repeated()
        scheduler.step()
        objective.update(latest[0])
        losses.append(loss.clone())
    seconds, cpu_seconds = time.perf_counter() - clocks[0], time.process_time() - clocks[1]
    return encoder, {
        "loss_per_epoch": torch.stack(losses).view(-1, steps_per_epoch).mean(1).tolist(),
        "student_passes": 2 * steps * recipe.batch_size,
        "parameters": sum(p.numel() for p in encoder.parameters()),
        "training_seconds": round(seconds, 1),
        "training_cpu_seconds": round(cpu_seconds, 1),
    }
