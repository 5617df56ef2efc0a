from __future__ import annotations

import sys

import pytest
import torch

from mvmr_loss import Teacher
from tests.teachers.networks import Own

# Errors.


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({}, ValueError, "either module or source must be given, and not both"),
        ({"module": Own(), "source": "timm"}, ValueError, "either module or source must be given"),
        *(
            (
                {"module": Own(), name: value},
                ValueError,
                rf"{name} must be None for a module, .* but is .*; weights .*load_checkpoint\(network",
            )
            for name, value in (
                *(("weights", "a.pt"), ("model", "resnet18"), ("prefix", "")),
                ("model_options", {"depth": 3}),
            )
        ),
        ({"module": 3}, TypeError, "module must be a torch.nn.Module or a callable but is a int"),
        ({"source": "hub"}, ValueError, "source must be one of torchvision, timm, .* but is 'hub'"),
        ({"source": "timm"}, ValueError, "model must name a network of timm but is None"),
        (
            {"module": Own(), "layer": "stam"},
            ValueError,
            "layer must be the name of a submodule but is 'stam'",
        ),
        ({"module": len, "layer": "stem"}, ValueError, "layer must be None for a callable"),
        ({"module": len, "token": "last"}, ValueError, 'token must be an index, "cls" or "mean"'),
        ({"module": len, "token": 1.5}, TypeError, "token must be an int or a str but is a float"),
        ({"module": len, "token": True}, TypeError, "token must be an int or a str but is a bool"),
        ({"module": len, "dtype": "int8"}, ValueError, "dtype must be a floating-point type"),
        ({"module": len, "dtype": "bf17"}, ValueError, "dtype must be a floating-point type"),
        (
            {"module": len, "mean": 0.5, "std": [1]},
            ValueError,
            "mean must be a list of a number per channel",
        ),
        (
            {"module": len, "mean": [float("nan")] * 3, "std": [1] * 3},
            ValueError,
            "mean must be finite",
        ),
        ({"module": len, "mean": [0] * 3, "std": [1, 0, 1]}, ValueError, "std positive"),
        (
            {"module": len, "mean": [0] * 3, "std": [1, 1]},
            ValueError,
            "mean and std must be of the same length",
        ),
        ({"module": len, "std": [1, 1, 1]}, ValueError, "both or not at all, but are None and"),
        ({"module": len, "mean": [0, 0, 0]}, ValueError, "both or not at all, but are .* and None"),
        (
            {"module": len, "preprocessing": {"size": 3}},
            TypeError,
            "preprocessing has no option 'size'",
        ),
        (
            {"module": len, "preprocessing": 3},
            TypeError,
            "preprocessing must be a TeacherPreprocessing",
        ),
        (
            {"module": len, "preprocessing": {"interpolation": "lanczos"}},
            ValueError,
            "interpolation must be one of .* but is 'lanczos'",
        ),
    ],
)
def test_exception(options, error, message):
    with pytest.raises(error, match=message):
        Teacher(**options)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            ("torchvision", "resnet19", None),
            "model must be a network of torchvision but is 'resnet19'",
        ),
        (
            ("torchvision", "resnet18", "V7"),
            "weights of resnet18 must be a file or one of IMAGENET1K_V1",
        ),
        (("timm", "no_such_net", None), "model and weights must be a network of timm"),
        (("timm", "test_vit", "no_such_tag"), "model and weights must be a network of timm"),
        (("open_clip", "ViT-Q-1", None), r"model must be one of open_clip.list_models\(\)"),
        (("open_clip", "ViT-B-16", "tag"), "weights of ViT-B-16 must be a file or one of openai, "),
        (
            ("transformers", "no_such_net", None),
            "model must be a type of network of transformers, such as dinov2",
        ),
        (
            ("transformers", None, "nobody/no-such-net"),
            "weights must be a folder or name on the hub",
        ),
        (("checkpoint", "SmallResNet", None), "model must be 'package.module:function'"),
        (
            ("checkpoint", "benchmarks.common.encoder:SmallResNet", None),
            "weights must be a checkpoint file",
        ),
    ],
)
@pytest.mark.filterwarnings("ignore:.*random weights")
def test_unknown_model_or_weights(options, message):
    source, model, weights = options
    with pytest.raises(ValueError, match=message):
        Teacher(source=source, model=model, weights=weights)


