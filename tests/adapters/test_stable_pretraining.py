"""The forward functions for stable-pretraining on what its modules and batches are, without the host."""

import copy
import pickle
import subprocess
import sys
from types import SimpleNamespace

import hydra
import pytest
import torch
from torch import nn

from mvmr_loss import (
    DistillationLoss,
    MultiRepresentationRegularizer,
    MVMRLoss,
    Representations,
    Teacher,
)
from mvmr_loss.adapters.stable_pretraining import distill, mvmr, regularized

N = 6


class Part(nn.Module):
    """As ``stable_pretraining.Module`` is: parts by keyword, and Lightning's logging."""

    def __init__(self, **parts):
        super().__init__()
        self.logged = {}
        for name, part in parts.items():
            setattr(self, name, part)

    def log_dict(self, named, **_):
        self.logged.update(named)


def module(**parts):
    torch.manual_seed(0)
    backbone = nn.Sequential(nn.Flatten(), nn.Linear(3 * 16 * 16, 8))
    return Part(**{"backbone": backbone, "projector": nn.Linear(8, 5), **parts})


def view(seed):
    images = torch.rand(N, 3, 16, 16, generator=torch.Generator().manual_seed(seed))
    return {"image": images, "label": torch.arange(N), "sample_idx": torch.arange(N)}


VIEWS = {"views": [view(0), view(1), view(2)]}


def two_views(self, batch, stage):
    """A method as those of stable_pretraining.forward: two views, a loss in training."""
    if "image" in batch:
        return {"embedding": self.backbone(batch["image"])}
    first, second = (self.projector(self.backbone(v["image"])) for v in batch["views"])
    return {"embedding": first, "loss": (first - second).square().mean()}


def plain_representations():
    return Representations(["pixels", "local_std"])


class Drifting(nn.Module):
    """Would change by being computed in training mode."""

    def __init__(self):
        super().__init__()
        self.norm = nn.BatchNorm2d(3)

    def forward(self, images):
        return {"own": self.norm(images).flatten(1)}


def test_representations_stay_fixed():
    self = module(loss=MVMRLoss(), representations=Drifting()).train()
    mvmr(self, {**VIEWS, "batch_idx": 0}, "fit")["loss"].backward()
    assert self.representations.norm.num_batches_tracked == 0
    assert self.representations.norm.weight.grad is None


@pytest.mark.parametrize("named", [False, True])
def test_mvmr_is_the_loss_of_the_views(named):
    views = [view(0), view(1), view(2)]
    batch = {"views": views}
    if named:
        batch = dict(
            zip(["first", "non_augmented", "second"], [views[1], views[0], views[2]], strict=True)
        )
    self = module(loss=MVMRLoss(), representations=plain_representations())
    out = mvmr(self, {**batch, "batch_idx": 3}, "fit")
    z = [self.projector(self.backbone(v["image"])) for v in views]
    features = plain_representations()(views[0]["image"])
    torch.testing.assert_close(out["loss"], MVMRLoss()(z[0], z[1:], features))
    assert out["embedding"].shape == (3 * N, 8)
    torch.testing.assert_close(out["label"], torch.arange(N).repeat(3))
    assert self.logged["fit/loss"] == out["loss"]
    assert "fit/representations/pixels" in self.logged
    out["loss"].backward()
    assert self.backbone[1].weight.grad.abs().sum() > 0


def test_mvmr_without_representations_is_the_terms_of_the_views():
    views = [view(0), view(1)]
    self = module(loss=MVMRLoss())
    z, z_augmented = (self.projector(self.backbone(v["image"])) for v in views)
    out = mvmr(self, {"views": views}, "fit")
    torch.testing.assert_close(out["loss"], MVMRLoss()(z, z_augmented))


@pytest.mark.parametrize("forward", [mvmr, distill, regularized(two_views)])
def test_validation_only_embeds(forward):
    self = module(loss=nn.Identity())
    out = forward(self, {"image": view(0)["image"]}, "validate")
    assert list(out) == ["embedding"]
    assert self.logged == {}


