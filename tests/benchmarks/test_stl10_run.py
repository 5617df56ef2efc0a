"""Whole runs, small: every method, resuming, the report, comparing, exporting, features."""

import dataclasses
import json
import os
import re
import subprocess
import sys
from importlib.metadata import version

import numpy as np
import pytest
import torch
import yaml
from PIL import Image

from benchmarks.common.evaluation import knn_scores, topk_accuracy
from benchmarks.stl10.__main__ import main
from benchmarks.stl10.data import EpochSampler, Normalize, load_data
from benchmarks.stl10.evaluate import read_features
from benchmarks.stl10.methods import Method, build_method
from benchmarks.stl10.settings import PRESETS, resolve
from benchmarks.stl10.train import load_run, read_metrics, run

TIMES = {"seconds", "step_seconds", "images_per_second", "peak_memory_mb"}
VICREG_WITH = ["--representations", "pixels", "{name: hog, orientations: 9}"]
RUNS = {
    "mvmr": ["--labels", "folds", "0.5"],
    "vicreg": ["--labels"],
    "vicreg-representations": ["--labels", *VICREG_WITH],
    "barlowtwins": ["--labels"],
    "simclr": ["--labels"],
    "byol": ["--labels"],
}
TERMS = {
    "mvmr": {
        *("invariance", "variance", "dependence", "pixels", "augmented_pixels"),
        *("scattering", "hog", "local_std"),
    },
    "vicreg-representations": {"vicreg", "pixels", "hog"},
}


def tiny(files, **options):
    """Settings of a run that takes seconds; 120 images and three steps an epoch."""
    quick = {
        "data": "stl10",
        "data_dir": str(files.root),
        "epochs": 2,
        "batch_size": 40,
        "projector_hidden_dim": 64,
        "projector_output_dim": 32,
        "knn_k": 5,
        "probe_epochs": 20,
        "finetune_epochs": 1,
        "monitor_every": 1,
        "accelerator": "cpu",
    }
    return resolve([PRESETS / "quick.yaml"], {**quick, **options})


def command_line(settings):
    """The options of ``run`` for settings: those that are not the defaults."""
    words = []
    for field in dataclasses.fields(settings):
        value, option = getattr(settings, field.name), f"--{field.name.replace('_', '-')}"
        if isinstance(value, bool):
            words.append(option if value else f"--no-{field.name.replace('_', '-')}")
        elif value is not None:
            words += [option, *map(str, value if isinstance(value, list) else [value])]
    return words


@pytest.fixture(scope="module")
def runs(stl10_files, tmp_path_factory):
    """Folders of a quick run of each method."""
    root = tmp_path_factory.mktemp("runs")
    for name, extra in RUNS.items():
        settings = tiny(stl10_files, method=name.partition("-")[0])
        main(["run", *command_line(settings), *extra, "--output", str(root / name)])
    return {name: root / name for name in RUNS}


def losses(folder):
    """What the metrics say of each epoch, without what a clock has measured."""
    rows = read_metrics(folder / "metrics.csv")
    return [{k: v for k, v in row.items() if k not in TIMES} for row in rows]


def weights(folder):
    return torch.load(folder / "checkpoint.ckpt", weights_only=True)["state_dict"]


@pytest.mark.parametrize("name", RUNS)
def test_every_method_runs(runs, name):
    rows = read_metrics(runs[name] / "metrics.csv")
    assert [(row["epoch"], row["step"]) for row in rows] == [(1, 3), (2, 6)]
    terms = TERMS.get(name, {name})
    for row in rows:
        logged = {k: v for k, v in row.items() if k.startswith("loss_")}
        assert set(logged) == {f"loss_{term}" for term in terms}
        assert row["loss"] == pytest.approx(sum(logged.values()), rel=1e-5)
        assert 0 <= row["train_knn_top1"] <= 100
        assert min(row[name] for name in TIMES) > 0

    results = json.loads((runs[name] / "results.json").read_text())
    accuracy = results["accuracy"]
    for evaluation in ("knn", "linear", "linear_ten_crop"):
        assert 0 <= accuracy[evaluation]["top1"] <= accuracy[evaluation]["top5"] <= 100
    assert results["environment"]["seed"] == 0
    assert results["environment"]["versions"]["torch"] == version("torch")
    assert results["pretraining"]["images"] == 120
    assert results["backbone"]["flops_per_image"] > 1e6


