"""The LightningModule: its loss, its groups and schedule, its online evaluation, its errors."""

import copy
import functools
import importlib.metadata
import json
import re
import shlex

import numpy as np
import pytest
import torch
import torchvision
from lightly.data import LightlyDataset
from lightly.utils.benchmarking import LinearClassifier
from omegaconf import OmegaConf
from pytorch_lightning import Trainer
from torch import nn
from torch.utils.data import DataLoader, Subset

import mvmr_loss
from mvmr_loss import DistillationLoss, MVMRLoss, Normalization, Representations
from mvmr_loss.adapters import lightly as adapter
from mvmr_loss.adapters import with_preset
from mvmr_loss.adapters.lightly import MVMR, MVMRTransform, MVMRViT
from mvmr_loss.adapters.lightly.__main__ import method_entry, option
from mvmr_loss.adapters.lightly.backbone import build_backbone
from mvmr_loss.adapters.lightly.hyperparameters import NOT_SAVED
from mvmr_loss.adapters.lightly.transform import CIFAR_NORMALIZE
from mvmr_loss.cache.__main__ import main
from mvmr_loss.dependence import dependence_measure
from mvmr_loss.representations import Pixels
from mvmr_loss.teachers import Teacher
from tests.adapters import guides

SIZE, CLASSES = 16, 5


class Backbone(nn.Module):
    """A backbone without BatchNorm but with a normalisation layer and biases."""

    num_features = 8

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 8, 3, stride=4)
        self.norm = nn.GroupNorm(2, 8)

    def forward(self, x):
        return self.norm(self.conv(x)).relu().mean((2, 3), keepdim=True)


def method(**options):
    torch.manual_seed(0)
    defaults = {
        "num_classes": CLASSES,
        "backbone": Backbone(),
        "hidden_dim": 16,
        "output_dim": 12,
        "representations": ["pixels", "local_std"],
    }
    return MVMR(4, **{**defaults, **options})


def images(count=20, views=2, size=SIZE):
    """Samples as lightly's: (views, target, filename); one view is no list."""
    generator = torch.Generator().manual_seed(0)
    made = []
    for i in range(count):
        image = [torch.rand(3, size, size, generator=generator) for _ in range(views)]
        made.append((image if views > 1 else image[0], i % CLASSES, f"{i}.png"))
    return made


def loader(views=2, **options):
    return DataLoader(images(views=views), batch_size=4, **options)


def trainer(**options):
    quiet = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False}
    defaults = {"max_epochs": 2, "accelerator": "cpu", "enable_model_summary": False}
    return Trainer(**{**quiet, **defaults, **options})


@pytest.fixture
def logged(monkeypatch):
    """What a method logs outside a trainer, by name."""
    values = {}
    monkeypatch.setattr(MVMR, "log", lambda self, name, value, **_: values.update({name: value}))
    monkeypatch.setattr(MVMR, "log_dict", lambda self, log, **_: values.update(log))
    return values


def test_the_loss_and_head_are_the_packages_own():
    for name in ("MVMRLoss", "MVMRProjectionHead", "Representations"):
        assert getattr(adapter, name) is getattr(mvmr_loss, name)


@pytest.mark.parametrize("views", [2, 3])
def test_training_step_is_the_loss_of_the_views(views, logged):
    model = method(loss={"variance_weight": 2.0, "representation_weights": 0.5}).eval()
    batch = next(iter(loader(views)))
    total = model.training_step(batch, 0)

    z, *z_augmented = [model.projection_head(model(view).flatten(1)) for view in batch[0]]
    criterion = MVMRLoss(variance_weight=2.0, representation_weights=0.5)
    representations = Representations(["pixels", "local_std"])(batch[0][0])
    terms = criterion.forward_components(z, z_augmented, representations)
    torch.testing.assert_close(logged["train_loss"], terms.total)
    torch.testing.assert_close(logged["train_dependence"], terms.terms["dependence"])
    weighted = terms.as_dict()
    torch.testing.assert_close(
        logged["train_representations/local_std"], weighted["representations/local_std"]
    )
    torch.testing.assert_close(logged["train_variance"], weighted["variance"])
    torch.testing.assert_close(total, terms.total + logged["train_online_cls_loss"])
    assert "train_online_cls_top5" in logged


def test_the_online_classifier_does_not_train_the_backbone(logged):
    model = method(loss={"invariance_weight": 0, "variance_weight": 0, "dependence_weight": 0})
    model.representations = None
    model.training_step(next(iter(loader())), 0).backward()
    assert not any(p.grad is not None and p.grad.any() for p in model.backbone.parameters())
    assert model.online_classifier.classification_head.weight.grad.any()


def test_without_representations(logged):
    model = method(representations=[])
    model.training_step(next(iter(loader())), 0)
    assert model.representations is None
    assert not any(name.startswith("train_representations") for name in logged)


