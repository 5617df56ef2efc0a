from __future__ import annotations

import os
import shutil
import time
from pathlib import Path

import pytest
import torch


@pytest.fixture
def images():
    return torch.randn(20, 3, 8, 8, generator=torch.Generator().manual_seed(0))


@pytest.fixture
def public_folder():
    """A folder that all users may enter, which pytest's own are not."""
    folder = Path("/tmp") / f"mvmr-cache-{os.getpid()}-{time.monotonic_ns()}"
    folder.mkdir(mode=0o755)
    yield folder
    for file in [folder, *folder.rglob("*")]:
        file.chmod(0o755)
    shutil.rmtree(folder)


@pytest.fixture
def image_folder(tmp_path):
    from benchmarks.common.photographs import Photographs

    dataset = Photographs("train", crops_per_class=2)
    folder = tmp_path / "images"
    for i in range(12):
        image, label = dataset[i]
        (folder / f"class{label}").mkdir(parents=True, exist_ok=True)
        image.resize((40, 32)).save(folder / f"class{label}" / f"{i}.png")
    return folder
