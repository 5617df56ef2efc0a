"""The mid-level loss, the kept teacher and the configuration in an unmodified torchdistill."""

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

from torchdistill.common.main_util import import_dependencies
from torchdistill.common.yaml_util import load_yaml_file
from torchdistill.core.distillation import get_distillation_box
from torchdistill.losses.registry import get_high_level_loss, get_mid_level_loss
from torchdistill.models.registry import get_model

from mvmr_loss import MultiRepresentationRegularizer, Representations
from mvmr_loss.adapters.torchdistill import (
    DependenceLoss,
    FixedRepresentations,
    NonAugmentedDatasetWrapper,
    forward_non_augmented,
)
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


def configuration(tmp_path):
    """The package's own configuration for small images, without a download."""
    config = load_yaml_file(str(CONFIGURATIONS / "dependence.yaml"))
    import_dependencies(config["dependencies"])
    loader = config["train"]["train_data_loader"]
    loader["kwargs"] = {"batch_size": 8, "num_workers": 0}
    loader["dataset_wrapper"]["kwargs"]["transform"] = nn.Identity()
    config["train"]["student"]["forward_hook"]["output"] = ["flat"]
    terms = config["train"]["criterion"]["kwargs"]["sub_terms"]
    terms["dependence"]["criterion"]["kwargs"]["student_module_path"] = "flat"
    options = config["models"]["teacher_model"]["kwargs"]
    options["cache"] = {"path": str(tmp_path / "store"), "num_samples": 16}
    return config


def test_the_configuration_trains_with_a_kept_teacher(tmp_path, monkeypatch):
    config = configuration(tmp_path)
    options = config["models"]["teacher_model"]["kwargs"]
    assert options["representations"][0]["source"] == "timm"
    calls = []
    options["representations"] = ["pixels", "local_std"]
    teacher = get_model(config["models"]["teacher_model"]["key"], **options)
    monkeypatch.setattr(Representations, "_in_slices", _counted(Representations._in_slices, calls))
    box = get_distillation_box(
        teacher,
        Student(),
        {"train": Images()},
        config["train"],
        torch.device("cpu"),
        None,
        False,
        1,
    )
    before = box.student_model.head.weight.clone()
    losses, computed = [], []
    for epoch in range(2):
        box.pre_epoch_process(epoch=epoch)
        for images, labels, supplement in box.train_data_loader:
            loss = box.forward_process(images, labels, supplement)
            box.post_forward_process(loss=loss)
            losses.append(loss.item())
        box.post_epoch_process()
        computed.append(sum(calls))
        calls.clear()
    assert all(torch.isfinite(torch.tensor(losses)))
    assert not torch.equal(before, box.student_model.head.weight)
    # Two representations of 16 images and of a test image; then only rows that are checked.
    assert computed[0] >= 32
    assert computed[1] < 16


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
    with pytest.raises(ValueError, match="transform must be None for a data set without"):
        NonAugmentedDatasetWrapper([1, 2], transform=nn.Identity())
    model = FixedRepresentations(
        ["pixels"], cache={"path": str(tmp_path / "store"), "num_samples": 4}
    )
    with pytest.raises(
        ValueError, match="indices must be given with a cache.*forward_non_augmented"
    ):
        forward_non_augmented(model, torch.rand(4, 3, 8, 8))


def test_the_example_runs_from_anywhere(tmp_path):
    """As the guide has it: from the first line to the accuracy."""
    (command,) = guides.commands("torchdistill", "python examples/torchdistill_dependence.py")
    command = command.replace("examples/torchdistill_dependence.py", str(EXAMPLE))
    output = guides.run(f"{command} --steps 2 --batch-size 8", tmp_path)
    assert "step    2, loss" in output
    assert re.search(r"^student: \d+\.\d % of the crops$", output, re.M)


def test_the_guide_is_right():
    dependencies, criterion = map(yaml.safe_load, guides.blocks("torchdistill", "yaml"))
    import_dependencies(dependencies["dependencies"])
    loss = get_high_level_loss(criterion["criterion"])
    x, y = torch.rand(6, 3), torch.rand(6, 2)
    value = loss(
        {"student": {"layer4": {"output": x}}, "teacher": {"layer4": {"output": y}}}, {}, 0
    )
    expected = MultiRepresentationRegularizer(dependence_measure="debiased_cka")(x, {"y": y})
    torch.testing.assert_close(value, expected)
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
