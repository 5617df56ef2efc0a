"""Whole runs, small: every method, resuming, the report, comparing, exporting, features."""

import json
import os
import re
import signal
import subprocess
import sys

import numpy as np
import pytest
import torch
import yaml
from PIL import Image
from pytorch_lightning.utilities.rank_zero import rank_zero_only

from benchmarks.harness import validate
from benchmarks.stl10.__main__ import main
from benchmarks.stl10.data import load_data
from benchmarks.stl10.evaluate import accuracies, evaluate, features_of, label_subsets
from benchmarks.stl10.methods import Pretraining, build_method
from benchmarks.stl10.report import metrics
from benchmarks.stl10.settings import Settings
from benchmarks.stl10.train import check_folder, load_run, run

METHODS = {
    "mvmr": {"labels": ["folds", 0.5]},
    "vicreg": {"representations": ["pixels", {"name": "hog", "orientations": 9}]},
    "barlowtwins": {},
    "simclr": {},
    "byol": {},
}
TERMS = {
    "mvmr": {
        *("invariance", "variance", "dependence"),
        *(f"representations/{n}" for n in ("pixels", "augmented_pixels", "scattering", "hog")),
    },
    "vicreg": {"vicreg", "representations/pixels", "representations/hog"},
}


def tiny(files, **options):
    """Settings of a run that takes seconds: 120 images, of which three steps are an epoch."""
    quick = {
        **{"data": "stl10", "data_dir": str(files.root), "image_size": 32, "backbone": "small"},
        **{"epochs": 2, "batch_size": 40, "projector_hidden_dim": 64, "projector_output_dim": 32},
        **{"knn_k": 5, "probe_epochs": 3, "finetune_epochs": 1, "monitor_every": 1},
        **{"warmup_epochs": 1, "normalization": "cifar", "accelerator": "cpu"},
    }
    return Settings(**{**quick, **options})


def command_line(settings):
    """The options of ``run`` for settings, as a file's."""
    return [
        f"--{name}={json.dumps(value)}" if not isinstance(value, str) else f"--{name}={value}"
        for name, value in settings.as_dict().items()
        if value is not None
    ]


@pytest.fixture(scope="module")
def runs(stl10_files, tmp_path_factory):
    """Folders of a quick run of each method."""
    root = tmp_path_factory.mktemp("runs")
    for name, options in METHODS.items():
        settings = tiny(stl10_files, method=name, **options)
        main(["run", *command_line(settings), "--output", str(root / name)])
    return {name: root / name for name in METHODS}


def losses(folder):
    """What the metrics say of each step, without what a clock has measured."""
    return [
        {k: v for k, v in row.items() if not k.startswith(("device/", "train/", "validate/"))}
        for row in metrics(folder)
    ]


def weights(folder):
    return torch.load(folder / "checkpoint.ckpt", weights_only=True)["state_dict"]


@pytest.mark.parametrize("name", METHODS)
def test_every_method_runs(runs, name):
    rows = metrics(runs[name])
    logged = [row for row in rows if "train_loss" in row]
    assert [row["step"] for row in logged] == [0, 1, 2, 3, 4, 5]
    names = {key for row in rows for key in row}
    assert {f"train_{term}" for term in TERMS.get(name, {name})} <= names
    assert {"val_knn_top1", "val_online_cls_top1", "lr-Adam/mvmr"} <= names or name == "byol"
    assert any("train/device/samples_per_sec" in row for row in rows)

    result = json.loads((runs[name] / "results.json").read_text())
    validate(result)
    accuracy = result["figures"]["accuracy"]
    for evaluation in ("knn", "linear", "linear_ten_crop"):
        assert 0 <= accuracy[evaluation]["top1"] <= accuracy[evaluation]["top5"] <= 100
    assert result["figures"]["pretraining"]["images"] == 120
    assert result["figures"]["pretraining"]["images_per_second"] > 0
    assert result["figures"]["backbone"]["flops_per_image"] > 1e6
    assert str(runs[name].parent) not in json.dumps(result)
    if name == "mvmr":
        assert (accuracy["labels_folds"]["subsets"], accuracy["labels_folds"]["images"]) == (10, 30)
        assert accuracy["labels_folds"]["finetune"]["top1_std"] >= 0
        assert "top1_std" not in accuracy["labels_0.5"]["linear"]