@pytest.mark.parametrize("forward", [mvmr, distill])
def test_validation_of_views_has_no_loss(forward):
    out = forward(module(), {"views": [view(0), view(1)]}, "validate")
    assert sorted(out) == ["embedding", "label"]


def test_regularized_adds_the_terms_to_the_loss():
    views = [view(0), view(1), view(2)]
    parts = {
        "loss": MultiRepresentationRegularizer(0.5),
        "representations": plain_representations(),
    }
    self = module(**parts)
    out = regularized(two_views)(self, {"views": views}, "fit")
    z = [self.projector(self.backbone(v["image"])) for v in views[1:]]
    features = plain_representations()(views[0]["image"])
    expected = two_views(self, {"views": views[1:]}, "fit")["loss"]
    expected = expected + MultiRepresentationRegularizer(0.5)(z, features)
    torch.testing.assert_close(out["loss"], expected)
    assert sorted(self.logged) == [
        "fit/regularized_loss",
        "fit/representations/local_std",
        "fit/representations/pixels",
    ]
    assert not self.projector._forward_hooks


def test_regularized_takes_embeddings_of_all_views_at_once_and_of_another_part():
    def together(self, batch, stage):
        z = self.head.student(self.backbone(torch.cat([v["image"] for v in batch["views"]])))
        return {"loss": z.square().mean()}

    head = nn.ModuleDict({"student": nn.Linear(8, 5), "teacher": nn.Linear(8, 5)})
    parts = {"loss": MultiRepresentationRegularizer(), "representations": plain_representations()}
    self = module(head=head, **parts)
    views = [view(0), view(1), view(2)]
    out = regularized(together, "head.student")(self, {"views": views}, "fit")
    z = [head.student(self.backbone(v["image"])) for v in views[1:]]
    terms = MultiRepresentationRegularizer()(z, plain_representations()(views[0]["image"]))
    torch.testing.assert_close(out["loss"], torch.cat(z).square().mean() + terms)


def test_regularized_is_found_by_its_path_and_can_be_pickled():
    forward = regularized("torch.nn.functional.relu")
    assert forward.keywords["forward"] is torch.nn.functional.relu
    assert pickle.loads(pickle.dumps(regularized(two_views))).keywords["forward"] is two_views


def test_distill_is_the_teachers_term_alone():
    teacher = nn.Sequential(nn.Flatten(), nn.Linear(3 * 16 * 16, 4))
    parts = {
        "loss": MultiRepresentationRegularizer(),
        "representations": Representations({"teacher": Teacher(teacher)}),
    }
    one = view(0)
    self = module(**parts)
    expected = MultiRepresentationRegularizer()(
        self.projector(self.backbone(one["image"])), {"teacher": teacher(one["image"])}
    )
    torch.testing.assert_close(distill(self, one, "fit")["loss"], expected)
    # The features themselves, where there is no projector; and several views.
    self = module(**parts, projector=None)
    z = [self.backbone(view(seed)["image"]) for seed in (0, 1)]
    expected = MultiRepresentationRegularizer()(z, {"teacher": teacher(one["image"])})
    out = distill(self, {"views": [view(0), view(1)]}, "fit")
    torch.testing.assert_close(out["loss"], expected)


def linear_teacher():
    network = nn.Sequential(nn.Flatten(), nn.Linear(3 * 16 * 16, 4))
    return network, Representations({"teacher": Teacher(network)})


def test_distill_is_the_distillation_loss_of_all_views():
    teacher, representations = linear_teacher()
    loss = DistillationLoss(8, {"teacher": 4})
    expected = copy.deepcopy(loss)
    self = module(loss=loss, representations=representations, projector=None)
    out = distill(self, VIEWS, "fit")
    h = [self.backbone(v["image"]) for v in VIEWS["views"]]
    target = {"teacher": teacher(VIEWS["views"][0]["image"])}
    torch.testing.assert_close(out["loss"], expected(h, target))
    assert sorted(self.logged) == [
        "fit/dependence/teacher",
        "fit/loss",
        "fit/regression/teacher",
    ]
    out["loss"].backward()
    heads = list(loss.parameters())
    assert len(heads) == 4
    assert all(p.grad.abs().sum() > 0 for p in [*heads, *self.backbone.parameters()])
    # The optimiser has what is the module's; what is exported is the backbone.
    assert {id(p) for p in heads} <= {id(p) for p in self.parameters()}
    assert list(self.backbone.state_dict()) == ["1.weight", "1.bias"]