def test_folds_and_fractions_of_labels(runs):
    accuracy = json.loads((runs["mvmr"] / "results.json").read_text())["accuracy"]
    assert (accuracy["labels_folds"]["subsets"], accuracy["labels_folds"]["images"]) == (10, 30)
    assert (accuracy["labels_0.5"]["subsets"], accuracy["labels_0.5"]["images"]) == (1, 30)
    for evaluation in ("linear", "finetune"):
        assert accuracy["labels_folds"][evaluation]["top1_std"] >= 0
        assert "top1_std" not in accuracy["labels_0.5"][evaluation]


def test_results_hold_no_absolute_path(runs, stl10_files):
    for name in ("results.json", "report.html"):
        text = (runs["mvmr"] / name).read_text()
        assert str(stl10_files.root) not in text
        assert str(runs["mvmr"].parent) not in text


def is_picture(path):
    """Whether a PNG shows more than one colour."""
    with Image.open(path) as image:
        return image.format == "PNG" and len(image.convert("RGB").getcolors(1 << 24)) > 10


@pytest.mark.parametrize("name", ["mvmr", "byol"])
def test_report(runs, name):
    page = (runs[name] / "report.html").read_text()
    assert set(re.findall(r'src="([^"]+)"', page)) == {"curves.png", "embedding.png"}
    assert is_picture(runs[name] / "curves.png")
    assert is_picture(runs[name] / "embedding.png")
    results = json.loads((runs[name] / "results.json").read_text())
    for evaluation in ("linear", "linear_ten_crop"):
        assert f"<td>{results['accuracy'][evaluation]['top1']:.2f}</td>" in page
    for text in ("weighted kNN", "30 test images", "learning_rate", results["label"]):
        assert text in page
    assert ("fine-tuned, folds of the labels" in page) == (name == "mvmr")


def test_compare(runs, tmp_path, capsys):
    main(["compare", *map(str, runs.values()), "--output", str(tmp_path / "comparison")])
    table = capsys.readouterr().out
    page = (tmp_path / "comparison" / "comparison.md").read_text()
    assert is_picture(tmp_path / "comparison" / "comparison.png")
    rows = dict(re.findall(r"^\| ([^|]+?) \| (.*) \|$", page, re.MULTILINE))
    labels = {"mvmr", "vicreg", "vicreg + representations", "barlowtwins", "simclr", "byol"}
    assert set(rows) == {"run", "---", *labels}
    assert rows["run"].split(" | ")[:3] == [
        "weighted kNN",
        "linear probe",
        "linear probe, ten crops",
    ]
    for name, folder in runs.items():
        results = json.loads((folder / "results.json").read_text())
        cells = rows[results["label"]].split(" | ")
        assert cells[0] == f"{results['accuracy']['knn']['top1']:.2f}", name
    assert rows["mvmr"] in table
    assert "These runs differ in: method, representations, labels." in page


def test_compare_tells_runs_of_one_method_apart(runs, tmp_path, capsys):
    copies = [tmp_path / place / "same" for place in ("a", "b", "c")]
    for copy in copies:
        copy.mkdir(parents=True)
        for name in ("results.json", "metrics.csv"):
            (copy / name).write_bytes((runs["simclr"] / name).read_bytes())
    main(["compare", *map(str, [*copies, copies[0]]), "--output", str(tmp_path / "comparison")])
    table = capsys.readouterr().out
    assert [f"| simclr ({copy}) |" in table for copy in copies] == [True] * 3
    assert table.count("| simclr (") == 3
    assert "same settings" in (tmp_path / "comparison" / "comparison.md").read_text()