@pytest.mark.parametrize("source", ["torchvision", "timm", "open_clip", "transformers"])
def test_exception_prefix_without_a_file(source):
    with pytest.raises(ValueError, match="^prefix must be None unless weights are .* is 'module.'"):
        Teacher(source=source, model="resnet18", prefix="module.")


@pytest.mark.parametrize(
    "source", ["torchvision", "timm", "open_clip", "transformers", "checkpoint"]
)
def test_missing_file(source, tmp_path):
    with pytest.raises(FileNotFoundError, match="weights must be a .*file.* does not exist"):
        Teacher(source=source, model="math:sqrt", weights=tmp_path / "none.pt")


@pytest.mark.parametrize(
    ("model", "error", "message"),
    [
        ("no_such_package:build", ValueError, "cannot be imported"),
        ("math:no_such_function", ValueError, "cannot be imported"),
        ("builtins:dict", TypeError, "must build a torch.nn.Module but gave a dict"),
    ],
)
def test_function_that_builds_nothing(tmp_path, model, error, message):
    torch.save(Own().state_dict(), tmp_path / "c.pt")
    with pytest.raises(error, match=message):
        Teacher(source="checkpoint", model=model, weights=tmp_path / "c.pt")


@pytest.mark.parametrize(
    ("source", "module", "package"),
    [
        ("torchvision", "torchvision.models", "torchvision"),
        ("timm", "timm", "timm"),
        ("open_clip", "open_clip", "open_clip_torch"),
        ("transformers", "transformers", "transformers"),
    ],
)
def test_missing_library(monkeypatch, source, module, package):
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(ImportError, match=f"this teacher needs {package}: pip install {package}"):
        Teacher(source=source, model="vit")


@pytest.mark.parametrize(
    ("network", "options", "message"),
    [
        (lambda x: "text", {}, "must give a tensor of features but gave a str; name a layer"),
        (
            lambda x: {"scores": x, "features": x},
            {},
            "gave a dict of 'scores', 'features'; .* in a torch.nn.Module whose forward returns",
        ),
        (lambda x: (), {}, "must give a tensor of features but gave a tuple; name a layer"),
        (
            lambda x: (x, x[:, 0]),
            {},
            r"gave a tuple of 2, of shapes \(4, 3, 16, 16\), \(4, 16, 16\)",
        ),
        (lambda x: [x, x], {"token": 0}, "must give a tensor of features but gave a list of 2"),
        (
            lambda x: {"pooler_output": x[:, 0, 0]},
            {"token": "mean"},
            r"token must be None unless the features have shape \(N, T, D\).* \(4, 16\)",
        ),
        (
            lambda x: x[:2],
            {},
            r"must give features of shape \(4, ...\), a row for each image, but gave",
        ),
        (lambda x: x[:, 0, 0, 0], {}, r"must give features of shape \(4, ...\)"),
        (
            lambda x: x,
            {"token": 0},
            r"token must be None unless the features have shape \(N, T, D\)",
        ),
        (lambda x: x[:, 0], {"token": 16}, "token must be among the 16 tokens but is 16"),
        (Own(), {"layer": "unused"}, "layer must be used by the network but 'unused' is not"),
    ],
)
def test_features_that_do_not_fit(images, network, options, message):
    with pytest.raises(ValueError, match=message):
        Teacher(network, **options)(images)


@pytest.mark.parametrize(
    ("scale", "message"),
    [
        (255, "normalised with the teacher's arguments mean and std, but undoing"),
        (None, "3 channels"),
    ],
)
def test_images_of_another_normalisation(images, scale, message):
    teacher = Teacher(Own(), preprocessing={})
    wrong = images[:, :2] if scale is None else images * scale
    with pytest.raises(ValueError, match=message):
        teacher(wrong)


def test_images_are_checked(images):
    images[0, 0, 0, 0] = float("nan")
    with pytest.raises(ValueError, match="images must be finite"):
        Teacher(Own())(images)
    with pytest.raises(TypeError, match="images must have a floating-point dtype"):
        Teacher(Own())((images * 0).int())
