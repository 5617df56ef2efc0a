"""One run: pretraining by Lightning's Trainer, evaluation, and the folder of results."""

from __future__ import annotations

import dataclasses
import math
import statistics
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytorch_lightning as pl
import torch
import yaml
from pytorch_lightning.callbacks import LearningRateMonitor, ModelCheckpoint, TQDMProgressBar
from pytorch_lightning.callbacks.throughput_monitor import ThroughputMonitor
from pytorch_lightning.loggers import CSVLogger
from pytorch_lightning.utilities.rank_zero import rank_zero_only
from torch.utils.data import DataLoader, Subset
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.common.checkpoints import contents_of
from benchmarks.harness import Run, atomic_path, check_run, record, write_json
from benchmarks.stl10.data import Data, Transformed, load_data, plain, pretraining_set
from benchmarks.stl10.evaluate import evaluate, loader
from benchmarks.stl10.methods import Pretraining, build_method
from benchmarks.stl10.report import SPEED, metrics, write_report
from benchmarks.stl10.settings import Settings, read_file

CHECKPOINT, SETTINGS, RESULTS = "checkpoint.ckpt", "settings.yaml", "results.json"
WANTED = "the checkpoint of this run"
# What Lightning reads of a checkpoint from which a run goes on.
RESUMED: dict[str, type] = {
    "pytorch-lightning_version": str,
    "epoch": int,
    "global_step": int,
    "state_dict": Mapping,
    "loops": Mapping,
    "callbacks": Mapping,
    "optimizer_states": list,
    "lr_schedulers": list,
}


class Reproducible(pl.Callback):
    """Seeds each epoch, so that a resumed run draws what an uninterrupted one would have drawn.

    Args:
        seed: Of the run.
        first: The first epoch of this process, whose loader begins before Lightning tells of it.
    """

    def __init__(self, seed: int, first: int) -> None:
        self.seed, self.first = seed, first
        self.started = False
        # Of the order and the worker processes.
        self.generator = torch.Generator().manual_seed(self.draw(first, 0))

    def draw(self, epoch: int, rank: int) -> int:
        """Returns the seed of an epoch in a process."""
        return int(np.random.SeedSequence([self.seed, epoch, rank]).generate_state(1)[0])

    def on_train_epoch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Seeds the order, the augmentation and what a backbone draws, as dropout does."""
        self.started = True
        seed = self.draw(trainer.current_epoch, trainer.global_rank)
        pl.seed_everything(seed, workers=True, verbose=False)
        if trainer.current_epoch != self.first:
            self.generator.manual_seed(self.draw(trainer.current_epoch, 0))

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Raises a ValueError when the loss is not finite any more."""
        loss = float(trainer.callback_metrics["train_loss"])
        if not math.isfinite(loss):
            raise ValueError(
                f"the loss must be finite but is {loss} after epoch {trainer.current_epoch + 1}; lower "
                "the learning rate, or use --precision 32-true or bf16-mixed."
            )


