"""The methods' losses, optimisers and backbones, and what is said of wrong ones."""

import copy

import pytest
import torch
from lightly.loss import BarlowTwinsLoss, NTXentLoss, VICRegLoss
from torch.nn import functional as F

from benchmarks.stl10.backbones import build_backbone, feature_dim
from benchmarks.stl10.methods import METHOD_CLASSES, build_method
from benchmarks.stl10.settings import METHODS, Settings
from mvmr_loss import MultiRepresentationRegularizer, MVMRLoss

SMALL = {
    "backbone": "small",
    "image_size": 32,
    "batch_size": 8,
    "projector_hidden_dim": 16,
    "projector_output_dim": 12,
}
LOSSES = {
    "vicreg": VICRegLoss(),
    "barlowtwins": BarlowTwinsLoss(),
    "simclr": NTXentLoss(temperature=0.3),
}


def method(name, **options):
    return build_method(Settings(method=name, **{**SMALL, **options}), steps=20)


@pytest.fixture
def views():
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(8, 3, 32, 32, generator=generator) for _ in range(2)]


@pytest.fixture
def representations():
    generator = torch.Generator().manual_seed(1)
    return {
        "a": torch.randn(8, 5, generator=generator),
        "b": torch.randn(8, 3, generator=generator),
    }


def test_every_method_has_a_class():
    assert tuple(METHOD_CLASSES) == METHODS


def test_mvmr_is_the_packages_loss(views, representations):
    model = method("mvmr", representation_weight=0.5).eval()
    terms = model.terms(views, representations)
    z = [model.projection_head(model.backbone(view)) for view in views]
    expected = MVMRLoss(representation_weights=0.5)(*z, representations)
    torch.testing.assert_close(sum(terms.values()), expected)
    assert set(terms) == {"invariance", "variance", "dependence", "a", "b"}


def test_mvmr_distils_on_its_features(views, representations):
    options = {"teacher_dims": {"a": 5}, "dependence_weight": 0.5}
    model = method("mvmr", distillation=options, view_terms=False).eval()
    terms = model.terms(views, representations)
    features = [model.backbone(view) for view in views]
    expected = model.distillation.forward_components(features, {"a": representations["a"]})
    z = [model.projection_head(x) for x in features]
    rest = MVMRLoss(invariance_weight=0, variance_weight=0, dependence_weight=0)
    total = expected.total + rest(*z, {"b": representations["b"]})
    torch.testing.assert_close(sum(terms.values()), total)
    torch.testing.assert_close(terms["dependence/a"], 0.5 * expected.terms["dependence/a"])
    (optimizer,), _ = model.configure_optimizers()
    trained = {id(p) for group in optimizer.param_groups for p in group["params"]}
    assert {id(p) for p in model.distillation.parameters()} <= trained


def test_exception_distillation():
    with pytest.raises(ValueError, match="distillation must be left out for vicreg"):
        method("vicreg", distillation={"teacher_dims": {"a": 5}})
    with pytest.raises(TypeError, match="distillation must be of type dict"):
        method("mvmr", distillation=["a"])


@pytest.mark.parametrize("name", LOSSES)
def test_the_others_are_lightlys(views, representations, name):
    model = method(name, temperature=0.3, representation_weight=0.5).eval()
    z = [model.projection_head(model.backbone(view)) for view in views]
    terms = model.terms(views, {})
    assert list(terms) == [name]
    torch.testing.assert_close(terms[name], LOSSES[name](*z))
    # The representation terms are added to it.
    more = model.terms(views, representations)
    expected = MultiRepresentationRegularizer(0.5)(z, representations)
    torch.testing.assert_close(more["a"] + more["b"], expected)
    torch.testing.assert_close(more[name], terms[name])


def test_byol(views):
    model = method("byol", momentum=0.9).eval()
    student, teacher = model.backbone, model.teacher_backbone
    with torch.no_grad():
        for parameter in student.parameters():
            parameter.add_(0.1)
    before = copy.deepcopy(teacher)
    terms = model.terms(views, {})
    # The momentum encoder has moved by a tenth, and is not trained.
    for old, new, own in zip(
        before.parameters(), teacher.parameters(), student.parameters(), strict=True
    ):
        torch.testing.assert_close(new, 0.9 * old + 0.1 * own)
        assert not new.requires_grad
    p = [model.prediction_head(model.projection_head(student(view))) for view in views]
    t = [model.teacher_projection_head(teacher(view)) for view in views]
    expected = sum(-2 * F.cosine_similarity(p[i], t[1 - i]).mean() for i in (0, 1))
    torch.testing.assert_close(terms["byol"], expected)
    trained = {id(p) for group in optimizer(model).param_groups for p in group["params"]}
    assert trained.isdisjoint(id(p) for p in teacher.parameters())
    assert {id(p) for p in model.prediction_head.parameters()} <= trained


