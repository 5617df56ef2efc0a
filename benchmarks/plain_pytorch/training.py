"""One training of the study: MV-MR in plain PyTorch, evaluated, with its figures and records.

    python -m benchmarks.plain_pytorch

trains a small ResNet on real photographs, then compares its features with those of the same network
untrained and with raw pixels. For images of one's own: ``--train FOLDER --test FOLDER``, each with
one folder of images a class (the labels are used in the evaluation only).

What MV-MR adds to an ordinary training loop is marked (1), (2) and (3) in :func:`pretrain`.
"""

from __future__ import annotations

import argparse
import copy
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import kornia.augmentation as K
import torch
from matplotlib.figure import Figure
from matplotlib.ticker import NullLocator
from torch import Tensor, nn

from benchmarks.common.checkpoints import contents_of
from benchmarks.common.data import Data, ImageFolder, image_tensor
from benchmarks.common.encoder import SmallResNet
from benchmarks.common.evaluation import evaluate_features, extract_features
from benchmarks.common.photographs import Photographs
from benchmarks.harness import (
    Run,
    atomic_path,
    check_run,
    plain_errors,
    progress,
    record,
    repeatable_adam,
    write_json,
)
from mvmr_loss import MVMRLoss, MVMRProjectionHead, Normalization, Representations

REPRESENTATIONS = ["pixels", "augmented_pixels", "scattering", "hog", "local_std"]


