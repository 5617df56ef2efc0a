"""What does not depend on the clock: launches, operations, bytes, memory for the backward pass.

These are the same on every machine with the same torch, so they are compared exactly, in the tests.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.harness import Run, run_all
from benchmarks.harness.runs import read
from mvmr_loss import DistillationLoss, MVMRLoss, Representations
from mvmr_loss.presets import preset_settings

RESULTS = Path(__file__).resolve().parent / "results"
# Ops that start nothing on an accelerator: they make memory, look at it anew, or ask.
QUIET = {
    *("empty", "empty_like", "new_empty", "empty_strided", "detach", "_unsafe_view", "device"),
    *("split", "unbind", "split_with_sizes", "promote_types", "lift_fresh", "scalar_tensor"),
}
NAMES = ("pixels", "scattering", "hog", "local_std", "dct")


class Counter(TorchDispatchMode):
    """Counts the operations that start work, and the bytes they write."""

    def __init__(self) -> None:
        super().__init__()
        self.launches, self.bytes = 0, 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        if not getattr(func, "is_view", False) and func.overloadpacket.__name__ not in QUIET:
            self.launches += 1
            self.bytes += sum(
                t.numel() * t.element_size() for t in tree_leaves(out) if isinstance(t, Tensor)
            )
        return out


def count(run: Callable[[], Any], *, backward: bool) -> dict[str, int]:
    """Counts what a call does.

    Args:
        run: The call; its tensors are of the device "meta".
        backward: Whether the backward pass belongs to it.

    Returns:
        ``launches`` and ``bytes`` written, ``flops`` of matrix products, and ``saved``: bytes kept for
        the backward pass, each tensor once.
    """
    saved: dict[int, Tensor] = {}

    def keep(tensor: Tensor) -> Tensor:
        saved[id(tensor)] = tensor
        return tensor

    with (
        torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor),
        FlopCounterMode(display=False) as flops,
        Counter() as counter,
    ):
        out = run()
        if backward:
            out.backward()
    return {
        "launches": counter.launches,
        "bytes": counter.bytes,
        "flops": int(flops.get_total_flops()),
        "saved": sum(t.numel() * t.element_size() for t in saved.values()),
    }


def counts(_: Run | None = None) -> dict[str, dict[str, int]]:
    """Counts the loss and the representations on tensors without content; nothing is computed.

    Returns:
        What -> as of :func:`count`.
    """
    found = {}
    for name, width in {"no representations": 0, "five sketches": 1024}.items():
        z, v = (torch.empty(256, 2048, device="meta", requires_grad=True) for _ in range(2))
        ys = {str(i): torch.empty(256, width, device="meta") for i in range(5 if width else 0)}
        calls = {"": MVMRLoss()}
        if width:
            measure = {"name": "distance_correlation", "block_size": 64}
            calls[" in blocks of 64"] = MVMRLoss(dependence_measure=measure)
        for mode, loss in calls.items():
            for backward in (False, True):
                words = "forward and backward" if backward else "forward"
                call = partial(loss, z, v, ys)
                found[f"loss{mode}, {name}, {words}"] = count(call, backward=backward)
    for views in (2, 5):
        name = f"preset features, {views} views, forward and backward"
        found[name] = count(features_preset(views), backward=True)
    for name in NAMES:
        module = Representations([name]).to("meta")
        images = torch.empty(64, 3, 96, 96, device="meta")
        with torch.no_grad():
            found[name] = count(partial(module, images), backward=False)
    return found


def features_preset(views: int) -> Callable[[], Any]:
    """Returns a call of the preset ``features``: embeddings, features and sketches without content."""
    criterion = MVMRLoss.from_preset("features")
    preset = preset_settings("features")
    widths = dict.fromkeys(preset.representations, preset.sketch_dim)
    on_features = DistillationLoss.from_preset("features", 512, widths).to("meta")

    def empty(width: int, **options: Any) -> Tensor:
        return torch.empty(256, width, device="meta", **options)

    z, h = ([empty(width, requires_grad=True) for _ in range(views)] for width in (2048, 512))
    sketches = {name: empty(width) for name, width in widths.items()}
    return lambda: criterion(z[0], z[1:]) + on_features(h, sketches)


def worse(found: dict[str, Any], recorded: dict[str, Any]) -> list[str]:
    """Returns a sentence for each count that is larger than the recorded one, or has none.

    Examples:
        >>> worse({"loss": {"flops": 3}}, {"loss": {"flops": 2}})
        ['loss: flops are 3 and were 2']
    """
    return [
        f"{what}: {name} are {value} and were {recorded.get(what, {}).get(name)}"
        for what, part in found.items()
        for name, value in part.items()
        if value > recorded.get(what, {}).get(name, -1)
    ]


def record_counts(folder: Path = RESULTS) -> None:
    """Writes the counts."""
    settings = {"n": 256, "d": 2048, "images": [64, 3, 96, 96]}
    run_all([Run("counts", settings)], folder, counts, again=True)


def regressions(found: dict[str, Any], folder: Path = RESULTS) -> list[str]:
    """Compares counts with the recorded ones.

    Args:
        found: As of :func:`counts`.
        folder: Where the recorded ones are.

    Returns:
        A sentence for each count that has grown. Another torch splits its own functions in another
        way, so beside a record of one a count may be a quarter larger.
    """
    recorded = read(folder / "counts.json")
    if recorded["versions"]["torch"] != torch.__version__.partition("+")[0]:
        slack = {
            k: {n: int(1.25 * v) for n, v in part.items()}
            for k, part in recorded["figures"].items()
        }
        return worse(found, slack)
    return worse(found, recorded["figures"])