@pytest.fixture
def teacher(tmp_path):
    """A teacher's configuration, and the network whose weights are in its checkpoint."""
    torch.manual_seed(3)
    network = torchvision.models.resnet18()
    torch.save({"state_dict": network.state_dict()}, tmp_path / "teacher.pt")
    network.fc = nn.Identity()
    configuration = {
        "name": "teacher",
        "source": "torchvision",
        "model": "resnet18",
        "weights": str(tmp_path / "teacher.pt"),
        # As large as the images, and of their normalisation: it sees what the student sees.
        "preprocessing": {"resize": None, "crop": None},
    }
    return configuration, network.eval()


def test_a_teacher_by_configuration(teacher, logged, tmp_path):
    configuration, network = teacher
    model = method(representations=[configuration], loss={"variance_weight": 0}).eval()
    views, *_ = batch = next(iter(loader()))
    model.training_step(batch, 0)
    z, z_augmented = [model.projection_head(model(view).flatten(1)) for view in views]
    with torch.no_grad():
        embedding = network(views[0])
    terms = MVMRLoss().forward_components(z, z_augmented, {"teacher": embedding})
    torch.testing.assert_close(
        logged["train_representations/teacher"],
        terms.terms["representations/teacher"],
        rtol=1e-3,
        atol=1e-3,
    )
    # The teacher is no part of the model: it is not saved, but built again from its configuration.
    assert not any("teacher" in name for name in model.state_dict())
    run = trainer(max_steps=1)
    run.fit(model, loader())
    run.save_checkpoint(tmp_path / "model.ckpt")
    restored = MVMR.load_from_checkpoint(tmp_path / "model.ckpt", backbone=Backbone())
    assert restored.hparams["representations"] == [configuration]
    assert list(restored.representations(views[0])) == ["teacher"]


def test_a_teacher_on_the_command_line(teacher):
    configuration, _ = teacher
    name, value = option(f"representations={json.dumps([configuration, 'hog'])}")
    small = {"backbone": "shufflenet_v2_x0_5", "hidden_dim": 8, "output_dim": 4}
    model = method_entry(False, {name: value, **small}, {})["model"](4, num_classes=5)
    assert list(model.representations(torch.rand(2, 3, 32, 32))) == ["teacher", "hog"]


DISTILLED = {"teacher_dims": {"pixels": 3 * SIZE**2}, "dependence_weight": 0.5}


def test_distillation_is_added_on_the_features(logged):
    model = method(distillation={**DISTILLED, "anchors": 4}).eval()
    assert model.distillation.gather_distributed
    batch = next(iter(loader(3)))
    total = model.training_step(batch, 0)
    features = [model(view).flatten(1) for view in batch[0]]
    represented = Representations(["pixels", "local_std"])(batch[0][0])
    teachers = {"pixels": represented.pop("pixels")}
    fresh = method(distillation={**DISTILLED, "anchors": 4}).distillation.eval()
    distilled = fresh.forward_components(features, teachers)
    z, *z_augmented = [model.projection_head(x) for x in features]
    plain = MVMRLoss()(z, z_augmented, represented)
    torch.testing.assert_close(logged["train_loss"], plain + distilled.total)
    torch.testing.assert_close(
        logged["train_dependence/pixels"], 0.5 * distilled.terms["dependence/pixels"]
    )
    torch.testing.assert_close(total, logged["train_loss"] + logged["train_online_cls_loss"])
    assert torch.equal(model.distillation.bank.samples()[0], features[0])


NO_VIEWS = {"invariance_weight": 0, "variance_weight": 0, "dependence_weight": 0}


@pytest.mark.parametrize(
    ("options", "trained"),
    [
        ({"loss": NO_VIEWS, "representations": ["pixels"], "distillation": DISTILLED}, False),
        ({"loss": NO_VIEWS, "distillation": DISTILLED}, True),  # local_std meets the embeddings
        ({"loss": {**NO_VIEWS, "representation_weights": {"pixels": 0, "local_std": 1}}}, True),
        ({"loss": {**NO_VIEWS, "identity_weight": 1}, "representations": []}, True),
    ],
)
def test_what_asks_for_a_gradient_gets_one(options, trained, logged):
    """Else DistributedDataParallel raises at the second step."""
    model = method(**options)
    model.training_step(next(iter(loader())), 0).backward()
    assert all((p.grad is not None) == p.requires_grad for p in model.parameters())
    assert all(p.requires_grad == trained for p in model.projection_head.parameters())


def test_distillation_trains_its_head_and_knows_a_full_store(tmp_path):
    dataset = LightlyDataset.from_torch_dataset(Photos())
    options = {
        "representations": ["pixels"],
        "distillation": DISTILLED,
        "cache": str(tmp_path / "store"),
        "fill_cache": True,
    }
    for fitted in (False, True):  # the first training fills the store
        model = method(**options)
        before = [p.clone() for p in model.distillation.parameters()]
        trainer(max_epochs=1).fit(model, DataLoader(dataset, 4))
        regression = model.distillation.regressions["pixels"]
        assert bool(regression.standardization.fitted) == fitted
        assert regression.standardization.count == 12
        assert not any(map(torch.equal, before, model.distillation.parameters()))
        assert not any("distillation" in name for name, _ in model.backbone.named_parameters())


IMAGE = torch.rand(3, SIZE, SIZE, generator=torch.Generator().manual_seed(0))


