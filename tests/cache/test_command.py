from __future__ import annotations

import os
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch
from PIL import Image

from mvmr_loss import Representations
from mvmr_loss.cache import (
    RepresentationCache,
)
from mvmr_loss.cache.__main__ import _dataset, _parse, main
from tests.cache.helpers import (
    ROOT,
)


def command(*arguments):
    return subprocess.run(
        [sys.executable, "-m", "mvmr_loss.cache", *map(str, arguments)],
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=False,
    )


def test_command(image_folder, tmp_path, capsys):
    from torchvision.datasets import ImageFolder
    from torchvision.transforms import v2

    data = os.path.relpath(image_folder, ROOT)  # The command's working directory is ROOT.
    arguments = [
        *("fill", tmp_path / "s", "--data", data, "--image-size", 32, "--sketch-dim", 512),
        *("--representations", "pixels", '{"name": "local_std", "window_size": 5}'),
    ]
    done = command(*arguments, "--processes", 2)
    assert done.returncode == 0, done.stderr
    assert "12/12" in done.stderr
    assert "\r" not in done.stderr  # A file has few lines instead of a bar.
    assert len(done.stderr.splitlines()) <= 4
    assert "Traceback" not in done.stderr
    # What a training of one's own reads there.
    dataset = ImageFolder(
        image_folder,
        v2.Compose(
            [
                v2.Resize(32),
                v2.CenterCrop(32),
                v2.ToImage(),
                v2.ToDtype(torch.float32, scale=True),
                v2.Normalize([0.485, 0.456, 0.406], [0.229, 0.224, 0.225]),
            ]
        ),
    )
    names = ["pixels", {"name": "local_std", "window_size": 5}]
    cache = {"path": tmp_path / "s", "dataset": dataset}
    representations = Representations(names, sketch_dim=512, cache=cache)
    x = torch.stack([image for image, _ in dataset])
    for name, y in representations(x, range(12)).items():
        torch.testing.assert_close(y, representations(x)[name], rtol=2e-3, atol=2e-3)

    main(["info", str(tmp_path / "s")])
    assert "12 of 12 rows" in capsys.readouterr().out
    main(["verify", str(tmp_path / "s")])
    assert "12 of 12 rows are there and whole" in capsys.readouterr().out
    with open(tmp_path / "s" / "rows.bin", "r+b") as file:
        file.seek(5)
        file.write(b"damaged")
    with pytest.raises(SystemExit, match="1 rows are damaged, the first of them 0"):
        main(["verify", str(tmp_path / "s")])
    main(["verify", "--repair", str(tmp_path / "s")])
    assert "11 of 12 rows are there" in capsys.readouterr().out
    main([str(argument) for argument in arguments])
    main(["verify", str(tmp_path / "s")])
    assert "12 of 12 rows are there and whole" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "match"),
    [
        (["fill", "s", "--data", "nowhere", "--image-size", "32"], "--data must be a folder"),
        (["fill", "s", "--data", "CIFAR10", "--image-size", "32"], "CIFAR10 cannot be read in"),
        (["info", "nowhere"], "there is no store at nowhere"),
        (["verify", "nowhere"], "there is no store at nowhere"),
    ],
)
def test_exception_command(arguments, match, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit, match=f"Error: .*{match}"):
        main(arguments)


def test_exception_command_representations(image_folder, tmp_path):
    arguments = ["fill", str(tmp_path / "s"), "--data", str(image_folder), "--image-size", "32"]
    with pytest.raises(SystemExit, match="representation must be one of"):
        main([*arguments, "--representations", "pixel"])
    with pytest.raises(SystemExit, match="must be names or JSON"):
        main([*arguments, "--representations", "{pixel"])


def test_broken_image_is_named_and_skipped(image_folder, tmp_path, capfd):
    broken = sorted(image_folder.rglob("*.png"))[3]
    broken.write_bytes(b"")
    arguments = ["fill", str(tmp_path / "s"), "--data", str(image_folder), "--image-size", "32"]
    arguments += ["--sketch-dim", "0", "--representations", "pixels"]
    with pytest.raises(SystemExit, match="Error: 1 of 12 rows are still missing") as error:
        main(arguments)
    assert isinstance(error.value.code, str)  # printed, and an exit code of 1
    assert f"{broken.name}) cannot be read" in capfd.readouterr().err
    main([*arguments, "--skip-broken"])
    assert f"{broken.name}) cannot be read" in capfd.readouterr().err
    assert int(RepresentationCache(tmp_path / "s").is_valid().sum()) == 11


