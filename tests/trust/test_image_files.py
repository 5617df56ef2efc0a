"""Folders of odd and damaged image files: read as torchvision reads them, or named and skipped."""

from __future__ import annotations

import os
import random
import re
import subprocess
import sys

import numpy as np
import pytest
import torch
from PIL import Image

from mvmr_loss.cache import RepresentationCache
from mvmr_loss.cache.__main__ import main
from mvmr_loss.cache.folder import image_folder
from tests.cache.helpers import ROOT

SIZE = 16


def picture(width=24, height=20, seed=0):
    numbers = np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
    return Image.fromarray(numbers)


def exif_rotated(file):
    exif = Image.Exif()
    exif[0x0112] = 6
    picture().save(file, exif=exif)


def animated(file):
    picture().save(file, save_all=True, append_images=[picture(seed=1), picture(seed=2)])


def truncated(file, kept=0.5):
    picture(64, 64).save(file)
    file.write_bytes(file.read_bytes()[: int(kept * file.stat().st_size)])


def sixteen_bits(file):
    Image.fromarray(np.linspace(0, 65535, 400).astype(np.uint16).reshape(20, 20)).save(file)


def huge(file):
    """A header that promises a picture which no memory holds."""
    picture().save(file)
    data = bytearray(file.read_bytes())
    data[16:24] = (60_000).to_bytes(4, "big") * 2
    import zlib

    data[29:33] = zlib.crc32(data[12:29]).to_bytes(4, "big")
    file.write_bytes(data)


# File -> how it is made, all of which torchvision reads as eight-bit RGB.
GOOD = {
    "plain.png": lambda file: picture().save(file),
    "plain.jpg": lambda file: picture().save(file),
    "cmyk.jpg": lambda file: picture().convert("CMYK").save(file),
    "cmyk.tif": lambda file: picture().convert("CMYK").save(file),
    "grey.png": lambda file: picture().convert("L").save(file),
    "bits.png": lambda file: picture().convert("1").save(file),
    "palette.png": lambda file: picture().convert("P").save(file),
    "transparent.png": lambda file: picture().convert("RGBA").save(file),
    "lab.tif": lambda file: picture().convert("LAB").save(file),
    "animated.png": animated,
    "animated.webp": animated,
    "exif.jpg": exif_rotated,
    "one_pixel.png": lambda file: picture(1, 1).save(file),
    "line.png": lambda file: picture(20_000, 1).save(file),
    "column.bmp": lambda file: picture(1, 5_000).save(file),
    "jpeg_named.png": lambda file: picture().save(file, format="jpeg"),
    "link.png": lambda file: file.symlink_to("plain.png"),
    "name with 'quotes' and ünïcödé.png": lambda file: picture().save(file),
}
# File -> how it is made, and what is said of it.
BROKEN = {
    "truncated.png": (truncated, "truncated"),
    "truncated.jpg": (truncated, "truncated"),
    "truncated.bmp": (truncated, "truncated"),
    "truncated.webp": (truncated, "."),
    "header_alone.png": (lambda file: truncated(file, 0.002), "Truncated File Read"),
    "empty.png": (lambda file: file.write_bytes(b""), "cannot identify"),
    "text.jpg": (lambda file: file.write_text("no picture"), "cannot identify"),
    "sixteen.png": (sixteen_bits, "8 bits a channel .* mode 'I;16'"),
    "sixteen.tif": (sixteen_bits, "8 bits a channel .* mode 'I;16'"),
    "float.tiff": (
        lambda file: Image.fromarray(np.ones((9, 9), np.float32)).save(file),
        "8 bits a channel .* mode 'F'",
    ),
    "too_long.png": (
        lambda file: picture(500_000, 1).save(file),
        "500000 times 1 pixels, and would have 128 million",
    ),
    "huge.png": (huge, "decompression bomb"),
    "dangling.png": (lambda file: file.symlink_to("nowhere.png"), "No such file"),
    "itself.png": (lambda file: file.symlink_to("itself.png"), "symbolic links"),
}


def make(folder, names):
    (folder / "class0").mkdir(parents=True)
    makers = GOOD | {name: make for name, (make, _) in BROKEN.items()}
    for name in sorted(names, key=lambda name: name == "link.png"):
        makers[name](folder / "class0" / name)
    return folder


def arguments(store, data, *more):
    options = ["--image-size", SIZE, "--sketch-dim", 0, "--representations", "pixels"]
    return [str(part) for part in ("fill", store, "--data", data, *options, *more)]