class Photos(torch.utils.data.Dataset):
    """Noise whose samples are given as views, the first of them always the same."""

    transform = None

    def __len__(self):
        return 12

    def __getitem__(self, index):
        plain = torch.rand(3, SIZE, SIZE, generator=torch.Generator().manual_seed(index))
        return [plain, plain + 0.1 * torch.rand_like(plain)], index % CLASSES


class SamePhotos(Photos):
    """Without noise of its own, which a resumed training would draw anew."""

    def __getitem__(self, index):
        (plain, _), target = super().__getitem__(index)
        return [plain, plain.flip(-1)], target


def test_kept_representations(teacher, tmp_path, monkeypatch):
    """A teacher's are computed once an image, also over trainings; what is random, in each step."""
    configuration, _ = teacher
    seen = []
    extract = Teacher.extract
    monkeypatch.setattr(Teacher, "extract", lambda s, x: (seen.append(len(x)), extract(s, x))[1])
    dataset = LightlyDataset.from_torch_dataset(Photos())
    names = [configuration, "augmented_pixels"]

    def losses(**options):
        model = method(representations=names, **options)
        values = []
        model.on_train_batch_end = lambda outputs, *_: values.append(outputs["loss"].item())
        torch.manual_seed(5)
        trainer(max_epochs=3).fit(model, DataLoader(dataset, 4))
        return values

    live = losses()
    assert sum(seen) == 3 * 12
    seen.clear()
    kept = losses(cache=str(tmp_path / "store"), fill_cache=True)
    # Besides, single images by which the store is laid out and checked, one a batch.
    assert 12 + 6 <= sum(seen) < 12 + 6 + 4
    seen.clear()
    assert losses(cache=tmp_path / "store") == kept
    assert 9 <= sum(seen) < 9 + 4
    # The store rounds to half precision.
    assert kept == pytest.approx(live, rel=1e-3)


CIFAR = list(CIFAR_NORMALIZE.values())


@pytest.mark.parametrize("wrap", [lambda d: d, lambda d: Subset(d, range(4))])
def test_the_normalisation_of_the_transform_and_of_the_representations(wrap, monkeypatch):
    monkeypatch.setattr(Photos, "__getitem__", lambda self, i: (self.transform(IMAGE), i % CLASSES))

    def fit(transform, **options):
        photos = Photos()
        photos.transform = transform
        model = method(**{"representations": ["augmented_pixels"], **options})
        trainer(max_epochs=1).fit(model, DataLoader(wrap(photos), 4))
        return model.representations.normalization

    fit(MVMRTransform.stl10(SIZE))
    told = fit(MVMRTransform.cifar(SIZE), normalization=CIFAR)
    assert told == Normalization.of(CIFAR)
    fit(MVMRTransform(SIZE, normalize=None), normalization="none")
    with pytest.raises(ValueError, match=r"normalization must be .*0\.491.* but is mean \(0\.485"):
        fit(MVMRTransform.cifar(SIZE))
    with pytest.raises(
        ValueError, match=r"normalization must be .*std \(1\.0.* but is mean \(0\.485"
    ):
        fit(
            MVMRTransform(SIZE, normalize=None),
            representations=Representations({"augmented_pixels": None}),
        )


def test_kept_representations_of_a_relative_folder(tmp_path, monkeypatch):
    """As the guide writes it, and read from another working directory."""
    for i in range(8):
        folder = tmp_path / "images" / str(i % 2)
        folder.mkdir(parents=True, exist_ok=True)
        torchvision.utils.save_image(torch.rand(3, SIZE, SIZE), folder / f"{i}.png")
    (tmp_path / "elsewhere").mkdir()

    def run(images, store, fill):
        dataset = LightlyDataset(images, transform=MVMRTransform.cifar(SIZE))
        model = method(representations=["hog"], normalization=CIFAR, cache=store, fill_cache=fill)
        trainer(max_epochs=2).fit(model, DataLoader(dataset, 4))
        return model.representations.cache.store.is_valid().all()

    monkeypatch.chdir(tmp_path)
    assert run("images", "store", fill=True)
    monkeypatch.chdir(tmp_path / "elsewhere")
    assert run("../images", "../store", fill=False)
    assert run(str(tmp_path / "images"), str(tmp_path / "store"), fill=False)
    (tmp_path / "images" / "0" / "0.png").rename(tmp_path / "images" / "1" / "0.png")
    with pytest.raises(ValueError, match="fingerprint is .* there but"):
        run("../images", "../store", fill=False)


def test_the_guides_store_fits_the_guides_transform(photograph_folder, tmp_path, monkeypatch):
    """Its command as it stands, but for the teacher, which would be downloaded."""
    monkeypatch.chdir(tmp_path)
    (command,) = guides.commands("lightly", "python -m mvmr_loss.cache fill")
    arguments = shlex.split(command)[3:]
    arguments[arguments.index("TRAIN")] = str(photograph_folder / "test")
    assert '"name": "teacher"' in arguments[-1]
    arguments[-1:] = ["pixels", "hog"]
    dataset = LightlyDataset(photograph_folder / "test", transform=MVMRTransform.imagenet())
    images = torch.stack([dataset[i][0][0] for i in range(4)])

    def read(store):
        cache = {"path": store, "dataset": dataset, "checks_per_epoch": len(dataset)}
        representations = Representations(["pixels", "hog"], cache=cache)
        for i, image in enumerate(images):  # compared with a live one in each call
            representations(image, [i])
        return representations(images, range(4))["pixels"]

    main(arguments)
    torch.testing.assert_close(read("runs/teacher"), images.flatten(1), rtol=2e-3, atol=2e-3)
    i = arguments.index("--resize-size")
    arguments[i : i + 2] = []
    main([arguments[0], "resized", *arguments[2:]])
    with pytest.raises(ValueError, match="resized, normalised and rounded alike"):
        read("resized")


