"""Settings: defaults, presets, command line, and what is said of wrong ones."""

import argparse
import dataclasses

import pytest
import yaml

from benchmarks.stl10.__main__ import main, parser
from benchmarks.stl10.settings import (
    PRESETS,
    REPRESENTATIONS,
    Settings,
    add_arguments,
    given,
    preset_names,
    resolve,
)

FIELDS = dataclasses.fields(Settings)
# The STL10 column of the authors' release, see docs/method.md.
RELEASE = {
    "data": "stl10",
    "image_size": 96,
    "normalization": "imagenet",
    "backbone": "resnet50",
    "stem": "small",
    "projector_hidden_dim": 8192,
    "projector_output_dim": 8192,
    "epochs": 1000,
    "batch_size": 256,
    "optimizer": "adam",
    "learning_rate": 1e-4,
    "weight_decay": 1e-6,
    "warmup_epochs": 10,
    "final_learning_rate": 1e-6,
    "precision": "16-mixed",
    "color_jitter": [0.8, 0.8, 0.8, 0.2],
    "color_jitter_probability": 0.8,
    "grayscale_probability": 0.2,
    "blur": True,
    "probe_epochs": 100,
    "probe_learning_rate": 1e-3,
    "method": "mvmr",
    "representation_names": ["pixels", "augmented_pixels", "scattering", "hog", "local_std"],
}
# Valid values of settings for which just any other one will not do.
OTHERS = {
    "distillation": {"teacher_dims": {"teacher": 384}},
    "method": "byol",
    "representations": ["hog", {"name": "local_std", "window_size": 5}],
    "representation_cache": "some/folder",
    "stem": "imagenet",
    "ten_crop_resize": 1.5,
    "color_jitter": [0.1, 0.2, 0.3, 0.4],
    "optimizer": "lars",
    "labels": [0.5],
    "max_steps": 7,
    "final_learning_rate": 1e-7,
    "batch_size": 64,
}


def parsed(*arguments):
    run = argparse.ArgumentParser()
    add_arguments(run)
    return given(run.parse_args(arguments))


def other(field, settings):
    """Another value of a setting."""
    if field.name in OTHERS:
        return OTHERS[field.name]
    value = getattr(settings, field.name)
    if field.name == "normalization":
        return "cifar" if value == "imagenet" else "imagenet"
    kinds = {bool: lambda v: not v, int: lambda v: v + 3, float: lambda v: v / 2 + 0.01}
    return kinds.get(type(value), lambda v: f"{v}-other")(value)


def words(field, value):
    """The command line that gives a setting a value."""
    option = field.name.replace("_", "-")
    if isinstance(value, bool):
        return [f"--{option}" if value else f"--no-{option}"]
    values = value if isinstance(value, list) else [value]
    return [f"--{option}", *(yaml.safe_dump(v) if isinstance(v, dict) else str(v) for v in values)]


@pytest.mark.parametrize("preset", preset_names())
@pytest.mark.parametrize("field", FIELDS, ids=lambda field: field.name)
def test_every_field_of_a_preset_can_be_overridden(preset, field):
    before = resolve([PRESETS / f"{preset}.yaml"], {})
    value = other(field, before)
    # Other data have no folds.
    more = ["--labels", "0.1"] if field.name == "data" else []
    settings = resolve([PRESETS / f"{preset}.yaml"], parsed(*words(field, value), *more))
    assert getattr(settings, field.name) == value != getattr(before, field.name)


def test_the_paper_preset_is_the_release():
    settings = resolve([PRESETS / "paper.yaml"], {})
    assert {name: getattr(settings, name) for name in RELEASE} == RELEASE


def test_files_override_one_another(tmp_path):
    (tmp_path / "own.yaml").write_text("epochs: 5\nseed: 3\n")
    settings = resolve([PRESETS / "quick.yaml", tmp_path / "own.yaml"], {"seed": 4})
    assert (settings.epochs, settings.seed, settings.backbone) == (5, 4, "small")


@pytest.mark.parametrize(
    ("options", "names", "label"),
    [
        ({}, REPRESENTATIONS, "mvmr"),
        ({"representations": []}, [], "mvmr, no representations"),
        ({"method": "vicreg"}, [], "vicreg"),
        ({"method": "simclr", "representations": ["hog"]}, ["hog"], "simclr + representations"),
    ],
)
def test_representations(options, names, label):
    settings = Settings(**options)
    assert (settings.representation_names, settings.label) == (names, label)


