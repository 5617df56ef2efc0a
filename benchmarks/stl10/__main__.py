"""The command line: ``python -m benchmarks.stl10 run | compare | export | features``."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch

from benchmarks.harness.records import atomic_path
from benchmarks.stl10.settings import (
    PRESETS,
    Settings,
    add_arguments,
    given,
    preset_names,
    read_file,
    resolve,
)

DESCRIPTION = """\
The STL10 benchmark of MV-MR: pretrain, then evaluate as in the paper, and compare methods under one
protocol. Without data of one's own it runs on photographs that come with scikit-image."""

EXAMPLES = """\
examples:
  python -m benchmarks.stl10 run --preset quick --method mvmr
  python -m benchmarks.stl10 run --preset quick --method vicreg --representations pixels hog
  python -m benchmarks.stl10 run --preset paper --data-dir data --download --output runs/stl10/paper
  python -m benchmarks.stl10 run --resume runs/stl10/paper
  python -m benchmarks.stl10 compare runs/stl10/* --output runs/comparison
  python -m benchmarks.stl10 export runs/stl10/paper resnet50.pt
  python -m benchmarks.stl10 features runs/stl10/paper features.npz"""


def parser() -> argparse.ArgumentParser:
    """Returns the parser of the command line."""
    raw = argparse.RawDescriptionHelpFormatter
    main = argparse.ArgumentParser(
        prog="python -m benchmarks.stl10",
        description=DESCRIPTION,
        epilog=EXAMPLES,
        formatter_class=raw,
    )
    commands = main.add_subparsers(dest="command", required=True, metavar="COMMAND")

    run = commands.add_parser(
        "run",
        help="pretrain, evaluate, and write a folder of results",
        description="Pretrains and evaluates. The folder then holds settings, metrics, checkpoint, "
        "results and report.html. Settings are read from the preset, then from --config, then from "
        "the options below, each overriding the one before.",
    )
    run.add_argument("--preset", choices=preset_names(), help="a file of benchmarks/stl10/presets")
    run.add_argument(
        "--config", type=Path, metavar="YAML", help="a file of settings, like a preset"
    )
    run.add_argument(
        "--output", type=Path, metavar="FOLDER", help="where to write (default: runs/stl10/METHOD)"
    )
    run.add_argument(
        "--resume",
        type=Path,
        metavar="FOLDER",
        help="continue the run in this folder exactly, from its checkpoint, with its settings",
    )
    add_arguments(run)

    compare = commands.add_parser("compare", help="one table and one plot of many runs")
    compare.add_argument("runs", nargs="+", type=Path, help="folders of finished runs")
    compare.add_argument(
        "--output", type=Path, default=Path("runs/comparison"), help="default: %(default)s"
    )

    export = commands.add_parser(
        "export",
        help="the backbone as a plain state dict",
        description="Writes the backbone's weights as a state dict with the names of torchvision's "
        "or timm's model.",
    )
    export.add_argument("run", type=Path, help="folder of a run")
    export.add_argument("output", type=Path, help="file to write, for example resnet50.pt")

    features = commands.add_parser(
        "features",
        help="features of images as .npz",
        description="Writes an .npz file with 'features' (N, D), 'labels' (N,) and 'classes'.",
    )
    features.add_argument("run", type=Path, help="folder of a run")
    features.add_argument("output", type=Path, help="file to write, ending in .npz")
    features.add_argument(
        "--split", choices=("train", "test"), default="test", help="which images (default: test)"
    )
    for name in ("data", "data_dir"):
        features.add_argument(
            f"--{name.replace('_', '-')}", help="other images than the run's, as in run"
        )
    return main