def run(settings: Settings, folder: Path, resume: bool = False) -> dict[str, Any]:
    """Pretrains, evaluates and writes the run's folder.

    Args:
        settings: The run's settings.
        folder: Where to write; created.
        resume: Continue from the folder's checkpoint; nothing in it is unpickled but tensors and plain
            values.

    Returns:
        What is in ``results.json``; empty in the processes of DDP other than the first.

    Raises:
        FileExistsError: If the folder holds a run already and ``resume`` is False.
        FileNotFoundError: If data are missing, or there is nothing to resume.
        ValueError: If data are damaged, a setting does not fit, or the loss is not finite.
    """
    check_folder(folder, resume)
    planned = Run(settings.label, settings.as_dict(), settings.seed)
    check_run(planned)
    data = load_data(settings)
    size = len(data.pretrain)  # type: ignore[arg-type]
    if size < settings.batch_size:
        raise ValueError(
            f"batch_size must be at most the number of images, {size}, but is {settings.batch_size}."
        )
    monitored = _monitor_loaders(data, settings)
    neighbours = min(settings.knn_k, len(monitored[0].dataset)) if monitored else None
    method = build_method(settings, len(data.classes), neighbours)
    batch_size = settings.batch_size // settings.devices
    # A run that was stopped before its first checkpoint starts from the beginning.
    checkpoint = folder / CHECKPOINT if resume and (folder / CHECKPOINT).is_file() else None
    # Read here too, without objects: some versions of Lightning would unpickle them.
    first = 0 if checkpoint is None else _next_epoch(checkpoint, method)
    reproducible = Reproducible(settings.seed, first)
    every = 10 if size // settings.batch_size >= 20 else 1
    checkpoints = ModelCheckpoint(
        folder,
        filename=Path(CHECKPOINT).stem,
        every_n_epochs=settings.checkpoint_every,
        save_on_train_epoch_end=True,
        enable_version_counter=False,
    )
    trainer = pl.Trainer(
        accelerator=settings.accelerator,
        devices=settings.devices,
        strategy="ddp" if settings.devices > 1 else "auto",
        precision=settings.precision,  # type: ignore[arg-type]
        max_epochs=settings.epochs,
        max_steps=settings.max_steps,
        callbacks=[
            reproducible,
            checkpoints,
            LearningRateMonitor(logging_interval="step"),
            ThroughputMonitor(batch_size_fn=lambda batch: len(batch[1]), window_size=every + 1),
            TQDMProgressBar(refresh_rate=10 if sys.stderr.isatty() else 0),
        ],
        # A resumed process has a file of its own: Lightning would empty the one that is there.
        logger=CSVLogger(folder, name="metrics"),
        log_every_n_steps=every,
        check_val_every_n_epoch=settings.monitor_every or None,
        deterministic="warn",
        num_sanity_val_steps=0,
        enable_model_summary=False,
        default_root_dir=folder,
    )
    if trainer.is_global_zero and not resume:
        folder.mkdir(parents=True, exist_ok=True)
        with atomic_path(folder / SETTINGS) as path:
            path.write_text(yaml.safe_dump(settings.as_dict(), sort_keys=False))
    started = time.perf_counter()
    options: dict[str, Any] = {"shuffle": True, "drop_last": True}
    batches = loader(
        pretraining_set(data, settings),
        settings,
        batch_size,
        generator=reproducible.generator,
        **options,
    )
    try:
        trainer.fit(method, batches, monitored or None, ckpt_path=checkpoint, weights_only=True)
    except Exception as error:  # Which one depends on what the checkpoint holds instead.
        if checkpoint is None or reproducible.started:
            raise
        raise ValueError(
            f"{checkpoint} must be {WANTED} but the run cannot go on from it "
            f"({type(error).__name__}: {error})"
        ) from error
    seconds = time.perf_counter() - started
    trainer.save_checkpoint(folder / CHECKPOINT, weights_only=False)
    if not trainer.is_global_zero:
        return {}
    device = trainer.strategy.root_device
    backbone = method.backbone.to(device).eval()
    found, features, labels = evaluate(backbone, data, settings)
    rates = [row[SPEED] for row in metrics(folder) if SPEED in row]
    memory = torch.cuda.max_memory_allocated(device) / 2**20 if device.type == "cuda" else None
    side = settings.image_size
    with FlopCounterMode(display=False) as flops, torch.no_grad():
        backbone(torch.zeros(1, 3, side, side, device=device))
    figures = {
        "label": settings.label,
        "accuracy": found,
        "classes": data.classes,
        "pretraining": {
            # A run that --max_steps ends may stop within an epoch.
            "epochs": round(trainer.global_step / len(batches), 2),
            "images": size,
            "seconds_of_this_process": seconds,
            "images_per_second": statistics.median(rates) * settings.devices if rates else None,
            "peak_memory_mb": memory,
            "processes": trainer.world_size,
            "resumed": checkpoint is not None,
        },
        "backbone": {
            "parameters": sum(p.numel() for p in backbone.parameters()),
            "flops_per_image": int(flops.get_total_flops()),
        },
    }
    result = record(planned, figures)
    write_json(folder / RESULTS, result)
    write_report(folder, result, features, labels)
    return result


