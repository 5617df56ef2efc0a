"""timm's distillation task with the dependence term, and its use in timm's training script."""

import csv
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

pytest.importorskip("timm", "1.0.31")

import timm
from timm.task import DistillationTeacher, FeatureDistillationTask
from torch import nn

from mvmr_loss import MultiRepresentationRegularizer, Representations
from mvmr_loss.adapters.timm import DependenceDistillationTask
from mvmr_loss.dependence import cka, distance_correlation
from tests.adapters import guides

EXAMPLE = Path(__file__).parents[2] / "examples" / "timm_dependence.py"
SIZE = 64
MEAN, STD = (0.4, 0.5, 0.6), (0.2, 0.25, 0.3)


def model(name, **config):
    torch.manual_seed(0)
    built = timm.create_model(name, num_classes=3, pretrained_cfg_overlay=config)
    return built.eval()  # no running statistics: two passes are equal


def student():
    return model("test_resnet", mean=MEAN, std=STD)


def teacher():
    return model("test_byobnet", mean=(0.5,) * 3, std=(0.5,) * 3)


def task(**options):
    built = DependenceDistillationTask(
        student(), teacher(), nn.CrossEntropyLoss(), verbose=False, **options
    )
    return built.eval()


def batch(n=6):
    generator = torch.Generator().manual_seed(0)
    return torch.randn(n, 3, SIZE, SIZE, generator=generator), torch.arange(n) % 3


def features(built, images):
    return built.forward_head(built.forward_features(images), pre_logits=True)


def teacher_features(images):
    """Of images that are normalised for the student."""
    mean, std = (torch.tensor(values)[:, None, None] for values in (MEAN, STD))
    return features(teacher(), ((images * std + mean) - 0.5) / 0.5)


