"""Self-supervised training with MV-MR in lightly, on a folder of images or real photographs.

    python -m examples.lightly_mvmr

trains a small ResNet with lightly's data set, Lightning's Trainer and ``MVMR``, the method of
``mvmr_loss.adapters.lightly``, and prints its kNN accuracy before and after. For images of one's
own: ``--train FOLDER --test FOLDER``, each with one folder of images a class.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from lightly.data import LightlyDataset
from lightly.transforms.utils import IMAGENET_NORMALIZE
from pytorch_lightning import Trainer, seed_everything
from torch.utils.data import DataLoader

from benchmarks.common.data import ImageFolder
from benchmarks.common.encoder import SmallResNet
from benchmarks.common.photographs import Photographs
from mvmr_loss.adapters.lightly import MVMR, MVMRTransform, NonAugmentedViewTransform


def main(arguments: Sequence[str] | None = None) -> dict[str, float]:
    """Trains and evaluates as the command line says.

    Args:
        arguments: The command line without the program's name; None means the program's own.

    Returns:
        kNN accuracy in percent of the backbone "untrained" and "trained".
    """
    settings = parse_arguments(arguments)
    seed_everything(settings.seed, workers=True)

    # The first view is the image as it is, from which the representations are computed.
    transform = MVMRTransform.cifar(settings.image_size, normalize=IMAGENET_NORMALIZE)
    plain = NonAugmentedViewTransform(settings.image_size)
    train = dataset("train", settings, transform)
    loader = DataLoader(
        train, settings.batch_size, shuffle=True, drop_last=True, num_workers=settings.num_workers
    )
    # For the online kNN: the images it learns from, and those it is tested on.
    evaluation = [
        DataLoader(dataset(split, settings, plain), 256, num_workers=settings.num_workers)
        for split in ("train", "test")
    ]

    backbone = SmallResNet()
    model = MVMR(
        settings.batch_size,
        num_classes=len(train.dataset.classes),
        knn_k=20,
        backbone=backbone,
        feature_dim=backbone.output_dim,
        hidden_dim=512,
        output_dim=512,
        lr=2e-3,
        warmup_epochs=1,
    )
    trainer = Trainer(
        max_epochs=settings.epochs,
        accelerator=settings.accelerator,
        devices=1,
        check_val_every_n_epoch=settings.epochs,
        num_sanity_val_steps=0,
        log_every_n_steps=5,
        default_root_dir=settings.output,
        logger=False,
        enable_checkpointing=False,
    )
    accuracy = {}
    (metrics,) = trainer.validate(model, evaluation, verbose=False)[1:]
    accuracy["untrained"] = 100 * metrics["val_knn_top1"]
    trainer.fit(model, loader, evaluation)
    accuracy["trained"] = 100 * trainer.callback_metrics["val_knn_top1"].item()

    settings.output.mkdir(parents=True, exist_ok=True)
    torch.save(backbone.state_dict(), settings.output / "backbone.pt")
    print("\nkNN accuracy (%): " + ", ".join(f"{k} {v:.1f}" for k, v in accuracy.items()))
    print(f"The backbone's weights are in {settings.output / 'backbone.pt'}")
    return accuracy


def dataset(
    split: str, settings: argparse.Namespace, transform: Callable[[Any], Any]
) -> LightlyDataset:
    """Returns the folder's images, or the embedded photographs if none is given."""
    folder = getattr(settings, split)
    images = Photographs(split) if folder is None else ImageFolder(folder)
    return LightlyDataset.from_torch_dataset(images, transform=transform)


def parse_arguments(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """Reads the command line."""
    parser = argparse.ArgumentParser(
        prog="python -m examples.lightly_mvmr",
        description="Trains a small ResNet with MV-MR in lightly.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    add = parser.add_argument
    add("--train", type=Path, help="folder of training images, one folder a class")
    add("--test", type=Path, help="folder of test images, with the same classes")
    add("--image-size", type=int, default=32, help="side of the views in pixels")
    add("--epochs", type=int, default=12, help="passes over the training images")
    add("--batch-size", type=int, default=128, help="images a step")
    add("--num-workers", type=int, default=0, help="processes that load images")
    add("--accelerator", default="auto", help="Lightning's accelerator: cpu, gpu, ...")
    add("--seed", type=int, default=0, help="of weights, order and augmentation")
    add("--output", type=Path, default=Path("runs/lightly_mvmr"), help="folder of the results")
    settings = parser.parse_args(arguments)
    if (settings.train is None) != (settings.test is None):
        parser.error("--train and --test must be given together.")
    return settings


if __name__ == "__main__":
    main()
