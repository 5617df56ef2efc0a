"""What is measured on a GPU beside the speed table."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import pytorch_lightning as pl
import torch
from torch.profiler import ProfilerActivity, profile

from benchmarks.harness.timing import interleaved, synchronize
from benchmarks.speed import losses, representations, training_step
from benchmarks.speed.counts import NAMES, Counter
from benchmarks.stl10.data import load_data, pretraining_set
from benchmarks.stl10.evaluate import loader
from benchmarks.stl10.methods import build_method
from benchmarks.stl10.settings import PRESETS, read_file
from mvmr_loss import MVMRLoss, Representations

Figures = dict[str, Any]
# STL10's unlabelled and labelled training images.
PRETRAINING_IMAGES = 105_000


def launched(events: Iterable[Any]) -> int:
    """Returns how many kernels were started, from the averages of a profile.

    Examples:
        >>> from types import SimpleNamespace as Event
        >>> names = {"cudaLaunchKernel": 2, "cuLaunchKernelEx": 1, "aten::mul": 3}
        >>> launched(Event(key=name, count=count) for name, count in names.items())
        3
    """
    names = ("cudaLaunchKernel", "cuLaunchKernel")
    return sum(int(event.count) for event in events if event.key.startswith(names))


def count_launches(run: Callable[[], Any], device: torch.device) -> int:
    """Returns how many kernels a call starts; on a CPU, how many operations torch dispatches."""
    if device.type == "cpu":
        with Counter() as counter:
            run()
        return counter.launches
    for _ in range(3):  # what is compiled or chosen at the first call
        run()
    synchronize(device)
    with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as profiled:
        run()
        synchronize(device)
    return launched(profiled.key_averages())


def launches(settings: Mapping[str, Any], device: torch.device) -> Figures:
    """Counts the kernels of the loss, forward and backward, and of each representation.

    Args:
        settings: ``n`` embeddings of width ``d``, ``images`` of ``side`` pixels.
        device: Where to run.

    Returns:
        What -> ``"eager"`` and, of the loss on a GPU, ``"compiled"`` -> kernels.
    """
    z, v = losses.embeddings(settings["n"], settings["d"], device)
    sketches = losses.features(settings["n"], device, dict.fromkeys(losses.SIZES, 1024))
    criterion = MVMRLoss()
    modes: dict[str, Callable[..., Any]] = {"eager": criterion}
    if device.type == "cuda":  # Compiled code hides its operations from the count on a CPU.
        modes["compiled"] = torch.compile(criterion, fullgraph=True)

    def count(loss: Callable[..., Any], ys: Mapping[str, Any]) -> int:
        return count_launches(losses.step(lambda z, v: loss(z, v, ys), z, v), device)

    found: Figures = {
        f"loss, {name}": {mode: count(loss, ys) for mode, loss in modes.items()}
        for name, ys in {"no representations": {}, "five sketches": sketches}.items()
    }
    images = representations.photographs(settings["images"], settings["side"], device)
    for name in NAMES:
        module = Representations([name]).to(device)
        found[name] = {"eager": count_launches(lambda module=module: module(images), device)}
    return found


def represent(settings: Mapping[str, Any], device: torch.device) -> Figures:
    """Times each representation and the paper's five together, and scattering beside kymatio.

    Args:
        settings: ``images`` of ``side`` pixels, ``repeats``.
        device: Where to run.

    Returns:
        ``times``: what -> name -> seconds of each round; ``error`` of scattering to kymatio.
    """
    n, side, repeats = settings["images"], settings["side"], settings["repeats"]
    images = representations.photographs(n, side, device)
    names = {name: [name] for name in NAMES} | {"five": list(training_step.FIVE)}
    modules = {name: Representations(which).to(device) for name, which in names.items()}
    ours = {name: lambda module=module: module(images) for name, module in modules.items()}
    beside = representations.scattering(side, device, repeats, n)
    return {
        "times": {
            "ours": interleaved(ours, device, repeats=repeats),
            "scattering": beside["times"],
        },
        "error": beside["error"],
    }


def step(settings: Mapping[str, Any], device: torch.device) -> Figures:
    """Times a training step with and without the loss; see ``training_step.step_times``.

    Args:
        settings: ``backbone``, ``images`` of ``side`` pixels, ``width`` of the embeddings, ``mode``
            (``"eager"``, ``"compiled"``, ``"bf16"`` or ``"bf16, compiled"``), ``repeats``.
        device: Where to run.

    Returns:
        ``times`` and, on a GPU, ``memory``: name -> seconds of each round, bytes at the peak.
    """
    return training_step.step_times(
        device,
        settings["repeats"],
        backbone=settings["backbone"],
        n=settings["images"],
        size=settings["side"],
        width=settings["width"],
        compiled="compiled" in settings["mode"],
        bf16="bf16" in settings["mode"],
    )


class Clock(pl.Callback):
    """Notes when each step begins, its batch being there, and ends, the device having finished."""

    def __init__(self) -> None:
        self.begun: list[float] = []
        self.ended: list[float] = []

    def on_train_batch_start(self, trainer: pl.Trainer, *_: Any) -> None:
        """Notes the beginning."""
        self.begun.append(time.perf_counter())

    def on_train_batch_end(self, trainer: pl.Trainer, *_: Any) -> None:
        """Notes the end."""
        synchronize(trainer.strategy.root_device)
        self.ended.append(time.perf_counter())


def pretraining_cost(settings: Mapping[str, Any], device: torch.device) -> Figures:
    """Measures steps of a preset of the STL10 benchmark, on photographs, and what all would take.

    Args:
        settings: ``preset``, ``batch_size`` (None: the preset's), ``steps``.
        device: Where to run.

    Returns:
        ``seconds`` of each step with reading and augmentation and ``seconds_computing`` without, but
        for the first third; ``steps_of_the_pretraining``, the whole one on STL10.
    """
    preset = read_file(PRESETS / f"{settings['preset']}.yaml")
    chosen = dataclasses.replace(
        preset,
        data="photographs",
        labels=[],
        monitor_every=0,
        batch_size=settings["batch_size"] or preset.batch_size,
    )
    data = load_data(chosen)
    batches = loader(
        pretraining_set(data, chosen), chosen, chosen.batch_size, shuffle=True, drop_last=True
    )
    clock = Clock()
    pl.Trainer(
        accelerator="gpu" if device.type == "cuda" else "cpu",
        devices=1,
        precision=chosen.precision,  # type: ignore[arg-type]
        max_steps=settings["steps"],
        callbacks=[clock],
        logger=False,
        enable_checkpointing=False,
        enable_model_summary=False,
        enable_progress_bar=False,
    ).fit(build_method(chosen, len(data.classes)), batches)
    first = max(1, len(clock.ended) // 3)
    seconds = [b - a for a, b in zip(clock.ended[first - 1 :], clock.ended[first:], strict=False)]
    computing = [b - a for a, b in zip(clock.begun, clock.ended, strict=True)][first:]
    steps = chosen.epochs * (PRETRAINING_IMAGES // chosen.batch_size)
    return {
        "seconds": seconds,
        "seconds_computing": computing,
        "steps_of_the_pretraining": steps,
    }


PARTS: dict[str, Callable[[Mapping[str, Any], torch.device], Figures]] = {
    "launches": launches,
    "representations": represent,
    "step": step,
    "paper": pretraining_cost,
}