def test_data_at_home(image_folder, tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    arguments = [
        "fill",
        "~/s",
        "--data=~/images",
        "--image-size",
        "8",
        "--representations",
        "pixels",
    ]
    assert len(_dataset(_parse(arguments))) == 12
    with pytest.raises(SystemExit, match="must lie outside of --data"):
        main(["fill", "~/images/s", *arguments[2:]])


def test_waiting_for_the_last_process_is_waiting(tmp_path, monkeypatch):
    """Whichever ends first, the index is looked at twice a second."""
    looks = []

    class Process:
        pid, exitcode = 1, 0

        def __init__(self, target, args):
            self.left = 0 if args[1] == 0 else 5

        def start(self):
            pass

        def is_alive(self):
            return self.left > 0

        def join(self, seconds=None):
            self.left -= seconds is not None

    class Store:
        num_samples = 3

        def is_valid(self):
            looks.append(0)
            assert len(looks) < 100
            return torch.ones(3)

    monkeypatch.setattr(
        torch.multiprocessing, "get_context", lambda _: SimpleNamespace(Process=Process)
    )
    monkeypatch.setattr("mvmr_loss.cache.__main__.RepresentationCache", lambda _: Store())
    for name in ("_dataset", "_check_before_it_is_made", "_representations"):
        monkeypatch.setattr(f"mvmr_loss.cache.__main__.{name}", lambda *_: None)
    main(["fill", str(tmp_path), "--data", "x", "--image-size", "8", "--processes", "2"])
    assert len(looks) == 5 + 2


@pytest.mark.parametrize(
    ("more", "match"),
    [
        (["--device", "gpu"], "--device cannot be used, 'gpu'"),
        (["--mean", "0.5", "--std", "0.5"], "--mean and --std must have a number for each of 3 "),
    ],
)
def test_nothing_is_made_where_a_setting_is_wrong(image_folder, tmp_path, more, match):
    arguments = ["fill", str(tmp_path / "s"), "--data", str(image_folder), "--image-size", "32"]
    with pytest.raises(SystemExit, match=f"Error: {match}"):
        main([*arguments, *more])
    assert not (tmp_path / "s").exists()


@pytest.mark.parametrize("interpolation", ["bilinear", "bicubic"])
def test_images_are_resized_as_the_training_does(image_folder, tmp_path, interpolation):
    from torchvision import transforms
    from torchvision.datasets import ImageFolder

    main(
        [
            *("fill", str(tmp_path / "s"), "--data", str(image_folder), "--image-size", "20"),
            *("--resize-size", "26", "--interpolation", interpolation, "--sketch-dim", "0"),
            *("--representations", "pixels", "--dtype", "float32"),
        ]
    )
    pipeline = transforms.Compose(
        [
            transforms.Resize(26, transforms.InterpolationMode(interpolation)),
            transforms.CenterCrop(20),
            transforms.ToTensor(),
            transforms.Normalize([0.485, 0.456, 0.406], [0.229, 0.224, 0.225]),
        ]
    )
    x = torch.stack([pipeline(image) for image, _ in ImageFolder(image_folder)])
    read = Representations(None, cache=tmp_path / "s")(None, range(12))["pixels"]
    torch.testing.assert_close(read, x.flatten(1))


@pytest.mark.parametrize("option", [("--resize-size", "31"), ("--interpolation", "lanczos")])
def test_exception_resizing(image_folder, tmp_path, option, capsys):
    with pytest.raises(SystemExit):
        main(["fill", str(tmp_path), "--data", str(image_folder), "--image-size", "32", *option])
    assert f"{option[0]}" in capsys.readouterr().err


class Split:
    """A data set of torchvision's form, of 28 x 28 pixels."""

    def __init__(self, mode, transform):
        self.transform, self.data = transform, torch.arange(3)
        self.image = Image.new(mode, (28, 28), 100)

    def __len__(self):
        return 3

    def __getitem__(self, index):
        return self.transform(self.image), 0


@pytest.fixture
def mnist(monkeypatch):
    """Stands for torchvision's, which would be downloaded."""
    splits = []

    class MNIST(Split):
        def __init__(self, root, train=True, transform=None):
            super().__init__("L", transform)
            splits.append(train)

    monkeypatch.setattr("torchvision.datasets.MNIST", MNIST)
    return splits


GREY = ("--mean", "0.5", "--std", "0.25")


@pytest.mark.parametrize(
    ("data", "split", "needed"),
    [
        ("MNIST", "validation", "train or test"),
        ("FakeData", "test", "left out for FakeData"),
        (None, "test", "left out for a folder"),
    ],
)
def test_exception_split(image_folder, mnist, tmp_path, data, split, needed):
    data = str(image_folder) if data is None else data
    arguments = ["fill", str(tmp_path / "s"), "--data", data, "--image-size", "28"]
    with pytest.raises(SystemExit, match=f"--split must be {needed} but is '{split}'"):
        main([*arguments, "--split", split])
    assert not mnist
    assert not (tmp_path / "s").exists()


@pytest.mark.parametrize("split", ["train", "test"])
def test_grey_images(mnist, tmp_path, split):
    arguments = ["fill", str(tmp_path / "s"), "--data", "MNIST", "--image-size", "28"]
    arguments += ["--representations", "pixels", "--split", split]
    for statistics, given in (((), "3 and 3"), ((*GREY[:2], "--std", "1", "1"), "1 and 2")):
        with pytest.raises(SystemExit, match=f"a number for each of 1 channels but have {given}"):
            main([*arguments, *statistics])
        assert not (tmp_path / "s").exists()
    settings = _parse([*arguments, *GREY])
    assert _dataset(settings)[0][0].shape == (1, 28, 28)
    assert mnist == [split == "train"] * 3


def test_a_store_is_no_class_of_its_images(image_folder):
    folders = sorted(image_folder.iterdir())
    store = str(image_folder / "store")
    with pytest.raises(SystemExit, match="Error: the store must lie outside of --data"):
        main(["fill", store, "--data", str(image_folder), "--image-size", "32"])
    assert sorted(image_folder.iterdir()) == folders
