"""The settings of a solo-learn configuration that concern MV-MR, without solo-learn."""

from __future__ import annotations

import inspect
import re
from importlib import resources
from pathlib import Path
from typing import Any

import pytest
import torch
from omegaconf import OmegaConf

from mvmr_loss import (
    DistillationLoss,
    MultiRepresentationRegularizer,
    MVMRLoss,
    Representations,
    preset_settings,
)
from mvmr_loss.adapters import GATHER_DISTRIBUTED, check_cache
from mvmr_loss.adapters.solo.building import build_representations, logged_terms
from mvmr_loss.adapters.solo.checks import check_pipelines, check_pretraining
from mvmr_loss.adapters.solo.options import (
    METHOD_DEFAULTS,
    REGULARIZER_DEFAULTS,
    SoloConfigError,
    check_method_options,
    check_regularizer_options,
)
from mvmr_loss.cache import fill
from tests.adapters import guides


def pipeline(crop_size: int = 32, num_crops: int = 1, **enabled: float) -> dict[str, Any]:
    """A pipeline that is non-augmented but for what is named."""
    names = ("color_jitter", "grayscale", "gaussian_blur", "solarization", "equalization")
    return {
        "rrc": {"enabled": bool(enabled.get("rrc", 0))},
        **{name: {"prob": enabled.get(name, 0.0)} for name in (*names, "horizontal_flip")},
        "crop_size": crop_size,
        "num_crops": num_crops,
    }


PLAIN, AUGMENTED = pipeline(), pipeline(rrc=1, horizontal_flip=0.5)


def pretraining(method: str, *pipelines: dict[str, Any], **more: Any) -> Any:
    return OmegaConf.create({"method": method, "augmentations": list(pipelines), **more})


def test_smoke() -> None:
    check_pretraining(pretraining("mvmr", PLAIN, AUGMENTED))
    check_pretraining(pretraining("mvmr", PLAIN, AUGMENTED, pipeline(24, 3, rrc=1)))
    view = pipeline(36)
    node = {"representations": ["pixels"]}
    check_pretraining(
        pretraining("vicreg", pipeline(num_crops=2, rrc=1), view, mvmr_regularizer=node)
    )


@pytest.mark.parametrize(
    ("defaults", "function"),
    [
        (check_method_options(None), MVMRLoss),
        (REGULARIZER_DEFAULTS, MultiRepresentationRegularizer),
    ],
)
def test_every_option_of_the_loss_is_named(defaults: dict[str, Any], function: Any) -> None:
    for name, parameter in inspect.signature(function).parameters.items():
        if name != "gather_distributed":
            assert defaults[name] == parameter.default


def test_a_preset_is_what_is_not_said() -> None:
    options = check_method_options({"preset": "identity", "representation_weights": 0.1})
    wanted = {**preset_settings("identity").loss, "representation_weights": 0.1}
    assert {name: options[name] for name in wanted} == wanted
    assert options["variance_margin"] == 1.0
    with pytest.raises(SoloConfigError, match="method_kwargs: preset must be one of paper, "):
        check_method_options({"preset": "best"})


def test_the_presets_of_distillation() -> None:
    options = check_method_options({"preset": "distillation", "representations": ["hog"]}, 64)
    assert options["distillation"]["teacher_dims"] == Representations(["hog"]).sizes(3, 64, 64)
    views = [options[f"{term}_weight"] for term in ("invariance", "variance", "dependence")]
    assert (views, options["representation_weights"]) == ([0.0, 0.0, 0.0], 0.0)
    paper = check_method_options({"preset": "distillation_paper", "representations": ["hog"]})
    assert (paper["distillation"], paper["representation_weights"]) == (None, 1.0)
    for preset in ("distillation", "distillation_paper"):
        with pytest.raises(SoloConfigError, match="representations must name a teacher"):
            check_method_options({"preset": preset})