def test_exception_compare(runs, tmp_path):
    with pytest.raises(SystemExit, match="has no results.json: it is no run, or one that is not f"):
        main(["compare", str(tmp_path)])
    (tmp_path / "results.json").write_text('{"accuracy": ')
    with pytest.raises(SystemExit, match="must be the results of a run but cannot be read"):
        main(["compare", str(tmp_path)])


KILLED = """
import os, signal, sys
from benchmarks.stl10.__main__ import main
from benchmarks.stl10.methods import Method

def die(self, batch, batch_idx, start=Method.on_train_batch_start):
    if self.global_step == int(sys.argv[1]):
        os.kill(os.getpid(), signal.SIGKILL)
    start(self, batch, batch_idx)

Method.on_train_batch_start = die
main(sys.argv[2:])
"""


@pytest.fixture
def folder(stl10_files, tmp_path):
    """The same images as a folder, which a process without the small files' checksums reads."""
    for split in ("train", "test"):
        for i, (image, label) in enumerate(
            zip(stl10_files.images[split], stl10_files.labels[split], strict=True)
        ):
            (tmp_path / "images" / split / str(label)).mkdir(parents=True, exist_ok=True)
            image.save(tmp_path / "images" / split / str(label) / f"{i}.png")
    return tmp_path / "images"


@pytest.mark.slow
def test_a_killed_run_continues_exactly(stl10_files, folder, tmp_path):
    """With all of the paper's representations, the randomly augmented one included."""
    options = {"data": str(folder), "batch_size": 20, "epochs": 3, "labels": [], "probe_epochs": 1}
    settings = tiny(stl10_files, **options)
    environment = {**os.environ, "OMP_NUM_THREADS": str(torch.get_num_threads())}
    for name, step in (("whole", -1), ("killed", 4)):  # in the middle of the second epoch
        arguments = ["run", *command_line(settings), "--output", str(tmp_path / name)]
        done = subprocess.run(
            [sys.executable, "-c", KILLED, str(step), *arguments],
            env=environment,
            capture_output=True,
            text=True,
            check=False,
        )
        assert done.returncode == (0 if name == "whole" else -9), done.stderr[-3000:]
    assert len(losses(tmp_path / "killed")) == 1
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks.stl10", "run", "--resume", str(tmp_path / "killed")],
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert losses(tmp_path / "killed") == losses(tmp_path / "whole")
    killed, whole = weights(tmp_path / "killed"), weights(tmp_path / "whole")
    assert killed.keys() == whole.keys()
    assert all(torch.equal(killed[name], whole[name]) for name in whole)
    results = [json.loads((tmp_path / n / "results.json").read_text()) for n in ("killed", "whole")]
    assert results[0]["accuracy"] == results[1]["accuracy"]
    assert [r["pretraining"]["resumed"] for r in results] == [True, False]


@pytest.mark.parametrize("step", [1, 4])
def test_an_interrupted_run_continues_exactly(stl10_files, tmp_path, monkeypatch, capsys, step):
    """Before the first checkpoint, and after it; with a momentum encoder."""
    settings = tiny(stl10_files, method="byol", labels=[], probe_epochs=1)
    run(settings, tmp_path / "whole")
    with monkeypatch.context() as patch:

        def interrupt(self, batch, batch_idx, start=Method.on_train_batch_start):
            if self.global_step == step:
                raise KeyboardInterrupt
            start(self, batch, batch_idx)

        patch.setattr(Method, "on_train_batch_start", interrupt)
        with pytest.raises((KeyboardInterrupt, SystemExit)):
            main(["run", *command_line(settings), "--output", str(tmp_path / "stopped")])
    assert f"Interrupted; continue with --resume {tmp_path / 'stopped'}" in capsys.readouterr().err
    assert not (tmp_path / "stopped" / "results.json").exists()
    main(["run", "--resume", str(tmp_path / "stopped")])
    assert losses(tmp_path / "stopped") == losses(tmp_path / "whole")


