"""What the tests of the solo-learn adapter share: the checkout, and small folders of photographs."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from benchmarks.common.photographs import Photographs

COMMIT = "9187ea3"

# solo-learn's configurations ask for GPUs.
ON_CPU = (
    "accelerator=cpu",
    "devices='1'",
    "strategy=auto",
    "precision=32",
    "sync_batchnorm=False",
    "data.num_workers=0",
)


@pytest.fixture(scope="session")
def solo_learn() -> Path:
    """Returns an unmodified checkout of solo-learn."""
    default = Path.home() / ".cache" / "mvmr-loss" / "solo-learn"
    folder = Path(os.environ.get("SOLO_LEARN", default))
    if not (folder / "solo" / "args" / "pretrain.py").is_file():
        pytest.skip(
            f"no solo-learn 1.0.6 in {folder}: git clone https://github.com/vturrisi/solo-learn "
            f"{folder} && git -C {folder} checkout {COMMIT}, or set SOLO_LEARN to a checkout"
        )
    return folder


@pytest.fixture(scope="session")
def solo(solo_learn: Path, tmp_path_factory: pytest.TempPathFactory) -> None:
    """Makes ``import solo`` work in this process and registers MV-MR in it."""
    # Only the package: the checkout itself holds a package called tests.
    shim = tmp_path_factory.mktemp("solo-learn")
    (shim / "solo").symlink_to(solo_learn / "solo", target_is_directory=True)
    sys.path.append(str(shim))

    from mvmr_loss.adapters.solo import register

    register("a test")


def save_photographs(
    folder: Path, split: str, per_class: int, shapes: list[tuple[int, int]]
) -> None:
    """Writes labelled crops as an image folder, in turn of the given shapes."""
    dataset = Photographs(split, crops_per_class=per_class)
    for i, (image, label) in enumerate(dataset):  # type: ignore[arg-type]
        path = folder / split / dataset.classes[label] / f"{i}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        image.resize(shapes[i % len(shapes)]).save(path)


@pytest.fixture(scope="session")
def photograph_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Returns a folder with train and test images of several shapes, one sub-folder a class."""
    folder = tmp_path_factory.mktemp("photographs")
    save_photographs(folder, "train", 8, [(64, 64), (64, 48), (40, 64)])
    save_photographs(folder, "test", 4, [(64, 64), (64, 48)])
    return folder


@pytest.fixture(scope="session")
def run_solo(solo_learn: Path) -> Callable[..., subprocess.CompletedProcess[str]]:
    """Returns a function that runs one of solo-learn's scripts in a process of its own."""

    def run(
        script: str,
        *arguments: str,
        cwd: Path,
        runner: bool = True,
        env: dict[str, str] | None = None,
        timeout: int = 300,
    ) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, *(["-m", "mvmr_loss.adapters.solo"] if runner else [])]
        return subprocess.run(
            [*command, str(solo_learn / script), *arguments],
            cwd=cwd,
            env={**os.environ, "WANDB_MODE": "disabled", **(env or {})},
            capture_output=True,
            text=True,
            timeout=timeout,
            check=False,
        )

    return run
