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
import torchvision
from PIL import Image

from benchmarks.common.data import ImageFolder, image_tensor
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
    # Pillow before 10.3 calls it I.
    "sixteen.png": (sixteen_bits, "8 bits a channel .* mode 'I(;16)?'"),
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
    from torchvision.transforms import v2

    mean, std = [0.485, 0.456, 0.406], [0.229, 0.224, 0.225]
    transform = v2.Compose(
        [
            *(v2.Resize(SIZE), v2.CenterCrop(SIZE), v2.ToImage()),
            *(v2.ToDtype(torch.float32, scale=True), v2.Normalize(mean, std)),
        ]
    )
    dataset = torchvision.datasets.ImageFolder(folder, transform)
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


# The two classes that open a folder of images: the cache's and the benchmarks'.
FOLDERS = {
    "cache": lambda root: image_folder(root, None, SIZE),
    "benchmarks": lambda root: ImageFolder(root, image_size=SIZE),
}
either = pytest.mark.parametrize("opened", FOLDERS.values(), ids=FOLDERS)


@either
def test_what_is_read_is_what_torchvision_reads(opened, tmp_path):
    folder = make(tmp_path / "images", GOOD)
    dataset, expected = opened(folder), torchvision.datasets.ImageFolder(folder)
    assert dataset.samples == expected.samples
    assert len(dataset) == len(GOOD)
    for i, (file, _) in enumerate(expected.samples):
        (image, label), (wanted, wanted_label) = dataset[i], expected[i]
        assert (image.mode, image.size, label) == ("RGB", wanted.size, wanted_label), file
        assert image.tobytes() == wanted.tobytes(), file


@either
@pytest.mark.parametrize("name", BROKEN)
def test_each_broken_file_is_an_error_when_it_is_read(name, opened, tmp_path):
    folder = make(tmp_path / "images", ["plain.png", name])
    dataset = opened(folder)
    (index,) = (i for i, (file, _) in enumerate(dataset.samples) if file.endswith(name))
    # The cache's reader names the file to what it raises, as the tests above see.
    with pytest.raises(Exception, match=BROKEN[name][1]) as error:
        dataset[index]
    if opened is FOLDERS["benchmarks"]:
        assert error.type is ValueError
        assert f"{name} cannot be read as an image (" in str(error.value)
    assert dataset[1 - index][0].size == (24, 20)


@pytest.mark.parametrize("name", BROKEN)
def test_the_benchmarks_stop_at_a_broken_file(name, tmp_path):
    folder = make(tmp_path / "images", ["plain.png", name])
    with pytest.raises(ValueError, match=re.escape(f"{name} cannot be read as an image")):
        image_tensor(ImageFolder(folder, image_size=SIZE), SIZE)


def stl10_data(folder):
    from benchmarks.stl10.data import load_data
    from benchmarks.stl10.settings import Settings

    data = load_data(Settings(data=str(folder), image_size=SIZE, batch_size=4))
    return [*data.pretrain, *data.train, *data.test]


def plain_pytorch_data(folder):
    from benchmarks.plain_pytorch.training import load_data, parse_arguments

    words = ["--train", folder / "train", "--test", folder / "test", "--image-size", SIZE]
    return load_data(parse_arguments([*map(str, words), "--batch-size", "4"]))


def quality_data(folder):
    from benchmarks.quality.training import load

    return load(folder, "test", None, "cpu")


def accuracy_data(folder):
    from benchmarks.cache.accuracy import load

    return load(folder)


WHOLE = ["plain.png", "plain.jpg", "grey.png", "bits.png"]
BENCHMARKS = [stl10_data, plain_pytorch_data, quality_data, accuracy_data]


@pytest.mark.parametrize("load", BENCHMARKS)
@pytest.mark.parametrize("name", ["sixteen.png", "too_long.png", "huge.png", "truncated.jpg"])
def test_every_benchmark_that_reads_folders_stops_at_a_broken_file(load, name, tmp_path):
    """None gives its own reader, or leaves out the size."""
    make(tmp_path / "train", [*WHOLE, name])
    make(tmp_path / "test", WHOLE)
    with pytest.raises(ValueError, match=re.escape(f"{name} cannot be read as an image")):
        load(tmp_path)


@pytest.mark.parametrize("load", BENCHMARKS)
def test_every_benchmark_that_reads_folders_refuses_a_loop(load, tmp_path):
    for part in ("train", "test"):
        make(tmp_path / part, WHOLE)
    (tmp_path / "test" / "class0" / "more").symlink_to(".")
    with pytest.raises(ValueError, match="must not lead back to itself"):
        load(tmp_path)


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


def with_loop(tmp_path, kind):
    folder = make(tmp_path / "images", ["plain.png"])
    (folder / "class1").mkdir()
    targets = {"itself": ".", "parent": "..", "each other": "../class1"}
    (folder / "class0" / "more").symlink_to(targets[kind])
    if kind == "each other":
        (folder / "class1" / "more").symlink_to("../class0")
        picture().save(folder / "class1" / "one.png")
    return folder


@pytest.mark.parametrize("kind", ["itself", "parent", "each other"])
@either
def test_loops_of_folders_are_refused(opened, kind, tmp_path):
    folder = with_loop(tmp_path, kind)
    with pytest.raises(ValueError, match=r"must not lead back to itself, but .*more is a symbolic"):
        opened(folder)


@pytest.mark.parametrize("kind", ["itself", "parent", "each other"])
def test_loops_of_folders_stop_the_command(kind, tmp_path, monkeypatch):
    folder = with_loop(tmp_path, kind)
    with pytest.raises(SystemExit, match=r"must not lead back to itself, but .*more is a symbolic"):
        fill_here(monkeypatch, tmp_path / "s", folder)
    assert not (tmp_path / "s").exists()


@either
def test_folders_by_links_are_read(opened, tmp_path):
    folder = make(tmp_path / "images", ["plain.png"])
    (folder / "class1").symlink_to("class0")
    (folder / "class2").mkdir()
    (folder / "class2" / "inner").symlink_to("../class0")
    assert len(opened(folder)) == 3


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