def test_distill_without_a_head_on_the_projectors_embeddings():
    options = {"regression_weight": 0, "dependence_measure": "u_distance_correlation_sqr"}
    teacher, representations = linear_teacher()
    loss = DistillationLoss(5, {"teacher": 4}, **options)
    assert not list(loss.parameters())
    self = module(loss=loss, representations=representations)
    one = view(0)
    z = self.projector(self.backbone(one["image"]))
    torch.testing.assert_close(
        distill(self, one, "fit")["loss"], loss(z, {"teacher": teacher(one["image"])})
    )


@pytest.mark.parametrize("forward", [mvmr, distill])
def test_the_distillation_loss_is_updated_once_a_training_step(forward):
    _, representations = linear_teacher()
    on_features = DistillationLoss(8, {"teacher": 4}, anchors=4 * N)
    parts = {"loss": on_features, "projector": None}
    if forward is mvmr:
        parts = {"loss": MVMRLoss(), "distillation": on_features}
    self = module(representations=representations, **parts)
    for step in (1, 2):
        forward(self, VIEWS, "fit")
        forward(self, VIEWS, "validate")
        assert on_features.bank.written == step * N
        assert on_features.regressions["teacher"].standardization.count == step * N


def full_store(path, stored=N):
    """Returns representations with a store that has that many of the images, opened and not."""
    images = view(0)["image"]
    filled = Representations(["pixels"], cache={"path": path, "dataset": list(images)})
    if stored:
        filled(images[:stored], torch.arange(stored))
    return Representations(["pixels"], cache=path), filled


def at_step(done):
    return SimpleNamespace(
        train_dataloader=SimpleNamespace(dataset=list(view(0)["image"])),
        fit_loop=SimpleNamespace(total_batch_idx=done),
    )


@pytest.mark.filterwarnings("ignore:the store at .* lacks")
@pytest.mark.parametrize("forward", [mvmr, distill])
@pytest.mark.parametrize("opened", [False, True])
@pytest.mark.parametrize(
    ("stored", "done", "fitted"),
    [(N, 0, True), (N, 1, False), (N - 1, 0, False), (0, 0, False)],
    ids=["full", "resumed", "not full", "empty"],
)
def test_statistics_are_of_a_full_store(forward, opened, stored, done, fitted, tmp_path):
    """Taken before the first loss of a training, and of no other step's."""
    on_features = DistillationLoss(8, {"pixels": 768})
    expected = copy.deepcopy(on_features)
    parts = {"loss": on_features, "projector": None}
    if forward is mvmr:
        parts = {"loss": MVMRLoss(), "distillation": on_features}
    representations = full_store(tmp_path / "store", stored)[opened]
    self = module(representations=representations, **parts)
    self.trainer = at_step(done)
    forward(self, VIEWS, "fit")
    standardization = on_features.regressions["pixels"].standardization
    assert standardization.fitted == fitted
    h = [self.backbone(v["image"]) for v in VIEWS["views"]]
    target = representations(VIEWS["views"][0]["image"], torch.arange(N))
    if fitted:
        expected.fit({"pixels": target["pixels"]})
    wanted = expected.forward_components(h, target)
    regression = self.logged["fit/regression/pixels"]
    torch.testing.assert_close(regression, wanted.as_dict("fit/")["fit/regression/pixels"])
    self.trainer = at_step(done + 1)
    forward(self, VIEWS, "fit")  # by now, the store is full
    assert standardization.fitted == fitted