def test_exception_kept_representations(tmp_path):
    for representations, words in (
        ([], "None without representations"),
        (Representations(["hog"]), "left out where representations are a module"),
    ):
        with pytest.raises(ValueError, match=f"cache must be {words}"):
            method(representations=representations, cache=str(tmp_path))
    with pytest.raises(TypeError, match="needs a LightlyDataset.*but the data set is a list"):
        trainer().fit(method(cache=str(tmp_path)), loader())
    dataset = DataLoader(LightlyDataset.from_torch_dataset(Photos()), 4)
    with pytest.raises(ValueError, match="there is none at 'nowhere'; set fill_cache to True"):
        trainer().fit(method(cache="nowhere"), dataset)


class OwnFeatures(nn.Module):
    """A module of one's own in the place of representations, which training would change."""

    def __init__(self):
        super().__init__()
        self.net = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Dropout(0.5))

    def forward(self, images):
        return {"own": self.net(images).flatten(1)}


def test_a_module_of_ones_own_stays_fixed():
    own = OwnFeatures()
    before = copy.deepcopy(own.state_dict())
    model = method(representations=own)
    trainer(max_epochs=1).fit(model, loader())
    assert model.representations is own
    for name, value in own.state_dict().items():
        assert torch.equal(value, before[name]), name
    for parameter in own.parameters():
        assert not parameter.requires_grad
        assert parameter.grad is None
    image = torch.rand(2, 3, SIZE, SIZE)
    model.train()
    first, second = (model._represent([[image]])["own"] for _ in range(2))
    assert torch.equal(first, second)
    assert not any(module.training for module in own.modules())


def test_a_preset_of_the_loss():
    criterion = method(preset="identity", loss={"representation_weights": 0.1}).criterion
    assert (criterion.identity_weight, criterion.invariance_weight) == (1.0, 0.0)
    assert criterion.representation_weights == 0.1
    assert criterion.gather_distributed
    with pytest.raises(ValueError, match="preset must be one of paper"):
        method(preset="best")


def test_the_preset_with_terms_on_the_features():
    model = method(preset="features", representations=None)
    names = ["scattering", "hog", "local_binary_patterns"]
    assert list(model.representations.by_name) == names
    assert model.distillation.teacher_dims == dict.fromkeys(names, 1024)
    assert model.distillation.dependence_weight == dict.fromkeys(names, 0.3)
    assert (model.distillation.scale, model.criterion.representation_weights) == ("coordinate", 0)
    own = {"edges": {"name": "hog", "pixels_per_cell": 4}}
    model = method(preset="features", representations=own, sketch_dim=16, lr=1e-2)
    assert model.distillation.teacher_dims == {"edges": 16}
    head = model.distillation.regressions["edges"]
    before = {k: v.clone() for k, v in head.state_dict().items()}
    trainer(max_epochs=2).fit(model, loader())
    assert any(not torch.equal(before[k], v) for k, v in head.state_dict().items())
    assert {"train_regression/edges", "train_dependence/edges"} <= set(model.trainer.logged_metrics)
    model = method(preset="features", representations=[])
    assert (model.representations, model.distillation) == (None, None)
    with pytest.raises(ValueError, match="distillation must be left out without representations"):
        method(preset="features", representations=[], distillation={"dependence_weight": 0.1})
    with pytest.raises(ValueError, match="sketch_dim must be left out where representations are"):
        method(preset="features", representations=torch.nn.Identity(), sketch_dim=16)
    own = Representations(["hog"])
    with pytest.raises(ValueError, match="distillation must say its teacher_dims where"):
        method(preset="features", representations=own)
    model = method(
        preset="features", representations=own, distillation={"teacher_dims": {"hog": 9}}
    )
    assert (model.distillation.teacher_dims, model.distillation.scale) == ({"hog": 9}, "coordinate")


def test_the_presets_of_distillation():
    hog = {"representations": {"edges": {"name": "hog", "pixels_per_cell": 4}}, "sketch_dim": 16}
    model = method(preset="distillation", **hog)
    best = DistillationLoss(
        model.online_classifier.feature_dim, {"edges": 16}, gather_distributed=True
    )
    assert repr(model.distillation.regressions) == repr(best.regressions)
    assert model.distillation.dependence_weight == best.dependence_weight
    assert not any(p.requires_grad for p in model.projection_head.parameters())
    metrics = trainer(max_epochs=1)
    metrics.fit(model, loader())
    found = {name for name in metrics.logged_metrics if "/" in name}
    assert found == {"train_regression/edges", "train_dependence/edges"}
    paper = method(preset="distillation_paper", **hog)
    assert (paper.distillation, paper.criterion.representation_weights) == (None, 1.0)
    for preset in ("distillation", "distillation_paper"):
        for empty in (None, [], {}):
            with pytest.raises(ValueError, match="representations must name a teacher"):
                method(preset=preset, representations=empty)