def test_a_finished_run_is_evaluated_again_when_resumed(runs, tmp_path):
    for name in ("settings.yaml", "checkpoint.ckpt", "metrics.csv"):
        (tmp_path / name).write_bytes((runs["simclr"] / name).read_bytes())
    main(["run", "--resume", str(tmp_path)])
    assert losses(tmp_path) == losses(runs["simclr"])
    accuracies = [
        json.loads((folder / "results.json").read_text())["accuracy"]
        for folder in (tmp_path, runs["simclr"])
    ]
    assert accuracies[0] == accuracies[1]


def test_each_epoch_has_its_own_order(stl10_files, tmp_path, monkeypatch):
    read = []

    def note(self, batch, batch_idx, start=Method.on_train_batch_start):
        read.append(batch[2].tolist())
        start(self, batch, batch_idx)

    monkeypatch.setattr(Method, "on_train_batch_start", note)
    run(tiny(stl10_files, method="simclr", labels=[], probe_epochs=1), tmp_path / "run")
    sampler = EpochSampler(120, 40, seed=0)
    expected = list(sampler)
    sampler.set_epoch(1)
    assert read == expected + list(sampler)
    assert read[:3] != read[3:]


def test_the_seed_decides(stl10_files, runs, tmp_path):
    for seed in (0, 1):
        settings = tiny(stl10_files, method="simclr", labels=[], seed=seed)
        run(settings, tmp_path / str(seed))
    assert losses(tmp_path / "0") == losses(runs["simclr"])
    assert losses(tmp_path / "1") != losses(runs["simclr"])


@pytest.mark.parametrize(("steps", "epochs"), [(1, "0.33"), (3, "1")])
def test_a_part_of_an_epoch_is_no_epoch(stl10_files, tmp_path, steps, epochs):
    settings = tiny(stl10_files, method="simclr", labels=[], max_steps=steps)
    results = run(settings, tmp_path / "run")
    assert results["pretraining"]["epochs"] == float(epochs)
    assert f"{epochs} of 2" in (tmp_path / "run" / "report.html").read_text()


def test_a_diverged_run_says_so(stl10_files, tmp_path, monkeypatch):
    monkeypatch.setattr(
        Method, "regularization", lambda self, z, r: {"broken": z[0].sum() * torch.nan}
    )
    settings = tiny(stl10_files, method="simclr")
    with pytest.raises(SystemExit, match="Error: the loss must be finite but is .*lower the learn"):
        main(["run", *command_line(settings), "--output", str(tmp_path / "out")])


def test_exception_folders(runs, tmp_path):
    with pytest.raises(SystemExit, match="holds a run already; continue it with --resume"):
        main(["run", "--output", str(runs["mvmr"])])
    with pytest.raises(SystemExit, match="must be the folder of a run but has no settings.yaml"):
        main(["run", "--resume", str(tmp_path)])
    with pytest.raises(SystemExit, match=r"own settings, but --preset, --epochs was given as well"):
        main(["run", "--resume", str(runs["mvmr"]), "--epochs", "3", "--preset", "quick"])
    (tmp_path / "settings.yaml").write_bytes((runs["mvmr"] / "settings.yaml").read_bytes())
    with pytest.raises(SystemExit, match="checkpoint.ckpt must be the run's checkpoint but is mis"):
        load(tmp_path)
    (tmp_path / "checkpoint.ckpt").write_bytes(b"no checkpoint")
    with pytest.raises(SystemExit, match="must be a checkpoint of this run but cannot be read"):
        load(tmp_path)


def load(folder):
    main(["export", str(folder), str(folder / "backbone.pt")])