GOOD = {"loss": MultiRepresentationRegularizer(), "representations": plain_representations()}
DISTILLATION = DistillationLoss(8, {"pixels": 768})
ERRORS = {
    "one view": (mvmr, {"loss": MVMRLoss()}, {"views": [view(0)]}, ValueError, "two views.*has 1"),
    "single image": (mvmr, {"loss": MVMRLoss()}, view(0), ValueError, "two views.*has 1"),
    "no loss": (mvmr, {}, VIEWS, TypeError, "loss must be a mvmr_loss.MVMRLoss but is missing"),
    "other loss": (
        *(mvmr, GOOD, VIEWS, TypeError),
        "must be a mvmr_loss.MVMRLoss but is a MultiRepresentationRegularizer",
    ),
    "loss of distill": (
        *(distill, {"loss": MVMRLoss()}, VIEWS, TypeError),
        "must be a mvmr_loss.DistillationLoss or a mvmr_loss.MultiRep.* but is a MVMRLoss: Module"
        r"\(..., loss=DistillationLoss\(...\)\), in YAML loss: {_target_: mvmr_loss.Dist",
    ),
    "distillation of distill": (
        *(distill, {**GOOD, "distillation": DISTILLATION}, VIEWS, TypeError),
        "distillation must be left out with the forward distill.* but is a DistillationLoss; give "
        "the DistillationLoss as the module's loss",
    ),
    "distillation of regularized": (
        regularized(two_views),
        *({**GOOD, "distillation": DISTILLATION}, VIEWS, TypeError),
        "distillation must be left out with the forward regularized.*; take mvmr.* or distill",
    ),
    "other distillation": (
        *(mvmr, {**GOOD, "loss": MVMRLoss(), "distillation": {"teacher_dims": 3}}, VIEWS),
        *(TypeError, "distillation must be a mvmr_loss.DistillationLoss but is a dict"),
    ),
    "more than teachers": (
        *(distill, {**GOOD, "loss": DISTILLATION, "projector": None}, VIEWS, ValueError),
        "teachers of its loss, pixels, alone but have local_std besides: name them",
    ),
    "width of a teacher": (
        distill,
        {**GOOD, "loss": DistillationLoss(8, {"pixels": 3, "local_std": 768}), "projector": None},
        *(VIEWS, ValueError, "must be {'pixels': 768, 'local_std': 768} for these images"),
    ),
    "no teacher": (
        *(distill, {"loss": MultiRepresentationRegularizer()}, VIEWS, TypeError),
        "representations must be a mvmr_loss.Representations but are missing",
    ),
    "names": (
        *(mvmr, {"loss": MVMRLoss(), "representations": ["hog"]}, VIEWS, TypeError),
        r"but are \['hog'\]: .*_target_",
    ),
    "no views": (mvmr, {"loss": MVMRLoss()}, {"views": []}, ValueError, "but is empty"),
    "named otherwise": (
        *(mvmr, {"loss": MVMRLoss()}, {"a": view(0)}, ValueError),
        "named 'non_augmented' but has 'a'",
    ),
    "single image of regularized": (
        *(regularized(two_views), GOOD, view(0), ValueError),
        "must have views in training.* but has a single 'image'; use MultiViewTransform",
    ),
    "no such part": (regularized(two_views, "head"), GOOD, VIEWS, ValueError, "but is 'head'"),
    "not called": (
        *(regularized(lambda self, batch, stage: {"loss": 0.0}), GOOD, VIEWS, ValueError),
        "'projector' must put out embeddings with a gradient",
    ),
    "not flat": (
        regularized(lambda self, b, s: {"loss": self.projector(torch.rand(N, 2, 8)).sum()}),
        *(GOOD, VIEWS, ValueError, r"embeddings of shape \(6, D\).* have shape \(6, 2, 5\)"),
    ),
}


