"""Distils a teacher into a small student, by MV-MR and its peers, at an equal budget.

    python -m benchmarks.distillation --train CIFAR/train --test CIFAR/test

Four parts, in this order: a teacher is trained on the labels; each method's option is chosen on
training images held out for that; variants of MV-MR are tried on them; every method trains a student
on all training images, with every seed. Each result is a file of its own, written when its run ends,
and a run whose file is there is not repeated: the same command continues after a stop.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch

from benchmarks.common.encoder import check_widths
from benchmarks.distillation.methods import METHODS, VARIANTS
from benchmarks.distillation.report import write_report
from benchmarks.distillation.training import ready_teacher, teacher_embeddings, train_student
from benchmarks.harness.records import environment, portable, write_json
from benchmarks.plain_pytorch.training import Data, check_training, load_data

FOLDER = Path(__file__).parent
EPOCHS = 6
# While options are chosen, one in five training images is held out.
HELD_OUT = 5
# What does not change the result of a run.
INCIDENTAL = {"seed", "seeds", "methods", "runs", "output", "work", "device"}


class Run(NamedTuple):
    """A student to train, and the file of its result; without options those chosen are taken.

    With options, it is trained without the held-out images, and judged on them.
    """

    path: Path
    method: str
    options: Mapping[str, Any] | None
    seed: int


def planned(settings: argparse.Namespace) -> Iterator[Run]:
    """Yields the runs in order."""
    results = settings.output / "results"
    for method in settings.methods:
        for i, options in enumerate(METHODS[method].candidates):
            yield Run(results / "selection" / f"{method}-{i}.json", method, options, 0)
    if "mvmr" in settings.methods:
        for name, changes in VARIANTS.items():
            options = {"layers": 0, "teacher": True, **changes}
            yield Run(results / "variants" / f"{name}.json", "mvmr", options, 0)
    for seed in settings.seeds:
        for method in settings.methods:
            yield Run(results / f"{method}-seed{seed}.json", method, None, seed)


def chosen(method: str, results: Path) -> Mapping[str, Any]:
    """Returns the candidate of the best linear accuracy on held-out training images."""
    candidates = METHODS[method].candidates
    accuracy = [
        json.loads((results / "selection" / f"{method}-{i}.json").read_text())["accuracy"]
        for i in range(len(candidates))
    ]
    best = max(range(len(candidates)), key=lambda i: accuracy[i]["linear"]["top1"])
    return candidates[best]


def settings_of(settings: argparse.Namespace) -> dict[str, Any]:
    """Returns the settings that make a run's result, as they are written."""
    return {k: portable(v) for k, v in vars(settings).items() if k not in INCIDENTAL}