def test_the_preset_with_terms_on_the_features() -> None:
    options = check_method_options({"preset": "features"})
    names = ["scattering", "hog", "local_binary_patterns"]
    assert options["representations"] == names
    assert options["sketch_dim"] == 1024
    distilled = {**preset_settings("features").distillation, "gather_distributed": True}
    teachers = dict.fromkeys(names, 1024)
    assert options["distillation"] == {"teacher_dims": teachers, **distilled}
    given = {"preset": "features", "representations": {"edges": {"name": "hog"}}, "sketch_dim": 64}
    options = check_method_options({**given, "distillation": {"dependence_weight": 0.1}})
    assert options["distillation"]["teacher_dims"] == {"edges": 64}
    assert options["distillation"]["dependence_weight"] == 0.1
    assert options["distillation"]["scale"] == "coordinate"
    assert check_method_options(options) == options  # as solo-learn asks, more than once
    small = check_method_options({"preset": "features", "sketch_dim": 2048}, image_size=28)
    found = dict(zip(names, (2048, 648, 1024), strict=True))
    assert small["distillation"]["teacher_dims"] == found
    options = check_method_options({"preset": "features", "representations": []})
    assert options["distillation"] is None
    assert build_representations(options) is None


def test_all_hosts_gather_unless_told_otherwise() -> None:
    """lightly's has a test of its own."""
    assert METHOD_DEFAULTS["gather_distributed"] is REGULARIZER_DEFAULTS["gather_distributed"]
    assert METHOD_DEFAULTS["gather_distributed"] is GATHER_DISTRIBUTED is True


MEASURE = {"name": "distance_correlation", "eps": 1e-4}


def test_a_measure_with_options_by_a_mapping() -> None:
    """As a configuration file says it."""
    given = OmegaConf.create({"dependence_measure": MEASURE})
    assert check_method_options(given)["dependence_measure"] == MEASURE
    assert check_regularizer_options(given)["dependence_measure"] == MEASURE
    assert type(check_method_options(given)["dependence_measure"]) is dict
    check_pretraining(pretraining("mvmr", PLAIN, AUGMENTED, method_kwargs=given))


def test_the_guide_names_every_option_and_configuration() -> None:
    guide = (Path(__file__).parents[2] / "adapters" / "solo" / "README.md").read_text()
    configs = resources.files("mvmr_loss.adapters.solo.configs")
    shipped = {p.name.removesuffix(".yaml") for p in configs.iterdir() if p.name.endswith(".yaml")}
    for name in {*METHOD_DEFAULTS, *REGULARIZER_DEFAULTS, *shipped}:
        assert f"`{name}`" in guide, name


def test_build_representations_computes_what_is_named() -> None:
    options = check_method_options({"representations": {"fine": {"name": "pixels"}}})
    source = build_representations(options)
    assert source is not None
    images = torch.rand(4, 3, 8, 8)
    torch.testing.assert_close(source(images, torch.arange(4))["fine"], images.flatten(1))
    assert build_representations(check_method_options({"representations": []})) is None


@pytest.mark.parametrize(
    ("pipelines", "match"),
    [
        ([PLAIN], "at least two pipelines .* holds 1"),
        (
            [AUGMENTED, PLAIN],
            r"has rrc.enabled, horizontal_flip.prob; augmentations\[1\] is: put it",
        ),
        (
            [AUGMENTED, AUGMENTED],
            r"has rrc.enabled, .* set rrc.enabled to False and every prob to 0",
        ),
        ([PLAIN, pipeline(24, rrc=1)], r"augmentations\[1\].crop_size must equal .* 32, but is 24"),
        ([PLAIN, PLAIN], r"augmentations\[1\] must be an augmented pipeline .* but only resizes"),
        ([PLAIN, AUGMENTED, pipeline(24)], r"augmentations\[2\] must be an augmented pipeline"),
        ([PLAIN, pipeline(num_crops=2, rrc=1)], "num_crops must be 1 .* is 1 and 2"),
        ([PLAIN, AUGMENTED, AUGMENTED], r"augmentations\[2\].crop_size must not be 32 .* even 31"),
    ],
    ids=[
        "one",
        "swapped",
        "none plain",
        "crop sizes",
        "two plain",
        "third plain",
        "two crops",
        "third of one size",
    ],
)
def test_exception_pipelines(pipelines: list[dict[str, Any]], match: str) -> None:
    with pytest.raises(SoloConfigError, match=match):
        check_pipelines(OmegaConf.create(pipelines))
    with pytest.raises(SoloConfigError, match=match):
        check_pretraining(pretraining("mvmr", *pipelines))