def is_picture(path):
    """Whether a PNG shows more than one colour."""
    with Image.open(path) as image:
        return image.format == "PNG" and len(image.convert("RGB").getcolors(1 << 24)) > 10


def test_report(runs):
    page = (runs["mvmr"] / "report.md").read_text()
    assert is_picture(runs["mvmr"] / "curves.png")
    assert is_picture(runs["mvmr"] / "embedding.png")
    found = json.loads((runs["mvmr"] / "results.json").read_text())["figures"]["accuracy"]
    for text in (f"| linear | {found['linear']['top1']:.2f} |", "fine-tuned, folds", "t-SNE"):
        assert text in page


def test_compare(runs, tmp_path, capsys):
    page = tmp_path / "page.md"
    page.write_text("# Mine\n\n<!-- comparison -->\n<!-- end of comparison -->\n\nwords\n")
    main(["compare", *map(str, runs.values()), "--page", str(page)])
    text = page.read_text()
    assert text.startswith("# Mine")
    assert text.endswith("words\n")
    assert is_picture(tmp_path / "comparison.png")
    rows = dict(re.findall(r"^\| ([^|]+?) \| (.*) \|$", text, re.MULTILINE))
    assert set(rows) == {"run", "---", *METHODS, "vicreg + representations"} - {"vicreg"}
    for folder in runs.values():
        figures = json.loads((folder / "results.json").read_text())["figures"]
        assert rows[figures["label"]].startswith(f"{figures['accuracy']['knn']['top1']:.2f} | ")
    assert "These runs differ in: method, representations, labels." in text
    assert rows["mvmr"] in capsys.readouterr().out
    with pytest.raises(SystemExit, match="has no results.json: it is no run, or one that is not f"):
        main(["compare", str(tmp_path)])


def stop_at(step, patch, kill=False):
    """Makes a run stop before a step."""

    def stop(self, batch, batch_idx, start=Pretraining.on_train_batch_start):
        if self.global_step == step:
            raise KeyboardInterrupt
        return start(self, batch, batch_idx)

    patch.setattr(Pretraining, "on_train_batch_start", stop)


@pytest.mark.parametrize(("method", "step"), [("mvmr", 4), ("byol", 1)])
def test_an_interrupted_run_continues_exactly(
    stl10_files, tmp_path, monkeypatch, capsys, method, step
):
    """After the first checkpoint, and before it; random representations, a momentum encoder."""
    names = ["pixels", "augmented_pixels"] if method == "mvmr" else []
    settings = tiny(stl10_files, method=method, representations=names, probe_epochs=1)
    run(settings, tmp_path / "whole")
    with monkeypatch.context() as patch:
        stop_at(step, patch)
        with pytest.raises((KeyboardInterrupt, SystemExit)):
            main(["run", *command_line(settings), "--output", str(tmp_path / "stopped")])
    assert f"Interrupted; continue with --resume {tmp_path / 'stopped'}" in capsys.readouterr().err
    assert not (tmp_path / "stopped" / "results.json").exists()
    main(["run", "--resume", str(tmp_path / "stopped")])
    assert losses(tmp_path / "stopped") == losses(tmp_path / "whole")
    stopped, whole = weights(tmp_path / "stopped"), weights(tmp_path / "whole")
    assert all(torch.equal(stopped[name], whole[name]) for name in whole)
    found = [json.loads((tmp_path / n / "results.json").read_text()) for n in ("stopped", "whole")]
    assert found[0]["figures"]["accuracy"] == found[1]["figures"]["accuracy"]
    assert found[0]["figures"]["pretraining"]["resumed"] == (step > 3)


