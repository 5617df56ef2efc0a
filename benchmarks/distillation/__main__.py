"""Distils teachers into small students, by this package and its peers, at an equal budget.

    python -m benchmarks.distillation --train CIFAR/train --test CIFAR/test

For each teacher, each method's options are chosen on training images held out for that; then every
method trains students of each size and length, with every seed. Each result is a file of its own,
written when its run ends, and a run whose file is there is not repeated: the same command continues
after a stop, the most telling runs first.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch

from benchmarks.common.encoder import check_widths
from benchmarks.common.results import environment, portable, write_json
from benchmarks.distillation.evaluation import evaluate_student, load_photographs
from benchmarks.distillation.methods import METHODS
from benchmarks.distillation.report import write_report
from benchmarks.distillation.training import (
    STUDENTS,
    TEACHERS,
    ready_teacher,
    teacher_embeddings,
    train_student,
)
from benchmarks.plain_pytorch.training import Data, check_training, load_data

FOLDER = Path(__file__).parent
# While options are chosen, one in five training images is held out.
HELD_OUT = 5
# What makes a run's result beside what its file's place says.
TELLING = ("train", "test", "image_size", "limit", "batch_size", "learning_rate", "color_jitter")


class Run(NamedTuple):
    """A student to train; without options those chosen are taken.

    With options, it is trained without the held-out images, and judged on them.
    """

    teacher: str
    student: str
    epochs: int
    method: str
    options: Mapping[str, Any] | None
    seed: int
    name: str

    def path(self, output: Path) -> Path:
        """Returns the file of its result."""
        return output / "results" / self.teacher / f"{self.student}-{self.epochs}" / self.name


def planned(settings: argparse.Namespace) -> Iterator[Run]:
    """Yields the runs in order: seeds outermost, so that every method has one early."""
    for teacher in settings.teachers:
        for method in settings.methods:
            for i, options in enumerate(METHODS[method].candidates):
                name = f"selection/{method}-{i}.json"
                yield Run(
                    *(teacher, settings.students[0], settings.selection_epochs),
                    *(method, options, 0, name),
                )
        for epochs in settings.epochs:
            for student in settings.students:
                for seed in settings.seeds:
                    for method in settings.methods:
                        name = f"{method}-seed{seed}.json"
                        yield Run(teacher, student, epochs, method, None, seed, name)


def chosen(run: Run, settings: argparse.Namespace) -> Mapping[str, Any]:
    """Returns the method's candidate of the best linear accuracy on held-out training images."""
    candidates = METHODS[run.method].candidates
    tried = run._replace(student=settings.students[0], epochs=settings.selection_epochs)
    accuracy = []
    for i in range(len(candidates)):
        path = tried._replace(name=f"selection/{run.method}-{i}.json").path(settings.output)
        accuracy.append(json.loads(path.read_text())["accuracy"]["linear"])
    return candidates[accuracy.index(max(accuracy))]


