"""What the tests of the STL10 benchmark share: STL10's files with few images."""

from __future__ import annotations

import functools
import hashlib
import http.server
import tarfile
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest
import torchvision
from PIL import Image

from benchmarks.common.photographs import Photographs

CLASSES, LABELLED, UNLABELED, TESTED = 10, 6, 6, 3
STL10 = torchvision.datasets.STL10


class Stl10Files(NamedTuple):
    """STL10 in its own format, with few images.

    Attributes:
        root: What ``--data-dir`` names.
        images: Split -> PIL images in the order of the file.
        labels: Split -> labels from 0.
        folds: Indices of each fold.
    """

    root: Path
    images: dict[str, list[Image.Image]]
    labels: dict[str, list[int]]
    folds: list[list[int]]


def md5(path: Path) -> str:
    """Returns a file's checksum."""
    return hashlib.md5(path.read_bytes()).hexdigest()


def upscaled(split: str, start: int, per_class: int) -> tuple[list[Image.Image], list[int]]:
    """Returns photographs at STL10's size, the classes in turn."""
    count = start + per_class
    photographs = Photographs(split, crops_per_class=count)
    order = [label * count + start + i for i in range(per_class) for label in range(CLASSES)]
    pairs = [photographs[i] for i in order]
    return [image.resize((96, 96)) for image, _ in pairs], [label for _, label in pairs]


def write_stl10(root: Path) -> Stl10Files:
    """Writes the files of STL10: images column by column, labels from 1, folds as text."""
    folder = root / STL10.base_folder
    folder.mkdir(parents=True)
    images, labels = {}, {}
    for name, split, start, per_class in (
        ("train", "train", 0, LABELLED),
        ("unlabeled", "train", LABELLED, UNLABELED),
        ("test", "test", 0, TESTED),
    ):
        images[name], labels[name] = upscaled(split, start, per_class)
        pixels = np.stack([np.asarray(image) for image in images[name]])
        (folder / f"{name}_X.bin").write_bytes(pixels.transpose(0, 3, 2, 1).tobytes())
        if name != "unlabeled":
            (folder / f"{name}_y.bin").write_bytes(bytes(label + 1 for label in labels[name]))
    draw = np.random.default_rng(0)
    size = len(images["train"])
    folds = [sorted(draw.choice(size, size // 2, replace=False).tolist()) for _ in range(10)]
    # Each line of the real file ends in a space.
    (folder / "fold_indices.txt").write_text(
        "".join(" ".join(map(str, fold)) + " \n" for fold in folds)
    )
    (folder / "class_names.txt").write_text("\n".join(Photographs("test").classes[:CLASSES]))
    return Stl10Files(root, images, labels, folds)


@pytest.fixture(scope="session")
def stl10_files(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Stl10Files]:
    """Returns STL10's files with few images, whose checksums torchvision takes for the real ones."""
    files = write_stl10(tmp_path_factory.mktemp("stl10"))
    folder = files.root / STL10.base_folder
    with pytest.MonkeyPatch.context() as patch:
        for name in ("train_list", "test_list"):
            listed = [[file, md5(folder / file)] for file, _ in getattr(STL10, name)]
            patch.setattr(STL10, name, listed)
        yield files


class QuietServer(http.server.SimpleHTTPRequestHandler):
    """Serves a folder without a word on the terminal."""

    def log_message(self, *_: object) -> None:
        """Says nothing."""


@pytest.fixture
def stl10_archive(
    stl10_files: Stl10Files, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Iterator[Path]:
    """Returns STL10's archive on a server of this machine, from which torchvision downloads it."""
    path = tmp_path / "server" / STL10.filename
    path.parent.mkdir()
    with tarfile.open(path, "w:gz") as tar:
        tar.add(stl10_files.root / STL10.base_folder, STL10.base_folder)
    handler = functools.partial(QuietServer, directory=str(path.parent))
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        monkeypatch.setattr(STL10, "url", f"http://127.0.0.1:{server.server_port}/{path.name}")
        monkeypatch.setattr(STL10, "tgz_md5", md5(path))
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        yield path
        server.shutdown()
        thread.join()
