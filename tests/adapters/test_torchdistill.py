"""The losses, the student with heads, the kept teacher and the configurations in torchdistill."""

import importlib.resources
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torchvision
import yaml
from torch import nn

pytest.importorskip("torchdistill", "1.1.5")

from torchdistill.common.main_util import import_dependencies, load_ckpt, save_ckpt
from torchdistill.common.yaml_util import load_yaml_file
from torchdistill.core.distillation import get_distillation_box
from torchdistill.losses.registry import get_high_level_loss, get_mid_level_loss
from torchdistill.models.registry import get_model
from torchdistill.models.wrapper import build_auxiliary_model_wrapper

from mvmr_loss import DistillationLoss, MultiRepresentationRegularizer, Representations
from mvmr_loss.adapters.torchdistill import (
    DependenceLoss,
    FixedRepresentations,
    NonAugmentedDatasetWrapper,
    RegressionDependenceLoss,
    StudentWithHeads,
    forward_non_augmented,
)
from mvmr_loss.cache import fill
from tests import processes
from tests.adapters import guides

CONFIGURATIONS = importlib.resources.files("mvmr_loss.adapters.torchdistill.configs")
EXAMPLE = Path(__file__).parents[2] / "examples" / "torchdistill_dependence.py"


class Images(torch.utils.data.Dataset):
    """Images of noise with a transform that augments, as torchvision's data sets have."""

    def __init__(self, n=16):
        self.images = torch.rand(n, 3, 16, 16, generator=torch.Generator().manual_seed(0))
        self.transform = lambda image: image + torch.rand(1)

    def __len__(self):
        return len(self.images)

    def __getitem__(self, index):
        image = self.images[index]
        return (self.transform(image) if self.transform else image), index % 3


def test_the_loss_is_the_dependence_of_two_layers():
    x, y = torch.rand(8, 4, 2, 2), torch.rand(8, 5)
    config = {
        "key": "DependenceLoss",
        "kwargs": {
            "student_module_path": "a.b",
            "student_module_io": "input",
            "teacher_module_path": ".",
            "loss": {"dependence_measure": "debiased_cka"},
        },
    }
    loss = get_mid_level_loss(config)
    # By name: pytest imports the module once more for its doctests, and registers that one.
    assert type(loss).__name__ == "DependenceLoss"
    assert loss.dependence.gather_distributed
    regularizer = MultiRepresentationRegularizer(dependence_measure="debiased_cka")
    value = loss({"a.b": {"input": x}}, {".": {"output": y}}, torch.arange(8))
    torch.testing.assert_close(value, regularizer(x.flatten(1), {"teacher": y}))
    several = {"one": y, "two": y.square()}
    value = loss({"a.b": {"input": x}}, {".": {"output": several}})
    torch.testing.assert_close(value, regularizer(x.flatten(1), several))


def test_no_gradient_reaches_the_teacher():
    x, y = torch.rand(2, 8, 5, requires_grad=True).unbind()
    DependenceLoss("a", "a")({"a": {"output": x}}, {"a": {"output": y}}).backward()
    loss = DependenceLoss("a", "a")
    y = torch.rand(8, 5, requires_grad=True)
    loss({"a": {"output": torch.rand(8, 3, requires_grad=True)}}, {"a": {"output": y}}).backward()
    assert y.grad is None


def test_the_wrapper_gives_both_images_and_the_index():
    dataset = Images()
    wrapped = NonAugmentedDatasetWrapper(dataset, transform=lambda image: image * 2)
    image, target, supplement = wrapped[5]
    assert len(wrapped) == 16
    assert (target, supplement["index"]) == (2, 5)
    torch.testing.assert_close(supplement["non_augmented"], 2 * dataset.images[5])
    assert (image > dataset.images[5]).all()
    image, target, supplement = NonAugmentedDatasetWrapper(Images())[5]
    assert list(supplement) == ["index"]


class Both(torchvision.datasets.VisionDataset):
    """A data set that reads both transforms at once, as torchvision's OxfordIIITPet does."""

    def __len__(self):
        return 1

    def __getitem__(self, index):
        return self.transforms(torch.ones(3, 4, 4), 1)


def test_the_wrapper_takes_no_transform_off_the_data_set_itself():
    """A second stage wraps the same data set; whichever of its transforms it reads."""
    own = Images()
    augment = own.transform
    both = Both(
        "", transform=lambda image: image + torch.rand(1), target_transform=lambda target: -target
    )
    for dataset in (own, both):
        for _ in range(2):
            wrapped = NonAugmentedDatasetWrapper(dataset, transform=lambda image: image * 2)
            image, target, supplement = wrapped[0]
            plain = dataset.images[0] if dataset is own else torch.ones(3, 4, 4)
            assert torch.equal(supplement["non_augmented"], 2 * plain)
            assert (image > plain).all()
            assert target == (0 if dataset is own else -1)
    assert own.transform is augment
    assert both.transforms.transform is both.transform


