"""Runs an unmodified benchmark script of lightly with MV-MR among its methods.

In a checkout of lightly: ``python -m mvmr_loss.adapters.lightly
benchmarks/imagenet/resnet50/main.py --methods mvmr ...``
"""

from __future__ import annotations

import argparse
import importlib.util
import inspect
import sys
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path
from types import ModuleType
from typing import Any

from ..options import option  # noqa: TID252 - of the same checkout
from . import MVMR, MVMRTransform, MVMRViT


def load_script(path: Path) -> ModuleType:
    """Imports a script of lightly's benchmarks as Python would run it, but for its last lines.

    Args:
        path: A ``main.py`` with a table ``METHODS``, a ``parser`` and a function ``main``.

    Returns:
        The module.

    Raises:
        SystemExit: If there is no such script, it cannot be imported or lacks one of these.
    """
    remedy = "give the path of benchmarks/imagenet/resnet50/main.py in a checkout of lightly"
    spec = importlib.util.spec_from_file_location(path.stem, path)
    if not path.is_file() or spec is None or spec.loader is None:
        raise SystemExit(f"Error: {path} must be a Python script but is none; {remedy}.")
    # The script's neighbours are its imports.
    sys.path.insert(0, str(path.resolve().parent))
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    try:
        spec.loader.exec_module(module)
    except ImportError as error:
        raise SystemExit(
            f"Error: {path} cannot be imported with lightly {version('lightly')}: {error}. Install "
            "what it misses, or use the checkout of the installed version (its tag is "
            f"v{version('lightly')})."
        ) from error
    expected = {"METHODS": dict, "parser": argparse.ArgumentParser}
    lacking = [n for n, kind in expected.items() if not isinstance(getattr(module, n, None), kind)]
    lacking += [] if callable(getattr(module, "main", None)) else ["main"]
    if lacking:
        raise SystemExit(
            f"Error: {path} must have METHODS, parser and main, as lightly's benchmarks do, but "
            f"has no {', '.join(lacking)}; {remedy}."
        )
    return module


def method_entry(
    vit: bool, model_options: dict[str, Any], transform_options: dict[str, Any]
) -> dict[str, Any]:
    """Returns the entry of MV-MR for the table of methods.

    Args:
        vit: Whether the script is one for ViTs.
        model_options: Arguments of :class:`~mvmr_loss.adapters.lightly.MVMR`.
        transform_options: Arguments of ``MVMRTransform.imagenet``.

    Returns:
        The model's class, as the scripts inspect its signature, and the transform.

    Raises:
        TypeError: If an option is unknown.
        ValueError: If an option of the transform is out of range.
    """
    base = MVMRViT if vit else MVMR
    known = list(inspect.signature(MVMR).parameters)[2:]
    for name in model_options:
        if name not in known:
            raise TypeError(f"--model has no option {name!r}; its options are {', '.join(known)}.")

    class ConfiguredMVMR(base):  # type: ignore[misc, valid-type]
        # The parameters that the scripts look for, by name, as Lightning does for checkpoints.
        def __init__(
            self,
            batch_size_per_device: int,
            num_classes: int,
            knn_k: int | None = None,
            knn_t: float = 0.1,
        ) -> None:
            given = {"knn_k": knn_k, "knn_t": knn_t, **model_options}
            super().__init__(batch_size_per_device, num_classes, **given)

    return {
        "model": ConfiguredMVMR if model_options else base,
        "transform": MVMRTransform.imagenet(**transform_options),
    }


def parse_arguments(arguments: Sequence[str]) -> argparse.Namespace:
    """Reads the options before the script; those after it are the script's."""
    parser = argparse.ArgumentParser(
        prog="python -m mvmr_loss.adapters.lightly",
        description="Runs a benchmark script of lightly with 'mvmr' added to its METHODS.",
        epilog="example: %(prog)s --model lr=0.0002 "
        "lightly/benchmarks/imagenet/resnet50/main.py --methods mvmr --epochs 100",
    )
    add = parser.add_argument
    add(
        "--model",
        metavar="NAME=VALUE",
        type=option,
        action="append",
        default=[],
        help="an argument of MVMR, its value a string or JSON; may be repeated",
    )
    add(
        "--transform",
        metavar="NAME=VALUE",
        type=option,
        action="append",
        default=[],
        help="an argument of MVMRTransform.imagenet, likewise",
    )
    add("script", type=Path, help="main.py of lightly's benchmarks/imagenet/resnet50 or vitb16")
    add("script_options", nargs=argparse.REMAINDER, help="options of the script itself")
    return parser.parse_args(arguments)


def main(arguments: Sequence[str]) -> None:
    """Runs the script.

    ``sys.argv`` is left alone: where Lightning starts further processes it repeats the command
    line, and they must come through here, too.

    Args:
        arguments: The command line without the program's name.

    Raises:
        SystemExit: If the script or an option is not usable.
    """
    settings = parse_arguments(arguments)
    script = load_script(settings.script)
    if "mvmr" in script.METHODS:
        raise SystemExit(f"Error: {settings.script} has a method mvmr already; run it directly.")
    vit = settings.script.resolve().parent.name.startswith("vit")
    try:
        entry = method_entry(vit, dict(settings.model), dict(settings.transform))
    except (TypeError, ValueError) as error:
        raise SystemExit(f"Error: {error}") from error
    script.METHODS["mvmr"] = entry
    script.main(**vars(script.parser.parse_args(settings.script_options)))


if __name__ == "__main__":
    main(sys.argv[1:])
