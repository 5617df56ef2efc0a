"""Runs a script of an unmodified solo-learn checkout with MV-MR added.

    python -m mvmr_loss.adapters.solo PATH/TO/main_pretrain.py --config-name mvmr_cifar10

Where this package is installed, solo-learn's Hydra scripts (main_pretrain.py, main_linear.py) find
MV-MR without this. It is needed where Hydra does not look for plugins: in an editable installation,
and for main_knn.py and main_umap.py, which do not use Hydra.
"""

from __future__ import annotations

import contextlib
import os
import runpy
import sys
from collections.abc import Iterator
from pathlib import Path

import torch

from .cpu import CudaOnCPU
from .registration import check_solo, register

# These two move data to the first GPU without asking whether there is one.
_GPU_ONLY = ("main_knn.py", "main_umap.py")


def _let_hydra_find_the_plugin() -> None:
    """Puts the plugin's folder on the path of this process and of those that it starts.

    Hydra walks the folders on the path, and an editable installation is not among them. Lightning
    starts the other processes of a distributed run as ``python main_pretrain.py ...``.
    """
    folder = Path(__file__).resolve().parent / "plugin"
    if folder.is_dir():  # not where the package is installed: the plugin lies beside it there
        sys.path.append(str(folder))
        inherited = os.environ.get("PYTHONPATH", "").split(os.pathsep)
        os.environ["PYTHONPATH"] = os.pathsep.join([*filter(None, inherited), str(folder)])


@contextlib.contextmanager
def _gpu_calls_allowed(script: Path) -> Iterator[None]:
    """Lets the scripts that ask for a GPU run where there is none."""
    if script.name in _GPU_ONLY and not torch.cuda.is_available():
        print(f"mvmr-loss: no GPU found, {script.name} runs on the CPU", file=sys.stderr)
        with CudaOnCPU():
            yield
    else:
        yield


def main() -> None:
    """Runs the script that the command line names.

    Raises:
        SystemExit: If there is no such script or no solo-learn 1.0.6.
    """
    if len(sys.argv) < 2 or not Path(sys.argv[1]).is_file():
        given = sys.argv[1] if len(sys.argv) > 1 else "nothing"
        raise SystemExit(
            "Error: give a script of a solo-learn checkout and its arguments, for example "
            "`python -m mvmr_loss.adapters.solo main_pretrain.py --config-name mvmr_cifar10`, "
            f"but {given} was given."
        )
    sys.argv = sys.argv[1:]
    script = Path(sys.argv[0])
    sys.path[0] = str(script.resolve().parent)
    try:
        check_solo()
        _let_hydra_find_the_plugin()
        register("python -m mvmr_loss.adapters.solo")
    except ImportError as error:
        raise SystemExit(f"Error: {error}") from error
    with _gpu_calls_allowed(script):
        runpy.run_path(str(script), run_name="__main__")


if __name__ == "__main__":
    main()
