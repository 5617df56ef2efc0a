"""timm's distillation task with regression and dependence, and its use in timm's training script."""

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

from mvmr_loss import DistillationLoss, MultiRepresentationRegularizer, Representations
from mvmr_loss.adapters.timm import DependenceDistillationTask
from mvmr_loss.dependence import cka, distance_correlation
from mvmr_loss.representations import Representation
from tests import processes
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


class Drifting(Representation):
    """Would change by being computed in training mode."""

    def __init__(self):
        super().__init__()
        self.norm = nn.BatchNorm2d(3)

    def extract(self, images):
        return self.norm(images)

    def output_shape(self, channels, height, width):
        return (channels, height, width)


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


def student_features(images):
    return features(student(), images)


def test_by_default_it_is_the_best_known_recipe():
    built, (images, labels) = task(distill_loss_weight=0.5, task_loss_weight=2.0), batch()
    result = built(images, labels)
    x, y = student_features(images), teacher_features(images)
    expected = DistillationLoss(x.shape[1], {"teacher": y.shape[1]})
    expected.load_state_dict(built.distillation.state_dict())
    terms = expected.eval().forward_components(x, {"teacher": y})
    assert {"regression/teacher", "dependence/teacher"} == set(terms.terms)
    for name, value in terms.as_dict("kd_").items():
        torch.testing.assert_close(result[name], value, rtol=1e-4, atol=1e-5)
    task_loss = nn.functional.cross_entropy(student()(images), labels)
    total = 2 * task_loss + 0.5 * terms.total
    torch.testing.assert_close(result["loss"], total, rtol=1e-4, atol=1e-5)
    result["loss"].backward()
    assert all(p.grad is None for p in built.teacher.parameters())
    assert all(p.grad.abs().sum() > 0 for p in built.distillation.parameters())
    assert built.distillation.gather_distributed
    assert built.dependence is None


def test_the_options_are_those_of_the_distillation():
    size = {"input_size": (3, SIZE, SIZE)}
    options = {"dependence_weight": 0.7, "hidden_dim": 0, "gather_distributed": False}
    built = DependenceDistillationTask(
        model("test_resnet", **size),
        teacher(),
        nn.CrossEntropyLoss(),
        distillation=options,
        representations=["hog"],
        verbose=False,
    )
    distillation = built.distillation
    assert list(distillation.teacher_dims) == ["teacher", "hog"]
    assert distillation.dependence_weight == {"teacher": 0.7, "hog": 0.7}
    assert isinstance(distillation.regressions["hog"].head, nn.Linear)
    assert not distillation.gather_distributed
    names = ("regression/teacher", "regression/hog", "dependence/teacher", "dependence/hog")
    assert [f"kd_{name}" for name in names] == list(built(*batch()))[4:]
    own = DistillationLoss(96, {"teacher": 256})
    assert task(distillation=own).distillation is own
    assert distillation.teacher_dims["hog"] == 1024
    # Of other images than the student's, whose representations are of another width.
    narrow = [{"name": "hog", "pixels_per_cell": 32}]
    dims = {"teacher": 256, **Representations(narrow).sizes(3, SIZE, SIZE)}
    assert dims["hog"] < 1024
    told = task(distillation={"teacher_dims": dims}, representations=narrow)
    assert "kd_regression/hog" in told(*batch())
    with pytest.raises(ValueError, match="as teacher_dims says"):
        task(representations=narrow)(*batch())


def test_the_widths_are_timms_arguments():
    built = task(student_feature_dim=5, teacher_feature_dim=7)
    assert built.distillation.embedding_dim == 5
    assert built.distillation.teacher_dims == {"teacher": 7}


def test_anchors_are_added_in_training():
    built, (images, labels) = task(distillation={"anchors": 8}), batch()
    for mode, there in ((False, 0), (True, 6), (True, 8)):
        built.train(mode)(images, labels)
        assert built.distillation.bank.embeddings.any(dim=1).sum() == there


def test_dependence_alone():
    weights = {"distill_loss_weight": 0.5, "task_loss_weight": 2.0}
    built, (images, labels) = task(loss={}, **weights), batch()
    assert built.distillation is None
    result = built(images, labels)
    logits, x = student()(images), student_features(images)
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
        x = student_features(images)
        terms = [
            2 * (1 - cka(x, teacher_features(images), debiased=True)),
            0.5 * (1 - cka(x, Representations(["hog"])(images)["hog"], debiased=True)),
        ]
        torch.testing.assert_close(result["kd_loss"], sum(terms), rtol=1e-3, atol=1e-4)
    representations = task(representations=["hog"]).representations
    assert representations.normalization.mean == MEAN


def test_representations_are_of_the_students_normalisation():
    given = Representations(["hog"], normalization=(MEAN, STD))
    assert task(representations=given).representations is given
    for other in (Representations(["hog"]), Representations(["hog"], normalization="none")):
        with pytest.raises(
            ValueError, match=r"student's normalization, mean \(0\.4, .* but are of"
        ):
            task(representations=other)


def test_representations_stay_fixed():
    own, (images, labels) = Drifting(), batch()
    built = task(representations={"own": own}).train()
    built(images, labels)["loss"].backward()
    assert not own.norm.training
    assert own.norm.num_batches_tracked == 0
    assert own.norm.weight.grad is None


