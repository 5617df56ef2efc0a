import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from PIL import Image

from benchmarks.common.photographs import Photographs
from benchmarks.harness import validate
from benchmarks.plain_pytorch import training
from benchmarks.plain_pytorch.training import load_encoder, main, normalize

ROOT = Path(__file__).parents[2]
FAST = ["--epochs", "1", "--batch-size", "8", "--representations", "pixels", "hog"]


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """Two folders of crops of three photographs, 12 training and 6 test images a class."""
    root = tmp_path_factory.mktemp("images")
    for split, size in (("train", 12), ("test", 6)):
        dataset = Photographs(split, crops_per_class=size)
        for i, (image, label) in enumerate(dataset):
            if label < 3:
                path = root / split / dataset.classes[label] / f"{i}.png"
                path.parent.mkdir(parents=True, exist_ok=True)
                image.save(path)
    return root


def run(folders, output, *options):
    """Runs the example on the folders and returns its figures."""
    paths = ["--train", str(folders / "train"), "--test", str(folders / "test")]
    main([*paths, "--output", str(output), *FAST, *options])
    record = json.loads((output / "metrics.json").read_text())
    validate(record)
    return record["figures"]


def test_smoke(folders, tmp_path, capsys):
    metrics = run(folders, tmp_path)
    assert metrics["steps"] == 36 // 8
    assert metrics["images"] == {"train": 36, "test": 18}
    assert set(metrics["accuracy"]) == {"raw pixels", "untrained", "trained"}
    terms = {"invariance", "variance", "views", "pixels", "hog"}
    assert [set(epoch) for epoch in metrics["loss_per_epoch"]] == [terms]
    assert not metrics["interrupted"]
    assert str(folders) not in (tmp_path / "metrics.json").read_text()
    shown = capsys.readouterr()
    assert "trained" in shown.out
    for doing in ("training", "features, trained, test", "linear classifier, raw pixels"):
        assert f"{doing}: 1 of " in shown.err
    with Image.open(tmp_path / "training.png") as image:
        assert min(image.size) > 300
    assert {path.name for path in tmp_path.iterdir()} == {
        "encoder.pt",
        "metrics.json",
        "training.png",
    }


def test_encoder_is_reloaded(folders, tmp_path):
    run(folders, tmp_path)
    encoder = load_encoder(tmp_path / "encoder.pt")
    assert not encoder.training
    content = torch.load(tmp_path / "encoder.pt", weights_only=True)
    state = encoder.state_dict()
    assert set(state) == set(content["state_dict"])
    assert all(torch.equal(state[name], value) for name, value in content["state_dict"].items())
    assert encoder(normalize(torch.rand(2, 3, 32, 32))).shape == (2, encoder.output_dim)


def test_same_seed_same_result(folders, tmp_path):
    first, second, other = (
        run(folders, tmp_path / str(i), "--seed", seed) for i, seed in enumerate("001")
    )
    assert first["loss_per_epoch"] == second["loss_per_epoch"]
    assert first["accuracy"] == second["accuracy"]
    assert first["loss_per_epoch"] != other["loss_per_epoch"]


def test_training_changes_the_encoder_as_the_settings_say(folders, tmp_path):
    options = {
        "none": ["--representations", "none"],
        "sign": ["--representation-weight", "-1"],
        "measure": ["--dependence-measure", "u_distance_correlation_sqr"],
    }
    loss = {
        name: run(folders, tmp_path / name, *option)["loss_per_epoch"][0]
        for name, option in {"default": [], **options}.items()
    }
    assert set(loss["none"]) == {"invariance", "variance", "views"}
    # The term is 1 - d with weight 1 and d with weight -1; embeddings differ little after 4 steps.
    assert loss["sign"]["hog"] == pytest.approx(1 - loss["default"]["hog"], abs=0.2)
    assert loss["measure"]["hog"] != loss["default"]["hog"]