def run(arguments: argparse.Namespace) -> None:
    """Runs or resumes one run."""
    from benchmarks.stl10 import train

    overrides = given(arguments)
    if arguments.resume is None:
        files = [] if arguments.preset is None else [PRESETS / f"{arguments.preset}.yaml"]
        files += [] if arguments.config is None else [arguments.config]
        settings = resolve(files, overrides)
        folder = arguments.output or Path(
            "runs/stl10", settings.label.replace(", ", "-").replace(" ", "-")
        )
    else:
        other = [name for name in ("preset", "config", "output") if getattr(arguments, name)]
        if overrides or other:
            names = ", ".join(f"--{name.replace('_', '-')}" for name in [*other, *overrides])
            raise ValueError(
                f"--resume continues a run with its own settings, but {names} was given as well; "
                "leave it out, or start a new run."
            )
        folder = arguments.resume
        train.check_folder(folder, resume=True)
        settings = Settings(**read_file(folder / train.SETTINGS))
    try:
        results = train.run(settings, folder, resume=arguments.resume is not None)
    except (KeyboardInterrupt, SystemExit):
        print(f"\nInterrupted; continue with --resume {folder}", file=sys.stderr)
        raise
    if results:
        from benchmarks.stl10.report import evaluation_rows

        for title, value in evaluation_rows(results["accuracy"]):
            print(f"{title:40s} top-1 {value['top1']:6.2f}   top-5 {value['top5']:6.2f}")
        print(f"report: {folder / 'report.html'}")


def compare(arguments: argparse.Namespace) -> None:
    """Compares runs."""
    from benchmarks.stl10.report import write_comparison
    from benchmarks.stl10.train import METRICS, read_metrics, read_results

    folders = list(dict.fromkeys(arguments.runs))
    results = [read_results(folder) for folder in folders]
    labels = [r["label"] for r in results]
    # Runs of one method are told apart by their folders.
    last = [folder.name for folder in folders]
    short = len(set(last)) == len(last)
    places = last if short else [str(folder) for folder in folders]
    names = [
        label if labels.count(label) == 1 or place == label else f"{label} ({place})"
        for label, place in zip(labels, places, strict=True)
    ]
    metrics = [read_metrics(folder / METRICS) for folder in folders]
    runs = dict(zip(names, zip(results, metrics, strict=True), strict=True))
    print(write_comparison(arguments.output, runs))
    print(f"written to {arguments.output}")


def export(arguments: argparse.Namespace) -> None:
    """Exports a backbone."""
    from benchmarks.stl10.backbones import has_classifier, loading_code
    from benchmarks.stl10.train import load_run

    settings, method = load_run(arguments.run)
    weights = {name: value.clone() for name, value in method.backbone.state_dict().items()}
    with atomic_path(arguments.output) as path:
        torch.save(weights, path)
    print(f"{arguments.output}: {len(weights)} tensors of {settings.backbone}. To load it:")
    for line in loading_code(settings, method.backbone):
        print(f"  {line}")
    partly = has_classifier(settings)
    strict = ", strict=False" if partly else ""
    print(f"  model.load_state_dict(torch.load({str(arguments.output)!r}){strict})")
    if partly:
        print("strict=False because the classifier is not among them.")


def features(arguments: argparse.Namespace) -> None:
    """Extracts features."""
    from benchmarks.stl10.data import load_data
    from benchmarks.stl10.evaluate import read_features
    from benchmarks.stl10.train import load_run

    if arguments.output.suffix != ".npz":
        raise ValueError(f"output must end in .npz but is {arguments.output}.")
    settings, method = load_run(arguments.run)
    for name in ("data", "data_dir"):
        if getattr(arguments, name) is not None:
            setattr(settings, name, getattr(arguments, name))
    data = load_data(settings)
    if torch.cuda.is_available() and settings.accelerator != "cpu":
        method.cuda()
    images = data.train if arguments.split == "train" else data.test
    found, labels = read_features(method, images, settings, "features")
    with atomic_path(arguments.output) as path:
        np.savez(
            path, features=found.numpy(), labels=labels.numpy(), classes=np.array(data.classes)
        )
    print(f"{arguments.output}: features {tuple(found.shape)}, labels {tuple(labels.shape)}")


def main(arguments: Sequence[str] | None = None) -> None:
    """Runs a command.

    Args:
        arguments: The command line without the program's name; None means that of this process.

    Raises:
        SystemExit: If the input is not usable; the message says why.
    """
    parsed = parser().parse_args(arguments)
    command = {"run": run, "compare": compare, "export": export, "features": features}
    try:
        command[parsed.command](parsed)
    except (ValueError, TypeError, FileNotFoundError, FileExistsError, ImportError) as error:
        raise SystemExit(f"Error: {error}") from error


if __name__ == "__main__":
    main()
