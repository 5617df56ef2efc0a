"""Settings: presets, every field on the command line, and what is said of wrong ones."""

import dataclasses
import json
import re
import shlex

import pytest
import yaml

from benchmarks.stl10.__main__ import main, parser, settings_of, with_presets
from benchmarks.stl10.settings import PRESETS, Settings
from mvmr_loss.presets import PAPER_REPRESENTATIONS

FIELDS = {field.name: field for field in dataclasses.fields(Settings)}
# The STL10 column of the authors' release, see docs/method.md.
RELEASE = {
    **{"data": "stl10", "image_size": 96, "normalization": "imagenet", "backbone": "resnet50"},
    **{"stem": "small", "projector_hidden_dim": 8192, "projector_output_dim": 8192},
    **{"epochs": 1000, "batch_size": 256, "optimizer": "adam", "learning_rate": 1e-4},
    **{"weight_decay": 1e-6, "warmup_epochs": 10, "precision": "16-mixed", "blur": True},
    **{"color_jitter": [0.8, 0.8, 0.8, 0.2], "color_jitter_probability": 0.8},
    **{"grayscale_probability": 0.2, "probe_optimizer": "adam", "probe_epochs": 100},
    **{"probe_learning_rate": 1e-3, "method": "mvmr", "objective": "paper"},
    **{"representation_names": list(PAPER_REPRESENTATIONS)},
}
# Values for which just any other one will not do.
OTHERS = {
    "distillation": {"teacher_dims": {"teacher": 384}},
    "method": "byol",
    "objective": "features",
    "representation_weight": 0.5,
    "representations": ["hog", {"name": "local_std", "window_size": 5}],
    "cache": "some/folder",
    "stem": "imagenet",
    "normalization": "cifar",
    "ten_crop_resize": 1.5,
    "color_jitter": [0.1, 0.2, 0.3, 0.4],
    "optimizer": "lars",
    "probe_optimizer": "adam",
    "labels": [0.5],
    "max_steps": 7,
    "batch_size": 64,
}


def parsed(*arguments):
    return settings_of(parser().parse_args(["run", *arguments]).run)


def other(name):
    value = getattr(Settings(), name)
    kinds = {bool: lambda v: not v, int: lambda v: v + 3, float: lambda v: v / 2 + 0.01}
    return OTHERS.get(name) or kinds.get(type(value), lambda v: f"{v}-other")(value)


def test_every_setting_is_an_option_and_a_key_of_files(tmp_path):
    values = {name: other(name) for name in FIELDS}
    plain = {k: v if isinstance(v, str) else json.dumps(v) for k, v in values.items()}
    words = [f"--{name}={value}" for name, value in plain.items()]
    found = parsed(*words)
    assert found.as_dict() == values
    assert all(values[name] != getattr(Settings(), name) for name in FIELDS)
    (tmp_path / "all.yaml").write_text(yaml.safe_dump(values))
    assert parsed(f"--config={tmp_path / 'all.yaml'}") == found
    # What stands later counts.
    assert parsed(f"--config={tmp_path / 'all.yaml'}", "--epochs=9").epochs == 9


def test_the_paper_preset_is_the_releases_setting():
    paper = parsed(f"--config={PRESETS / 'paper.yaml'}")
    assert {name: getattr(paper, name) for name in RELEASE} == RELEASE


def test_labels():
    for method, names, label in (
        ("mvmr", None, "mvmr"),
        ("mvmr", [], "mvmr, no representations"),
        ("vicreg", None, "vicreg"),
        ("vicreg", ["hog"], "vicreg + representations"),
    ):
        assert Settings(method=method, representations=names).label == label


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["--epochs", "0"], "epochs must be above 0 but is 0"),
        (["--momentum", "1.5"], r"momentum must be in \[0, 1\] but is 1.5"),
        (["--num_workers", "-1"], "num_workers must be at least 0"),
        (["--crop_scale_min", "0"], r"crop_scale_min must be in \(0, 1\]"),
        (["--labels", "[1.5]"], "labels must be fractions"),
        (["--labels", "[folds]"], "labels must be fractions: only stl10 has folds"),
        (["--batch_size", "9", "--devices", "2"], "batch_size must be a multiple of devices"),
        (["--color_jitter", "[1, 1]"], "color_jitter must be four numbers"),
        (["--max_steps", "0"], "max_steps must be above 0, or -1"),
    ],
)
def test_exception_ranges(words, told):
    with pytest.raises(SystemExit, match=f"Error: {told}"):
        main(["run", *words])


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["--epochs", "many"], "epochs"),
        (["--method", "moco"], "method"),
        (["--preset", "absent"], "absent.yaml"),
        (["--epoch_count", "3"], "epoch_count"),
    ],
)
def test_exception_types_and_names(words, told, capsys):
    with pytest.raises(SystemExit):
        main(["run", *words])
    assert told in capsys.readouterr().err


