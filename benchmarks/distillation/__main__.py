"""Distils teachers into small students, by this package and its peers, at an equal budget.

    python -m benchmarks.distillation --train CIFAR/train --test CIFAR/test

For each teacher, each method's options are chosen on training images held out for that, with the
smallest student; then every method trains students of each size and length, with every seed. A run
whose file is there is not repeated: the same command continues after a stop.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from benchmarks.common.data import Data
from benchmarks.common.encoder import check_widths
from benchmarks.common.evaluation import evaluate_features
from benchmarks.common.frozen import evaluate_frozen, load_photographs
from benchmarks.distillation.methods import METHODS, WITH_RATES
from benchmarks.distillation.report import write_report
from benchmarks.distillation.training import (
    STUDENTS,
    TEACHERS,
    ready_teacher,
    teacher_embeddings,
    train_student,
)
from benchmarks.harness import Run, place_of_best, plain_errors, run_all, run_in_processes
from benchmarks.plain_pytorch.training import check_training, load_data, normalize

FOLDER = Path(__file__).parent
# While options are chosen, one in five training images is held out.
HELD_OUT = 5
# What makes a run's result beside teacher, student, epochs, method and its options.
COMMON = ("train", "test", "image_size", "limit", "batch_size", "color_jitter")


def planned(settings: argparse.Namespace) -> Iterator[Run]:
    """Yields the runs in order: what a method's options are chosen by, then one seed after another."""
    images = {name: getattr(settings, name) for name in COMMON}
    # Where each method has a learning rate of its own, the results stand beside the others.
    own_rates = settings.learning_rates is not None
    told_rates = {"learning_rates": settings.learning_rates} if own_rates else {}

    def run(place: str, teacher: str, student: str, epochs: int, method: str, **rest: Any) -> Run:
        told = {"teacher": teacher, "student": student, "epochs": epochs, "method": method}
        told |= {"bf16": True} if settings.bf16 else {}
        held = {"held_out": HELD_OUT} if place.startswith("selection") else {}
        options, rate = rest["tried"]
        told |= {"options": options, **held, **common, "learning_rate": rate, **told_rates}
        return Run(f"{folder}/{student}-{epochs}/{place}", told, rest["seed"])

    for teacher in settings.teachers:
        folder = f"{teacher}-rates" if own_rates else teacher
        common = {**images, **teacher_settings(teacher, settings)}
        # By the smallest, whichever students are asked for: a run's name does not tell.
        small = next(iter(STUDENTS))
        for method in settings.methods:
            for i, tried in enumerate(tries(method, settings)):
                place = f"selection/{method}-{i}"
                epochs = settings.selection_epochs
                yield run(place, teacher, small, epochs, method, tried=tried, seed=0)
        made = settings.output / "results" / folder
        made = made / f"{small}-{settings.selection_epochs}" / "selection"
        for epochs in settings.epochs:
            for student in settings.students:
                for seed in settings.seeds:
                    for method in settings.methods:
                        best = chosen(method, made, settings)
                        place = f"{method}-seed{seed}"
                        yield run(place, teacher, student, epochs, method, tried=best, seed=seed)
        if not own_rates:
            told = {"teacher": teacher, **common, "learning_rate": settings.learning_rate}
            yield Run(f"{teacher}/teacher", told, 0)


def teacher_settings(teacher: str, settings: argparse.Namespace) -> dict[str, Any]:
    """Returns what a teacher depends on that is trained here."""
    if teacher != "small_resnet":
        return {}
    return {name: getattr(settings, name) for name in ("teacher_widths", "teacher_epochs")}


def tries(method: str, settings: argparse.Namespace) -> list[tuple[Mapping[str, Any], float]]:
    """Returns what is tried of a method: candidates, each with each learning rate."""
    if settings.learning_rates is None:
        return [(options, settings.learning_rate) for options in METHODS[method].candidates]
    return [(options, rate) for options in WITH_RATES[method] for rate in settings.learning_rates]


def chosen(
    method: str, folder: Path, settings: argparse.Namespace
) -> tuple[Mapping[str, Any], float]:
    """Returns the try of the best linear accuracy on held-out training images."""
    tried = tries(method, settings)
    paths = [folder / f"{method}-{i}.json" for i in range(len(tried))]
    return tried[place_of_best(paths, "accuracy", "linear")]


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