def test_the_teacher_sees_the_image_that_is_not_augmented():
    model = FixedRepresentations(["pixels"], normalization="none")
    images, plain = torch.rand(2, 4, 3, 8, 8)
    for supplement, expected in (
        ({"non_augmented": plain, "index": torch.arange(4)}, plain),
        ({}, images),
        (None, images),
    ):
        found = forward_non_augmented(model, images, None, supplement)
        torch.testing.assert_close(found["pixels"], expected.flatten(1))


class Student(nn.Sequential):
    def __init__(self):
        super().__init__()
        self.pool = nn.AdaptiveAvgPool2d(4)
        self.flat = nn.Flatten()
        self.head = nn.Linear(48, 10)


def configuration(tmp_path, name="dependence"):
    """One of the package's own configurations for small images, without a download."""
    config = load_yaml_file(str(CONFIGURATIONS / f"{name}.yaml"))
    import_dependencies(config["dependencies"])
    loader = config["train"]["train_data_loader"]
    loader["kwargs"] = {"batch_size": 8, "num_workers": 0}
    loader["dataset_wrapper"]["kwargs"]["transform"] = nn.Identity()
    terms = config["train"]["criterion"]["kwargs"]["sub_terms"]
    student = config["train"]["student"]
    path = "flat" if name == "dependence" else "student_model.flat"
    student["forward_hook"]["output"] = [path]
    terms[name]["criterion"]["kwargs"]["student_module_path"] = path
    options = config["models"]["teacher_model"]["kwargs"]
    assert options["representations"][0]["source"] == "timm"
    options["representations"] = ["pixels", "local_std"]
    options["cache"] = {"path": str(tmp_path / "store"), "num_samples": 16}
    if name == "distillation":
        heads = student["auxiliary_model_wrapper"]["kwargs"]
        heads.update(embedding_dim=48, teacher_dims=dict.fromkeys(("pixels", "local_std"), 768))
    return config


def distillation_box(config, distributed=False):
    torch.manual_seed(0)
    teacher = config["models"]["teacher_model"]
    return get_distillation_box(
        get_model(teacher["key"], **teacher["kwargs"]),
        Student(),
        {"train": Images()},
        config["train"],
        torch.device("cpu"),
        None,
        distributed,
        1,
    )


def train_one_epoch(box, epoch=0):
    losses = []
    box.pre_epoch_process(epoch=epoch)
    for images, labels, supplement in box.train_data_loader:
        loss = box.forward_process(images, labels, supplement)
        box.post_forward_process(loss=loss)
        losses.append(loss.item())
    box.post_epoch_process()
    assert all(torch.isfinite(torch.tensor(losses)))


@pytest.mark.parametrize("name", ["dependence", "distillation"])
def test_the_configuration_trains_with_a_kept_teacher(tmp_path, monkeypatch, name):
    calls = []
    monkeypatch.setattr(Representations, "_in_slices", _counted(Representations._in_slices, calls))
    box = distillation_box(configuration(tmp_path, name))
    before = {k: v.clone() for k, v in box.student_model.named_parameters()}
    computed = []
    for epoch in range(2):
        train_one_epoch(box, epoch)
        computed.append(sum(calls))
        calls.clear()
    for label, parameter in box.student_model.named_parameters():
        assert not torch.equal(before[label], parameter), label
    # Two representations of 16 images and of a test image; then only rows that are checked.
    assert computed[0] >= 32
    assert computed[1] < 16


def test_the_configuration_without_a_head_has_the_best_measure(tmp_path):
    criterion, _ = distillation_box(configuration(tmp_path)).criterion.term_dict["dependence"]
    assert criterion.dependence.measure.name == "u_distance_correlation_sqr"


def test_the_configuration_is_the_best_known_recipe(tmp_path):
    """The loss's own defaults, on the features of both models, to the statistics of all images."""
    config = configuration(tmp_path, "distillation")
    options = config["models"]["teacher_model"]["kwargs"]
    filled = FixedRepresentations(**options)
    fill(filled.representations, Images().images)
    box = distillation_box(config)
    heads = box.student_model.distillation
    assert heads.gather_distributed
    box.pre_epoch_process(epoch=0)
    images, labels, supplement = next(iter(box.train_data_loader))
    loss = box.forward_process(images, labels, supplement)
    expected = DistillationLoss(48, {"pixels": 768, "local_std": 768})
    expected.load_state_dict(heads.state_dict())
    expected.fit(filled.representations)
    student = box.student_model.student_model
    teachers = filled(supplement["non_augmented"], supplement["index"])
    term = expected.eval()(student.flat(student.pool(images)), teachers)
    labels_term = nn.functional.cross_entropy(student(images), labels)
    torch.testing.assert_close(loss, labels_term + term, rtol=1e-4, atol=1e-4)


