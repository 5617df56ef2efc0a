"""Time and memory of the loss, forward and backward, beside the release's formulation and its peers."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from benchmarks.harness.timing import Times, interleaved, peak_memory
from benchmarks.speed.release import release_loss
from mvmr_loss import MVMRLoss
from mvmr_loss.dependence import dependence_measure
from mvmr_loss.representations import FoldedSignSketch

# What the five representations of a 3 x 96 x 96 image hold: 233,280 numbers.
SIZES = {
    "pixels": 27_648,
    "augmented_pixels": 27_648,
    "scattering": 139_968,
    "hog": 10_368,
    "local_std": 27_648,
}
SKETCH_DIM = 1024
BLOCK_SIZE = 64

Loss = Callable[[Tensor, Tensor], Tensor]


def embeddings(n: int, d: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Returns two views' embeddings, related, both wanting a gradient."""
    generator = torch.Generator().manual_seed(0)
    z = torch.randn(n, d, generator=generator)
    v = z + 0.5 * torch.randn(n, d, generator=generator)
    return z.to(device).requires_grad_(), v.to(device).requires_grad_()


def features(n: int, device: torch.device, sizes: dict[str, int] = SIZES) -> dict[str, Tensor]:
    """Returns tensors of the sizes of the representations."""
    generator = torch.Generator().manual_seed(1)
    return {name: torch.rand(n, d, generator=generator).to(device) for name, d in sizes.items()}


def step(loss: Loss, z: Tensor, v: Tensor) -> Callable[[], None]:
    """Returns a forward and backward pass of a loss as something to time."""

    def run() -> None:
        z.grad = v.grad = None
        loss(z, v).backward()

    return run


def against_release(device: torch.device, repeats: int) -> Times:
    """Times the loss with five representations of a 96 x 96 image at n = 256, d = 8192.

    Args:
        device: Where to run.
        repeats: Timed rounds.

    Returns:
        Name -> seconds of each round: the release's formulation; ours exact, with sketches made on
        the fly, with ready sketches, in blocks and compiled.
    """
    z, v = embeddings(256, 8192, device)
    ys = features(256, device)
    criterion = MVMRLoss()
    blocks = MVMRLoss(
        dependence_measure=dependence_measure("distance_correlation", block_size=BLOCK_SIZE)
    )
    compiled = torch.compile(MVMRLoss(), fullgraph=True)
    sketch = FoldedSignSketch(SKETCH_DIM)
    ready = {name: sketch(y) for name, y in ys.items()}
    candidates: dict[str, Loss] = {
        "release": lambda z, v: release_loss(z, v, ys),
        "exact": lambda z, v: criterion(z, v, ys),
        "exact, compiled": lambda z, v: compiled(z, v, ys),
        "exact, in blocks": lambda z, v: blocks(z, v, ys),
        "sketched on the fly": lambda z, v: criterion(
            z, v, {name: sketch(y) for name, y in ys.items()}
        ),
        "ready sketches": lambda z, v: criterion(z, v, ready),
    }
    return interleaved(
        {name: step(loss, z, v) for name, loss in candidates.items()}, device, repeats=repeats
    )


def against_peers(d: int, device: torch.device, repeats: int) -> Times:
    """Times the loss with five ready sketches beside lightly's losses at n = 256.

    Args:
        d: Width of the embeddings.
        device: Where to run.
        repeats: Timed rounds; those whose work grows with d^2 have three at most.

    Returns:
        Name -> seconds of each round.
    """
    from lightly.loss import BarlowTwinsLoss, NTXentLoss, VICRegLoss

    z, v = embeddings(256, d, device)
    ready = features(256, device, dict.fromkeys(SIZES, SKETCH_DIM))
    criterion = MVMRLoss()
    ours: Loss = lambda z, v: criterion(z, v, ready)  # noqa: E731
    fast: dict[str, Loss] = {"no representations": criterion, "NT-Xent": NTXentLoss()}
    slow: dict[str, Loss] = {"Barlow Twins": BarlowTwinsLoss(), "VICReg": VICRegLoss()}
    times = interleaved(
        {name: step(loss, z, v) for name, loss in {"ready sketches": ours, **fast}.items()},
        device,
        repeats=repeats,
    )
    again = interleaved(
        {name: step(loss, z, v) for name, loss in {"ours": ours, **slow}.items()},
        device,
        repeats=min(3, repeats),
        warmup=1,
    )
    # A second time ours, beside the slow ones: rounds are compared with those beside them.
    return times | {"ready sketches, again": again.pop("ours"), **again}


def memory(device: torch.device) -> dict[str, list[float]]:
    """Measures the peak memory of a forward and backward pass, each in a process of its own.

    Args:
        device: Where to run.

    Returns:
        Name -> bytes (one round) above the inputs, at n = 256 with five representations (release,
        exact) and at n = 4096, d = 512, two representations of width 1024 (exact and in blocks).
    """
    results = {}
    for name in ("release", "exact", "exact, n = 4096", "blocks, n = 4096"):
        done = subprocess.run(
            [sys.executable, "-m", "benchmarks.speed.losses", name, str(device)],
            capture_output=True,
            text=True,
            check=True,
        )
        results[name] = [float(json.loads(done.stdout))]
    return results


def _measure_memory(name: str, device: torch.device) -> float:
    losses: dict[str, Any] = {
        "release": release_loss,
        "exact": MVMRLoss(),
        "exact, n = 4096": MVMRLoss(),
        "blocks, n = 4096": MVMRLoss(
            dependence_measure=dependence_measure("distance_correlation", block_size=BLOCK_SIZE)
        ),
    }
    loss = losses[name]
    # A small pass first, for what the libraries allocate once.
    z, v = embeddings(16, 32, device)
    loss(z, v, features(16, device, {"pixels": 64})).backward()
    if "4096" in name:
        z, v = embeddings(4096, 512, device)
        ys = features(4096, device, {"a": 1024, "b": 1024})
    else:
        z, v = embeddings(256, 8192, device)
        ys = features(256, device)
    z.grad, v.grad = torch.zeros_like(z), torch.zeros_like(v)
    return peak_memory(lambda: loss(z, v, ys).backward(), device)


if __name__ == "__main__":
    torch.set_num_threads(2)
    print(json.dumps(_measure_memory(sys.argv[1], torch.device(sys.argv[2]))))