class Study:
    """Trains and evaluates students; images are read, and a teacher asked, when the first run needs it.

    Args:
        settings: As :func:`parse_arguments` gives them.
    """

    def __init__(self, settings: argparse.Namespace) -> None:
        self.settings = settings
        self._data: tuple[Data, Data, Data] | None = None
        self._embeddings: tuple[str, torch.Tensor] = ("", torch.empty(0))

    def images(self) -> tuple[Data, Data, Data]:
        """Returns all images, the training images with a part of them to test on, photographs."""
        if self._data is None:
            data = read(self.settings)
            held = self.held_out(data)
            selection = Data(
                data.train_images[~held],
                data.train_labels[~held],
                data.train_images[held],
                data.train_labels[held],
                data.classes,
            )
            photographs = load_photographs(self.settings.image_size, self.settings.limit)
            self._data = data, selection, photographs
        return self._data

    @staticmethod
    def held_out(data: Data) -> torch.Tensor:
        """Returns which training images are held out while options are chosen."""
        return torch.arange(len(data.train_labels)) % HELD_OUT == HELD_OUT - 1

    def embeddings(self, teacher: str) -> torch.Tensor:
        """Returns a teacher's embeddings of all training images."""
        if self._embeddings[0] != teacher:
            data = self.images()[0]
            if teacher == "small_resnet":
                ready_teacher(data, self.settings)
            embeddings = teacher_embeddings(teacher, data.train_images, "train", self.settings)
            self._embeddings = teacher, embeddings
        return self._embeddings[1]

    def judge_teacher(self, teacher: str) -> dict[str, Any]:
        """Returns the figures of a teacher's own features."""
        data, train = self.images()[0], self.embeddings(teacher)
        test = teacher_embeddings(teacher, data.test_images, "test", self.settings)
        accuracy = evaluate_features(train, data.train_labels, test, data.test_labels)
        top1 = {probe: values["top1"] for probe, values in accuracy.items()}
        return {"accuracy": top1, "width": train.shape[1]}

    def run(self, run: Run) -> dict[str, Any]:
        """Trains the student of a run, or judges the teacher, and returns the figures."""
        if "student" not in run.settings:
            return self.judge_teacher(run.settings["teacher"])
        data, selection, photographs = self.images()
        embeddings = self.embeddings(run.settings["teacher"])
        choosing = "held_out" in run.settings
        if choosing:
            embeddings = embeddings[~self.held_out(data)]
        images = selection if choosing else data
        encoder, costs = train_student(
            run.settings, images, embeddings, run.seed or 0, self.settings.device
        )
        accuracy = evaluate_frozen(
            encoder,
            images,
            normalize,
            photographs=photographs,
            damaged=not choosing,
            device=self.settings.device,
            seed=run.seed or 0,
        )
        return {"accuracy": accuracy, **costs}


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
    add("--learning-rates", type=float, nargs="+", help="choose each method's among these")
    add("--color-jitter", type=float, default=0.4, help="strength of the colour augmentation")
    add("--teacher-widths", type=int, nargs="+", default=[64, 128, 256], help="of small_resnet")
    add("--teacher-epochs", type=int, default=12, help="of the training of small_resnet")
    add("--seeds", type=int, nargs="+", default=[0, 1, 2], help="a student of each method for each")
    add("--methods", nargs="+", choices=METHODS, default=list(METHODS), metavar="METHOD")
    add("--runs", type=int, help="stop after this many students; None is all")
    add("--minutes", type=float, help="begin no student later; None is no end")
    add("--jobs", type=int, default=1, help="so many processes share the plan")
    add("--output", type=Path, default=FOLDER, help="where results and tables are")
    add("--work", type=Path, default=Path("runs/distillation"), help="where features are kept")
    add("--bf16", action="store_true", help="run students in bfloat16 where autocast has it so")
    add("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="where to compute")
    settings = parser.parse_args(arguments)
    minima = {"image_size": 8, "selection_epochs": 1, "teacher_epochs": 1}
    minima |= {"batch_size": 4, "limit": 20, "runs": 1, "jobs": 1}
    check_training(parser, settings, minima)
    if settings.learning_rates is not None:
        if min(settings.learning_rates) <= 0:
            parser.error(f"--learning-rates must be above 0 but are {settings.learning_rates}.")
        unknown = [name for name in settings.methods if name not in WITH_RATES]
        if unknown:
            parser.error(
                f"--learning-rates is for --methods {' '.join(WITH_RATES)}, not {unknown[0]}."
            )
    if min(settings.epochs) < 1:
        parser.error(f"--epochs must be at least 1 but are {settings.epochs}.")
    try:
        check_widths("--teacher-widths", settings.teacher_widths)
    except ValueError as error:
        parser.error(str(error))
    return settings


def main(arguments: Sequence[str] | None = None) -> None:
    """Runs the command line; what is wrong with it or the images becomes one sentence."""
    arguments = sys.argv[1:] if arguments is None else arguments
    settings = parse_arguments(arguments)
    if settings.jobs > 1:
        run_in_processes(settings.jobs, ["benchmarks.distillation", *arguments, "--jobs", "1"])
        write_report(settings.output)
        return
    study = Study(settings)
    try:
        with plain_errors():
            complete = run_all(
                planned(settings),
                settings.output / "results",
                study.run,
                limit=settings.runs,
                minutes=settings.minutes,
            )
    finally:
        write_report(settings.output)
    print("complete" if complete else "not complete yet: run the same command again to continue")


if __name__ == "__main__":
    main()