def read(settings: argparse.Namespace) -> Data:
    """Reads the images; with a limit, about that many of each split, of all classes."""
    data = load_data(settings)
    if settings.limit is None:
        return data
    train, test = (
        slice(None, None, max(1, len(labels) // settings.limit))
        for labels in (data.train_labels, data.test_labels)
    )
    return Data(
        data.train_images[train].clone(),
        data.train_labels[train],
        data.test_images[test].clone(),
        data.test_labels[test],
        data.classes,
    )


def run_missing(settings: argparse.Namespace) -> bool:
    """Makes the results that are not there yet, at most ``settings.runs`` students.

    Args:
        settings: As :func:`parse_arguments` gives them.

    Returns:
        Whether all are there now.

    Raises:
        ValueError: If a result is there that other settings made.
    """
    wanted = {name: portable(getattr(settings, name)) for name in TELLING}
    missing = [run for run in planned(settings) if not _kept(run.path(settings.output), wanted)]
    teacher, embeddings = "", torch.empty(0)
    if missing:
        data, photographs = read(settings), load_photographs(settings.image_size)
        held = torch.arange(len(data.train_labels)) % HELD_OUT == HELD_OUT - 1
        selection = Data(
            data.train_images[~held],
            data.train_labels[~held],
            data.train_images[held],
            data.train_labels[held],
            data.classes,
        )
    for run in missing[: settings.runs]:
        path = run.path(settings.output)
        print(path.relative_to(settings.output), flush=True)
        if run.teacher != teacher:
            teacher = settings.teacher = run.teacher
            if teacher == "small_resnet":
                record = ready_teacher(data, settings)
                write_json(path.parents[1] / "teacher.json", {**record, **environment(0)})
            embeddings = teacher_embeddings(data, settings)
        settings.seed, settings.student = run.seed, run.student
        choosing = run.options is not None
        options = chosen(run, settings) if run.options is None else run.options
        images = selection if choosing else data
        encoder, costs = train_student(
            run.method,
            options,
            images,
            embeddings[~held] if choosing else embeddings,
            run.epochs,
            settings,
        )
        accuracy = evaluate_student(
            encoder, images, None if choosing else photographs, settings.device, run.seed
        )
        result = {"method": run.method, "options": options, "accuracy": accuracy, **costs}
        write_json(path, {**result, "settings": wanted, **environment(run.seed)})
        write_report(settings.output)
    if not missing:
        write_report(settings.output)
    return settings.runs is None or len(missing) <= settings.runs


def _kept(path: Path, wanted: dict[str, Any]) -> bool:
    """Tells whether a result is there, after checking what made it."""
    if not path.exists():
        return False
    found = json.loads(path.read_text())["settings"]
    if found != wanted:
        raise ValueError(
            f"{portable(path)} was made with other settings; give another --output or remove it. "
            f"(They were {found} and are {wanted}.)"
        )
    return True


def parse_arguments(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """Reads and checks the command line."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.distillation",
        description="Distils teachers into small students, by this package and its peers, at an "
        "equal budget, on folders of images, or on photographs that come with scikit-image.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    add = parser.add_argument
    add("--train", type=Path, help="folder of training images, one folder a class")
    add("--test", type=Path, help="folder of test images, with the same classes")
    add("--image-size", type=int, default=32, help="side in pixels that images are resized to")
    add("--limit", type=int, help="use about this many images of each split")
    add("--teachers", nargs="+", choices=TEACHERS, default=list(TEACHERS), help="in this order")
    add("--students", nargs="+", choices=STUDENTS, default=list(STUDENTS), help="in this order")
    add("--epochs", type=int, nargs="+", default=[6, 12, 30], help="of the students, in this order")
    add("--selection-epochs", type=int, default=3, help="while options are chosen")
    add("--batch-size", type=int, default=128, help="images a step")
    add("--learning-rate", type=float, default=2e-3, help="Adam's largest learning rate")
    add("--color-jitter", type=float, default=0.4, help="strength of the colour augmentation")
    add("--teacher-widths", type=int, nargs="+", default=[64, 128, 256], help="of small_resnet")
    add("--teacher-epochs", type=int, default=12, help="of the training of small_resnet")
    add("--seeds", type=int, nargs="+", default=[0, 1, 2], help="a student of each method for each")
    add("--methods", nargs="+", choices=METHODS, default=list(METHODS), metavar="METHOD")
    add("--runs", type=int, help="stop after this many students; None is all")
    add("--output", type=Path, default=FOLDER, help="where results, table and plot are")
    add("--work", type=Path, default=Path("runs/distillation"), help="where features are kept")
    add("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="where to compute")
    settings = parser.parse_args(arguments)
    minima = {"image_size": 8, "selection_epochs": 1, "teacher_epochs": 1}
    minima |= {"batch_size": 4, "limit": 20, "runs": 1}
    check_training(parser, settings, minima)
    if min(settings.epochs) < 1:
        parser.error(f"--epochs must be at least 1 but are {settings.epochs}.")
    try:
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