def test_the_loss_is_the_criterion_and_the_dependence():
    built, (images, labels) = task(distill_loss_weight=0.5, task_loss_weight=2.0), batch()
    result = built(images, labels)
    logits, x = student()(images), features(student(), images)
    torch.testing.assert_close(result["output"], logits)
    task_loss = nn.functional.cross_entropy(logits, labels)
    kd_loss = 1 - distance_correlation(x, teacher_features(images))
    torch.testing.assert_close(result["kd_loss"], kd_loss, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(result["kd_representations/teacher"], result["kd_loss"])
    torch.testing.assert_close(result["loss"], 2 * task_loss + 0.5 * kd_loss, rtol=1e-4, atol=1e-5)
    result["loss"].backward()
    assert all(p.grad is None for p in built.teacher.parameters())
    assert sum(p.grad.abs().sum() for p in built.trainable_module.parameters()) > 0


def test_another_measure_and_further_representations():
    options = {"dependence_measure": "debiased_cka", "weights": {"teacher": 2.0, "hog": 0.5}}
    for loss in (options, MultiRepresentationRegularizer(**options)):
        built, (images, labels) = task(loss=loss, representations=["hog"]), batch()
        result = built(images, labels)
        x = features(student(), images)
        terms = [
            2 * (1 - cka(x, teacher_features(images), debiased=True)),
            0.5 * (1 - cka(x, Representations(["hog"])(images)["hog"], debiased=True)),
        ]
        torch.testing.assert_close(result["kd_loss"], sum(terms), rtol=1e-3, atol=1e-4)
    representations = task(representations=["hog"]).representations
    assert representations.normalization.mean == MEAN


def test_weights_are_timms():
    for weights in ({}, {"task_loss_weight": 0.3}, {"distill_loss_weight": 5.0}):
        ours = task(**weights)
        theirs = FeatureDistillationTask(
            student(), teacher(), nn.CrossEntropyLoss(), verbose=False, **weights
        )
        assert ours.task_loss_weight == theirs.task_loss_weight
        assert ours.distill_loss_weight == theirs.distill_loss_weight


def test_it_is_trained_saved_and_loaded_as_timms_tasks_are():
    built, (images, labels) = task(), batch(8)
    built.train()
    assert not built.teacher.training
    built.setup_ema(decay=0.5)
    parameters = list(built.get_trainable_module().parameters())
    assert len(parameters) == len(list(student().parameters()))  # no projection
    optimizer = torch.optim.Adam(parameters, lr=1e-3)
    losses = []
    for _ in range(6):
        result = built(images, labels)
        optimizer.zero_grad()
        result["loss"].backward()
        optimizer.step()
        built.update_ema()
        losses.append(result["loss"].item())
    assert losses[-1] < losses[0]
    state = built.get_checkpoint_state()
    assert list(state) == ["state_dict"]
    fresh = task()
    fresh.load_checkpoint_state(state["state_dict"])
    torch.testing.assert_close(
        fresh.get_eval_model().fc.weight, built.get_eval_model().fc.weight, rtol=0, atol=0
    )


def test_a_teacher_of_timms_own_class_and_bfloat16():
    built = DependenceDistillationTask(
        student().bfloat16(),
        DistillationTeacher(teacher().bfloat16(), dtype=torch.bfloat16),
        nn.CrossEntropyLoss(),
        dtype=torch.bfloat16,
        verbose=False,
    ).eval()
    images, labels = batch()
    result = built(images.bfloat16(), labels)
    assert result["kd_loss"].dtype == torch.float32
    assert torch.isfinite(result["loss"])


def test_a_teacher_of_a_folder(tmp_path):
    """As the guide names one for ``--kd-model-name``."""
    saved = timm.create_model("test_vit", num_classes=3)
    timm.models.save_for_hf(saved, tmp_path)
    built = DependenceDistillationTask(
        student(), f"local-dir:{tmp_path}", nn.CrossEntropyLoss(), verbose=False
    )
    torch.testing.assert_close(built.teacher.model.head.weight, saved.head.weight)


def test_the_criterion_is_made_of_options():
    """Which an older timm does not know, and is not told of unless they are given."""
    built = DependenceDistillationTask(
        student(), teacher(), criterion_kwargs={"smoothing": 0.1}, verbose=False
    ).eval()
    images, labels = batch()
    expected = nn.functional.cross_entropy(student()(images), labels, label_smoothing=0.1)
    torch.testing.assert_close(built(images, labels)["task_loss"], expected)


def test_errors():
    with pytest.raises(TypeError, match="loss must be a .*Regularizer or a mapping.*is a str"):
        task(loss="debiased_cka")
    with pytest.raises(ValueError, match="dependence_measure must be one of"):
        task(loss={"dependence_measure": "cca"})
    with pytest.raises(ValueError, match="other names than 'teacher'.*give a label"):
        task(representations={"teacher": {"name": "pixels"}})


SCRIPT = """
import sys
import timm
import torch
from timm.task import FeatureDistillationTask
from neighbour import NAME
print(sys.argv[1:], NAME)
model = timm.create_model("test_resnet", num_classes=3)
task = FeatureDistillationTask(
    student_model=model, teacher_model=timm.create_model("test_vit", num_classes=3),
    criterion=torch.nn.CrossEntropyLoss(), student_feature_dim=None, teacher_feature_dim=None,
    distill_loss_weight=None, task_loss_weight=None, verbose=True,
)
print(type(task).__name__, task.dependence.measure.name)
"""


def test_the_guide_runs(tmp_path):
    namespace = {}
    exec("\n".join(guides.blocks("timm", "python")), namespace)
    named = namespace["result"]
    assert list(named) == ["loss", "output", "task_loss", "kd_loss", "kd_representations/teacher"]
    for command in guides.commands("timm", "python -m mvmr_loss.adapters.timm"):
        (tmp_path / "train.py").write_text("import sys; print(sys.argv[1:])")
        output = guides.run(command, tmp_path)
        assert "'--kd-model-name', 'resnet50', '--kd-distill-type', 'feature'" in output


@pytest.fixture(scope="module")
def checkout():
    """A checkout of timm, whose training script is on no index."""
    folder = Path(os.environ.get("TIMM_REPO", "~/.cache/mvmr-loss/timm")).expanduser()
    if not (folder / "train.py").is_file():
        pytest.skip(
            f"no checkout of timm in {folder}: git clone "
            f"https://github.com/huggingface/pytorch-image-models {folder}, or set TIMM_REPO"
        )
    return folder


@pytest.mark.parametrize("index", [0, 1])
def test_the_guides_commands_with_timms_script(checkout, photograph_folder, tmp_path, index):
    """As they stand, in the checkout, with small networks on a CPU, to the accuracy."""
    for split, name in (("train", "train"), ("test", "val")):
        (tmp_path / "DATA").mkdir(exist_ok=True)
        (tmp_path / "DATA" / name).symlink_to(photograph_folder / split)
    classes = len(list((photograph_folder / "train").iterdir()))
    own = timm.create_model("test_byobnet", num_classes=classes)
    timm.models.save_for_hf(own, tmp_path / "teacher")
    command = guides.commands("timm", "python -m mvmr_loss.adapters.timm")[index]
    for there, here in (
        (" DATA ", f" {tmp_path / 'DATA'} "),
        (" resnet18 ", " test_resnet "),
        (" resnet50 ", f" local-dir:{tmp_path / 'teacher'} "),
    ):
        assert there in command
        command = command.replace(there, here)
    options = f"--device cpu --num-classes {classes} --img-size 32 --batch-size 16 --workers 1"
    options += f" --epochs 1 --output {tmp_path / 'runs'} --experiment one"
    output = guides.run(f"{command} {options}", checkout)
    assert '"top1": ' in output
    (row,) = csv.DictReader((tmp_path / "runs" / "one" / "summary.csv").open())
    assert 0 <= float(row["eval_top1"]) <= 100
    assert float(row["train_loss"]) > 0


def test_the_example_runs_from_anywhere(tmp_path):
    output = guides.run(f"python {EXAMPLE} --steps 2 --batch-size 8", tmp_path)
    assert "student: step    2, loss" in output
    assert "widths: 512 and 96" in output


def run(folder, *arguments):
    command = [sys.executable, "-m", "mvmr_loss.adapters.timm", *arguments]
    return subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)