def _next_epoch(checkpoint: Path, method: Pretraining) -> int:
    """Returns the epoch that follows a checkpoint after checking what Lightning will ask of it."""
    with contents_of(checkpoint, WANTED) as content:
        for name, kind in RESUMED.items():
            if not isinstance(content[name], kind) or isinstance(content[name], bool):
                raise TypeError(f"{name} is {type(content[name]).__name__}")
            if isinstance(content[name], list) and not content[name]:  # Lightning would start anew.
                raise ValueError(f"{name} is empty")
        method.load_state_dict(content["state_dict"])
        if content["epoch"] < 0:
            raise ValueError(f"epoch is {content['epoch']}")
        return int(content["epoch"]) + 1


def _monitor_loaders(data: Data, settings: Settings) -> list[DataLoader[Any]]:
    """Returns loaders of a tenth of the labelled training images, and of the others before it."""
    if not settings.monitor_every:
        return []
    order = np.random.default_rng(settings.seed).permutation(len(data.labels))
    cut = max(1, len(order) // 10)
    return [
        loader(Transformed(Subset(data.train, part.tolist()), plain(settings)), settings)
        for part in (order[cut:], order[:cut])
    ]


def check_folder(folder: Path, resume: bool) -> None:
    """Raises unless a new run may be written into the folder, or an old one be resumed.

    Args:
        folder: The run's folder.
        resume: Whether the run is to be resumed.

    Raises:
        FileExistsError: If the folder holds a run already and ``resume`` is False.
        FileNotFoundError: If there is nothing to resume.
    """
    # The first process decides: what a further one finds may be what the first has just written. It
    # ends alone where the run is refused, and who started the others ends them, before they write.
    if not resume and rank_zero_only.rank == 0 and (folder / SETTINGS).exists():
        raise FileExistsError(
            f"{folder} holds a run already; continue it with --resume {folder}, or choose another "
            "folder with --output."
        )
    if resume and not (folder / SETTINGS).is_file():
        raise FileNotFoundError(
            f"{folder} must be the folder of a run but has no {SETTINGS}; nothing can be resumed."
        )


def read_settings(folder: Path) -> Settings:
    """Reads the settings of a run."""
    check_folder(folder, resume=True)
    return read_file(folder / SETTINGS)


def load_run(folder: Path) -> tuple[Settings, Pretraining]:
    """Reads the settings of a run and its method with the backbone's weights of the checkpoint.

    Args:
        folder: The run's folder.

    Returns:
        The settings, and the method on the CPU in evaluation mode.

    Raises:
        FileNotFoundError: If it holds no run or no checkpoint.
        ValueError: If the checkpoint is damaged.
    """
    settings, path = read_settings(folder), folder / CHECKPOINT
    if not path.is_file():
        raise FileNotFoundError(
            f"{path} must be the run's checkpoint but is missing; resume the run."
        )
    # Features need no representations, nor the files of a teacher, nor what distils them.
    about = ("representation_weight", "dependence_measure", "view_terms", "cache", "objective")
    told = {name: getattr(Settings, name) for name in (*about, "distillation")}
    method = build_method(dataclasses.replace(settings, **told, representations=[]), 2)
    with contents_of(path, WANTED) as content:
        kept = {k: v for k, v in content["state_dict"].items() if k.startswith("backbone.")}
        method.backbone.load_state_dict({k.removeprefix("backbone."): v for k, v in kept.items()})
    return settings, method.eval()