def test_distillation_knows_the_widths_and_names_of_representations():
    model = method(distillation={"hidden_dim": 16}, representations=["hog"])
    assert model.distillation.teacher_dims == {
        "hog": Representations(["hog"]).sizes(3, 224, 224)["hog"]
    }
    assert model.criterion.invariance_weight == 1
    told = "teacher_dims of the distillation must name representations, .* but names 'pixel'"
    with pytest.raises(ValueError, match=told):
        method(distillation={"teacher_dims": {"pixel": 192}})
    with pytest.raises(TypeError, match="distillation has no option 'hiden_dim'; its options are"):
        method(distillation={**DISTILLED, "hiden_dim": 16})


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("representation_weights", {"hogg": 50.0}),
        ("representation_views", "both"),
        ("dependence_measure", "debiased_cka"),
    ],
)
def test_exception_options_of_terms_that_are_not_there(name, value):
    told = f"{name} must be left out with preset 'features'.*; in distillation it is"
    with pytest.raises(ValueError, match=told):
        method(preset="features", representations=None, loss={name: value})
    all_distilled = {"representations": ["pixels"], "distillation": DISTILLED}
    with pytest.raises(ValueError, match=f"{name} must be left out with this distillation"):
        method(loss={name: value, "dependence_weight": 0}, **all_distilled)
    # Others of the representations meet the embeddings, and the measure compares the views, too.
    method(loss={name: value}, distillation=DISTILLED)
    method(loss={"dependence_measure": "debiased_cka"}, **all_distilled)


def test_the_widths_of_the_presets_teachers(logged):
    """A sketch leaves as it is what is narrower."""
    names = ["scattering", "hog", "local_binary_patterns"]
    model = method(preset="features", representations=None, sketch_dim=2048)
    dims = dict(zip(names, (2048, 2048, 1024), strict=True))
    assert model.distillation.teacher_dims == dims
    batch = next(iter(DataLoader(images(4, size=28), 4)))
    model = method(preset="features", representations=None)
    found = dict(zip(names, (1024, 648, 1024), strict=True))
    told = f"teacher_dims of the distillation must be {found} for these images but are {{'scat"
    with pytest.raises(ValueError, match=re.escape(told)) as error:
        model.training_step(batch, 0)
    given = {"teacher_dims": found}
    assert str(error.value).endswith(f"give distillation={given}.")
    method(preset="features", representations=None, distillation=given).training_step(batch, 0)
    assert with_preset("features", ["hog"], None, {"teacher_dims": {"hog": 1152}})[1] is None


def test_gathers_unless_told_otherwise():
    assert method().criterion.gather_distributed
    assert not method(loss={"gather_distributed": False}).criterion.gather_distributed


def test_fit_lowers_the_loss_and_evaluates_online():
    model = method(knn_k=3, knn_t=0.1, lr=1e-2, warmup_epochs=1)
    run = trainer(max_epochs=15, check_val_every_n_epoch=15)
    validation = [loader(views=1), loader(views=1)]
    before = []
    model.on_train_batch_end = lambda outputs, batch, i: before.append(outputs["loss"].item())
    run.fit(model, loader(), validation)
    assert sum(before[-5:]) < 0.9 * sum(before[:5])
    # The training images are their own nearest neighbours, and there is no more of the bank left.
    metrics = run.callback_metrics
    assert metrics["val_knn_top5"] == 1
    assert 0 <= metrics["val_online_cls_top1"] <= 1
    assert model.knn_classifier._train_features_tensor is None


def test_fit_with_one_validation_loader_and_few_classes():
    few = [(image, target % 3, name) for image, target, name in images()]
    validation = [(image[0], target, name) for image, target, name in few]
    run = trainer(max_epochs=1)
    run.fit(method(num_classes=3), DataLoader(few, 4), DataLoader(validation, 4))
    assert "val_online_cls_top1" in run.callback_metrics
    assert "val_online_cls_top5" not in run.callback_metrics


def test_parameter_groups():
    model = method(weight_decay=0.3, lr=0.2, classifier_lr=0.4, warmup_epochs=0)
    run = trainer()
    run.fit(model, loader())
    groups = {group["name"]: group for group in run.optimizers[0].param_groups}
    decayed = {id(p) for p in groups["mvmr"]["params"]}
    assert decayed == {
        id(p)
        for name, p in model.named_parameters()
        if p.ndim > 1 and not name.startswith("online_classifier")
    }
    assert groups["mvmr"]["weight_decay"] == 0.3
    assert groups["mvmr_no_weight_decay"]["weight_decay"] == 0
    assert groups["online_classifier"]["weight_decay"] == 0
    assert sum(len(g["params"]) for g in groups.values()) == len(list(model.parameters()))
    assert (groups["mvmr"]["initial_lr"], groups["online_classifier"]["initial_lr"]) == (0.2, 0.4)