class Evil:
    """What a checkpoint must not be able to run."""

    def __reduce__(self):
        return os.system, (f"kill -{signal.SIGKILL} {os.getpid()}",)


@pytest.mark.parametrize("command", ["run --resume", "export"])
def test_no_pickle_is_loaded(runs, tmp_path, command):
    (tmp_path / "settings.yaml").write_bytes((runs["simclr"] / "settings.yaml").read_bytes())
    checkpoint = torch.load(runs["simclr"] / "checkpoint.ckpt", weights_only=True)
    torch.save({**checkpoint, "evil": Evil()}, tmp_path / "checkpoint.ckpt")
    words = [*command.split(), str(tmp_path)]
    with pytest.raises(SystemExit, match="would run code when loaded"):
        main(words if "--resume" in words else [*words, str(tmp_path / "a.pt")])


def test_the_seed_decides_and_each_epoch_has_its_own_order(stl10_files, tmp_path, monkeypatch):
    seen = []

    def note(self, batch, batch_idx):
        seen.append(tuple(batch[2]))

    monkeypatch.setattr(Pretraining, "on_train_batch_start", note)
    for seed in (0, 1):
        settings = tiny(stl10_files, method="simclr", seed=seed, probe_epochs=1, monitor_every=0)
        run(settings, tmp_path / str(seed))
    assert losses(tmp_path / "0") != losses(tmp_path / "1")
    assert len(set(seen)) == len(seen) == 12


def test_a_diverged_run_says_so(stl10_files, tmp_path, monkeypatch):
    monkeypatch.setattr(
        Pretraining, "training_step", lambda self, b, i: self.log("train_loss", torch.nan)
    )
    settings = tiny(stl10_files, method="mvmr")
    with pytest.raises(SystemExit, match="Error: the loss must be finite but is nan"):
        main(["run", *command_line(settings), "--output", str(tmp_path / "out")])


def test_exception_folders(runs, tmp_path, monkeypatch):
    with pytest.raises(SystemExit, match="holds a run already; continue it with --resume"):
        main(["run", "--output", str(runs["mvmr"])])
    # Under torchrun the first process decides, and a further one may find what that has written.
    with monkeypatch.context() as patch:
        patch.setenv("LOCAL_RANK", "0")
        with pytest.raises(FileExistsError, match="holds a run already"):
            check_folder(runs["mvmr"], resume=False)
        patch.setattr(rank_zero_only, "rank", 1)
        check_folder(runs["mvmr"], resume=False)
    with pytest.raises(SystemExit, match="must be the folder of a run but has no settings.yaml"):
        main(["run", "--resume", str(tmp_path)])
    with pytest.raises(SystemExit, match="own settings, but --epochs was given as well"):
        main(["run", "--resume", str(runs["mvmr"]), "--epochs", "3"])
    (tmp_path / "settings.yaml").write_bytes((runs["mvmr"] / "settings.yaml").read_bytes())
    with pytest.raises(SystemExit, match="checkpoint.ckpt must be the run's checkpoint but is mis"):
        main(["export", str(tmp_path), str(tmp_path / "backbone.pt")])
    (tmp_path / "checkpoint.ckpt").write_bytes(b"no checkpoint")
    with pytest.raises(SystemExit, match="checkpoint.ckpt cannot be read as a file of ten"):
        main(["export", str(tmp_path), str(tmp_path / "backbone.pt")])


def few_images(folder, files):
    """Writes a folder of images that has fewer than a step of pretraining."""
    for split in ("train", "test"):
        for i in range(4):
            path = folder / split / str(i % 2) / f"{i}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            files.images[split][i].save(path)
    return folder


def test_exception_more_in_a_step_than_there_are_images(stl10_files, tmp_path):
    folder = few_images(tmp_path / "few", stl10_files)
    with pytest.raises(ValueError, match="batch_size must be at most the number of images, 4, but"):
        run(tiny(stl10_files, data=str(folder)), tmp_path / "run")


