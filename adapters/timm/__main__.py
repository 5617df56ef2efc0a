"""Runs timm's unmodified training script with this term in place of its feature distillation.

In a checkout of timm: ``python -m mvmr_loss.adapters.timm train.py --kd-distill-type feature
--kd-model-name TEACHER ...``
"""

from __future__ import annotations

import argparse
import functools
import runpy
import sys
from collections.abc import Sequence
from pathlib import Path

import timm.task

from ..options import option  # noqa: TID252 - of the same checkout
from . import DependenceDistillationTask

# Arguments of the task that the script does not give.
OPTIONS = ("distillation", "loss", "representations")


def parse_arguments(arguments: Sequence[str]) -> argparse.Namespace:
    """Reads the options before the script; those after it are the script's."""
    parser = argparse.ArgumentParser(
        prog="python -m mvmr_loss.adapters.timm",
        description="Runs timm's train.py, whose '--kd-distill-type feature' is regression through a "
        "head and dependence then.",
        epilog="example: %(prog)s --task 'distillation={\"dependence_weight\": 0.3}' train.py "
        "--data-dir DATA --model resnet18 --kd-model-name resnet50 --kd-distill-type feature",
    )
    parser.add_argument(
        "--task",
        metavar="NAME=VALUE",
        type=option,
        action="append",
        default=[],
        help="an argument of DependenceDistillationTask, 'distillation', 'loss' or 'representations', "
        "its value a string or JSON; may be repeated; needs '--kd-distill-type feature'",
    )
    parser.add_argument("script", type=Path, help="train.py of a checkout of timm")
    parser.add_argument("script_options", nargs=argparse.REMAINDER, help="options of the script")
    return parser.parse_args(arguments)


def _refuse_other_tasks() -> None:
    """Has timm's other tasks end the program: which one is made, a configuration file may say, too."""

    def refuse(self: object, *_: object, **__: object) -> None:
        raise SystemExit(
            "Error: --task must be left out but for feature distillation, but the script trains by "
            f"{type(self).__name__}; give it --kd-model-name TEACHER --kd-distill-type feature."
        )

    base, own = timm.task.TrainingTask, timm.task.FeatureDistillationTask
    for name, value in list(vars(timm.task).items()):
        if isinstance(value, type) and issubclass(value, base) and value not in (base, own):
            setattr(timm.task, name, type(name, (value,), {"__init__": refuse}))


def main(arguments: Sequence[str]) -> None:
    """Runs the script.

    Args:
        arguments: The command line without the program's name.

    Raises:
        SystemExit: If there is no such script, an option is none of the task's, or there are options
            but the script has another task.
    """
    settings = parse_arguments(arguments)
    if not settings.script.is_file():
        raise SystemExit(
            f"Error: {settings.script} must be a Python script but is none; give the path of train.py "
            "in a checkout of timm."
        )
    options = dict(settings.task)
    for name in options:
        if name not in OPTIONS:
            raise SystemExit(f"Error: --task must be {'=..., '.join(OPTIONS)}=... but is {name}.")
    if options:
        _refuse_other_tasks()
    # The script imports it by name, and its neighbours before all else.
    task = functools.partial(DependenceDistillationTask, **options)
    timm.task.FeatureDistillationTask = task  # type: ignore[assignment, misc]
    sys.argv = [str(settings.script), *settings.script_options]
    sys.path.insert(0, str(settings.script.resolve().parent))
    runpy.run_path(str(settings.script), run_name="__main__")


if __name__ == "__main__":
    main(sys.argv[1:])