def test_the_heads_are_trained_and_not_exported(tmp_path):
    config = configuration(tmp_path, "distillation")
    options = config["train"]["student"]["auxiliary_model_wrapper"]["kwargs"]
    options.update(ckpt=str(tmp_path / "heads.pt"), anchors=4, hidden_dim=0)
    box = distillation_box(config)
    wrapper = box.student_model
    trained = {id(p) for group in box.optimizer.param_groups for p in group["params"]}
    assert trained >= {id(p) for p in wrapper.distillation.parameters()}
    assert isinstance(wrapper.distillation.regressions["pixels"].head, nn.Linear)
    train_one_epoch(box)
    anchors, _ = wrapper.distillation.bank.samples()
    assert anchors.any(dim=1).all()
    # As torchdistill's script does: of the box's student, into the student alone.
    path = str(tmp_path / "student.pt")
    save_ckpt(wrapper, box.optimizer, box.lr_scheduler, 0.0, None, path)
    exported = Student()
    load_ckpt(path, model=exported, strict=True)
    torch.testing.assert_close(exported.head.weight, wrapper.student_model.head.weight)
    resumed = distillation_box(config)
    load_ckpt(path, model=resumed.student_model, strict=True)
    state = resumed.student_model.distillation.state_dict()
    for name, value in wrapper.distillation.state_dict().items():
        torch.testing.assert_close(state[name], value, rtol=0, atol=0)
    # Though the store has become full meanwhile, it keeps the statistics that it began with.
    resumed.pre_epoch_process(epoch=1)
    regression = resumed.student_model.distillation.regressions["pixels"]
    assert not regression.standardization.fitted


def heads(ckpt, width=2):
    return StudentWithHeads(
        Student(), 3, {"teacher": width}, device=torch.device("cpu"), ckpt=str(ckpt)
    )


def test_a_training_that_stops_while_it_writes_leaves_the_heads_of_before(tmp_path, monkeypatch):
    path = tmp_path / "new" / "heads.pt"
    first = heads(path)
    first.post_epoch_process()
    second = heads(path)
    with torch.no_grad():
        next(second.distillation.parameters()).fill_(1)

    def stop(state, file):
        Path(file).write_bytes(b"half")
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(torch, "save", stop)
        with pytest.raises(KeyboardInterrupt):
            second.post_epoch_process()
    assert [file.name for file in path.parent.iterdir()] == ["heads.pt"]
    for name, value in heads(path).distillation.state_dict().items():
        torch.testing.assert_close(value, first.distillation.state_dict()[name])
    second.post_epoch_process()
    assert (next(heads(path).distillation.parameters()) == 1).all()
    assert [file.name for file in path.parent.iterdir()] == ["heads.pt"]