def test_features(runs, tmp_path, stl10_files, capsys):
    for split in ("train", "test"):
        path = tmp_path / f"{split}.npz"
        main(["features", str(runs["mvmr"]), str(path), "--split", split])
        settings, method = load_run(runs["mvmr"])
        images = getattr(load_data(settings), split)
        expected, labels = read_features(method, images, settings, "")
        with np.load(path) as read:
            assert set(read) == {"features", "labels", "classes"}
            np.testing.assert_array_equal(read["features"], expected.numpy())
            assert read["labels"].tolist() == stl10_files.labels[split] == labels.tolist()
            assert read["classes"].tolist() == load_data(settings).classes
        assert f"features {tuple(expected.shape)}" in capsys.readouterr().out
    with pytest.raises(SystemExit, match=r"output must end in .npz but is .*features.txt"):
        main(["features", str(runs["mvmr"]), str(tmp_path / "features.txt")])


def test_features_of_other_images(runs, tmp_path):
    main(["features", str(runs["simclr"]), str(tmp_path / "f.npz"), "--data", "photographs"])
    with np.load(tmp_path / "f.npz") as read:
        assert read["features"].shape == (770, 128)
        assert len(read["classes"]) == 11


@pytest.mark.parametrize(
    "backbone", ["small", "resnet18", "mobilenet_v3_small", "resnet10t", "vit_tiny_patch16_224"]
)
def test_export_loads_by_what_it_prints(stl10_files, tmp_path, capsys, backbone):
    settings = tiny(stl10_files, backbone=backbone, representations=["pixels"])
    folder = tmp_path / "run"
    folder.mkdir()
    (folder / "settings.yaml").write_text(yaml.safe_dump(settings.as_dict()))
    method = build_method(settings)
    torch.save({"state_dict": method.state_dict()}, folder / "checkpoint.ckpt")
    main(["export", str(folder), str(tmp_path / "backbone.pt")])
    code = [line.strip() for line in capsys.readouterr().out.splitlines() if line[:2] == "  "]
    names = {}
    exec("\n".join(code), names)
    model = names["model"].eval()
    exported = torch.load(tmp_path / "backbone.pt", weights_only=True)
    loaded = model.state_dict()
    assert exported.keys() <= loaded.keys()
    # All but the classifier.
    rest = loaded.keys() - exported.keys()
    assert all(re.match(r"(fc|classifier\.3)\.", name) for name in rest)
    for name in ("fc", "classifier"):
        if hasattr(model, name):
            head = getattr(model, name)
            if name == "classifier":
                head[-1] = torch.nn.Identity()
            else:
                model.fc = torch.nn.Identity()
    # strict=False is advised where the classifier is missing, and nowhere else.
    assert ("strict=False" in "\n".join(code)) == bool(rest)
    images = torch.randint(0, 256, (2, 3, 32, 32), dtype=torch.uint8)
    with torch.no_grad():
        torch.testing.assert_close(
            model(Normalize(settings.normalization)(images)), method.eval()(images)
        )


TEACHER = {"name": "teacher", "source": "torchvision", "model": "resnet18"}


@pytest.fixture(scope="module")
def teacher(tmp_path_factory):
    """A teacher's configuration, its weights in a checkpoint of one's own."""
    from torchvision.models import resnet18

    path = tmp_path_factory.mktemp("teacher") / "teacher.pt"
    torch.manual_seed(3)
    network = resnet18()
    torch.save({"state_dict": network.state_dict()}, path)
    return {**TEACHER, "weights": str(path), "preprocessing": {"resize": 32, "crop": 32}}