def test_timms_script_gets_it_for_feature_distillation(tmp_path):
    (tmp_path / "scripts").mkdir()
    (tmp_path / "scripts" / "train.py").write_text(SCRIPT)
    (tmp_path / "scripts" / "neighbour.py").write_text("NAME = 'found'")
    loss = 'loss={"dependence_measure": "debiased_cka"}'
    done = run(tmp_path, "--task", loss, "scripts/train.py", "--lr", "0.1")
    assert done.returncode == 0, done.stderr
    assert "['--lr', '0.1'] found" in done.stdout
    assert "DependenceDistillationTask debiased_cka" in done.stdout


@pytest.mark.parametrize("name", ["LogitDistillationTask", "ClassificationTask"])
def test_options_without_feature_distillation(tmp_path, name):
    (tmp_path / "train.py").write_text(
        f"import timm\nfrom timm.task import {name}\nmodel = timm.create_model('test_resnet')\n"
        f"{name}(model, **({{'teacher_model': model}} if 'Logit' in '{name}' else {{}}))\n"
        "print('trained')"
    )
    done = run(tmp_path, "--task", "loss={}", "train.py")
    assert (
        f"--task must be left out but for feature distillation, but the script trains by {name}"
        in (done.stderr)
    )
    assert "trained" in run(tmp_path, "train.py").stdout


def test_errors_of_the_command(tmp_path):
    assert "must be a Python script but is none" in run(tmp_path, "train.py").stderr
    (tmp_path / "train.py").write_text("")
    done = run(tmp_path, "--task", "lr=1", "train.py")
    assert "--task must be loss=... or representations=... but is lr" in done.stderr


def test_error_where_timm_has_no_tasks(tmp_path):
    code = """
import sys
sys.modules["timm.task"] = None
try:
    import mvmr_loss.adapters.timm
except ImportError as error:
    print(error)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert "pip install 'timm>=1.0.31'" in done.stdout