def test_no_value_means_none():
    assert parsed("--representations", "--labels") == {"representations": [], "labels": []}
    assert parsed("--representations", "{name: hog, orientations: 9}") == {
        "representations": [{"name": "hog", "orientations": 9}]
    }


def test_settings_survive_their_file(tmp_path):
    settings = Settings(**{f.name: other(f, Settings()) for f in FIELDS if f.name != "devices"})
    (tmp_path / "settings.yaml").write_text(yaml.safe_dump(settings.as_dict()))
    assert resolve([tmp_path / "settings.yaml"], {}) == settings


def test_help_tells_every_setting(capsys):
    with pytest.raises(SystemExit) as caught:
        main(["run", "--help"])
    assert caught.value.code == 0
    text = capsys.readouterr().out
    for field in FIELDS:
        assert f"--{field.name.replace('_', '-')}" in text
    assert "(default: 0.8 0.8 0.8 0.2)" in text
    assert "{mvmr,vicreg,barlowtwins,simclr,byol}" in text
    # Of each group a title, of each preset the name.
    for word in ("method:", "augmentation:", "machine:", "{paper,quick}", "--resume FOLDER"):
        assert word in text


def test_help_shows_examples_that_are_valid(capsys):
    with pytest.raises(SystemExit):
        main(["--help"])
    examples = [
        line.split()[3:]
        for line in capsys.readouterr().out.splitlines()
        if line.startswith("  python -m benchmarks.stl10")
    ]
    assert {example[0] for example in examples} == {"run", "compare", "export", "features"}
    for example in examples:
        parser().parse_args(example)


@pytest.mark.parametrize(
    ("options", "error", "match"),
    [
        ({"epochs": 0}, ValueError, "epochs must be above 0 but is 0"),
        ({"epochs": 1.5}, TypeError, "epochs must be of type int but is 1.5"),
        ({"blur": 1}, TypeError, "blur must be of type bool but is 1"),
        (
            {"representations": "hog"},
            TypeError,
            "representations must be of type list.*but is 'hog",
        ),
        ({"representation_cache": 3}, TypeError, "representation_cache must be of type str | None"),
        ({"temperature": float("nan")}, ValueError, "temperature must be finite but is nan"),
        ({"method": "dino"}, ValueError, "method must be one of mvmr, vicreg.*but is 'dino'"),
        ({"momentum": 1.5}, ValueError, r"momentum must be in \[0, 1\] but is 1.5"),
        ({"seed": -1}, ValueError, "seed must be at least 0 but is -1"),
        ({"crop_scale_min": 0.0}, ValueError, r"crop_scale_min must be in \(0, 1\] but is 0.0"),
        ({"ten_crop_resize": 0.9}, ValueError, "ten_crop_resize must be at least 1 but is 0.9"),
        ({"max_steps": 0}, ValueError, "max_steps must be above 0, or -1 but is 0"),
        ({"labels": [2]}, ValueError, r"labels must be fractions in \(0, 1\], or 'folds' but is"),
        ({"labels": ["folds"]}, ValueError, "labels must be fractions: only stl10 has folds but"),
        (
            {"batch_size": 3},
            ValueError,
            r"batch_size must be a multiple of devices \(1\), at least",
        ),
        ({"batch_size": 9, "devices": 2}, ValueError, r"a multiple of devices \(2\), at least 4"),
        (
            {"learning_rate": 1e-4, "final_learning_rate": 1e-3},
            ValueError,
            r"final_learning_rate must be above 0 and at most learning_rate \(0.0001\) but is 0.001",
        ),
    ],
)
def test_exception(options, error, match):
    with pytest.raises(error, match=match):
        Settings(**options)


@pytest.mark.parametrize(
    ("content", "match"),
    [
        ("epoch: 3", "has an unknown setting 'epoch'; see --help"),
        ("- epochs", "must hold settings as 'name: value' but holds"),
        ("epochs: [", "must be YAML but cannot be read"),
    ],
)
def test_exception_file(tmp_path, content, match):
    (tmp_path / "own.yaml").write_text(content)
    with pytest.raises(ValueError, match=match):
        resolve([tmp_path / "own.yaml"], {})
    with pytest.raises(FileNotFoundError, match="must be a file of settings, but there is no such"):
        resolve([tmp_path / "absent.yaml"], {})


def test_exception_command_line(capsys):
    with pytest.raises(SystemExit):
        parsed("--representations", "{name: hog")
    assert "must be a name or YAML" in capsys.readouterr().err