@pytest.mark.parametrize(
    ("length", "accumulate", "warmup"),
    [
        ({"max_epochs": 4}, 1, 5),
        ({"max_epochs": 8}, 5, 1),  # five batches an epoch are one step
        ({"max_epochs": 1}, 1, 2),  # at most half
        ({"max_epochs": -1, "max_steps": 20}, 1, 5),
    ],
)
def test_schedule(length, accumulate, warmup):
    model = method(lr=1.0, warmup_epochs=1)
    rates = []
    model.on_train_batch_start = lambda batch, i: rates.append(
        model.trainer.optimizers[0].param_groups[0]["lr"]
    )
    trainer(accumulate_grad_batches=accumulate, **length).fit(model, loader())
    rates = rates[::accumulate]
    assert rates[: warmup + 1] == pytest.approx([*[(i + 1) / warmup for i in range(warmup)], 1.0])
    assert rates[warmup:] == sorted(rates[warmup:], reverse=True)
    assert 0.01 <= rates[-1] <= 0.2


def test_mixed_precision():
    run = trainer(precision="bf16-mixed", max_epochs=1)
    run.fit(method(knn_k=3), loader(), [loader(views=1), loader(views=1)])
    assert run.callback_metrics["train_loss"].dtype == torch.float32
    assert torch.isfinite(run.callback_metrics["train_loss"])


@pytest.mark.parametrize("by_name", [True, False])
def test_checkpoint(tmp_path, by_name):
    backbone = {"backbone": "shufflenet_v2_x0_5"} if by_name else {}
    model, run = method(**backbone), trainer(max_steps=1)
    run.fit(model, loader())
    run.save_checkpoint(tmp_path / "model.ckpt")
    given = {} if by_name else {"backbone": Backbone()}
    restored = MVMR.load_from_checkpoint(tmp_path / "model.ckpt", **given)
    assert restored.hparams["output_dim"] == 12
    for name, value in model.state_dict().items():
        torch.testing.assert_close(restored.state_dict()[name], value)
    assert not any(name.startswith("representations") for name in model.state_dict())


def embedding():
    """A teacher that is an object, as large as the images."""
    torch.manual_seed(7)
    network = nn.Sequential(nn.Flatten(), nn.Linear(3 * SIZE**2, 6))
    return Teacher(network, preprocessing={"resize": None, "crop": None})


class Wrapped(MVMR):
    """A class of the user's: it takes an object of its own, and saves its arguments once more."""

    def __init__(self, *arguments, net=None, **options):
        super().__init__(*arguments, **options)
        self.save_hyperparameters()


# Argument -> a function that makes an object in it: at its top, in a mapping, in an option.
OBJECTS = {
    "backbone": lambda: Backbone(),
    "representations": lambda: {"teacher": embedding(), "pixels": {}},
    "representations (without state)": lambda: {"mine": Pixels()},
    "representations (a module)": lambda: Representations(["pixels"]),
    "representations (one's options)": lambda: [
        {"name": "teacher", "module": nn.Flatten(), "preprocessing": {"resize": None, "crop": None}}
    ],
    "loss": lambda: {"dependence_measure": dependence_measure("hsic"), "variance_weight": 2.0},
}


@pytest.mark.parametrize("cls", [MVMR, Wrapped])
@pytest.mark.parametrize("argument", OBJECTS)
def test_checkpoints_hold_no_objects(argument, cls, tmp_path):
    """They are read with weights_only, resumed and, with the object given again, loaded."""
    make, name = OBJECTS[argument], argument.split()[0]

    def made():
        plain = {"hidden_dim": 16, "output_dim": 12, "representations": ["pixels"]}
        plain["backbone"] = "shufflenet_v2_x0_5"
        return cls(4, CLASSES, **{**plain, name: make()})

    path, run = tmp_path / "model.ckpt", trainer(max_steps=1)
    run.fit(made(), loader())
    run.save_checkpoint(path)

    held = torch.load(path, weights_only=True)["hyper_parameters"]
    assert held[name] == NOT_SAVED
    assert held["hidden_dim"] == 16
    json.dumps(held)  # of plain values throughout

    again = trainer(max_steps=2)
    again.fit(made(), loader(), ckpt_path=path, weights_only=True)
    assert again.global_step == 2

    with pytest.raises(ValueError, match=rf"give it again: load_from_checkpoint\(path, {name}="):
        cls.load_from_checkpoint(path)
    restored = cls.load_from_checkpoint(path, weights_only=True, **{name: make()})
    for key, value in run.model.state_dict().items():
        torch.testing.assert_close(restored.state_dict()[key], value)


def test_checkpoints_of_a_class_with_an_object_of_its_own(tmp_path):
    path, run = tmp_path / "model.ckpt", trainer(max_steps=1)
    options = {"backbone": "shufflenet_v2_x0_5", "hidden_dim": 16, "output_dim": 12}
    run.fit(Wrapped(4, CLASSES, net=Backbone(), representations=["pixels"], **options), loader())
    run.save_checkpoint(path)
    assert torch.load(path, weights_only=True)["hyper_parameters"]["net"] == NOT_SAVED