def test_weights_are_timms():
    for weights in ({}, {"task_loss_weight": 0.3}, {"distill_loss_weight": 5.0}):
        ours = task(**weights)
        theirs = FeatureDistillationTask(
            student(), teacher(), nn.CrossEntropyLoss(), verbose=False, **weights
        )
        assert ours.task_loss_weight == theirs.task_loss_weight
        assert ours.distill_loss_weight == theirs.distill_loss_weight


@pytest.mark.parametrize("options", [{}, {"loss": {}}])
def test_it_is_trained_saved_and_loaded_as_timms_tasks_are(options):
    """With its heads, which the student's own state has none of."""
    built, (images, labels) = task(**options), batch(8)
    built.train()
    assert not built.teacher.training
    built.setup_ema(decay=0.5)
    heads = [] if options else list(built.distillation.parameters())
    parameters = list(built.get_trainable_module().parameters())
    assert len(parameters) == len(list(student().parameters())) + len(heads)
    clipped = {id(parameter) for parameter in built.get_clip_parameters()}
    assert {id(parameter) for parameter in parameters} == clipped
    before = [head.clone() for head in heads]
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
    assert not any(torch.equal(old, new) for old, new in zip(before, heads, strict=True))
    for ema in (False, True):
        entries = built.get_checkpoint_state(ema=ema)
        end = "_ema" if ema else ""
        names = ["state_dict"] if options else ["state_dict", "task_state"]
        assert list(entries) == [name + end for name in names]
        assert list(entries[f"state_dict{end}"]) == list(student().state_dict())
        assert list(built.get_eval_model(ema=ema).state_dict()) == list(student().state_dict())
    state, fresh = built.get_checkpoint_state(), task(**options)
    fresh.load_checkpoint_state(state["state_dict"], state.get("task_state"))
    found = fresh.get_trainable_module().state_dict()
    for name, value in built.get_trainable_module().state_dict().items():
        torch.testing.assert_close(found[name], value, rtol=0, atol=0)


def test_compiled_and_in_mixed_precision_by_timms_own_methods():
    """Both leave the loss what it is."""
    expected, (images, labels) = task()(*batch()), batch()
    built = task()
    built.compile(backend="eager")
    result = built(images, labels)
    for name, value in expected.items():
        torch.testing.assert_close(result[name], value, rtol=1e-4, atol=1e-5)
    result["loss"].backward()
    assert all(p.grad is not None for p in built.distillation.parameters())
    assert list(built.get_checkpoint_state()["state_dict"]) == list(student().state_dict())
    with torch.autocast("cpu", dtype=torch.bfloat16):
        result = task()(images, labels)
    torch.testing.assert_close(result["kd_loss"], expected["kd_loss"], rtol=0.02, atol=0.02)
    result["loss"].backward()


def _check_processes(rank, count):
    images, labels = batch(8)
    whole, part = task(), task()
    part.prepare_distributed()
    for built in (whole, part):
        built.distillation.train()  # counts statistics, which are of all processes
    mine = slice(rank * 4, rank * 4 + 4)
    whole(images, labels)["loss"].backward()
    part(images[mine], labels[mine])["loss"].backward()
    names = [name for name, _ in whole.trainable_module.named_parameters()]
    assert any(name.startswith("projection.regressions.teacher.head") for name in names)
    pairs = zip(
        whole.trainable_module.parameters(), part.trainable_module.parameters(), strict=True
    )
    for one, other in pairs:
        torch.testing.assert_close(other.grad, one.grad, rtol=1e-3, atol=1e-5)


def test_two_processes_have_the_gradient_of_the_whole_batch(tmp_path):
    processes.run(2, tmp_path, _check_processes)


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
    with pytest.raises(TypeError, match="distillation must be a .*Loss or a mapping.*is a str"):
        task(distillation="regression")
    with pytest.raises(TypeError, match="'dependence_weigth'"):
        task(distillation={"dependence_weigth": 0.3})
    with pytest.raises(ValueError, match="scale must be one of"):
        task(distillation={"scale": "each"})
    with pytest.raises(ValueError, match="loss must be left out with distillation"):
        task(loss={}, distillation={})
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
print(type(task).__name__, task.distillation.extra_repr())
"""


def test_the_guide_runs(tmp_path):
    namespace = {}
    exec("\n".join(guides.blocks("timm", "python")), namespace)
    named = list(namespace["result"])
    assert named[3:] == ["kd_loss", "kd_regression/teacher", "kd_dependence/teacher"]
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


@pytest.mark.parametrize("index", [0, 1, 2])
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
    for option, expected in (
        ((), "dependence_weight={'teacher': 0.3}"),
        (("--task", 'distillation={"dependence_weight": 0.4}'), "weight={'teacher': 0.4}"),
    ):
        done = run(tmp_path, *option, "scripts/train.py", "--lr", "0.1")
        assert done.returncode == 0, done.stderr
        assert "['--lr', '0.1'] found" in done.stdout
        assert "DependenceDistillationTask" in done.stdout
        assert expected in done.stdout


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
    assert "--task must be distillation=..., loss=..., representations=... but is lr" in done.stderr


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


def test_a_cache_would_never_be_read(tmp_path):
    cache = {"path": tmp_path / "store", "dataset": torch.rand(4, 3, 32, 32)}
    with pytest.raises(ValueError, match="representations must have no cache"):
        task(representations=Representations(["hog"], normalization=(MEAN, STD), cache=cache))