def test_exception_what_a_record_refuses_is_found_before_training(stl10_files, tmp_path):
    settings = tiny(stl10_files, representations=[{"name": "hog", "orientations": float("inf")}])
    with pytest.raises(ValueError, match=r"settings.representations\[0\].orientations must be fin"):
        run(settings, tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_a_teachers_file_is_named_in_the_command(stl10_files, tmp_path, monkeypatch):
    """Wherever its absolute path stands in an option."""
    teacher = "{name: teacher, source: torchvision, model: resnet18, preprocessing: {resize: 32,"
    teacher += f" crop: 32}}, weights: {tmp_path / 'nets' / 'teacher.pt'}}}"
    from torchvision.models import resnet18

    (tmp_path / "nets").mkdir()
    torch.save(resnet18().state_dict(), tmp_path / "nets" / "teacher.pt")
    words = ["run", *command_line(tiny(stl10_files, epochs=1, probe_epochs=1, monitor_every=0))]
    words += [f"--representations=[{teacher}]", "--output", str(tmp_path / "run")]
    monkeypatch.setattr(sys, "argv", ["stl10", *words])
    main(words)
    result = json.loads((tmp_path / "run" / "results.json").read_text())
    assert "weights: .../nets/teacher.pt}]" in result["command"]
    assert result["settings"]["representations"][0]["weights"] == ".../nets/teacher.pt"


def test_features(runs, tmp_path, stl10_files):
    path = tmp_path / "test.npz"
    main(["features", str(runs["mvmr"]), str(path)])
    settings, method = load_run(runs["mvmr"])
    expected, labels = features_of(method.backbone, load_data(settings).test, settings)
    with np.load(path) as read:
        np.testing.assert_array_equal(read["features"], expected.numpy())
        assert read["labels"].tolist() == stl10_files.labels["test"] == labels.tolist()
    main(["features", str(runs["simclr"]), str(path), "--data", "photographs"])
    with np.load(path) as read:
        assert read["features"].shape == (770, 128)
    # A few images of one's own: fewer than a step of the pretraining had.
    folder = few_images(tmp_path / "few", stl10_files)
    main(["features", str(runs["mvmr"]), str(path), "--data", str(folder)])
    with np.load(path) as read:
        assert read["features"].shape == (4, 128)
    with pytest.raises(SystemExit, match=r"output must end in .npz but is .*features.txt"):
        main(["features", str(runs["mvmr"]), str(tmp_path / "features.txt")])


@pytest.mark.parametrize("backbone", ["small", "resnet18", "mobilenet_v3_small", "resnet10t"])
def test_export_loads_by_what_it_prints(stl10_files, tmp_path, capsys, backbone):
    settings = tiny(stl10_files, backbone=backbone, representations=["pixels"])
    (tmp_path / "settings.yaml").write_text(yaml.safe_dump(settings.as_dict()))
    method = build_method(settings, 10).eval()
    torch.save({"state_dict": method.state_dict()}, tmp_path / "checkpoint.ckpt")
    main(["export", str(tmp_path), str(tmp_path / "backbone.pt")])
    code = [line.strip() for line in capsys.readouterr().out.splitlines() if line[:2] == "  "]
    names = {}
    exec("\n".join(code), names)
    model = names["model"].eval()
    rest = model.state_dict().keys() - method.backbone.state_dict().keys()
    assert all(re.match(r"(fc|classifier\.3)\.", name) for name in rest)
    if hasattr(model, "fc"):
        model.fc = torch.nn.Identity()
    if backbone == "mobilenet_v3_small":
        model.classifier[-1] = torch.nn.Identity()
    images = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        torch.testing.assert_close(model(images), method(images))


@pytest.mark.parametrize(
    "options",
    [
        {"objective": "features"},
        {"objective": "features", "distillation": {"dependence_weight": 0.1}},
        {"representations": ["pixels"], "distillation": {"teacher_dims": {"pixels": 3072}}},
        {"representations": ["hog"], "objective": "distillation"},
        {"representations": ["hog"], "objective": "distillation_paper"},
        {"representations": ["hog"], "representation_weight": 0.5, "view_terms": False},
        {"representations": ["hog"], "method": "vicreg", "dependence_measure": "debiased_cka"},
    ],
)
def test_a_run_that_distils_is_read_without_its_teachers(stl10_files, tmp_path, options):
    settings = tiny(stl10_files, **options)
    (tmp_path / "settings.yaml").write_text(yaml.safe_dump(settings.as_dict()))
    method = build_method(settings, 10).eval()
    torch.save({"state_dict": method.state_dict()}, tmp_path / "checkpoint.ckpt")
    _, loaded = load_run(tmp_path)
    images = torch.randn(2, 3, 32, 32)
    torch.testing.assert_close(loaded(images), method(images))


def test_a_kept_teacher_is_asked_once(stl10_files, tmp_path):
    from torchvision.models import resnet18

    torch.save({"state_dict": resnet18().state_dict()}, tmp_path / "teacher.pt")
    teacher = {"name": "teacher", "source": "torchvision", "model": "resnet18"}
    teacher |= {
        "weights": str(tmp_path / "teacher.pt"),
        "preprocessing": {"resize": 32, "crop": 32},
    }
    options = {"representations": [teacher, "hog"], "probe_epochs": 1, "monitor_every": 0}
    settings = tiny(stl10_files, cache=str(tmp_path / "store"), **options)
    run(settings, tmp_path / "first")
    run(settings, tmp_path / "second")
    first, second = losses(tmp_path / "first"), losses(tmp_path / "second")
    assert first == second
    assert "train_representations/teacher" in first[0]
    assert (tmp_path / "store").exists()


def test_label_subsets_and_accuracies(stl10_files):
    data = load_data(tiny(stl10_files))
    (part,) = label_subsets(0.5, data, seed=0)
    assert np.bincount(data.labels[part]).tolist() == [3] * 10
    assert len(set(part)) == 30
    scores = torch.tensor([[3.0, 2, 1], [1, 2, 3]])
    assert accuracies(scores, torch.tensor([0, 0])) == {"top1": 50.0, "top5": 100.0}


def test_good_features_are_found_good(stl10_files):
    """A backbone that knows the answer reaches it in every evaluation of frozen features."""
    settings = tiny(stl10_files, probe_optimizer="adam", probe_epochs=200, probe_learning_rate=1e-2)
    data = load_data(settings)
    # The class of a photograph is in its colours, which means over a grid keep.
    grid = torch.nn.Sequential(
        torch.nn.AdaptiveAvgPool2d(4), torch.nn.Flatten(), torch.nn.Linear(48, 64)
    )
    found, features, labels = evaluate(grid, data, settings)
    assert found["knn"]["top1"] >= 40
    assert found["linear"]["top1"] >= 40
    assert features.shape == (30, 64)
    assert labels.tolist() == stl10_files.labels["test"]


@pytest.mark.slow
def test_two_processes(stl10_files, tmp_path):
    for split in ("train", "test"):
        pairs = zip(stl10_files.images[split], stl10_files.labels[split], strict=True)
        for i, (image, label) in enumerate(pairs):
            (tmp_path / "images" / split / str(label)).mkdir(parents=True, exist_ok=True)
            image.save(tmp_path / "images" / split / str(label) / f"{i}.png")
    options = {"data": str(tmp_path / "images"), "batch_size": 20, "probe_epochs": 1, "epochs": 1}
    settings = tiny(stl10_files, devices=2, **options)
    command = ["-m", "benchmarks.stl10", "run", *command_line(settings)]
    done = subprocess.run(
        [sys.executable, *command, "--output", str(tmp_path / "run")],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    result = json.loads((tmp_path / "run" / "results.json").read_text())
    assert result["figures"]["pretraining"]["processes"] == 2
    assert [row["step"] for row in losses(tmp_path / "run") if "train_loss" in row] == [0, 1, 2]