def test_mvmr_with_terms_on_the_features():
    representations = Representations(["pixels", "local_std"])
    dims = {"local_std": 768}
    on_features = DistillationLoss.from_preset("features", 8, dims)
    expected = DistillationLoss.from_preset("features", 8, dims)
    expected.load_state_dict(on_features.state_dict())
    criterion = MVMRLoss.from_preset("identity")
    self = module(loss=criterion, representations=representations, distillation=on_features)
    out = mvmr(self, VIEWS, "fit")
    h = [self.backbone(v["image"]) for v in VIEWS["views"]]
    values = representations(VIEWS["views"][0]["image"])
    z = [self.projector(x) for x in h]
    wanted = criterion(z[0], z[1:], {"pixels": values["pixels"]})
    wanted = wanted + expected(h, {"local_std": values["local_std"]})
    torch.testing.assert_close(out["loss"], wanted)
    assert self.logged["fit/loss"] == out["loss"]
    assert {"fit/regression/local_std", "fit/dependence/local_std", "fit/identity"} <= set(
        self.logged
    )
    out["loss"].backward()
    assert all(p.grad.abs().sum() > 0 for p in on_features.parameters())


@pytest.mark.parametrize("case", ERRORS)
def test_errors(case):
    forward, parts, batch, error, match = ERRORS[case]
    with pytest.raises(error, match=match):
        forward(module(**parts), batch, "fit")


@pytest.mark.parametrize("path", ["no.such.function", "torch.nn.nothing", "two words"])
def test_error_of_a_path(path):
    with pytest.raises(ValueError, match=f"forward must be a function.*'{path}'"):
        regularized(path)


def test_a_preset_and_a_method_in_yaml():
    config = {"_target_": "mvmr_loss.MVMRLoss.from_preset", "preset": "identity"}
    assert hydra.utils.instantiate(config).identity_weight > 0
    path = "mvmr_loss.adapters.stable_pretraining.regularized"
    forward = hydra.utils.instantiate({"_target_": path, "forward": "torch.nn.functional.relu"})
    assert forward.keywords["forward"] is torch.nn.functional.relu


def test_error_of_no_function():
    with pytest.raises(TypeError, match="forward must be a function but is a int"):
        regularized(3)


@pytest.mark.parametrize("subset", [False, True])
def test_the_sample_index_feeds_the_cache(tmp_path, subset):
    representations = Representations(["pixels"], cache=tmp_path / "store")
    self = module(loss=MVMRLoss(), representations=representations)
    dataset = list(view(0)["image"])
    if subset:
        dataset = torch.utils.data.Subset(dataset, [1, 2, 3])
    loader = SimpleNamespace(dataset=dataset)
    self.trainer = SimpleNamespace(train_dataloader=loader)
    computed = [mvmr(self, VIEWS, "fit")["loss"] for _ in range(2)]
    torch.testing.assert_close(*computed)
    alone = Representations(None, cache=tmp_path / "store")
    pixels = alone(None, torch.arange(N))["pixels"]
    torch.testing.assert_close(pixels, view(0)["image"].flatten(1), rtol=1e-2, atol=1e-3)


def test_a_cache_without_index_is_refused(tmp_path):
    representations = Representations(["pixels"], cache=tmp_path / "store")
    batch = {"views": [{"image": v["image"]} for v in VIEWS["views"]]}
    with pytest.raises(ValueError, match="must have 'sample_idx'.*but has 'image'"):
        mvmr(module(loss=MVMRLoss(), representations=representations), batch, "fit")


def test_the_host_is_not_imported():
    code = "import sys, mvmr_loss.adapters.stable_pretraining as _; print(sorted(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    modules = done.stdout
    assert "'mvmr_loss.adapters.stable_pretraining.forward'" in modules
    assert "'stable_pretraining'" not in modules
    assert "'lightning'" not in modules


def test_error_of_the_command_without_the_host(tmp_path):
    (tmp_path / "c.yaml").write_text("data: {}")
    code = """
import runpy, sys
sys.modules["stable_pretraining"] = None
sys.argv = ["python", "c.yaml"]
runpy.run_module("mvmr_loss.adapters.stable_pretraining", run_name="__main__")
"""
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, check=False
    )
    assert done.returncode == 1
    assert done.stderr.startswith("Error: mvmr_loss.adapters.stable_pretraining needs")
    assert done.stderr.endswith("pip install 'stable-pretraining>=0.1.8'\n")