def pretrain(
    encoder: SmallResNet, images: Tensor, settings: argparse.Namespace
) -> tuple[list[dict[str, float]], bool]:
    """Trains the encoder in place, until the last epoch or Ctrl-C.

    Args:
        encoder: From images (N, 3, S, S) to features (N, ``encoder.output_dim``).
        images: Training images, uint8 of shape (N, 3, S, S).
        settings: As :func:`parse_arguments` gives them.

    Returns:
        The terms of the loss, one entry a step, and whether the training was interrupted.
    """
    device = settings.device

    # (1) The loss, a projection head, and the fixed features that embeddings shall depend on.
    criterion = MVMRLoss(
        representation_weights=settings.representation_weight,
        dependence_measure=settings.dependence_measure,
    )
    head = MVMRProjectionHead(encoder.output_dim, hidden_dim=512, output_dim=512).to(device)
    representations = (
        Representations(settings.representations) if settings.representations else None
    )

    augment = augmentation(images.shape[-1], settings.color_jitter)
    parameters = [*encoder.parameters(), *head.parameters()]
    steps = settings.epochs * (len(images) // settings.batch_size)
    optimizer, scheduler = adam_in_one_cycle(parameters, settings.learning_rate, steps)
    history: list[dict[str, float]] = []
    encoder.train()
    try:
        for index in progress(random_batches(len(images), settings), "training", steps):
            batch = images[index].to(device).float() / 255

            # (2) Two views of each image, through the same network: as it is, and augmented.
            view, view_augmented = normalize(batch), normalize(augment(batch))
            z, z_augmented = head(encoder(view)), head(encoder(view_augmented))

            # (3) The representations are those of the view that is not augmented.
            features = representations(view) if representations else None
            terms = criterion.forward_components(z, z_augmented, features)

            optimizer.zero_grad()
            terms.total.backward()
            optimizer.step()
            scheduler.step()

            named = {n.removeprefix("representations/"): t for n, t in terms.as_dict().items()}
            named["views"] = named.pop("dependence")
            del named["loss"]
            history.append({name: term.item() for name, term in named.items()})
    except KeyboardInterrupt:
        print("Interrupted: what was trained so far is saved and evaluated.")
        return history, True
    return history, False


def augmentation(size: int, jitter: float) -> nn.Module:
    """Builds what makes the augmented view of images in [0, 1]: crops, flips and colours."""
    return K.AugmentationSequential(
        K.RandomResizedCrop((size, size), scale=(0.2, 1.0)),
        K.RandomHorizontalFlip(),
        K.ColorJitter(jitter, jitter, jitter, jitter / 4, p=0.8),
        K.RandomGrayscale(p=jitter / 4),
    )


def adam_in_one_cycle(
    parameters: Sequence[nn.Parameter], learning_rate: float, steps: int
) -> tuple[torch.optim.Optimizer, torch.optim.lr_scheduler.LRScheduler]:
    """Builds Adam and a schedule that warms up in a tenth of the steps and falls to about 0."""
    optimizer = repeatable_adam(parameters, learning_rate, 1e-6, parameters[0].device)
    return optimizer, torch.optim.lr_scheduler.OneCycleLR(
        optimizer, learning_rate, steps, pct_start=0.1, cycle_momentum=False
    )


def random_batches(size: int, settings: argparse.Namespace) -> Iterator[Tensor]:
    """Yields the indices of full batches, each epoch in a new random order."""
    for _ in range(settings.epochs):
        order = torch.randperm(size)
        yield from order[: size - size % settings.batch_size].split(settings.batch_size)


def normalize(images: Tensor) -> Tensor:
    """Normalises images in [0, 1] with ImageNet's mean and standard deviation."""
    # Convolutions on a CPU are faster on images whose channels come last in memory.
    ready = Normalization.imagenet().apply(images)
    return ready.contiguous(memory_format=torch.channels_last)


def load_data(settings: argparse.Namespace) -> Data:
    """Reads the folders, or the embedded photographs if none are given."""
    train: Any
    test: Any
    if settings.train is None:
        train, test = Photographs("train"), Photographs("test")
    else:
        train, test = (
            ImageFolder(folder, image_size=settings.image_size)
            for folder in (settings.train, settings.test)
        )
        if train.classes != test.classes:
            raise ValueError(
                "--train and --test must have the same folders of classes but "
                f"{sorted(set(train.classes) ^ set(test.classes))} are in one of them only."
            )
    if len(train) < settings.batch_size:
        raise ValueError(
            f"--batch-size must be at most the number of training images, {len(train)}, "
            f"but is {settings.batch_size}."
        )
    return Data(
        *image_tensor(train, settings.image_size, "reading training images"),
        *image_tensor(test, settings.image_size, "reading test images"),
        train.classes,
    )


def evaluate(
    encoder: nn.Module, data: Data, settings: argparse.Namespace, name: str
) -> dict[str, Any]:
    """Computes the kNN and linear accuracies of an encoder's features; ``name`` says whose."""
    train, test = (
        extract_features(
            encoder,
            (
                normalize(x.float() / 255)
                for x in progress(images.split(256), f"features, {name}, {split}", unit="batch")
            ),
            settings.device,
        )
        for split, images in (("train", data.train_images), ("test", data.test_images))
    )
    return evaluate_features(
        train,
        data.train_labels,
        test,
        data.test_labels,
        seed=settings.seed,
        description=f"linear classifier, {name}",
    )


def load_encoder(path: str | Path) -> SmallResNet:
    """Loads the encoder that a run saved, in evaluation mode.

    Args:
        path: The file ``encoder.pt`` of a run; it is read without unpickling objects.

    Returns:
        The encoder, from images prepared by :func:`normalize` to features.

    Raises:
        ValueError: If the file is damaged, or is none that a run saved.
    """
    with contents_of(Path(path), "the encoder of a run") as content:
        encoder = SmallResNet(content["widths"])
        encoder.load_state_dict(content["state_dict"])
    return encoder.eval()


def run(settings: argparse.Namespace) -> dict[str, Any]:
    """Trains, evaluates and writes ``encoder.pt``, ``metrics.json`` and ``training.png``.

    Args:
        settings: As :func:`parse_arguments` gives them.

    Returns:
        The figures of the record in ``metrics.json``.
    """
    start = time.perf_counter()
    planned = Run("plain_pytorch", settings_of(settings), settings.seed)
    check_run(planned)
    torch.manual_seed(settings.seed)
    data = load_data(settings)
    encoder = SmallResNet().to(settings.device, memory_format=torch.channels_last)
    untrained = copy.deepcopy(encoder)

    clocks = time.perf_counter(), time.process_time()
    history, interrupted = pretrain(encoder, data.train_images, settings)
    seconds, cpu_seconds = time.perf_counter() - clocks[0], time.process_time() - clocks[1]

    # Before the evaluation: whatever happens in it, the encoder is safe.
    with atomic_path(settings.output / "encoder.pt") as path:
        state = {"state_dict": encoder.state_dict(), "widths": encoder.widths}
        torch.save({**state, "image_size": settings.image_size}, path)

    encoders = {"raw pixels": nn.Flatten(), "untrained": untrained, "trained": encoder}
    accuracy = {name: evaluate(value, data, settings, name) for name, value in encoders.items()}
    figures = {
        "accuracy": accuracy,
        "loss_per_epoch": epoch_means(history, len(data.train_images) // settings.batch_size),
        "interrupted": interrupted,
        "steps": len(history),
        "images": {"train": len(data.train_labels), "test": len(data.test_labels)},
        "classes": data.classes,
        "training_seconds": round(seconds, 1),
        "training_cpu_seconds": round(cpu_seconds, 1),
        "total_seconds": round(time.perf_counter() - start, 1),
    }
    write_json(settings.output / "metrics.json", record(planned, figures))
    with atomic_path(settings.output / "training.png") as path:
        plot(history, accuracy, len(data.classes)).savefig(path, dpi=110)
    return figures


def settings_of(settings: argparse.Namespace) -> dict[str, Any]:
    """Returns the settings that make a run's result, beside the seed."""
    incidental = ("seed", "output", "device")
    return {name: value for name, value in vars(settings).items() if name not in incidental}


def epoch_means(history: Sequence[dict[str, float]], steps: int) -> list[dict[str, float]]:
    """Computes the mean of each term of the loss over each epoch; the last may be incomplete."""
    epochs = [history[i : i + steps] for i in range(0, len(history), steps)]
    return [
        {name: round(sum(step[name] for step in epoch) / len(epoch), 5) for name in epoch[0]}
        for epoch in epochs
    ]


def plot(history: Sequence[dict[str, float]], accuracy: dict[str, Any], num_classes: int) -> Figure:
    """Draws the terms of the loss over time beside the accuracies."""
    figure = Figure(figsize=(11, 4.2), layout="constrained")
    left, right = figure.subplots(1, 2, width_ratios=(1.15, 1))
    labels = {"views": "dependence: views", "invariance": "invariance", "variance": "variance"}
    for name in history[0] if history else ():
        style = "-" if name in labels else "--"
        values = torch.tensor([step[name] for step in history])
        width = max(1, len(values) // 40)
        smooth = values.unfold(0, width, 1).mean(dim=1)
        steps = torch.arange(len(smooth)) + (width + 1) / 2
        left.plot(steps, smooth, style, label=labels.get(name, name), lw=1.5)
    # Logarithmic, and linear about 0, where a bias-corrected dependence may be negative.
    left.set_yscale("symlog", linthresh=0.01, linscale=0.4)
    ticks = [0, 0.01, 0.03, 0.1, 0.3, 1]
    left.set_yticks(ticks, [f"{tick:g}" for tick in ticks])
    left.yaxis.set_minor_locator(NullLocator())
    left.set(title="Terms of the loss, training", xlabel="step")
    left.legend(fontsize=8, ncols=3, frameon=False, loc="upper right")

    colors = ("#b8b8b8", "#7f9fc4", "#1f5fa8")
    for i, (name, color) in enumerate(zip(accuracy, colors, strict=True)):
        heights = [accuracy[name][probe]["top1"] for probe in ("knn", "linear")]
        places = [probe + (i - 1) * 0.27 for probe in range(2)]
        bars = right.bar(places, heights, 0.25, label=name, color=color)
        right.bar_label(bars, fmt="%.1f", padding=2, fontsize=9)
    right.axhline(100 / num_classes, color="black", lw=0.8, ls=":", label="chance")
    right.set(title="Accuracy of frozen features on test images", ylabel="top-1 accuracy (%)")
    right.set(ylim=(0, 112), yticks=range(0, 101, 20), xticks=(0, 1))
    right.set_xticklabels(["20 nearest neighbours", "linear classifier"])
    right.legend(fontsize=8, ncols=4, frameon=False, loc="upper center")
    for axes in (left, right):
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(axis="y", color="0.9", zorder=0)
        axes.set_axisbelow(True)
    return figure


def parse_arguments(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """Reads and checks the command line."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.plain_pytorch",
        description="Trains a small ResNet with MV-MR on folders of images, or on photographs that "
        "come with scikit-image, and evaluates its features.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    add = parser.add_argument
    add("--train", type=Path, help="folder of training images, one folder a class")
    add("--test", type=Path, help="folder of test images, with the same classes")
    add("--image-size", type=int, default=32, help="side in pixels that images are resized to")
    add("--epochs", type=int, default=10, help="passes over the training images")
    add("--batch-size", type=int, default=128, help="images a step")
    add("--learning-rate", type=float, default=2e-3, help="Adam's largest learning rate")
    add(
        "--color-jitter",
        type=float,
        # Chosen, like the learning rate, by training on one half of the training tiles and
        # evaluating on the other: colours tell these photographs apart.
        default=0.2,
        help="strength of the colour augmentation; 0.4 is the paper's for CIFAR",
    )
    add("--seed", type=int, default=0, help="of weights, order and augmentation")
    add(
        "--representations",
        nargs="+",
        default=REPRESENTATIONS,
        metavar="NAME",
        help="what the embeddings shall depend on, or none",
    )
    add(
        "--representation-weight",
        type=float,
        default=1.0,
        help="of each representation's term; -1 rewards independence, as the authors' release does",
    )
    add("--dependence-measure", default="distance_correlation", help="how dependence is measured")
    add("--output", type=Path, default=Path("runs/plain_pytorch"), help="folder of the results")
    add("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="where to compute")
    settings = parser.parse_args(arguments)
    if settings.representations == ["none"]:
        settings.representations = []
    check_training(parser, settings, {"image_size": 8, "epochs": 1, "batch_size": 4})
    return settings


def check_training(
    parser: argparse.ArgumentParser, settings: argparse.Namespace, minima: Mapping[str, int]
) -> None:
    """Ends the command with one sentence if a setting of the images or the training is wrong.

    Args:
        parser: What read the settings.
        settings: The settings.
        minima: The smallest value of each setting that has one.
    """
    if (settings.train is None) != (settings.test is None):
        parser.error("--train and --test must be given together.")
    for name, minimum in minima.items():
        value = getattr(settings, name)
        if value is not None and value < minimum:
            option = "--" + name.replace("_", "-")
            parser.error(f"{option} must be at least {minimum} but is {value}.")
    if settings.learning_rate <= 0:
        parser.error(f"--learning-rate must be above 0 but is {settings.learning_rate}.")
    if not 0 <= settings.color_jitter <= 1:
        parser.error(f"--color-jitter must be in [0, 1] but is {settings.color_jitter}.")


def main(arguments: Sequence[str] | None = None) -> None:
    """Runs the command line; what is wrong with it or the images becomes one sentence."""
    settings = parse_arguments(arguments)
    with plain_errors():
        try:
            figures = run(settings)
        except KeyboardInterrupt:
            raise SystemExit("Interrupted: the evaluation is incomplete.") from None
    print(f"\n{'top-1 accuracy (%)':20}{'kNN':>8}{'linear':>8}")
    for name, result in figures["accuracy"].items():
        print(f"{name:20}{result['knn']['top1']:8.1f}{result['linear']['top1']:8.1f}")
    print(f"\n{figures['total_seconds']:.0f} s; results are in {settings.output}")


if __name__ == "__main__":
    main()
