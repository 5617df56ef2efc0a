"""Time of a step of each method with the terms on the features beside it, over that of it alone.

A second step alone, made like the first, tells what of it is noise, and the terms by themselves, on
features that are there, what they cost whatever the method.

python -m benchmarks.quality.cost
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch

from benchmarks.harness import Run, interleaved, keep_freed_memory, plain_errors, run_all
from benchmarks.harness.timing import Times
from benchmarks.plain_pytorch.training import adam_in_one_cycle
from benchmarks.quality.methods import Batch, build
from benchmarks.quality.plan import KNOWN, LBP, LEAN, LEANER, ON_FEATURES, ON_TOP, Settings
from benchmarks.quality.training import encode, make_encoder, make_views, read, represent

# The terms that are timed, by themselves and beside a method.
TERMS: dict[str, Settings] = {
    "features": ON_FEATURES,
    LEAN: {**ON_FEATURES, **LEANER[LEAN]["options"]},
}
# What stands beside the method in each step that is timed.
STEPS: dict[str, Settings] = {
    "alone": {},
    "alone again": {},
    **{f"and {label}": options for label, options in TERMS.items()},
}
HERE = Path(__file__).parent
REPRESENTATIONS = [*KNOWN, LBP]


def make_step(
    name: str, encoder_name: str, batch_size: int, device: str, beside: Settings
) -> Callable[[], None]:
    """Returns a training step on photographs, two full crops of each, with stored sketches.

    Args:
        name: Of the method.
        encoder_name: As of :func:`make_encoder`.
        batch_size: Images a step.
        device: Where it runs.
        beside: Options of the terms on the features; empty: none.
    """
    torch.manual_seed(0)
    images = read(None).train_images[:batch_size].to(device)
    stored = represent(REPRESENTATIONS, images) if beside else {}
    encoder = make_encoder(encoder_name).to(device, memory_format=torch.channels_last)
    method = build(name, encoder, beside, stored).to(device)
    parameters = [p for p in (*encoder.parameters(), *method.parameters()) if p.requires_grad]
    optimizer, _ = adam_in_one_cycle(parameters, 1e-3, 1000)

    def step() -> None:
        views = make_views("two", images.float() / 255)
        loss = method(Batch(encode(encoder, views), stored, views, encode))["loss"]
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()

    return step


def make_terms(
    encoder_name: str, batch_size: int, device: str, options: Settings
) -> Callable[[], None]:
    """Returns a step of the terms by themselves: forward, backward, and Adam on their heads."""
    torch.manual_seed(0)
    stored = represent(REPRESENTATIONS, read(None).train_images[:batch_size].to(device))
    encoder = make_encoder(encoder_name)
    terms = build("simclr", encoder, options, stored).regression.to(device)
    shape = 2, batch_size, encoder.output_dim
    features = [x.requires_grad_() for x in torch.randn(shape, device=device)]
    optimizer, _ = adam_in_one_cycle(list(terms.parameters()), 1e-3, 1000)

    def step() -> None:
        loss = terms(features, stored)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()

    return step


def measure(run: Run) -> dict[str, dict[str, Times]]:
    """Returns ``times``: method -> name in :data:`STEPS` and :data:`TERMS` -> each round's seconds."""
    told = run.settings
    where = told["encoder"], told["batch_size"], told["device"]
    # The same for every method.
    terms = {label: make_terms(*where, options) for label, options in TERMS.items()}
    times = {}
    for name in ON_TOP:
        steps = {label: make_step(name, *where, beside) for label, beside in STEPS.items()}
        made = {**steps, **terms}
        times[name] = interleaved(made, told["device"], repeats=told["repeats"], warmup=1)
    return {"times": times}


def plan(arguments: argparse.Namespace) -> Iterator[Run]:
    """Yields the runs, one an encoder."""
    for encoder in arguments.encoders:
        settings: dict[str, Any] = {"encoder": encoder, "representations": REPRESENTATIONS}
        told = ("batch_size", "repeats", "device", "freed_memory")
        settings |= {name: getattr(arguments, name) for name in told}
        yield Run(f"cost/{encoder}-{arguments.device}", settings)


def main(command: Sequence[str] | None = None) -> None:
    """Reads the command line and measures what is not measured yet."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.quality.cost", description=__doc__)
    add = parser.add_argument
    add(
        "--encoders", nargs="+", choices=("small", "resnet18", "vit"), default=["resnet18", "small"]
    )
    add("--batch-size", type=int, default=128, help="images a step")
    add("--repeats", type=int, default=9, help="timed rounds")
    add("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    add("--threads", type=int, default=2, help="threads on a CPU")
    add("--results", type=Path, default=HERE / "results", help="folder of the results")
    arguments = parser.parse_args(command)
    torch.set_num_threads(arguments.threads)
    kept = arguments.device == "cpu" and keep_freed_memory()
    arguments.freed_memory = "kept" if kept else "as usual"
    with plain_errors():
        run_all(plan(arguments), arguments.results, measure)


if __name__ == "__main__":
    main()