@pytest.mark.parametrize(
    ("given", "match"),
    [
        (
            {"weight": 1.0},
            "method_kwargs has no option 'weight'; its options are proj_hidden_dim, ",
        ),
        (
            {"proj_output_dim": 0},
            "method_kwargs.proj_output_dim must be at least 1 but is 0",
        ),
        ({"proj_hidden_dim": "8k"}, "proj_hidden_dim must be an int but is a str"),
        ({"variance_weight": -1.0}, "method_kwargs: variance_weight must be .* but is -1"),
        ({"invariance_weight": "1"}, "method_kwargs: invariance_weight must be a number"),
        ({"dependence_measure": "no"}, "method_kwargs: .*'no'"),
        ({"dependence_measure": {**MEASURE, "pes": 1}}, "method_kwargs: .*no option 'pes'"),
        ({"dependence_measure": {"eps": 1e-4}}, "method_kwargs: .*a mapping with a 'name'"),
        ({"representation_weights": [1.0]}, "method_kwargs: representation_weights .*list"),
        ({"normalization": "imagenette"}, "method_kwargs: normalization must be one of"),
        ({"gather_distributed": "yes"}, "gather_distributed must be True or False but is 'yes'"),
        ({"representations": ["no"]}, "representation must be one of .* but is 'no'"),
        (
            {"representations": {"a": {"name": "no"}}},
            "representation must be one of .* but is 'no'",
        ),
        ({"representations": "pixels"}, "representations must be a list of names or a mapping"),
        ({"representations": {"hog": 9}}, "method_kwargs: each of representations must .* 'hog'"),
        ({"preset": "features", "representation_weights": 0.5}, "method_kwargs: representation_we"),
        (
            {"preset": "features", "representation_views": "both"},
            "representation_views must be left",
        ),
        (
            {"preset": "features", "dependence_measure": "cka"},
            "dependence_measure must be left out",
        ),
        ({"fill_cache": 1}, "method_kwargs.fill_cache must be True or False but is 1"),
        ({"cache": 3}, "method_kwargs.cache must be a path, or .* but is 3"),
        ("pixels", "method_kwargs must be a mapping of options but is 'pixels'"),
    ],
)
def test_exception_method_options(given: Any, match: str) -> None:
    with pytest.raises(SoloConfigError, match=match):
        check_method_options(given)


@pytest.mark.parametrize(
    ("given", "match"),
    [
        ({"weight": 1.0}, "mvmr_regularizer has no option 'weight'; its options are weights, "),
        ({"weights": {"pixels": "x"}}, "mvmr_regularizer: weights.*must be a number"),
        ({"embeddings": 3}, "mvmr_regularizer.embeddings must name an output .* but is 3"),
        ({"representations": []}, "must name at least one representation but is empty"),
        (True, "mvmr_regularizer must be a mapping of options but is True"),
    ],
)
def test_exception_regularizer_options(given: Any, match: str) -> None:
    with pytest.raises(SoloConfigError, match=match):
        check_regularizer_options(given)


@pytest.mark.parametrize(
    ("method", "pipelines", "match"),
    [
        ("mvmr", [PLAIN, AUGMENTED], "mvmr_regularizer must not be given with method 'mvmr'"),
        ("vicreg", [AUGMENTED], "needs the non-augmented image or a cache: .* other than 32"),
        (
            "vicreg",
            [AUGMENTED, pipeline(36, 2)],
            "num_crops of the last pipeline must be 1 .* is 2",
        ),
        # Of the method's own size, it would be a third large crop.
        (
            "vicreg",
            [AUGMENTED, PLAIN],
            "needs the non-augmented image or a cache: .* other than 32",
        ),
    ],
)
def test_exception_regularizer_pipelines(
    method: str, pipelines: list[dict[str, Any]], match: str
) -> None:
    cfg = pretraining(method, *pipelines, mvmr_regularizer={"representations": ["pixels"]})
    with pytest.raises(SoloConfigError, match=match):
        check_pretraining(cfg)


def test_exception_missing_cache(tmp_path: Path) -> None:
    missing = str(tmp_path / "missing")
    match = f"there is none at '{missing}'; set fill_cache to True"
    cfg = pretraining("mvmr", PLAIN, AUGMENTED, method_kwargs={"cache": missing})
    with pytest.raises(SoloConfigError, match=match):
        check_pretraining(cfg)
    cfg.method_kwargs.fill_cache = True
    check_pretraining(cfg)
    cfg = pretraining("vicreg", AUGMENTED, mvmr_regularizer={"cache": missing})
    with pytest.raises(SoloConfigError, match=match):
        check_pretraining(cfg)
    cfg.mvmr_regularizer.fill_cache = True
    with pytest.raises(
        SoloConfigError, match="fill_cache must be left out without a non-augmented"
    ):
        check_pretraining(cfg)
    with pytest.raises(SoloConfigError, match=match):
        build_representations(check_method_options({"cache": missing}), range(4))


