"""The STL10 benchmark: pretrain, evaluate as in the paper, compare methods under one protocol.

python -m benchmarks.stl10 run --preset quick --method mvmr
python -m benchmarks.stl10 run --preset paper --data_dir data --download true --output runs/paper
python -m benchmarks.stl10 run --resume runs/paper
python -m benchmarks.stl10 compare runs/stl10/* --page runs/comparison.md
python -m benchmarks.stl10 export runs/paper resnet50.pt
python -m benchmarks.stl10 features runs/paper features.npz
python -m benchmarks.stl10 transfer resnet50.pt voc07 --backbone resnet50 --data_dir data
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
import yaml
from jsonargparse import ActionConfigFile, ArgumentParser, Namespace, set_loader

from benchmarks.harness import (
    Run,
    atomic_path,
    check_run,
    plain_errors,
    portable,
    record,
    write_json,
)
from benchmarks.harness.runs import read
from benchmarks.stl10.settings import PRESETS, Settings, read_yaml

set_loader("plain", read_yaml, exceptions=(yaml.YAMLError,))
Transfers = Literal["voc07", "classes"]


def parser() -> ArgumentParser:
    """Returns the parser of the command line; every setting is an option of run and transfer."""

    def sub(help: str, *positional: tuple[str, Any]) -> ArgumentParser:  # noqa: A002
        made = ArgumentParser(description=help, parser_mode="plain")
        for name, kind in positional:
            made.add_argument(name, type=kind)
        return made

    run = sub("pretrain, evaluate, and write a folder of results")
    run.add_class_arguments(Settings)
    run.add_argument("--config", action=ActionConfigFile, help="a file of settings, like a preset")
    run.add_argument("--output", type=Path | None, help="default: runs/stl10/METHOD")
    run.add_argument("--resume", type=Path | None, help="continue the run in this folder exactly")
    compare = sub("one table and one plot of many runs")
    compare.add_argument("runs", nargs="+", type=Path)
    compare.add_argument("--page", type=Path, default=Path("runs/comparison/comparison.md"))
    export = sub("the backbone's state dict", ("run", Path), ("output", Path))
    features = sub("features and labels as .npz", ("run", Path), ("output", Path))
    features.add_argument("--split", type=Literal["train", "test"], default="test")
    features.add_argument("--data", type=str | None, help="other images than the run's")
    features.add_argument("--data_dir", type=str | None)
    transfer = sub(
        "a linear classifier on an exported backbone", ("weights", Path), ("to", Transfers)
    )
    transfer.add_class_arguments(Settings)
    transfer.add_argument("--config", action=ActionConfigFile, help="a file of settings")
    transfer.add_argument("--classifier", type=Literal["svm", "linear"], default="svm")
    transfer.add_argument("--output", type=Path | None, help="file of the record (JSON)")
    main = ArgumentParser(
        prog="python -m benchmarks.stl10", description=__doc__, parser_mode="plain"
    )
    commands = main.add_subcommands()
    for name, made in {
        "run": run,
        "compare": compare,
        "export": export,
        "features": features,
        "transfer": transfer,
    }.items():
        commands.add_subcommand(name, made, help=made.description)
    return main


def settings_of(arguments: Namespace) -> Settings:
    """Returns the settings among parsed arguments."""
    names = Settings.__dataclass_fields__
    return Settings(**{k: v for k, v in arguments.as_dict().items() if k in names})


def run(arguments: Namespace, given: Sequence[str]) -> None:
    """Runs or resumes one run."""
    from benchmarks.stl10 import train
    from benchmarks.stl10.report import evaluation_rows

    if arguments.resume is None:
        settings = settings_of(arguments)
        name = settings.label.replace(", ", "-").replace(" ", "-")
        folder = arguments.output or Path("runs/stl10", name)
    else:
        others = [word for word in given if word.startswith("--") and "resume" not in word]
        if others:
            raise ValueError(
                f"--resume continues a run with its own settings, but {', '.join(others)} was given as "
                "well; leave it out, or start a new run."
            )
        folder = arguments.resume
        settings = train.read_settings(folder)
    try:
        result = train.run(settings, folder, resume=arguments.resume is not None)
    except (KeyboardInterrupt, SystemExit):
        print(f"\nInterrupted; continue with --resume {folder}", file=sys.stderr)
        raise
    if result:
        for title, value in evaluation_rows(result["figures"]["accuracy"]):
            print(f"{title:40s} top-1 {value['top1']:6.2f}   top-5 {value['top5']:6.2f}")
        print(f"report: {folder / 'report.md'}")


def compare(arguments: Namespace) -> None:
    """Compares runs."""
    from benchmarks.stl10.report import write_comparison

    folders = list(dict.fromkeys(arguments.runs))
    for folder in folders:
        if not (folder / "results.json").is_file():
            raise FileNotFoundError(
                f"{folder} has no results.json: it is no run, or one that is not finished; continue it "
                f"with --resume {folder}."
            )
    found = [read(folder / "results.json") for folder in folders]
    labels = [r["figures"]["label"] for r in found]
    # Runs of one method are told apart by their folders.
    names = [
        label if labels.count(label) == 1 else f"{label} ({portable(folder)})"
        for label, folder in zip(labels, folders, strict=True)
    ]
    print(write_comparison(arguments.page, dict(zip(names, found, strict=True))))
    print(f"written to {arguments.page}")


def export(arguments: Namespace) -> None:
    """Exports a backbone."""
    from benchmarks.stl10.methods import loading_code
    from benchmarks.stl10.train import load_run

    settings, method = load_run(arguments.run)
    weights = {name: value.clone() for name, value in method.backbone.state_dict().items()}
    with atomic_path(arguments.output) as path:
        torch.save(weights, path)
    lines = loading_code(settings)
    # torchvision's models have a classifier, which is not among the weights.
    strict = ", strict=False" if "torchvision" in lines[0] else ""
    print(f"{arguments.output}: {len(weights)} tensors of {settings.backbone}. To load it:")
    for line in [*lines, f"model.load_state_dict(torch.load({str(arguments.output)!r}){strict})"]:
        print(f"  {line}")


def features(arguments: Namespace) -> None:
    """Extracts features."""
    from benchmarks.stl10.data import load_data
    from benchmarks.stl10.evaluate import features_of
    from benchmarks.stl10.train import load_run

    if arguments.output.suffix != ".npz":
        raise ValueError(f"output must end in .npz but is {arguments.output}.")
    settings, method = load_run(arguments.run)
    settings.data = arguments.data or settings.data
    settings.data_dir = arguments.data_dir or settings.data_dir
    settings.labels = []  # whose folds are the evaluation's alone
    data = load_data(settings)
    found, labels = features_of(
        _placed(method.backbone, settings), getattr(data, arguments.split), settings, "features"
    )
    with atomic_path(arguments.output) as path:
        np.savez(
            path, features=found.numpy(), labels=labels.numpy(), classes=np.array(data.classes)
        )
    print(f"{arguments.output}: features {tuple(found.shape)}, labels {tuple(labels.shape)}")


def transfer(arguments: Namespace) -> None:
    """Evaluates an exported backbone on VOC07, or on any data set of the settings."""
    from benchmarks.common.checkpoints import contents_of
    from benchmarks.stl10.data import load_data
    from benchmarks.stl10.evaluate import evaluate
    from benchmarks.stl10.methods import build_backbone
    from benchmarks.stl10.transfer import voc07

    settings = settings_of(arguments)
    told = {**settings.as_dict(), "weights": arguments.weights, "to": arguments.to}
    told["classifier"] = arguments.classifier
    planned = Run((arguments.output or arguments.weights).stem, told, settings.seed)
    check_run(planned)
    backbone, _ = build_backbone(settings)
    what = (
        f"weights of {settings.backbone!r} with the stem {settings.stem!r}, as export writes them,"
    )
    with contents_of(arguments.weights, what) as weights:
        backbone.load_state_dict(weights)
    backbone = _placed(backbone.eval(), settings)
    if arguments.to == "voc07":
        figures = voc07(backbone, settings, arguments.classifier)
        print(f"VOC07 mAP {figures['map']:.2f}")
    else:
        figures = {"accuracy": evaluate(backbone, load_data(settings), settings)[0]}
        print(f"linear top-1 {figures['accuracy']['linear']['top1']:.2f}")
    if arguments.output is not None:
        write_json(arguments.output, record(planned, figures))


def _placed(backbone: torch.nn.Module, settings: Settings) -> torch.nn.Module:
    """Returns a backbone where it computes fastest."""
    gpu = torch.cuda.is_available() and settings.accelerator != "cpu"
    return backbone.to("cuda" if gpu else "cpu")


def with_presets(words: Sequence[str]) -> list[str]:
    """Returns a command line with a preset's file in the place of its name.

    Examples:
        >>> with_presets(["run", "--preset", "quick"])[1].rpartition("/")[2]
        'quick.yaml'
    """
    joined = list(words)
    while "--preset" in joined[:-1]:
        place = joined.index("--preset")
        joined[place : place + 2] = [f"--preset={joined[place + 1]}"]
    return [
        f"--config={PRESETS / word.partition('=')[2]}.yaml"
        if word.startswith("--preset=")
        else word
        for word in joined
    ]


def main(arguments: Sequence[str] | None = None) -> None:
    """Runs a command.

    Args:
        arguments: The command line without the program's name; None means that of this process.

    Raises:
        SystemExit: If the input is not usable; the message says why.
    """
    given = list(sys.argv[1:] if arguments is None else arguments)
    with plain_errors():
        parsed = parser().parse_args(with_presets(given))
        chosen = parsed[parsed.subcommand]
        if parsed.subcommand == "run":
            run(chosen, given[1:])
        else:
            commands = {"compare": compare, "export": export, "features": features}
            {**commands, "transfer": transfer}[parsed.subcommand](chosen)


if __name__ == "__main__":
    main()
