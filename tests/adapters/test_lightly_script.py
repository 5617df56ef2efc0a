"""lightly's benchmark scripts, unmodified, with ``mvmr`` among their methods."""

import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks.common.photographs import Photographs
from tests.adapters import guides

CLASSES = 5
OPTIONS = ["--batch-size-per-device", str(CLASSES), "--num-workers", "1", "--accelerator", "cpu"]
OPTIONS += ["--precision", "32-true", "--num-classes", str(CLASSES), "--knn-k", "3", "--seed", "0"]
# The scripts fix the images to 224 pixels: what makes them quick on a CPU is a small network.
SMALL = ["--model", "backbone=shufflenet_v2_x0_5"]
SMALL += ["--model", "hidden_dim=64", "--model", "output_dim=64"]
# The guide's commands, in their order.
TWO_METHODS, VITB16, RESNET50, TEACHER = range(4)
DOWNLOAD = '"weights": "default"'
ONLY_KNN = ["--skip-linear-eval", "--skip-finetune-eval"]


@pytest.fixture(scope="module")
def benchmark():
    """The folder of lightly's ImageNet benchmarks in a checkout."""
    repository = Path(os.environ.get("LIGHTLY_REPO", "~/.cache/mvmr-loss/lightly")).expanduser()
    folder = repository / "benchmarks" / "imagenet"
    if not (folder / "resnet50" / "main.py").is_file():
        pytest.skip(
            f"no checkout of lightly in {repository}: git clone "
            f"https://github.com/lightly-ai/lightly {repository}, or set LIGHTLY_REPO"
        )
    return folder


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """A folder of training and one of validation images, with five classes."""
    root = tmp_path_factory.mktemp("images")
    for split, name in (("train", "train"), ("test", "val")):
        photographs = Photographs(split, crops_per_class=1)
        for i in range(CLASSES):
            image, label = photographs[i]
            (root / name / str(label)).mkdir(parents=True)
            image.save(root / name / str(label) / "0.png")
    return ["--train-dir", str(root / "train"), "--val-dir", str(root / "val")]


def with_batch_size(size):
    return [OPTIONS[0], str(size), *OPTIONS[2:]]


def launch(*arguments, cwd, module="mvmr_loss.adapters.lightly"):
    start = ["-m", module] if module else []
    return subprocess.run(
        [sys.executable, *start, *map(str, arguments)],
        cwd=cwd,
        env={**os.environ, "PYTHONDONTWRITEBYTECODE": "1"},
        capture_output=True,
        text=True,
        check=False,
    )


def table(done):
    """The script's table of results: (evaluation, metric) -> value."""
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    rows = re.findall(r"^\| (\w+) +\| (val_\w+)[^|]*\| ([\d.]+) +\|$", done.stdout, re.MULTILINE)
    return {(evaluation, metric): float(value) for evaluation, metric, value in rows}


def as_in_the_guide(index, benchmark, cwd, *script_options, model=SMALL):
    """Runs one of the guide's commands, with more options for the model and for the script."""
    command = guides.commands("lightly", "python -m mvmr_loss.adapters.lightly")[index]
    command = command.replace("python ", f"{sys.executable} ", 1).replace(
        DOWNLOAD, '"weights": null'
    )
    command = command.replace("benchmarks/", f"{shlex.join(model)} benchmarks/", 1)
    if not (cwd / "benchmarks").exists():
        (cwd / "benchmarks").symlink_to(benchmark.parent)  # the reader's folder is the checkout
    return subprocess.run(
        ["bash", "-c", f'{command} "$@"', "bash", *map(str, script_options)],
        cwd=cwd,
        env={**os.environ, "PYTHONDONTWRITEBYTECODE": "1"},
        capture_output=True,
        text=True,
        check=False,
    )


def test_resnet50_script(benchmark, folders, tmp_path):
    options = ["--epochs", "1", *folders, *OPTIONS, *ONLY_KNN]
    done = as_in_the_guide(RESNET50, benchmark, tmp_path, *options)
    results = table(done)
    assert results["knn", "val_knn_top5"] == 1.0  # of five classes
    assert set(results) == {("knn", "val_knn_top1"), ("knn", "val_knn_top5")}
    # The online classifier was evaluated, too, and the script found its accuracy.
    assert "max val_online_cls_top5: 1.0" in done.stdout
    checkpoints = tmp_path.glob("benchmark_logs/mvmr/*/pretrain/version_0/checkpoints/*.ckpt")
    assert len(list(checkpoints)) == 1


@pytest.mark.slow  # the other script's twin
def test_vitb16_script(benchmark, folders, tmp_path):
    pytest.importorskip("timm")
    model = ["--model", "backbone=vit_tiny_patch16_224", *SMALL[2:]]
    options = ["--epochs", "1", *folders, *OPTIONS, *ONLY_KNN]
    done = as_in_the_guide(VITB16, benchmark, tmp_path, *options, model=model)
    assert table(done)["knn", "val_knn_top5"] == 1.0


@pytest.mark.slow
def test_a_teacher_that_is_kept_then_alone(benchmark, folders, tmp_path):
    """The second training reads what the first has stored, and regresses onto it."""
    pytest.importorskip("timm")
    options = ["--epochs", "1", *folders, *OPTIONS, *ONLY_KNN]
    table(as_in_the_guide(TEACHER, benchmark, tmp_path, *options))
    assert (tmp_path / "runs" / "teacher").is_dir()
    (distillation,) = guides.commands("lightly", "    --model preset=distillation")
    model = [*SMALL, "--model", "fill_cache=false", *shlex.split(distillation)]
    done = as_in_the_guide(TEACHER, benchmark, tmp_path, *options, model=model)
    assert table(done)["knn", "val_knn_top5"] == 1.0