def test_error_of_a_file_of_heads(tmp_path):
    """Damaged, of other teachers, of something else, or no file."""
    path = tmp_path / "heads.pt"
    told = r"ckpt must be a file that .* but is '.*heads.pt' \(.*\); name another, or remove it"
    heads(path).post_epoch_process()
    with pytest.raises(ValueError, match=told) as error:
        heads(path, width=4)
    assert "\n" not in str(error.value)
    content = path.read_bytes()
    path.write_bytes(content[: len(content) // 2])
    with pytest.raises(ValueError, match=told):
        heads(path)
    torch.save([1, 2], path)
    with pytest.raises(ValueError, match=told):
        heads(path)
    path.unlink()
    path.mkdir()
    with pytest.raises(ValueError, match=told):
        heads(path)


def test_anchors_are_added_in_training():
    student = StudentWithHeads(Student(), 3, {"teacher": 2}, device=torch.device("cpu"), anchors=8)
    io_dict = {"student_model": {"output": torch.rand(4, 3)}}
    loss = RegressionDependenceLoss("student_model", ".")
    for mode, there in ((False, 0), (True, 4)):
        student.train(mode).secondary_forward(io_dict)
        loss(io_dict, {".": {"output": torch.rand(4, 2)}})
        assert student.distillation.bank.embeddings.any(dim=1).sum() == there


def _check_processes(rank, count, tmp_path):
    images = Images()
    batch, labels = images.images[:8], torch.arange(8) % 3
    gradients = []
    for distributed in (False, True):
        config = configuration(tmp_path / f"{rank}", "distillation")
        config["models"]["teacher_model"]["kwargs"]["cache"] = None
        box = distillation_box(config, distributed)
        part = slice(rank * 4, rank * 4 + 4) if distributed else slice(None)
        box.forward_process(batch[part], labels[part], {}).backward()
        gradients.append([p.grad for p in box.student_model.parameters()])
    assert len(gradients[0]) == 2 + 2 * 4
    for whole, shared in zip(*gradients, strict=True):
        torch.testing.assert_close(shared, whole, rtol=1e-3, atol=1e-5)


def test_two_processes_have_the_gradient_of_the_whole_batch(tmp_path):
    processes.run(2, tmp_path, _check_processes, tmp_path)


def _counted(function, calls):
    def call(self, module, images):
        calls.append(len(images))
        return function(self, module, images)

    return call


def test_errors(tmp_path):
    with pytest.raises(TypeError, match="loss must be a mapping of options.*is a str"):
        DependenceLoss("a", "a", loss="cka")
    loss = DependenceLoss("a", "b")
    with pytest.raises(
        ValueError, match=r"teacher's output of 'b'.*only output of '\.' is; add 'b'"
    ):
        loss({"a": {"output": torch.rand(4, 2)}}, {".": {"output": torch.rand(4, 2)}})
    with pytest.raises(
        ValueError, match="student's output of 'a' must be recorded but only nothing"
    ):
        loss({}, {})
    with pytest.raises(
        ValueError, match="must be in StudentWithHeads for RegressionDependenceLoss"
    ):
        RegressionDependenceLoss("a", "a")(*[{"a": {"output": torch.rand(4, 2)}}] * 2)
    with pytest.raises(TypeError, match="'dependence_weigth'"):
        StudentWithHeads(
            Student(), 3, {"teacher": 2}, device=torch.device("cpu"), dependence_weigth=0.3
        )
    with pytest.raises(ValueError, match="transform must be None for a data set without"):
        NonAugmentedDatasetWrapper([1, 2], transform=nn.Identity())
    model = FixedRepresentations(
        ["pixels"], cache={"path": str(tmp_path / "store"), "num_samples": 4}
    )
    with pytest.raises(
        ValueError, match="indices must be given with a cache.*forward_non_augmented"
    ):
        forward_non_augmented(model, torch.rand(4, 3, 8, 8))


def test_error_where_there_is_nothing_to_fit(tmp_path):
    config = configuration(tmp_path)
    config["train"]["pre_epoch_process"] = "fit_to_kept_teacher"
    box = distillation_box(config)
    with pytest.raises(ValueError, match="pre_epoch_process must be left out, or be another"):
        box.pre_epoch_process(epoch=0)


def test_the_example_runs_from_anywhere(tmp_path):
    """As the guide has it: from the first line to the accuracy."""
    (command,) = guides.commands("torchdistill", "python examples/torchdistill_dependence.py")
    command = command.replace("examples/torchdistill_dependence.py", str(EXAMPLE))
    output = guides.run(f"{command} --steps 2 --batch-size 8", tmp_path)
    assert "step    2, loss" in output
    assert re.search(r"^student: \d+\.\d % of the crops$", output, re.M)


def test_the_guide_is_right():
    blocks = map(yaml.safe_load, guides.blocks("torchdistill", "yaml"))
    dependencies, student, criterion = blocks
    import_dependencies(dependencies["dependencies"])
    loss = get_high_level_loss(criterion["criterion"])
    x, y = torch.rand(6, 3), torch.rand(6, 2)
    value = loss(
        {"student": {"layer4": {"output": x}}, "teacher": {"layer4": {"output": y}}}, {}, 0
    )
    measure = "u_distance_correlation_sqr"
    expected = MultiRepresentationRegularizer(dependence_measure=measure)(x, {"y": y})
    torch.testing.assert_close(value, expected)
    options = student["student"]
    wrapped = build_auxiliary_model_wrapper(
        options,
        student_model=Student(),
        device=torch.device("cpu"),
        device_ids=None,
        distributed=False,
    )
    assert wrapped.distillation.dependence_weight == {"teacher": 0.3}
    shipped = load_yaml_file(str(CONFIGURATIONS / "distillation.yaml"))["train"]["student"]
    del options["auxiliary_model_wrapper"]["kwargs"]["dependence_weight"]
    assert options.items() <= shipped.items()
    (program,) = guides.blocks("torchdistill", "python")
    namespace = {}
    exec(program, namespace)
    models = namespace["config"]["models"]
    assert models["student_model"]["kwargs"]["num_classes"] == 100
    assert models["teacher_model"]["kwargs"]["representations"][0]["source"] == "timm"
    assert "(`source: timm`)" in guides.text("torchdistill")


def test_error_without_torchdistill():
    code = """
import sys
sys.modules["torchdistill"] = None
try:
    import mvmr_loss.adapters.torchdistill
except ImportError as error:
    print(error)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert "pip install 'torchdistill>=1.1.5'" in done.stdout