def optimizer(model):
    return model.configure_optimizers()[0][0]


@pytest.mark.parametrize(
    ("name", "cls"), [("adam", "Adam"), ("adamw", "AdamW"), ("sgd", "SGD"), ("lars", "LARS")]
)
@pytest.mark.parametrize("method_name", METHODS)
def test_optimizer_is_the_same_for_every_method(method_name, name, cls):
    model = method(method_name, optimizer=name, weight_decay=0.1)
    groups = optimizer(model).param_groups
    assert type(optimizer(model)).__name__ == cls
    assert [group["weight_decay"] for group in groups] == [0.1, 0.0]
    assert all(p.ndim > 1 for p in groups[0]["params"])
    assert all(p.ndim <= 1 for p in groups[1]["params"])
    grouped = {id(p) for group in groups for p in group["params"]}
    assert grouped == {id(p) for p in model.parameters() if p.requires_grad}


def test_schedule():
    model = method("simclr", epochs=4, warmup_epochs=1, learning_rate=0.2, final_learning_rate=0.02)
    (chosen,), (schedule,) = model.configure_optimizers()
    rates = []
    for _ in range(20):  # 5 steps an epoch
        rates.append(chosen.param_groups[0]["lr"])
        chosen.step()
        schedule["scheduler"].step()
    assert rates[:5] == pytest.approx([0.04, 0.08, 0.12, 0.16, 0.2])
    assert rates[5:] == sorted(rates[5:], reverse=True)
    assert 0.02 <= rates[-1] < 0.03


def test_weights_follow_from_the_seed_alone():
    first = method("simclr", seed=1).state_dict()
    torch.manual_seed(99)
    again, other = method("simclr", seed=1).state_dict(), method("simclr", seed=2).state_dict()
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert not torch.equal(first["backbone.stem.0.weight"], other["backbone.stem.0.weight"])


@pytest.mark.parametrize(
    ("name", "width"),
    [
        ("small", 128),
        ("resnet18", 512),
        ("resnet50", 2048),
        ("mobilenet_v3_small", 1024),
        ("vit_b_32", 768),
        ("resnet10t", 512),
        ("vit_tiny_patch16_224", 192),
    ],
)
def test_backbones(name, width):
    backbone = build_backbone(Settings(backbone=name, image_size=64))
    assert feature_dim(backbone, 64) == width


@pytest.mark.parametrize(("stem", "stride", "kernel"), [("small", 1, 3), ("imagenet", 2, 7)])
def test_stem_and_zero_init(stem, stride, kernel):
    backbone = build_backbone(Settings(backbone="resnet18", stem=stem))
    assert backbone.conv1.stride == (stride, stride)
    assert backbone.conv1.kernel_size == (kernel, kernel)
    assert isinstance(backbone.maxpool, torch.nn.MaxPool2d)
    assert not backbone.layer1[0].bn2.weight.any()


@pytest.mark.parametrize(
    ("options", "error", "match"),
    [
        ({"backbone": "resnet19"}, ValueError, "torchvision or timm model but is 'resnet19'"),
        (
            {"backbone": "squeezenet1_1"},
            ValueError,
            "must be a classification model that ends in a",
        ),
        (
            {"backbone": "vit_b_16", "image_size": 33},
            ValueError,
            "cannot be built for images of 33",
        ),
        ({"representations": ["sift"]}, ValueError, "but is 'sift'"),
        ({"representations": [{"name": "hog", "bins": 3}]}, TypeError, "hog has no option 'bins'"),
        ({"representations": [{"name": "teacher"}]}, ValueError, "either module or source must be"),
        ({"dependence_measure": "mine"}, ValueError, "'mine'"),
    ],
)
def test_exception(options, error, match):
    with pytest.raises(error, match=match):
        method("mvmr", **options)
