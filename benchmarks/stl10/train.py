"""One run: pretraining with Lightning, evaluation, and the folder of results."""

from __future__ import annotations

import csv
import dataclasses
import json
import math
import os
import resource
import statistics
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytorch_lightning as pl
import torch
import yaml
from pytorch_lightning.callbacks import TQDMProgressBar
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.common.evaluation import extract_features, knn_scores, topk_accuracy
from benchmarks.harness.records import atomic_path, environment, portable, write_json
from benchmarks.stl10.data import (
    Data,
    EpochSampler,
    Indexed,
    Part,
    in_order,
    load_data,
    train_loader,
)
from benchmarks.stl10.evaluate import evaluate
from benchmarks.stl10.methods import Method, build_method
from benchmarks.stl10.report import write_report
from benchmarks.stl10.settings import Settings, read_file
from mvmr_loss.teachers.checkpoints import load_tensors

CHECKPOINT = "checkpoint.ckpt"
SETTINGS = "settings.yaml"
METRICS = "metrics.csv"
RESULTS = "results.json"


class Recorder(pl.Callback):
    """Writes a row of metrics an epoch, and checkpoints; both survive an interruption.

    The rows are part of the checkpoint: a resumed run continues the table where the checkpoint was
    taken, whatever was written after it.

    Args:
        folder: The run's folder.
        data: Its labelled training images are looked at for the kNN during pretraining.
        settings: The run's settings.
    """

    def __init__(self, folder: Path, data: Data, settings: Settings) -> None:
        self.folder, self.data, self.settings = folder, data, settings
        self.rows: list[dict[str, float]] = []
        self._step_times: list[float] = []
        self._time = 0.0
        self._first = True

    def state_dict(self) -> dict[str, Any]:
        """Returns the rows so far, for the checkpoint."""
        return {"rows": self.rows}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Takes the rows from a checkpoint."""
        self.rows = list(state_dict["rows"])

    def on_train_epoch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Starts the clock."""
        self._step_times = []
        self._time = time.perf_counter()

    def on_train_batch_end(self, *_: Any) -> None:
        """Notes the time since the last step, reading data included."""
        now = time.perf_counter()
        self._step_times.append(now - self._time)
        self._time = now

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Adds the epoch's row and, where it is due, writes a checkpoint."""
        epoch = trainer.current_epoch + 1
        last = epoch == self.settings.epochs or trainer.global_step == trainer.max_steps
        losses = {
            name.removesuffix("_epoch"): value.item()
            for name, value in trainer.callback_metrics.items()
            if name.startswith("loss") and not name.endswith("_step")
        }
        if not all(math.isfinite(value) for value in losses.values()):
            raise ValueError(
                f"the loss must be finite but is {losses} after epoch {epoch}; lower the learning "
                "rate, or use --precision 32-true or bf16-mixed."
            )
        # The first steps of a process warm up allocators and kernels.
        times = (
            self._step_times[2:] if self._first and len(self._step_times) > 4 else self._step_times
        )
        self._first = False
        row = {
            "epoch": epoch,
            "step": trainer.global_step,
            **losses,
            "learning_rate": trainer.optimizers[0].param_groups[0]["lr"],
            "seconds": sum(self._step_times),
            "step_seconds": statistics.median(times),
            "images_per_second": self.settings.batch_size / statistics.fmean(times),
            "peak_memory_mb": peak_memory_mb(pl_module.device),
        }
        every = self.settings.monitor_every
        if trainer.is_global_zero:
            if every and (epoch % every == 0 or last):
                row["train_knn_top1"] = self._monitor(pl_module)
            self.rows.append(row)
        if epoch % self.settings.checkpoint_every == 0 or last:
            path = self.folder / CHECKPOINT
            temporary = self.folder / f".{CHECKPOINT}.new"
            trainer.save_checkpoint(temporary)
            if trainer.is_global_zero:
                os.replace(temporary, path)
        if trainer.is_global_zero:
            write_metrics(self.folder / METRICS, self.rows)

    def _monitor(self, method: pl.LightningModule) -> float:
        """Returns the kNN accuracy on a tenth of the labelled training images, from the others."""
        order = np.random.default_rng(self.settings.seed).permutation(len(self.data.train))
        cut = max(1, len(order) // 10)
        parts = []
        for index in (order[cut:], order[:cut]):
            images = Part(self.data.train, index.tolist())
            loader = in_order(images, num_workers=0)
            features = extract_features(method, (batch for batch, _ in loader), method.device)
            parts.append((features, torch.from_numpy(self.data.train_labels[index])))
        (bank, labels), (queries, truth) = parts
        scores = knn_scores(
            bank,
            labels,
            queries,
            k=self.settings.knn_k,
            temperature=self.settings.knn_temperature,
            num_classes=len(self.data.classes),
        )
        return topk_accuracy(scores, truth, ks=(1,))["top1"]


def run(settings: Settings, folder: Path, resume: bool = False) -> dict[str, Any]:
    """Pretrains, evaluates and writes the run's folder.

    The folder then holds ``settings.yaml``, ``metrics.csv`` (one row an epoch), ``checkpoint.ckpt``
    (of Lightning), ``results.json``, and ``report.html`` with its pictures.

    Args:
        settings: The run's settings.
        folder: Where to write; created.
        resume: Continue from the folder's checkpoint.

    Returns:
        What is in ``results.json``; empty in the processes of DDP other than the first.

    Raises:
        FileExistsError: If the folder holds a run already and ``resume`` is False.
        FileNotFoundError: If data are missing, or there is nothing to resume.
        ValueError: If data are damaged, a setting does not fit, or the loss is not finite.
    """
    started = time.perf_counter()
    check_folder(folder, resume)
    data = load_data(settings)
    pl.seed_everything(settings.seed, verbose=False)
    steps = settings.epochs * (len(data.pretrain) // settings.batch_size)
    method = build_method(settings, steps)
    if settings.representation_cache is not None:
        method.cache_representations(settings.representation_cache, len(data.pretrain))
    recorder = Recorder(folder, data, settings)
    trainer = pl.Trainer(
        accelerator=settings.accelerator,
        devices=settings.devices,
        strategy="ddp" if settings.devices > 1 else "auto",
        precision=settings.precision,  # type: ignore[arg-type]
        max_epochs=settings.epochs,
        max_steps=settings.max_steps,
        callbacks=[recorder, TQDMProgressBar(refresh_rate=10 if sys.stderr.isatty() else 0)],
        deterministic="warn",
        use_distributed_sampler=False,
        logger=False,
        enable_checkpointing=False,
        enable_model_summary=False,
        default_root_dir=folder,
    )
    sampler = EpochSampler(
        len(data.pretrain),
        settings.batch_size,
        settings.seed,
        trainer.global_rank,
        trainer.world_size,
    )
    if trainer.is_global_zero and not resume:
        folder.mkdir(parents=True, exist_ok=True)
        with atomic_path(folder / SETTINGS) as path:
            path.write_text(yaml.safe_dump(settings.as_dict(), sort_keys=False))
    # A run that was stopped before its first checkpoint starts from the beginning.
    checkpoint = folder / CHECKPOINT if resume and (folder / CHECKPOINT).is_file() else None
    if checkpoint is not None:
        read_checkpoint(checkpoint)  # Some versions of Lightning would unpickle objects.
    trainer.fit(
        method,
        train_loader(Indexed(data.pretrain), sampler, settings.num_workers),
        ckpt_path=checkpoint,
    )
    pretrained = time.perf_counter()
    if not trainer.is_global_zero:
        return {}
    method.to(trainer.strategy.root_device)
    accuracies, features, labels = evaluate(method, data, settings)
    results = {
        "label": settings.label,
        "accuracy": accuracies,
        "pretraining": {
            # A run that --max-steps ends may stop within an epoch.
            "epochs": round(recorder.rows[-1]["step"] / len(sampler), 2),
            "images": len(data.pretrain),
            "seconds": sum(row["seconds"] for row in recorder.rows),
            "step_seconds": statistics.median(row["step_seconds"] for row in recorder.rows),
            "images_per_second": statistics.median(
                row["images_per_second"] for row in recorder.rows
            ),
            "peak_memory_mb": max(row["peak_memory_mb"] for row in recorder.rows),
            "processes": trainer.world_size,
            "resumed": checkpoint is not None,
        },
        "evaluation_seconds": time.perf_counter() - pretrained,
        "total_seconds_of_this_process": time.perf_counter() - started,
        "backbone": {
            "parameters": sum(p.numel() for p in method.backbone.parameters()),
            "flops_per_image": flops(method.backbone, settings.image_size),
        },
        "classes": data.classes,
        "settings": {key: portable(value) for key, value in settings.as_dict().items()},
        "environment": {**environment(), "seed": settings.seed},
    }
    write_json(folder / RESULTS, results)
    write_report(folder, results, recorder.rows, features, labels)
    return results


def check_folder(folder: Path, resume: bool) -> None:
    """Raises unless a new run may be written into the folder, or an old one be resumed.

    Args:
        folder: The run's folder.
        resume: Whether the run is to be resumed.

    Raises:
        FileExistsError: If the folder holds a run already and ``resume`` is False.
        FileNotFoundError: If there is nothing to resume.
    """
    # The further processes of DDP start after the first has written its settings.
    first = "LOCAL_RANK" not in os.environ
    if not resume and first and (folder / SETTINGS).exists():
        raise FileExistsError(
            f"{folder} holds a run already; continue it with --resume {folder}, or choose another "
            "folder with --output."
        )
    if resume and not (folder / SETTINGS).is_file():
        raise FileNotFoundError(
            f"{folder} must be the folder of a run but has no {SETTINGS}; nothing can be resumed."
        )


def read_checkpoint(path: Path) -> dict[str, Any]:
    """Reads a run's checkpoint; nothing but tensors and plain containers is unpickled.

    Args:
        path: The file.

    Returns:
        What Lightning wrote.

    Raises:
        ValueError: If the file is damaged, no checkpoint, or holds objects, which would run code.
    """
    try:
        content = load_tensors(path)
    except ValueError as error:
        raise ValueError(
            f"{path} must be a checkpoint of this run but cannot be read: {error}"
        ) from error
    if not isinstance(content, dict) or not isinstance(content.get("state_dict"), dict):
        raise ValueError(f"{path} must be a checkpoint of this run but holds no state dict.")
    return content


def load_run(folder: Path) -> tuple[Settings, Method]:
    """Reads the settings of a run and its method with the weights of the checkpoint.

    Args:
        folder: The run's folder.

    Returns:
        The settings, and the method on the CPU in evaluation mode.

    Raises:
        FileNotFoundError: If it holds no run or no checkpoint.
        ValueError: If the checkpoint is damaged.
    """
    check_folder(folder, resume=True)
    settings = Settings(**read_file(folder / SETTINGS))
    path = folder / CHECKPOINT
    if not path.is_file():
        raise FileNotFoundError(
            f"{path} must be the run's checkpoint but is missing; resume the run."
        )
    # Features need no representations, nor the files of a teacher.
    method = build_method(dataclasses.replace(settings, representations=[]))
    weights = read_checkpoint(path)["state_dict"]
    try:
        method.load_state_dict(
            {k: v for k, v in weights.items() if not k.startswith("representations.")}
        )
    except Exception as error:
        raise ValueError(
            f"{path} must be a checkpoint of this run but does not fit its method: {error}"
        ) from error
    return settings, method.eval()


def read_metrics(path: Path) -> list[dict[str, float]]:
    """Reads the rows that :func:`write_metrics` wrote; empty cells are left out.

    Args:
        path: The CSV file.

    Returns:
        One mapping an epoch.
    """
    with path.open(newline="") as file:
        return [{k: float(v) for k, v in row.items() if v} for row in csv.DictReader(file)]


def write_metrics(path: Path, rows: list[dict[str, float]]) -> None:
    """Writes one row an epoch as CSV, atomically.

    Args:
        path: The file.
        rows: One mapping an epoch; names that some lack become empty cells.
    """
    names = list(dict.fromkeys(name for row in rows for name in row))
    with atomic_path(path) as temporary, temporary.open("w", newline="") as file:
        writer = csv.DictWriter(file, names)
        writer.writeheader()
        writer.writerows(rows)


def peak_memory_mb(device: torch.device) -> float:
    """Returns the most memory that this process has used so far, in MiB.

    Args:
        device: An accelerator, whose allocated memory counts, or the CPU, where the whole process
            counts.

    Returns:
        MiB.
    """
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**20
    usage = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return usage / (2**20 if sys.platform == "darwin" else 2**10)


@torch.no_grad()
def flops(module: torch.nn.Module, image_size: int) -> int:
    """Returns the floating-point operations of one image's forward pass (a multiply-add is two).

    Args:
        module: Takes images of shape (N, 3, H, W).
        image_size: Side of the images in pixels.

    Returns:
        The number of operations, of convolutions and matrix products.
    """
    device = next(module.parameters()).device
    training = module.training
    with FlopCounterMode(display=False) as counter:
        module.eval()(torch.zeros(1, 3, image_size, image_size, device=device))
    module.train(training)
    return int(counter.get_total_flops())


def read_results(folder: Path) -> dict[str, Any]:
    """Reads the results of a run.

    Args:
        folder: The run's folder.

    Returns:
        What :func:`run` returned.

    Raises:
        FileNotFoundError: If the run has no results yet.
        ValueError: If the file is damaged.
    """
    path = folder / RESULTS
    if not path.is_file():
        raise FileNotFoundError(
            f"{folder} has no {RESULTS}: it is no run, or one that is not finished; continue it "
            f"with --resume {folder}."
        )
    try:
        results: dict[str, Any] = json.loads(path.read_text())
        _ = results["accuracy"], results["label"]
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(
            f"{path} must be the results of a run but cannot be read: {error}"
        ) from error
    return results
