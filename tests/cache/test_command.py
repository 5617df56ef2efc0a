from __future__ import annotations

import os
import subprocess
import sys

import pytest
import torch

from mvmr_loss import Representations
from mvmr_loss.cache import (
    RepresentationCache,
)
from mvmr_loss.cache.__main__ import main
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


def test_a_store_is_no_class_of_its_images(image_folder):
    folders = sorted(image_folder.iterdir())
    store = str(image_folder / "store")
    with pytest.raises(SystemExit, match="Error: the store must lie outside of --data"):
        main(["fill", store, "--data", str(image_folder), "--image-size", "32"])
    assert sorted(image_folder.iterdir()) == folders
