"""What a preset costs: measured seconds of a step here, counted operations, hours on a GPU assumed.

    python -m benchmarks.stl10.cost --preset paper --batch-size 8

A GPU is not needed and not used: the operations are counted without computing anything, and the
GPU's speed is an assumption that the output names.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.harness.records import environment, write_json
from benchmarks.stl10.backbones import build_backbone, feature_dim
from benchmarks.stl10.methods import Method, build_method
from benchmarks.stl10.settings import PRESETS, Settings, preset_names, resolve
from mvmr_loss import MVMRProjectionHead
from mvmr_loss.representations import augmented_pixels

# Images of STL10's train+unlabeled.
IMAGES = 105_000
# An assumption, not measured: an A100's peak in half precision, and the part of it that the training
# of a ResNet-50 reaches; about 2,500 images/s at 224 pixels, 25 GFLOP each, would be as much.
PEAK_FLOPS = 312e12
UTILISATION = 0.2


def training_flops(settings: Settings, batch_size: int) -> int:
    """Counts the operations of backbone and projection head in a step, forward and backward.

    Convolutions and matrix products count, a multiply-add as two; two views. Nothing is computed.

    Args:
        settings: The backbone's and projection head's.
        batch_size: Images a step.

    Returns:
        The number of operations.

    Examples:
        >>> settings = Settings(backbone="small", image_size=32)
        >>> training_flops(settings, 8) == 2 * training_flops(settings, 4)
        True
    """
    side = settings.image_size
    with torch.device("meta"):
        backbone = build_backbone(settings)
        width = feature_dim(backbone, side)
        hidden, output = settings.projector_hidden_dim, settings.projector_output_dim
        head = MVMRProjectionHead(width, hidden, output)
        images = torch.empty(2 * batch_size, 3, side, side)
    with FlopCounterMode(display=False) as counter:
        head(backbone(images)).sum().backward()
    return int(counter.get_total_flops())


def step_seconds(method: Method, batch_size: int, steps: int) -> dict[str, float]:
    """Measures the parts of a training step.

    Args:
        method: In training mode, on the device to compute on.
        batch_size: Images a step, which are noise: no part's time depends on what they show.
        steps: Number of steps, of which the median counts; one more is made first.

    Returns:
        Name of the part -> seconds.
    """
    side = method.settings.image_size
    images = torch.randint(0, 256, (batch_size, 3, side, side), dtype=torch.uint8)
    (optimizer,), _ = method.configure_optimizers()
    plain = method.normalize(images)
    parts: dict[str, list[float]] = {}

    def timed(name: str, work: Callable[..., Any], *arguments: Any, **options: Any) -> Any:
        started = time.perf_counter()
        result = work(*arguments, **options)
        parts.setdefault(name, []).append(time.perf_counter() - started)
        return result

    def train(views: list[Tensor], representations: dict[str, Tensor]) -> None:
        optimizer.zero_grad()
        torch.stack(list(method.terms(views, representations).values())).sum().backward()
        optimizer.step()

    for step in range(steps + 1):
        with torch.no_grad():
            view = timed("augmentation", augmented_pixels, plain, step, **method.augmentation)
            features = timed("representations", method.representations, plain)
        timed("network and loss", train, [plain, view], features)
    return {name: statistics.median(seconds[1:]) for name, seconds in parts.items()}


def estimate(settings: Settings, batch_size: int, steps: int) -> dict[str, Any]:
    """Measures and counts, and says what the whole pretraining takes.

    Args:
        settings: The run's, MV-MR's with representations.
        batch_size: Images of a measured step.
        steps: Number of measured steps.

    Returns:
        What can be written as JSON.
    """
    method = build_method(settings, steps=steps + 1).train()
    seconds = step_seconds(method, batch_size, steps)
    images = settings.epochs * (IMAGES // settings.batch_size) * settings.batch_size
    per_image = training_flops(settings, settings.batch_size) / settings.batch_size
    here = sum(seconds.values()) / batch_size
    return {
        "images_of_the_pretraining": images,
        "measured": {
            "batch_size": batch_size,
            "seconds": seconds,
            "seconds_per_image": here,
            "network_flops_per_second": batch_size * per_image / seconds["network and loss"],
        },
        "counted": {"flops_per_image": per_image, "flops_of_the_pretraining": images * per_image},
        "days_here": images * here / 86400,
        "assumed": {"gpu_peak_flops_per_second": PEAK_FLOPS, "utilisation": UTILISATION},
        "gpu_hours_assumed": images * per_image / (PEAK_FLOPS * UTILISATION) / 3600,
        "environment": {**environment(), "seed": settings.seed},
    }


def main(arguments: Sequence[str] | None = None) -> dict[str, Any]:
    """Estimates as the command line says, prints and, if asked to, writes the result.

    Args:
        arguments: The command line without the program's name; None means that of this process.

    Returns:
        What is in the file.
    """
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.stl10.cost", description=__doc__.split("\n")[0]
    )
    add = parser.add_argument
    add("--preset", choices=preset_names(), default="paper", help="default: %(default)s")
    add("--batch-size", type=int, default=8, help="images of a measured step (default: 8)")
    add("--steps", type=int, default=3, help="measured steps (default: 3)")
    add("--output", type=Path, metavar="JSON", help="file to write")
    given = parser.parse_args(arguments)
    settings = resolve([PRESETS / f"{given.preset}.yaml"], {})
    found = estimate(settings, given.batch_size, given.steps)
    for name, seconds in found["measured"]["seconds"].items():
        print(f"{name:20s} {seconds:8.3f} s for {given.batch_size} images")
    print(f"counted: {found['counted']['flops_per_image'] / 1e9:.1f} GFLOP an image and step,")
    print(f"  {found['counted']['flops_of_the_pretraining'] / 1e18:.2f} EFLOP in all")
    print(f"on this machine: {found['days_here']:.0f} days")
    print(
        f"on a GPU: {found['gpu_hours_assumed']:.0f} hours for the network, assuming "
        f"{UTILISATION:.0%} of {PEAK_FLOPS / 1e12:.0f} TFLOP/s"
    )
    if given.output is not None:
        write_json(given.output, found)
    return found


if __name__ == "__main__":
    main()