def read(settings: argparse.Namespace) -> Data:
    """Reads the images; with a limit, about that many of each split, of all classes."""
    data = load_data(settings)
    if settings.limit is not None:
        train, test = (
            slice(None, None, max(1, len(labels) // settings.limit))
            for labels in (data.train_labels, data.test_labels)
        )
        data = Data(
            data.train_images[train].clone(),
            data.train_labels[train],
            data.test_images[test].clone(),
            data.test_labels[test],
            data.classes,
        )
    return data


def run_missing(settings: argparse.Namespace) -> bool:
    """Makes the results that are not there yet, at most ``settings.runs`` students.

    Args:
        settings: As :func:`parse_arguments` gives them.

    Returns:
        Whether all are there now.

    Raises:
        ValueError: If a result is there that other settings or another teacher made.
    """
    results = settings.output / "results"
    data = read(settings)
    teacher = ready_teacher(data, settings)
    wanted = {"settings": settings_of(settings), "teacher": teacher["fingerprint"]}
    if not _kept(results / "teacher.json", {"fingerprint": teacher["fingerprint"]}):
        write_json(results / "teacher.json", {**teacher, **environment(), "seed": 0})
    missing = [run for run in planned(settings) if not _kept(run.path, wanted)]
    if missing:
        embeddings = teacher_embeddings(data, settings)
        held = torch.arange(len(data.train_labels)) % HELD_OUT == HELD_OUT - 1
        selection = Data(
            data.train_images[~held],
            data.train_labels[~held],
            data.train_images[held],
            data.train_labels[held],
            data.classes,
        )
    for run in missing[: settings.runs]:
        print(f"{run.path.stem}: running", flush=True)
        settings.seed = run.seed
        choosing = run.options is not None
        options = chosen(run.method, results) if run.options is None else run.options
        result = train_student(
            run.method,
            options,
            selection if choosing else data,
            embeddings[~held] if choosing else embeddings,
            settings.selection_epochs if choosing else settings.epochs,
            settings,
        )
        write_json(
            run.path,
            {
                "method": run.method,
                "options": options,
                **result,
                **wanted,
                **environment(),
                "seed": run.seed,
            },
        )
        write_report(settings.output)
    if not missing:
        write_report(settings.output)
    return settings.runs is None or len(missing) <= settings.runs


def _kept(path: Path, wanted: dict[str, Any]) -> bool:
    """Tells whether a result is there, after checking what made it."""
    if not path.exists():
        return False
    result = json.loads(path.read_text())
    for name, value in wanted.items():
        if result[name] != value:
            raise ValueError(
                f"{portable(path)} was made with other settings or by another teacher; give another "
                f"--output or remove it. ({name} was {result[name]} and is {value}.)"
            )
    return True


def parse_arguments(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """Reads and checks the command line."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.distillation",
        description="Distils a teacher into a small student, by MV-MR and its peers, at an equal "
        "budget, on folders of images, or on photographs that come with scikit-image.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    add = parser.add_argument
    add("--train", type=Path, help="folder of training images, one folder a class")
    add("--test", type=Path, help="folder of test images, with the same classes")
    add("--image-size", type=int, default=32, help="side in pixels that images are resized to")
    add("--limit", type=int, help="use about this many images of each split")
    add("--epochs", type=int, default=EPOCHS, help="of a student")
    add("--selection-epochs", type=int, default=EPOCHS // 2, help="while options are chosen")
    add("--batch-size", type=int, default=128, help="images a step")
    add("--learning-rate", type=float, default=2e-3, help="Adam's largest learning rate")
    add("--color-jitter", type=float, default=0.4, help="strength of the colour augmentation")
    add("--student-widths", type=int, nargs="+", default=[16, 32, 64], help="of SmallResNet")
    add("--teacher-widths", type=int, nargs="+", default=[64, 128, 256], help="of SmallResNet")
    add("--teacher-epochs", type=int, default=12, help="of the teacher's own training")
    add("--seeds", type=int, nargs="+", default=[0, 1, 2], help="a student of each method for each")
    add(
        "--methods",
        nargs="+",
        choices=METHODS,
        default=list(METHODS),
        metavar="METHOD",
        help="these only; the variants belong to mvmr",
    )
    add("--runs", type=int, help="stop after this many students; None is all")
    add("--output", type=Path, default=FOLDER, help="where results, table and plot are")
    add("--work", type=Path, default=Path("runs/distillation"), help="where the teacher is")
    add("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="where to compute")
    settings = parser.parse_args(arguments)
    minima = {"image_size": 8, "epochs": 1, "selection_epochs": 1, "teacher_epochs": 1}
    minima |= {"batch_size": 4, "limit": 20, "runs": 1}
    check_training(parser, settings, minima)
    try:
        check_widths("--student-widths", settings.student_widths)
        check_widths("--teacher-widths", settings.teacher_widths)
    except ValueError as error:
        parser.error(str(error))
    return settings


def main(arguments: Sequence[str] | None = None) -> None:
    """Runs the command line; what is wrong with it or the images becomes one sentence."""
    settings = parse_arguments(arguments)
    try:
        complete = run_missing(settings)
    except (ImportError, OSError, TypeError, ValueError) as error:
        raise SystemExit(f"Error: {error}") from error
    except KeyboardInterrupt:
        raise SystemExit("Interrupted: run the same command again to continue.") from None
    print("complete" if complete else "not complete yet: run the same command again to continue")


if __name__ == "__main__":
    main()