def test_numbers_of_numpy_and_paths_are_saved_as_plain_ones(tmp_path):
    given = {
        "lr": np.float32(0.5),
        "knn_k": np.int64(3),
        "representations": ({"name": "hog", "orientations": 4},),
        "loss": OmegaConf.create({"variance_weight": 2.0}),
        "weight_decay": np.float64(0.25),
        "cache": tmp_path / "store",
    }
    model = MVMR(np.int64(4), CLASSES, backbone="shufflenet_v2_x0_5", hidden_dim=8, **given)
    run = trainer(max_steps=1)
    model.representations.cache = None  # the images have no file names
    run.fit(model, loader(), [loader(views=1), loader(views=1)])
    run.save_checkpoint(tmp_path / "model.ckpt")
    held = torch.load(tmp_path / "model.ckpt", weights_only=True)["hyper_parameters"]
    numbers = ("batch_size_per_device", "lr", "knn_k", "weight_decay")
    assert [held[name] for name in numbers] == [4, 0.5, 3, 0.25]
    assert held["representations"] == ({"name": "hog", "orientations": 4},)
    assert held["loss"] == {"variance_weight": 2.0}
    assert held["cache"] == str(tmp_path / "store")
    MVMR.load_from_checkpoint(tmp_path / "model.ckpt", weights_only=True)