@pytest.mark.slow
def test_all_evaluations(benchmark, folders, tmp_path):
    """Pretraining, kNN, linear and fine-tune evaluation."""
    done = launch(
        *[*SMALL, benchmark / "resnet50" / "main.py", "--methods", "mvmr"],
        *["--epochs", "10", *folders, *OPTIONS, "--log-dir", tmp_path],
        cwd=tmp_path,
    )
    results = table(done)
    assert {evaluation for evaluation, _ in results} == {"knn", "linear", "finetune"}
    assert all(results[name, "val_top5"] == 1.0 for name in ("linear", "finetune"))


@pytest.mark.slow
def test_beside_a_method_of_lightly(benchmark, folders, tmp_path):
    """VICReg, with its ResNet-50 and a warm-up of ten epochs, then MV-MR, in one run."""
    options = ["--epochs", "10", *folders, *with_batch_size(3), *ONLY_KNN]
    done = as_in_the_guide(TWO_METHODS, benchmark, tmp_path, *options)
    table(done)
    assert re.findall(r"Results for (\w+):", done.stdout) == ["mvmr", "vicreg"]


@pytest.mark.slow
def test_two_processes(benchmark, folders, tmp_path):
    """Lightning starts the second process by repeating the command line: it must find mvmr too."""
    done = launch(
        *[*SMALL, benchmark / "resnet50" / "main.py", "--methods", "mvmr", "--devices", "2"],
        *["--epochs", "1", *folders, *with_batch_size(2), *ONLY_KNN, "--log-dir", tmp_path],
        cwd=tmp_path,
    )
    assert table(done)["knn", "val_knn_top5"] == 1.0
    assert "GLOBAL_RANK: 1, MEMBER: 2/2" in done.stderr


FAKE = """
import argparse, inspect, json, neighbour
parser = argparse.ArgumentParser("fake")
parser.add_argument("--methods", nargs="+")
parser.add_argument("--knn-k", type=int, default=200)
METHODS = {"theirs": {"model": neighbour.Model, "transform": None}}
def main(methods, knn_k):
    entry = METHODS["mvmr"]
    parameters = list(inspect.signature(entry["model"].__init__).parameters)
    model = entry["model"](batch_size_per_device=4, num_classes=5)
    print(json.dumps({
        "methods": sorted(METHODS), "asked": methods, "knn_k": knn_k, "parameters": parameters,
        "optimizer": model.optimizer_class.__name__, "hparams": model.hparams["backbone"],
        "lr": model.lr, "views": len(entry["transform"].transforms),
    }))
if __name__ == "__main__":
    raise AssertionError("the last lines of a script are the launcher's")
"""


@pytest.fixture
def fake(tmp_path):
    """A script of the benchmarks' form that tells what it is given."""
    (tmp_path / "neighbour.py").write_text("class Model: pass\n")
    (tmp_path / "main.py").write_text(FAKE)
    return tmp_path / "main.py"


def test_options_reach_model_transform_and_script(fake, tmp_path):
    import json

    done = launch(
        *["--model", "backbone=resnet18", "--model", "lr=0.25", "--model", "hidden_dim=8"],
        *["--transform", "num_augmented_views=3", fake, "--knn-k", "7", "--methods", "a", "b"],
        cwd=tmp_path,
    )
    assert done.returncode == 0, done.stderr
    told = json.loads(done.stdout)
    assert told == {
        "methods": ["mvmr", "theirs"],
        "asked": ["a", "b"],
        "knn_k": 7,
        "parameters": ["self", "batch_size_per_device", "num_classes", "knn_k", "knn_t"],
        "optimizer": "Adam",
        "hparams": "resnet18",
        "lr": 0.25,
        "views": 4,
    }


def test_exception(fake, tmp_path, monkeypatch, capsys):
    from mvmr_loss.adapters.lightly.__main__ import main

    monkeypatch.syspath_prepend(tmp_path)  # restores sys.path, which the launcher extends

    def refused(*arguments, text=None):
        monkeypatch.delitem(sys.modules, "main", raising=False)
        if text is not None:
            fake.write_text(text)
        with pytest.raises(SystemExit) as caught:
            main(list(map(str, arguments)))
        return capsys.readouterr().err if caught.value.code == 2 else str(caught.value)

    assert "must be a Python script but is none" in refused(tmp_path / "absent.py")
    assert "must be NAME=VALUE but is 'lr'" in refused("--model", "lr", fake)
    assert "--model has no option 'rate'; its options are" in refused("--model", "rate=1", fake)
    assert "num_augmented_views must be at least 1" in refused(
        "--transform", "num_augmented_views=0", fake
    )
    assert "has no METHODS, parser, main; give the path" in refused(fake, text="METHODS = []")
    assert "has no METHODS; give the path" in refused(
        fake, text=FAKE.replace("METHODS = {", "OTHERS = {")
    )
    assert "has a method mvmr already" in refused(fake, text=FAKE.replace('"theirs":', '"mvmr":'))
    message = refused(fake, text="from lightly.loss import NoSuchLoss")
    assert re.search(r"cannot be imported with lightly [\d.]+: cannot import name", message)
    assert "use the checkout of the installed version" in message