def test_exception_file(tmp_path, capsys):
    (tmp_path / "a.yaml").write_text("epoch: 3")
    with pytest.raises(SystemExit):
        main(["run", "--config", str(tmp_path / "a.yaml")])
    assert "epoch" in capsys.readouterr().err


def test_distillation_is_mvmrs():
    from benchmarks.stl10.methods import Pretraining, TwoViews

    small = {"backbone": "small", "image_size": 32, "batch_size": 8, "projector_hidden_dim": 8}
    options = {"representations": ["pixels"], "distillation": {"teacher_dims": {"pixels": 3072}}}
    model = Pretraining(Settings(**small, **options, view_terms=False), 5)
    assert model.distillation.teacher_dims == {"pixels": 3072}
    loss = model.criterion
    assert (loss.invariance_weight, loss.variance_weight, loss.dependence_weight) == (0, 0, 0)
    assert not any(p.requires_grad for p in model.projection_head.parameters())  # for DDP
    assert Pretraining(Settings(**small), 5).criterion.invariance_weight == 1
    model = Pretraining(Settings(**{**small, "image_size": 28}, objective="features"), 5)
    found = {"scattering": 1024, "hog": 648, "local_binary_patterns": 1024}
    assert model.distillation.teacher_dims == found
    model = Pretraining(Settings(**small, objective="distillation", representations=["pixels"]), 5)
    assert model.distillation.teacher_dims == {"pixels": 3072}
    assert not any(p.requires_grad for p in model.projection_head.parameters())
    with pytest.raises(ValueError, match="representations must name a teacher with preset"):
        Pretraining(Settings(**small, objective="distillation_paper"), 5)
    with pytest.raises(ValueError, match="dependence_measure must be left out with preset 'feat"):
        Pretraining(Settings(**small, objective="features", dependence_measure="debiased_cka"), 5)
    with pytest.raises(TypeError, match="each of representations must be a name, .* but one is 9"):
        TwoViews(Settings(method="vicreg", representations=[9], **small), 5)


@pytest.mark.parametrize(
    ("method", "name", "value"),
    [
        ("vicreg", "distillation", {"teacher_dims": {"pixels": 3072}}),
        ("vicreg", "objective", "features"),
        ("byol", "view_terms", False),
        ("mvmr", "temperature", 0.2),
        ("simclr", "momentum", 0.9),
    ],
)
def test_an_option_of_another_method_is_refused(method, name, value):
    from benchmarks.stl10.methods import build_method

    settings = Settings(method=method, backbone="small", image_size=32, **{name: value})
    with pytest.raises(ValueError, match=f"{name} must be left out for {method}, for it is "):
        build_method(settings, 5)


@pytest.mark.parametrize(
    ("method", "name", "value"),
    [
        ("vicreg", "representation_weight", 0.5),
        ("simclr", "dependence_measure", "debiased_cka"),
        ("mvmr", "representation_weight", 0.5),
        ("mvmr", "view_terms", False),
    ],
)
def test_an_option_of_representations_is_refused_where_there_are_none(method, name, value):
    from benchmarks.stl10.methods import build_method

    small = {"backbone": "small", "image_size": 32, "projector_hidden_dim": 8}
    settings = Settings(method=method, representations=[], **small, **{name: value})
    with pytest.raises(ValueError, match=f"{name} must be left out where there are no repr"):
        build_method(settings, 5)
    build_method(dataclasses.replace(settings, representations=["pixels"]), 5)


def test_the_augmented_representation_has_the_seed_and_the_augmentation_of_the_views():
    from benchmarks.stl10.methods import build_method

    options = {"backbone": "small", "image_size": 32, "projector_hidden_dim": 8, "seed": 3}
    settings = Settings(representations=["augmented_pixels"], crop_scale_min=0.3, **options)
    drawn = build_method(settings, 5).representations.by_name["augmented_pixels"].options
    # Not the process's number besides: the representation itself sees to it.
    assert (drawn.seed, drawn.crop_scale) == (3, (0.3, 1.0))


def test_the_measure_is_that_of_the_views_too():
    from benchmarks.stl10.methods import build_method

    options = {"backbone": "small", "image_size": 32, "projector_hidden_dim": 8}
    settings = Settings(representations=[], dependence_measure="debiased_cka", **options)
    assert build_method(settings, 5).criterion.measure.name == "debiased_cka"


@pytest.mark.parametrize("page", ["README.md", "RESULTS.md"])
def test_commands_of_the_pages_are_understood(page, monkeypatch):
    """From the checkout's folder, where their reader is; what they do is tested elsewhere."""
    text = (PRESETS.parent / page).read_text()
    lines = re.findall(r"^    (?:\.\.\.|python -m benchmarks\.stl10) (.*)$", text, re.M)
    lines += re.findall(r"^\| `((?:run|compare|export|features|transfer) .*?)` \|", text, re.M)
    assert len(lines) >= 2
    monkeypatch.chdir(PRESETS.parents[2])
    for line in lines:
        words = shlex.split(line.replace("METHOD", "byol"), comments=True)
        parser().parse_args(with_presets([word for word in words if word != "..."]))