@pytest.mark.parametrize("distils", [False, True])
def test_resume_continues_exactly(tmp_path, distils):
    """Also where the store, empty at the start, is full by then."""
    options, batches = {}, loader()
    if distils:
        store = {"cache": str(tmp_path / "store"), "fill_cache": True}
        options = {**store, "representations": ["pixels"], "distillation": DISTILLED}
        batches = DataLoader(LightlyDataset.from_torch_dataset(SamePhotos()), 4)

    def fit(**resumed):
        model = method(**options)
        losses = []
        model.on_train_batch_end = lambda outputs, *_: losses.append(outputs["loss"].item())
        run = trainer(max_epochs=4)
        model.on_train_epoch_end = lambda: run.save_checkpoint(
            tmp_path / f"{run.current_epoch}.ckpt"
        )
        run.fit(model, batches, **resumed)
        return losses

    whole = fit()
    assert fit(ckpt_path=tmp_path / "1.ckpt") == whole[len(whole) // 2 :]


@pytest.mark.parametrize(
    ("name", "width"),
    [
        ("resnet18", 512),
        ("mobilenet_v3_small", 1024),
        ("vit_b_16", 768),
        ("convnext_tiny", 768),
        ("resnet10t", 512),
    ],
)
def test_backbones_by_name(name, width):
    with torch.device("meta"):
        model = method(backbone=name)
        size = 224 if name.startswith("vit") else 64
        assert model(torch.zeros(2, 3, size, size)).flatten(1).shape == (2, width)
    assert model.online_classifier.feature_dim == width


def test_residual_branches_start_at_zero():
    assert not method(backbone="resnet18").backbone.layer1[0].bn2.weight.any()


def test_vit():
    model = MVMRViT(4, CLASSES, hidden_dim=16, output_dim=12)
    assert model(torch.zeros(2, 3, 32, 32)).shape == (2, 384)
    run = trainer(max_steps=1)
    run.fit(model, DataLoader(images(4, size=32), 4))
    assert isinstance(run.optimizers[0], torch.optim.AdamW)
    assert run.optimizers[0].param_groups[0]["weight_decay"] == 5e-2


def test_lightly_evaluates_it():
    model = method()
    classifier = LinearClassifier(
        model, 4, feature_dim=model.online_classifier.feature_dim, num_classes=CLASSES
    )
    before = model.backbone.conv.weight.clone()
    run = trainer(max_epochs=1)
    run.fit(classifier, loader(views=1), loader(views=1))
    assert "val_top5" in run.callback_metrics
    assert torch.equal(model.backbone.conv.weight, before)


@pytest.mark.parametrize(
    ("views", "error", "match"),
    [
        (torch.zeros(4, 3, 8, 8), TypeError, "views must be a list of tensors but are a Tensor"),
        ([torch.zeros(4, 3, 8, 8)], ValueError, "at least two views.*but has 1; use MVMRTransform"),
        (
            [torch.zeros(4, 3, 8, 8), torch.zeros(4, 3, 6, 6)],
            ValueError,
            r"same shape \(N, C, H, W\) but have shapes \[\(4, 3, 8, 8\), \(4, 3, 6, 6\)\]",
        ),
        ([torch.zeros(4, 8)] * 2, ValueError, "must all have the same shape"),
    ],
)
def test_exception_views(views, error, match):
    with pytest.raises(error, match=match):
        method().training_step((views, torch.zeros(4).long()), 0)


@pytest.mark.parametrize(
    ("options", "error", "match"),
    [
        ({"num_classes": 1}, ValueError, "num_classes must be at least 2 but is 1"),
        ({"knn_k": 0}, ValueError, "knn_k must be at least 1 but is 0"),
        ({"lr": -1.0}, ValueError, "lr must be finite and at least 0 but is -1.0"),
        (
            {"warmup_epochs": float("nan")},
            ValueError,
            "warmup_epochs must be finite and at least 0",
        ),
        ({"backbone": "resnet19"}, ValueError, "torchvision or timm model.*but is 'resnet19'"),
        ({"backbone": 3}, TypeError, "backbone must be a name or a torch.nn.Module but is a int"),
        ({"backbone": nn.Flatten()}, ValueError, "feature_dim must be given for a backbone"),
        ({"backbone": "squeezenet1_1"}, ValueError, "feature_dim must be given for a backbone"),
        ({"representations": ["sift"]}, ValueError, "'sift'"),
        ({"loss": {"covariance": 1.0}}, TypeError, "covariance"),
        ({"loss": [1.0]}, TypeError, "loss must be a mapping of options.*but is a list"),
        ({"distillation": [1]}, TypeError, "distillation must be a mapping of options"),
        ({"distillation": {"teacher_dims": {}}}, ValueError, "at least one teacher"),
        ({"fill_cache": "no"}, TypeError, "fill_cache must be True or False but is 'no'"),
    ],
)
def test_exception(options, error, match):
    with pytest.raises(error, match=match):
        method(**options)


def test_exception_loaders():
    with pytest.raises(ValueError, match=r"two validation dataloaders, \[train, val\].*are 1"):
        trainer(max_epochs=1).fit(method(knn_k=3), loader(), loader(views=1))


def test_exception_endless_training():
    with pytest.raises(ValueError, match="give it max_epochs or max_steps"):
        trainer(max_epochs=-1).fit(method(), loader())


@pytest.mark.parametrize("version", ["1.5.24", "1.4.26", "0.9"])
def test_an_old_lightly_is_refused(monkeypatch, version):
    monkeypatch.setattr(importlib.metadata, "version", lambda name: version)
    with pytest.raises(ImportError, match=rf"but {version} is installed.*pip install 'lightly>="):
        adapter._check_lightly()


def test_no_lightly(monkeypatch):
    def version(name):
        raise importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(importlib.metadata, "version", version)
    with pytest.raises(ImportError, match=r"which is not installed.*pip install 'lightly>="):
        adapter._check_lightly()


@pytest.mark.parametrize("version", [adapter.MINIMUM_LIGHTLY, "1.10.0", "2.0"])
def test_new_enough(monkeypatch, version):
    monkeypatch.setattr(importlib.metadata, "version", lambda name: version)
    adapter._check_lightly()


def test_the_guides_program_trains(tmp_path, monkeypatch):
    """As it stands, but for a Trainer of one batch, a small batch and a small head."""
    for i in range(4):
        (tmp_path / "path/to/images" / str(i % 2)).mkdir(parents=True, exist_ok=True)
        image = torchvision.transforms.functional.to_pil_image(torch.rand(3, 40, 48))
        image.save(tmp_path / "path/to/images" / str(i % 2) / f"{i}.png")
    (program,) = guides.blocks("lightly", "python")
    given = {}

    def one_batch(**options):
        given.update(options)
        return trainer(**{**options, "max_epochs": 1, "limit_train_batches": 1, "precision": 32})

    small = functools.partial(MVMR, hidden_dim=16, output_dim=12)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("pytorch_lightning.Trainer", one_batch)
    monkeypatch.setattr(adapter, "MVMR", small)
    for large, less in (
        ("=256", "=4"),
        ("num_workers=8", "num_workers=0"),
        ("resnet50", "resnet18"),
    ):
        assert large in program
        program = program.replace(large, less)
    namespace = {}
    exec(program, namespace)
    assert given == {"max_epochs": 100, "precision": "16-mixed"}
    logged = namespace["model"].trainer.callback_metrics
    assert torch.isfinite(logged["train_loss"])
    assert "train_regression/scattering" in logged


def test_the_width_is_that_of_the_features():
    model = method(feature_dim=7)
    with pytest.raises(ValueError, match="feature_dim must be 8, .* but is 7"):
        model.training_step(next(iter(loader())), 0)


@pytest.mark.parametrize("name", ["mobilenetv3_small_050", "resnet10t"])
def test_the_width_of_timms_networks_is_what_they_put_out(name):
    backbone, width = build_backbone(name, None)
    assert backbone.eval()(torch.zeros(1, 3, 64, 64)).shape == (1, width)
    assert build_backbone(backbone, None)[1] == width


def test_exception_a_store_to_fill_and_none_is_named():
    with pytest.raises(
        ValueError, match="cache must be a folder where fill_cache is True but is None"
    ):
        method(fill_cache=True)


def test_exception_a_representation_without_a_weight():
    options = {"preset": "features", "representations": ["hog", "pixels"]}
    dims = {"teacher_dims": {"hog": 1944}}
    with pytest.raises(ValueError, match="representation_weights must be given .* for pixels"):
        method(**options, distillation=dims)
    method(**options, distillation=dims, loss={"representation_weights": 0.1})


@pytest.mark.parametrize("option", [{"normalization": "none"}, {"fill_cache": True}])
def test_exception_what_a_module_of_ones_own_says_itself(option):
    with pytest.raises(ValueError, match=f"{next(iter(option))} must be left out where"):
        method(representations=Representations(["pixels"]), **option)
