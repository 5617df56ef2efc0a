"""Time of a whole training step with and without the loss and the representations computed in it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.harness.timing import Times, interleaved, peak_memory
from benchmarks.speed.representations import photographs
from mvmr_loss import MVMRLoss, MVMRProjectionHead, Representations

FIVE = ("pixels", "augmented_pixels", "scattering", "hog", "local_std")
COMPARED = ("network alone", "no representations", "five, live", "five, live, sketched")


def live_representations(device: torch.device, repeats: int) -> Times:
    """Times a step of ResNet-18 on 64 images of 96 x 96 without, and with five live representations.

    Args:
        device: Where to run.
        repeats: Timed rounds.

    Returns:
        Name -> seconds of each round of a step (two forward passes, backward, optimiser).
    """
    steps = make_steps(device)
    del steps["network alone"]
    return interleaved(steps, device, repeats=repeats, warmup=1)


def step_times(device: torch.device, repeats: int, **options: Any) -> dict[str, Any]:
    """Times a step without the loss, with it, and with five live representations.

    Args:
        device: Where to run.
        repeats: Timed rounds.
        **options: Of :func:`make_steps`.

    Returns:
        ``times``: name -> seconds of each round, and on a GPU ``memory``: name -> bytes at the peak.
    """
    made = make_steps(device, **options)
    steps = {name: made[name] for name in COMPARED}
    times = interleaved(steps, device, repeats=repeats, warmup=min(3, repeats))
    found: dict[str, Any] = {"times": times}
    if device.type == "cuda":
        found["memory"] = {name: peak_memory(run, device) for name, run in steps.items()}
    return found


def make_steps(
    device: torch.device,
    *,
    backbone: str = "resnet18",
    n: int = 64,
    size: int = 96,
    width: int = 2048,
    compiled: bool = False,
    bf16: bool = False,
) -> dict[str, Callable[[], None]]:
    """Returns steps of one network to time.

    Args:
        device: Where to run.
        backbone: One of torchvision's ResNets.
        n: Images a step.
        size: Their height and width.
        width: Of the projection head and the embeddings.
        compiled: Whether network, loss and representations are compiled.
        bf16: Whether the network runs in bfloat16 where autocast has it so.

    Returns:
        ``"network alone"`` (the views' mean squared error), ``"no representations"``, ``"five, live"``,
        ``"five, live, sketched"``, and each of the five alone.
    """
    from torchvision.models import get_model

    torch.manual_seed(0)
    network = get_model(backbone)
    features, network.fc = network.fc.in_features, nn.Identity()
    model = nn.Sequential(network, MVMRProjectionHead(features, width, width)).to(device).train()
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-4)
    images = photographs(n, size, device)
    augmented = images.flip(-1)
    ready = torch.compile if compiled else lambda module: module
    forward, criterion = ready(model), ready(MVMRLoss())

    def loss(z: Tensor, v: Tensor, representations: Callable[..., Any] | None) -> Tensor:
        value: Tensor = criterion(
            z, v, representations(images) if representations is not None else None
        )
        return value

    def step(compare: Callable[[Tensor, Tensor], Tensor]) -> Callable[[], None]:
        def run() -> None:
            optimizer.zero_grad()
            with torch.autocast(device.type, torch.bfloat16, enabled=bf16):
                z, v = forward(images), forward(augmented)
            compare(z, v).backward()
            optimizer.step()

        return run

    def represented(names: Any, **options: Any) -> Callable[[], None]:
        module = ready(Representations(names, normalization="none", **options).to(device))
        return step(lambda z, v: loss(z, v, module))

    return {
        "network alone": step(nn.functional.mse_loss),
        "no representations": step(lambda z, v: loss(z, v, None)),
        "five, live": represented(FIVE),
        "five, live, sketched": represented(FIVE, sketch_dim=1024),
        **{f"{name} alone": represented([name]) for name in FIVE},
    }