@pytest.mark.parametrize(
    ("option", "value"),
    [
        ("sketch_dim", 64),
        ("sketch_seed", 5),
        ("normalization", "none"),
        ("slice_size", 8),
        ("representations", ["hog"]),
    ],
)
def test_exception_options_of_what_is_read(option: str, value: Any, tmp_path: Path) -> None:
    fill(Representations(["pixels"], cache=tmp_path), torch.rand(4, 3, 8, 8))
    node = {"cache": str(tmp_path), option: value}
    match = re.escape(
        f"mvmr_regularizer.{option} must be left out without a non-augmented pipeline"
    )
    with pytest.raises(SoloConfigError, match=match):
        check_pretraining(pretraining("vicreg", AUGMENTED, mvmr_regularizer=node))
    node[option] = REGULARIZER_DEFAULTS[option]
    check_pretraining(pretraining("vicreg", AUGMENTED, mvmr_regularizer=node))


def test_a_store_is_what_the_cache_takes_for_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "store").mkdir()
    monkeypatch.setenv("HOME", str(tmp_path))
    for cache in ("~/store", {"path": tmp_path / "store"}):
        with pytest.raises(ValueError, match="there is none at .*store'; set fill_cache to True"):
            check_cache(cache, False)
        check_cache(cache, True)
    fill(Representations(["pixels"], cache="~/store"), torch.rand(4, 3, 8, 8))
    for cache in ("~/store", {"path": tmp_path / "store"}):
        check_cache(cache, False)


def test_cache_is_filled_and_read_by_index(tmp_path: Path) -> None:
    images = torch.rand(4, 3, 8, 8)
    given = {"representations": ["pixels"], "cache": str(tmp_path / "store"), "fill_cache": True}
    filling = build_representations(check_method_options(given), range(4))
    assert filling is not None
    computed = filling(images, torch.arange(4))
    reading = build_representations(
        check_regularizer_options({"cache": given["cache"]}), range(4), has_images=False
    )
    assert reading is not None
    read = reading(None, torch.tensor([2, 0]))["pixels"]
    torch.testing.assert_close(read, images[[2, 0]].flatten(1), rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(read, computed["pixels"][[2, 0]])
    with pytest.raises(SoloConfigError, match="num_samples is 4 there but 5 here"):
        build_representations(check_method_options(given), range(5))
    with pytest.raises(SoloConfigError, match="cache needs a data set with a length"):
        build_representations(check_method_options(given), None)


def test_exception_is_of_both_kinds() -> None:
    """solo-learn refuses settings by AssertionError, this package by ValueError."""
    assert issubclass(SoloConfigError, AssertionError)
    assert issubclass(SoloConfigError, ValueError)


def test_the_guides_teacher(recwarn: pytest.WarningsRecorder) -> None:
    """Its YAML as it stands, but for the weights, which would be downloaded."""
    pytest.importorskip("timm")
    (text,) = (block for block in guides.blocks("solo", "yaml") if "source: timm" in block)
    assert text.count("weights: default") == 1
    given = OmegaConf.create(text.replace("weights: default", "weights: null"))
    representations = build_representations(check_method_options(given.method_kwargs))
    assert representations is not None
    assert ["random weights" in str(warning.message) for warning in recwarn] == [True]
    sizes = representations.sizes(3, 96, 96)
    assert list(sizes) == ["teacher", "hog"]
    assert sizes["teacher"] == 384


def test_the_guide_has_every_option_and_term() -> None:
    rows = re.findall(r"^\| (`.*?) \|", guides.text("solo"), re.M)
    named = {name for row in rows for name in re.findall(r"`(\w+)`", row)}
    assert named >= {*METHOD_DEFAULTS, *REGULARIZER_DEFAULTS}
    z, y = torch.randn(2, 8, 4)
    criterion = MVMRLoss(identity_weight=1.0, covariance_weight=1.0)
    on_features = DistillationLoss(4, {"teacher": 4}, dependence_weight=0.1)
    logged = {
        **logged_terms(criterion.forward_components(z, y, {"hog": y})),
        **logged_terms(on_features.forward_components(z, {"teacher": y})),
    }
    for name in logged:
        said = name.replace("hog", "<representation>").replace("teacher", "<teacher>")
        assert f"`{said}`" in guides.text("solo")