def test_interrupted_training_is_saved_and_evaluated(folders, tmp_path, monkeypatch, capsys):
    def two_batches_then_interrupt(size, settings):
        yield from torch.arange(size)[:16].split(8)
        raise KeyboardInterrupt

    monkeypatch.setattr(training, "random_batches", two_batches_then_interrupt)
    metrics = run(folders, tmp_path)
    assert metrics["interrupted"]
    assert metrics["steps"] == 2
    assert "trained" in metrics["accuracy"]
    assert load_encoder(tmp_path / "encoder.pt").output_dim > 0
    assert "Interrupted" in capsys.readouterr().out


@pytest.mark.skipif(os.name == "nt", reason="SIGINT is sent to processes on POSIX systems only")
def test_ctrl_c(folders, tmp_path):
    paths = ["--train", folders / "train", "--test", folders / "test", "--output", tmp_path]
    process = subprocess.Popen(
        [sys.executable, "-m", "benchmarks.plain_pytorch", *paths, *FAST, "--epochs", "100000"],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        # Where the tests run in the background, processes are born deaf to it.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )
    try:
        # Its progress tells that the training runs.
        seen = ""
        while "training: 1 of" not in seen and process.poll() is None:
            seen += process.stderr.read(1)
        time.sleep(0.5)
        process.send_signal(signal.SIGINT)
        output, errors = process.communicate(timeout=120)
    finally:
        process.kill()
    assert process.returncode == 0, errors
    assert "Interrupted" in output
    metrics = json.loads((tmp_path / "metrics.json").read_text())["figures"]
    assert metrics["interrupted"]
    assert 0 < metrics["steps"] < 400000
    assert load_encoder(tmp_path / "encoder.pt").output_dim > 0


def test_interrupted_evaluation_leaves_the_encoder(folders, tmp_path, monkeypatch):
    def interrupt(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(training, "evaluate", interrupt)
    with pytest.raises(SystemExit, match="Interrupted: the evaluation is incomplete"):
        run(folders, tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["encoder.pt"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--train", "absent"], "absent must be a folder"),
        (["--representations", "absent"], "representation must be one of .* but is 'absent'"),
        (["--dependence-measure", "absent"], "dependence_measure must be .*'absent'"),
        (["--representation-weight", "nan"], "representation_weight must be finite but is nan"),
        (["--batch-size", "37"], "--batch-size must be at most .* 36, but is 37"),
    ],
)
def test_exception(folders, tmp_path, options, message):
    with pytest.raises(SystemExit, match="^Error: .*" + message) as error:
        run(folders, tmp_path, *options)
    assert "\n" not in str(error.value)
    assert not any(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--train", "folder"], "--train and --test must be given together"),
        (["--epochs", "0"], "--epochs must be at least 1 but is 0"),
        (["--batch-size", "1"], "--batch-size must be at least 4 but is 1"),
        (["--learning-rate", "0"], "--learning-rate must be above 0 but is 0"),
        (["--color-jitter", "-1"], "--color-jitter must be in"),
    ],
)
def test_wrong_option(options, message, capsys):
    with pytest.raises(SystemExit):
        main(options)
    assert message in capsys.readouterr().err


def test_other_classes(folders, tmp_path):
    Image.new("RGB", (40, 40)).save(make_folder(tmp_path / "test" / "unicorn") / "0.png")
    with pytest.raises(SystemExit, match=r"must have the same folders of classes .*unicorn"):
        main(["--train", str(folders / "train"), "--test", str(tmp_path / "test"), *FAST])


def make_folder(path):
    """Makes a folder and returns it."""
    path.mkdir(parents=True)
    return path


@pytest.mark.slow
@pytest.mark.timeout(1800)  # the whole example, on one core that other tests may share
def test_training_teaches(tmp_path):
    main(["--output", str(tmp_path)])
    accuracy = json.loads((tmp_path / "metrics.json").read_text())["figures"]["accuracy"]
    for probe in ("knn", "linear"):
        top1 = {name: result[probe]["top1"] for name, result in accuracy.items()}
        assert top1["trained"] > top1["untrained"] + 2
        assert top1["trained"] > top1["raw pixels"] + 10