def test_distillation_with_a_kept_teacher(stl10_files, teacher, tmp_path):
    """The teacher's embeddings are computed once an image; then the teacher itself is not asked."""
    from mvmr_loss.teachers import Teacher

    options = {"representations": [teacher, "hog"], "labels": [], "probe_epochs": 1}
    whole = tiny(stl10_files, **options)
    kept = dataclasses.replace(whole, representation_cache=str(tmp_path / "store"))
    run(whole, tmp_path / "whole")
    run(kept, tmp_path / "kept")
    seen = []
    with pytest.MonkeyPatch.context() as patch:
        extract = Teacher.extract
        patch.setattr(Teacher, "extract", lambda s, x: (seen.append(len(x)), extract(s, x))[1])
        run(kept, tmp_path / "again")
    # Single images: of each batch, and by which the store is laid out.
    assert set(seen) == {1}
    steps = losses(tmp_path / "again")[-1]["step"]
    assert steps <= len(seen) < steps + 4
    names = {"loss_teacher", "loss_hog"}
    for row, again, exact in zip(
        *(losses(tmp_path / name) for name in ("kept", "again", "whole")), strict=True
    ):
        assert row == again
        assert names <= exact.keys()
        # The store rounds to half precision.
        assert row["loss"] == pytest.approx(exact["loss"], rel=1e-3)
    # The teacher is no part of what the run learned: features need none of its files.
    main(["export", str(tmp_path / "kept"), str(tmp_path / "backbone.pt")])


def test_the_teacher_sees_its_own_normalisation(stl10_files, teacher):
    from torchvision.models import resnet18
    from torchvision.transforms.v2 import functional as TF

    unresized = {**teacher, "preprocessing": {"resize": None, "crop": None}}
    method = build_method(tiny(stl10_files, representations=[unresized], normalization="cifar"))
    images = load_data(tiny(stl10_files)).test.__getitems__([0, 1, 2])[0]
    found = method.representations(method.normalize(images))["teacher"]
    network = resnet18()
    network.load_state_dict(torch.load(teacher["weights"])["state_dict"])
    network.fc = torch.nn.Identity()
    pixels = TF.normalize(images / 255, [0.485, 0.456, 0.406], [0.229, 0.224, 0.225])
    with torch.no_grad():
        torch.testing.assert_close(found, network.eval()(pixels), rtol=1e-3, atol=1e-4)


def test_exception_cache(stl10_files, tmp_path):
    settings = tiny(stl10_files, method="simclr", representation_cache=str(tmp_path / "store"))
    with pytest.raises(ValueError, match="representation_cache must be left out: the run has no"):
        run(settings, tmp_path / "out")
    settings = tiny(stl10_files, representations=["augmented_pixels"])
    settings = dataclasses.replace(settings, representation_cache=str(tmp_path / "store"))
    with pytest.raises(ValueError, match="representations must have one that is cacheable"):
        run(settings, tmp_path / "out")


@pytest.mark.slow
def test_two_processes(stl10_files, folder, tmp_path):
    options = {"data": str(folder), "batch_size": 20, "labels": [], "probe_epochs": 1}
    settings = tiny(stl10_files, devices=2, epochs=1, **options)
    command = ["-m", "benchmarks.stl10", "run", *command_line(settings)]
    done = subprocess.run(
        [sys.executable, *command, "--output", str(tmp_path / "run")],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    results = json.loads((tmp_path / "run" / "results.json").read_text())
    assert results["pretraining"]["processes"] == 2
    assert [row["step"] for row in losses(tmp_path / "run")] == [3]


@pytest.mark.slow
def test_the_quick_preset_learns(tmp_path):
    """Better features of photographs than those of the same network untrained."""
    options = {"accelerator": "cpu", "labels": []}
    settings = resolve([PRESETS / "quick.yaml"], options)
    results = run(settings, tmp_path / "run")
    rows = losses(tmp_path / "run")
    assert rows[-1]["loss"] < rows[0]["loss"]
    untrained, data = build_method(settings), load_data(settings)
    features = [
        read_features(untrained, images, settings, "") for images in (data.train, data.test)
    ]
    scores = knn_scores(*features[0], features[1][0], k=settings.knn_k)
    before = topk_accuracy(scores, features[1][1])["top1"]
    assert results["accuracy"]["knn"]["top1"] > before