def fill(*words):
    command = [sys.executable, "-m", "mvmr_loss.cache", *arguments(*words)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.run(
        command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False
    )


def fill_here(monkeypatch, *words):
    """The command in this process: its share is filled here too."""
    import mvmr_loss.cache.__main__ as command

    class Here:
        pid, exitcode = 0, 0

        def __init__(self, target, args):
            self.start = lambda: target(*args)

        def is_alive(self):
            return False

        def join(self, timeout=None):
            pass

    class Context:
        Process = Here

    monkeypatch.setattr(command.torch.multiprocessing, "get_context", lambda kind: Context)
    main(arguments(*words))


def test_odd_files_are_read_and_broken_ones_named_and_counted(tmp_path):
    folder = make(tmp_path / "images", GOOD | BROKEN)
    done = fill(tmp_path / "s", folder, "--skip-broken")
    assert done.returncode == 0, done.stderr
    assert "Traceback" not in done.stderr
    for name, (_, said) in BROKEN.items():
        (line,) = [line for line in done.stderr.splitlines() if f"/{name}) cannot be read" in line]
        assert re.search(said, line), line
    assert done.stderr.count("Skipped: ") == len(BROKEN)
    total = len(GOOD) + len(BROKEN)
    assert f"{len(BROKEN)} of {total} rows are missing: skipped." in done.stderr
    # What is in the store is what torchvision gives a training.
    from torchvision.datasets import ImageFolder
    from torchvision.transforms import v2

    mean, std = [0.485, 0.456, 0.406], [0.229, 0.224, 0.225]
    transform = v2.Compose(
        [
            *(v2.Resize(SIZE), v2.CenterCrop(SIZE), v2.ToImage()),
            *(v2.ToDtype(torch.float32, scale=True), v2.Normalize(mean, std)),
        ]
    )
    dataset = ImageFolder(folder, transform)
    names = [os.path.basename(file) for file, _ in dataset.samples]
    cache = RepresentationCache(tmp_path / "s")
    assert [names[i] for i in cache.is_valid().nonzero()] == [n for n in names if n in GOOD]
    for i, name in enumerate(names):
        if name in GOOD:
            expected = dataset[i][0].flatten().half().float()
            assert torch.equal(cache.read([i])["pixels"][0], expected), name


@pytest.mark.parametrize("name", BROKEN)
def test_each_broken_file_stops_the_command_with_its_name(name, tmp_path, monkeypatch):
    folder = make(tmp_path / "images", ["plain.png", name])
    with pytest.raises(SystemExit, match=re.escape(name)) as error:
        fill_here(monkeypatch, tmp_path / "s", folder)
    assert str(error.value).startswith("Error: image ")
    assert re.search(BROKEN[name][1], str(error.value))


def test_drawn_damage_of_image_files(tmp_path):
    """Bits flipped and pieces cut, in every format: a picture or an error, never a crash."""
    draw = random.Random(0)
    (tmp_path / "images" / "c").mkdir(parents=True)
    counts = {"read": 0, "refused": 0}
    formats = [name for name in GOOD if "." in name and name not in ("link.png", "line.png")]
    for number in range(150):
        name = draw.choice(formats)
        file = tmp_path / "images" / "c" / f"{number}_{name}"
        GOOD[name](file)
        data = bytearray(file.read_bytes())
        for _ in range(draw.choice([1, 4, 30])):
            data[draw.randrange(len(data))] ^= 1 << draw.randrange(8)
        file.write_bytes(data[: draw.choice([len(data), draw.randrange(1, len(data) + 1)])])
    from mvmr_loss.cache.dataset import _Readable

    dataset = _Readable(image_folder(tmp_path / "images", np.asarray, SIZE))
    for index, image in map(dataset.__getitem__, range(150)):
        if isinstance(image, str):
            assert f"image {index} (" in image
            counts["refused"] += 1
        else:
            assert image.ndim == 3
            assert image.dtype == np.uint8
            counts["read"] += 1
    assert min(counts.values()) > 15, counts


@pytest.mark.parametrize("kind", ["itself", "parent", "each other"])
def test_loops_of_folders_are_refused(kind, tmp_path, monkeypatch):
    folder = make(tmp_path / "images", ["plain.png"])
    (folder / "class1").mkdir()
    targets = {"itself": ".", "parent": "..", "each other": "../class1"}
    (folder / "class0" / "more").symlink_to(targets[kind])
    if kind == "each other":
        (folder / "class1" / "more").symlink_to("../class0")
    with pytest.raises(SystemExit, match=r"must not lead back to itself, but .*more is a symbolic"):
        fill_here(monkeypatch, tmp_path / "s", folder)
    assert not (tmp_path / "s").exists()


def test_folders_by_links_are_read(tmp_path):
    folder = make(tmp_path / "images", ["plain.png"])
    (folder / "class1").symlink_to("class0")
    assert len(image_folder(folder, None, SIZE)) == 2


@pytest.mark.parametrize(
    ("content", "match"),
    [
        ({}, "find any class folder"),
        ({"image.png": None}, "find any class folder"),
        ({"class0/notes.txt": None}, "valid file for the classes class0"),
    ],
)
def test_folders_without_images(content, match, tmp_path, monkeypatch):
    folder = tmp_path / "images"
    folder.mkdir()
    for name in content:
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_bytes(b"x")
    with pytest.raises(SystemExit, match=f"Error: .*{match}"):
        fill_here(monkeypatch, tmp_path / "s", folder)
