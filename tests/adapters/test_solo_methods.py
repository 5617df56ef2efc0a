"""The classes of the solo-learn adapter in this process: the method, and the regulariser on others."""

from __future__ import annotations

import pickle
import shlex
from collections.abc import Iterator
from importlib import resources
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from omegaconf import DictConfig, OmegaConf
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset
from torchvision.datasets import ImageFolder

from benchmarks.common.photographs import Photographs
from mvmr_loss import MultiRepresentationRegularizer, MVMRLoss, Representations
from mvmr_loss.adapters.solo import SoloConfigError
from mvmr_loss.adapters.solo.building import build_representations, with_host_normalization
from mvmr_loss.adapters.solo.checks import check_pretraining
from mvmr_loss.adapters.solo.options import (
    METHOD_DEFAULTS,
    REGULARIZER_DEFAULTS,
    check_method_options,
)
from mvmr_loss.cache.__main__ import main
from mvmr_loss.normalization import Normalization
from tests.adapters import guides

pytestmark = pytest.mark.usefixtures("solo")

CONFIGS = sorted(
    p.name.removesuffix(".yaml")
    for p in resources.files("mvmr_loss.adapters.solo.configs").iterdir()
    if p.name.endswith(".yaml")
)
AUGMENTATION_FILES = resources.files("mvmr_loss.adapters.solo.configs") / "augmentations"
AUGMENTATIONS = sorted(p.name.removesuffix(".yaml") for p in AUGMENTATION_FILES.iterdir())

# What all of solo-learn's methods together ask for, in small.
METHOD_KWARGS = {
    "proj_hidden_dim": 32,
    "proj_output_dim": 16,
    "pred_hidden_dim": 32,
    "queue_size": 32,
    "temperature": 0.2,
    "temperature_q": 0.1,
    "temperature_k": 0.04,
    "lamb": 5e-3,
    "scale_loss": 0.025,
    "num_prototypes": 32,
    "kmeans_iters": 1,
    "sk_iters": 3,
    "sk_epsilon": 0.05,
    "epoch_queue_starts": 0,
    "freeze_prototypes_epochs": 1,
    "norm_last_layer": True,
    "clip_grad": 0,
    "freeze_last_layer": 1,
    "use_bn_in_head": False,
    "student_temperature": 0.1,
    "teacher_temperature": 0.07,
    "warmup_teacher_temperature": 0.04,
    "warmup_teacher_temperature_epochs": 1,
    "iternorm": False,
    "whitening_iters": 1,
    "whitening_eps": 1e-2,
    "whitening_size": 8,
    "mask_ratio": 0.75,
    "decoder_embed_dim": 32,
    "decoder_depth": 1,
    "decoder_num_heads": 2,
    "norm_pix_loss": True,
}
FOR_METHOD: dict[str, dict[str, Any]] = {
    "deepclusterv2": {"num_prototypes": [4, 4]},
    "wmse": {"proj_output_dim": 4},
}


def pipeline(crop_size: int, num_crops: int, augmented: bool) -> dict[str, Any]:
    none = ("color_jitter", "grayscale", "gaussian_blur", "solarization", "equalization")
    return {
        "rrc": {"enabled": augmented, "crop_min_scale": 0.2, "crop_max_scale": 1.0},
        **{name: {"prob": 0.0} for name in (*none, "horizontal_flip")},
        "crop_size": crop_size,
        "num_crops": num_crops,
    }


def make_cfg(method: str, small_crops: int = 0, **more: Any) -> DictConfig:
    """A configuration as solo-learn's parse_cfg leaves it."""
    cfg: dict[str, Any] = {
        "name": "test",
        "method": method,
        "backbone": {"name": "tiny"},
        "method_kwargs": {**METHOD_KWARGS, **FOR_METHOD.get(method, {})},
        "momentum": {"base_tau": 0.99, "final_tau": 1.0},
        "data": {
            "dataset": "custom",
            "num_classes": 11,
            "num_large_crops": 2,
            "num_small_crops": small_crops,
        },
        "augmentations": [pipeline(32, 2, True)],
        "optimizer": {
            "name": "sgd",
            "batch_size": 16,
            "lr": 0.01,
            "classifier_lr": 0.01,
            "weight_decay": 1e-5,
            "kwargs": {},
        },
        "scheduler": {"name": "none"},
        "max_epochs": 1,
    }
    if method == "mvmr":
        cfg["method_kwargs"] = {
            "proj_hidden_dim": 32,
            "proj_output_dim": 16,
            "representations": ["pixels", "local_std"],
        }
        cfg["augmentations"] = [pipeline(32, 1, False), pipeline(32, 1, True)]
    if method == "mae":
        cfg["backbone"] = {"name": "vit_tiny", "kwargs": {"img_size": 32, "patch_size": 8}}

    made = OmegaConf.create({**cfg, **more})
    OmegaConf.set_struct(made, False)
    return made


def regularized_cfg(method: str, **node: Any) -> DictConfig:
    """The method with the regulariser, whose view is a third crop of 40 pixels."""
    with_view = [pipeline(32, 2, True), pipeline(40, 1, False)]
    return make_cfg(method, small_crops=1, augmentations=with_view, mvmr_regularizer=node)


@pytest.fixture(scope="module")
def images() -> Tensor:
    """Sixteen photographs of 44 x 44 pixels, about as bright as normalised ones."""
    from torchvision.transforms import functional

    dataset = Photographs("train", crops_per_class=2, crop_size=44)
    return torch.stack([functional.to_tensor(dataset[i][0]) * 4 - 2 for i in range(16)])


def tiny_backbone(method: str) -> nn.Module:
    network = nn.Sequential(
        nn.Conv2d(3, 16, 5, stride=4),
        nn.BatchNorm2d(16),
        nn.ReLU(),
        nn.AdaptiveAvgPool2d(2),
        nn.Flatten(),
    )
    network.num_features = 64  # type: ignore[assignment]
    return network


@pytest.fixture(scope="module", autouse=True)
def tiny(solo: None) -> Iterator[None]:
    """Lets the tests use a backbone that takes no time."""
    from solo.methods import BaseMethod

    BaseMethod._BACKBONES["tiny"] = tiny_backbone
    yield
    del BaseMethod._BACKBONES["tiny"]


class Samples(Dataset[tuple[int, list[Tensor], int]]):
    """Samples as of solo-learn's data sets: index, views, target."""

    def __init__(self, images: Tensor, sizes: list[int]) -> None:
        self.views = [images[..., :size, :size] + 0.1 * i for i, size in enumerate(sizes)]

    def __len__(self) -> int:
        return len(self.views[0])

    def __getitem__(self, index: int) -> tuple[int, list[Tensor], int]:
        return index, [view[index] for view in self.views], index % 11


def build(cfg: DictConfig, seed: int = 0) -> Any:
    from solo.methods import METHODS

    torch.manual_seed(seed)
    return METHODS[cfg.method](cfg)


def fit(
    model: Any, data: Dataset[Any], batch_size: int = 16, ckpt_path: Any = None, **trainer: Any
) -> dict[str, Any]:
    """Trains for one batch in Lightning; returns the step's loss and what was logged."""
    from lightning.pytorch import Callback, Trainer, seed_everything

    losses: list[Tensor] = []

    class KeepLoss(Callback):  # type: ignore[misc]
        def on_train_batch_end(self, trainer: Any, module: Any, outputs: Any, *_: Any) -> None:
            losses.append(outputs["loss"].detach())

    seed_everything(0, verbose=False)
    options = {
        "accelerator": "cpu",
        "logger": False,
        "enable_checkpointing": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "max_epochs": 1,
        "limit_train_batches": 1,
        "callbacks": [KeepLoss()],
    }
    runner = Trainer(**{**options, **trainer})
    runner.fit(model, DataLoader(data, batch_size, drop_last=True), ckpt_path=ckpt_path)
    return {"loss": losses[0], **{k: v.item() for k, v in runner.callback_metrics.items()}}


# ------------------------------------------------------------------------------- configurations


@pytest.mark.parametrize("name", CONFIGS)
def test_shipped_configurations_compose(name: str, tmp_path: Path) -> None:
    from hydra import compose, initialize_config_module
    from solo.args import linear, pretrain
    from solo.methods import METHODS, BaseMethod

    paths = [f"data.train_path={tmp_path}", f"data.val_path={tmp_path}"]
    if name.endswith("_linear"):
        paths.append("pretrained_feature_extractor=x.ckpt")
    with initialize_config_module("mvmr_loss.adapters.solo.configs", version_base="1.2"):
        cfg = compose(name, overrides=paths)
    OmegaConf.set_struct(cfg, False)
    if name.endswith("_linear"):
        parsed = linear.parse_cfg(cfg)
        assert parsed.pretrain_method == "mvmr"
        assert parsed.optimizer.lr == pytest.approx(1e-3)
        return
    if name.startswith("mvmr_distillation"):
        cfg.method_kwargs.representations = {"teacher": {"name": "pixels"}}
    parsed = pretrain.parse_cfg(cfg)
    assert (parsed.data.num_large_crops, parsed.data.num_small_crops) == (2, 0)
    parsed = METHODS["mvmr"].add_and_assert_specific_cfg(parsed)
    assert set(parsed.method_kwargs) == set(METHOD_DEFAULTS)
    assert parsed.backbone.name in BaseMethod._BACKBONES
    # The learning rate at which solo-learn then trains is the authors'.
    lr = parsed.optimizer.lr * parsed.accumulate_grad_batches
    assert lr == pytest.approx(2e-4 if "cifar" in name else 1e-4)
    assert parsed.scheduler.min_lr * parsed.accumulate_grad_batches == pytest.approx(1e-6)


def test_shipped_options_are_the_defaults() -> None:
    from hydra import compose, initialize_config_module

    with initialize_config_module("mvmr_loss.adapters.solo.configs", version_base="1.2"):
        cfg = compose("mvmr_custom")
    assert OmegaConf.to_container(cfg.method_kwargs) == METHOD_DEFAULTS


def test_the_configuration_of_the_guide_composes(tmp_path: Path) -> None:
    from hydra import compose, initialize_config_dir

    guide = (Path(__file__).parents[2] / "adapters" / "solo" / "README.md").read_text()
    example = guide.split("```yaml\n# mine.yaml", 1)[1].split("```", 1)[0]
    (tmp_path / "mine.yaml").write_text(f"# {example}")
    path = "hydra.searchpath=[pkg://mvmr_loss.adapters.solo.configs]"
    with initialize_config_dir(str(tmp_path), version_base="1.2"):
        cfg = compose("mine", overrides=[path])
    assert (cfg.method, cfg.name, cfg.augmentations[0].crop_size) == ("mvmr", "mine", 96)


@pytest.mark.parametrize("name", ["mvmr_distillation", "mvmr_distillation_paper"])
def test_distillation_configuration_names_the_teacher(name: str) -> None:
    from hydra import compose, initialize_config_module

    with initialize_config_module("mvmr_loss.adapters.solo.configs", version_base="1.2"):
        cfg = compose(name)
    (teacher,) = cfg.method_kwargs.representations
    assert (teacher.name, teacher.source, teacher.model) == ("teacher", "open_clip", "ViT-B-16")
    assert (cfg.max_epochs, cfg.optimizer.batch_size) == (200, 256)
    options = check_method_options(cfg.method_kwargs)
    views = [options[f"{term}_weight"] for term in ("invariance", "variance", "dependence")]
    if name.endswith("paper"):
        assert options["distillation"] is None
        assert views == [1.0, 1.0, 1.0]
    else:
        assert options["distillation"]["teacher_dims"] == {"teacher": 512}
        assert views == [0.0, 0.0, 0.0]


def test_distillation_is_added_on_the_features(images: Tensor) -> None:
    cfg = make_cfg("mvmr")
    cfg.method_kwargs.distillation = {
        **{"teacher_dims": {"pixels": 3072}, "dependence_weight": 0.5},
        "anchors": 8,
    }
    model = build(cfg)
    found = fit(model, Samples(images, [32, 32]))
    assert "distillation" in {group["name"] for group in model.learnable_params}
    again = build(cfg)
    views = Samples(images, [32, 32]).views
    # In training, so that the statistics are the batch's, as they were.
    distilled = again.distillation.forward_components(
        [again.backbone(view) for view in views], {"pixels": views[0].flatten(1)}
    )
    for name, term in distilled.as_dict().items():
        if name != "loss":
            assert found[f"train_{name}_loss"] == pytest.approx(term.item(), rel=1e-3)
    kept, _ = model.distillation.bank.samples()
    assert kept.shape == (8, 64)


def test_without_terms_on_embeddings_the_projector_asks_for_no_gradient(images: Tensor) -> None:
    """As of mvmr_distillation, whose own strategy, DDP, else raises at the second step."""
    cfg = make_cfg("mvmr")
    for term in ("invariance", "variance", "dependence"):
        cfg.method_kwargs[f"{term}_weight"] = 0.0
    cfg.method_kwargs.representations = ["pixels"]
    cfg.method_kwargs.distillation = {"teacher_dims": {"pixels": 3072}}
    model = build(cfg)
    fit(model, Samples(images, [32, 32]))
    assert all((p.grad is not None) == p.requires_grad for p in model.parameters())
    assert not any(p.requires_grad for p in model.projector.parameters())


@pytest.mark.filterwarnings("ignore:.*random weights")
def test_the_widths_of_the_presets_teachers(images: Tensor) -> None:
    cfg = make_cfg("mvmr")
    cfg.augmentations = [pipeline(28, 1, False), pipeline(28, 1, True)]
    cfg.method_kwargs = {
        **{"preset": "features", "proj_hidden_dim": 32, "proj_output_dim": 16},
        "representations": [
            "hog",
            {"name": "teacher", "source": "torchvision", "model": "resnet18"},
        ],
    }
    model = build(cfg)
    fit(model, Samples(images, [28, 28]))
    assert model.distillation.teacher_dims == {"hog": 648, "teacher": 512}


def test_statistics_are_taken_at_the_start_of_a_training_only(
    images: Tensor, tmp_path: Path
) -> None:
    """One that is resumed finds the store full, which was empty when it began."""
    cfg = make_cfg("mvmr")
    cfg.method_kwargs.representations = ["pixels"]
    cfg.method_kwargs.distillation = {"teacher_dims": {"pixels": 3072}}
    cfg.method_kwargs.cache, cfg.method_kwargs.fill_cache = str(tmp_path / "store"), True
    data = Samples(images, [32, 32])
    model = build(cfg)
    fit(model, data)
    model.trainer.save_checkpoint(tmp_path / "x.ckpt")
    for resumed in (True, False):
        again = build(cfg)
        fit(again, data, ckpt_path=tmp_path / "x.ckpt" if resumed else None, max_epochs=2)
        standardization = again.distillation.regressions["pixels"].standardization
        assert bool(standardization.fitted) is not resumed
        assert standardization.count == (32 if resumed else 16)


@pytest.mark.parametrize(
    ("given", "match"),
    [
        (3, "method_kwargs.distillation must be a mapping"),
        ({"teacher_dims": {"pixels": 0}}, "teacher_dims"),
        ({"teacher_dims": {"pixels": 3}, "cosine": 1}, "cosine"),
        ({"teacher_dims": {"pixel": 3}}, "must name representations, .* but names 'pixel'"),
    ],
)
def test_distillation_options_are_checked(given: Any, match: str) -> None:
    with pytest.raises(SoloConfigError, match=match):
        check_method_options({"distillation": given})


@pytest.mark.parametrize("name", [name for name in CONFIGS if not name.endswith("_linear")])
def test_representations_know_the_normalisation_of_their_data_set(name: str) -> None:
    """Those that undo the normalisation of the images: augmented pixels and teachers."""
    from hydra import compose, initialize_config_module
    from solo.data.pretrain_dataloader import build_transform_pipeline

    with initialize_config_module("mvmr_loss.adapters.solo.configs", version_base="1.2"):
        cfg = compose(name)
    normalize = build_transform_pipeline(cfg.data.dataset, cfg.augmentations[0]).transforms[-1]
    options = with_host_normalization(check_method_options(cfg.method_kwargs), cfg, view=0)
    assert options["normalization"] == Normalization(tuple(normalize.mean), tuple(normalize.std))
    own = with_host_normalization(check_method_options({"normalization": "none"}), cfg, view=0)
    assert own["normalization"] == "none"


@pytest.mark.parametrize("method", ["mvmr", "vicreg"])
def test_representations_are_told_the_normalisation(method: str, images: Tensor) -> None:
    if method == "mvmr":
        cfg = make_cfg("mvmr")
        cfg.method_kwargs.representations = ["augmented_pixels"]
    else:
        cfg = regularized_cfg(method, representations=["augmented_pixels"])
    cfg.data.dataset = "cifar100"
    model = build(cfg)
    fit(model, Samples(images, [32, 32] if method == "mvmr" else [32, 32, 40]))
    source = model.representations if method == "mvmr" else model.mvmr_representations
    assert source.normalization == Normalization.cifar100()


@pytest.mark.parametrize("name", AUGMENTATIONS)
@pytest.mark.parametrize("size", [(300, 200), (50, 90), (64, 64)])
def test_shipped_pipelines_give_square_views(name: str, size: tuple[int, int]) -> None:
    from hydra import compose, initialize_config_module
    from solo.data.pretrain_dataloader import build_transform_pipeline

    with initialize_config_module("mvmr_loss.adapters.solo.configs", version_base="1.2"):
        cfg = compose("mvmr_custom", overrides=[f"augmentations={name}"])
    image = Photographs("train", crops_per_class=1)[0][0].resize(size)
    for aug_cfg in cfg.augmentations:
        transform = build_transform_pipeline("custom", aug_cfg)
        assert transform(image).shape == (3, aug_cfg.crop_size, aug_cfg.crop_size)
    plain = cfg.augmentations[0 if name.startswith("mvmr") else -1]
    transform = build_transform_pipeline("custom", plain)
    assert torch.equal(transform(image), transform(image))


def test_the_non_augmented_pipeline_cuts_the_centre() -> None:
    from PIL import Image
    from solo.data.pretrain_dataloader import build_transform_pipeline
    from torchvision.transforms import functional

    image = Photographs("train", crops_per_class=1)[0][0].resize((96, 64))
    cfg = OmegaConf.create({**pipeline(64, 1, False), "mean": [0.0] * 3, "std": [1.0] * 3})
    for name in ("color_jitter", "grayscale", "gaussian_blur", "solarization", "equalization"):
        cfg[name] = {"prob": 0.0}
    cfg.horizontal_flip = {"prob": 0.0}
    view = build_transform_pipeline("custom", cfg)(image)
    assert isinstance(image, Image.Image)
    torch.testing.assert_close(view, functional.to_tensor(image.crop((16, 0, 80, 64))))


# --------------------------------------------------------------------------------------- method


def test_defaults_are_filled() -> None:
    cfg = make_cfg("mvmr")
    model = build(cfg)
    assert cfg.method_kwargs.variance_margin == model.criterion.variance_margin == 1.0
    assert cfg.method_kwargs.proj_output_dim == model.projector.layers[-1].out_features == 16
    assert model.criterion.gather_distributed


def test_smoke(images: Tensor) -> None:
    model = build(make_cfg("mvmr"))
    out = model(images[:2, :, :32, :32])
    assert out["z"].shape == (2, 16)
    assert out["feats"].shape == (2, 64)
    assert out["logits"].shape == (2, 11)
    groups = {group["name"]: list(group["params"]) for group in model.learnable_params}
    assert set(groups) == {"backbone", "classifier", "projector"}
    learnt = sum(len(group) for group in groups.values())
    assert learnt == len(list(model.parameters()))


def test_a_step_is_the_loss_of_its_views_and_every_term_is_logged(images: Tensor) -> None:
    data = Samples(images, [32, 32])
    cfg = make_cfg("mvmr")
    cfg.method_kwargs.representation_weights = {"pixels": 0.5, "local_std": -2.0}
    logged = fit(build(cfg), data)

    model = build(cfg).train()
    embeddings = [model(view)["z"] for view in data.views]
    criterion = MVMRLoss(representation_weights={"pixels": 0.5, "local_std": -2.0})
    expected = criterion.forward_components(
        *embeddings, Representations(["pixels", "local_std"])(data.views[0])
    )
    terms = {n.removeprefix("representations/"): t for n, t in expected.as_dict().items()}
    terms["mvmr"] = terms.pop("loss")
    for name, term in terms.items():
        assert logged[f"train_{name}_loss"] == pytest.approx(term.item(), rel=1e-4), name
    total = logged["train_mvmr_loss"] + logged["train_class_loss"]
    assert logged["loss"].item() == pytest.approx(total, rel=1e-5)


def test_small_crops_are_further_augmented_views(images: Tensor) -> None:
    data = Samples(images, [32, 32, 24, 24])
    more = [pipeline(32, 1, False), pipeline(32, 1, True), pipeline(24, 2, True)]
    cfg = make_cfg("mvmr", small_crops=2, augmentations=more)
    logged = fit(build(cfg), data)

    model = build(cfg).train()
    z, *z_augmented = [model(view)["z"] for view in data.views]
    representations = Representations(["pixels", "local_std"])(data.views[0])
    expected = MVMRLoss()(z, z_augmented, representations)
    assert logged["train_mvmr_loss"] == pytest.approx(expected.item(), rel=1e-4)


class Recorder(nn.Module):
    """Stands in for a source of representations and keeps what it is asked."""

    def __init__(self) -> None:
        super().__init__()
        self.asked: list[tuple[Tensor, Tensor]] = []

    def forward(self, images: Tensor, indices: Tensor) -> dict[str, Tensor]:
        self.asked.append((images, indices))
        return {"pixels": images.flatten(1)}


def test_sample_indexes_and_the_non_augmented_images_reach_the_representations(
    images: Tensor,
) -> None:
    data = Samples(images, [32, 32])
    model = build(make_cfg("mvmr"))
    model.representations = recorder = Recorder()
    fit(model, data, batch_size=8)
    ((seen, indices),) = recorder.asked
    assert indices.tolist() == list(range(8))
    torch.testing.assert_close(seen, data.views[0][:8])


@pytest.mark.parametrize("precision", ["bf16-mixed", "32"])
def test_precision_and_gradient_accumulation(images: Tensor, precision: str) -> None:
    cfg = make_cfg("mvmr", accumulate_grad_batches=2)
    model = build(cfg)
    before = [p.detach().clone() for p in model.parameters()]
    logged = fit(
        model,
        Samples(images, [32, 32]),
        batch_size=8,
        precision=precision,
        accumulate_grad_batches=2,
        limit_train_batches=2,
    )
    assert logged["loss"].dtype == torch.float32
    assert torch.isfinite(logged["loss"])
    changed = [not torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True)]
    assert all(changed)


def test_no_representations(images: Tensor) -> None:
    cfg = make_cfg("mvmr")
    cfg.method_kwargs.representations = []
    logged = fit(build(cfg), Samples(images, [32, 32]))
    three = sum(logged[f"train_{t}_loss"] for t in ("invariance", "variance", "dependence"))
    assert logged["train_mvmr_loss"] == pytest.approx(three, rel=1e-5)


def test_a_checkpoint_holds_no_representations_and_evaluation_builds_none(
    images: Tensor, tmp_path: Path
) -> None:
    from lightning.pytorch import Callback

    class Save(Callback):  # type: ignore[misc]
        def on_train_end(self, trainer: Any, module: Any) -> None:
            trainer.save_checkpoint(tmp_path / "x.ckpt")

    cfg = make_cfg("mvmr")
    model = build(cfg)
    from lightning.pytorch import Trainer

    trainer = Trainer(
        accelerator="cpu", logger=False, enable_checkpointing=False, max_epochs=1,
        limit_train_batches=1, enable_progress_bar=False, callbacks=[Save()],
    )  # fmt: skip
    trainer.fit(model, DataLoader(Samples(images, [32, 32]), batch_size=8))
    state = torch.load(tmp_path / "x.ckpt", weights_only=True)["state_dict"]
    assert {key.split(".")[0] for key in state} == {"backbone", "classifier", "projector"}
    from solo.methods import METHODS

    loaded = METHODS["mvmr"].load_from_checkpoint(tmp_path / "x.ckpt", strict=False, cfg=cfg)
    assert loaded.representations is None
    loaded.eval()
    model.eval()
    torch.testing.assert_close(loaded(images)["z"], model(images)["z"])


@pytest.mark.parametrize(
    "backbone",
    [
        "resnet18",
        "resnet18_3x3",
        "vit_tiny",
        "wide_resnet28w2",
        *(
            pytest.param(name, marks=pytest.mark.slow)
            for name in (
                "resnet50", "resnet50_3x3", "vit_small", "vit_base", "vit_large", "swin_tiny",
                "swin_small", "swin_base", "swin_large", "poolformer_s12", "poolformer_s24",
                "poolformer_s36", "poolformer_m36", "poolformer_m48", "convnext_tiny",
                "convnext_small", "convnext_base", "convnext_large", "wide_resnet28w8",
            )
        ),
    ],
)  # fmt: skip
def test_backbones(backbone: str, images: Tensor) -> None:
    fixed = {"vit": {"img_size": 32}, "swin": {"img_size": 32, "window_size": 1}}
    kwargs = fixed.get(backbone.split("_")[0], {})
    cfg = make_cfg("mvmr", backbone={"name": backbone, "kwargs": kwargs})

    model = build(cfg)
    logged = fit(model, Samples(images[:4], [32, 32]), batch_size=4)
    assert torch.isfinite(logged["loss"])
    gradients = [p.grad for p in model.backbone.parameters()]
    assert any(g is not None and bool(g.abs().sum() > 0) for g in gradients)


def test_the_backbone_test_knows_all_of_solo_learn() -> None:
    from solo.methods import BaseMethod

    (mark,) = test_backbones.pytestmark  # type: ignore[attr-defined]
    tested = {getattr(value, "values", (value,))[0] for value in mark.args[1]}
    assert tested == set(BaseMethod._BACKBONES) - {"tiny"}


def test_3x3_stem_keeps_the_resolution() -> None:
    model = build(
        make_cfg(
            "mvmr",
            backbone={"name": "resnet18_3x3"},
        )
    )
    assert model.backbone.conv1(torch.rand(1, 3, 96, 96)).shape == (1, 64, 96, 96)
    assert isinstance(model.backbone.maxpool, nn.MaxPool2d)


def test_exception(images: Tensor) -> None:
    cfg = make_cfg("mvmr")
    cfg.method_kwargs.proj_dim = 3
    with pytest.raises(AssertionError, match="method_kwargs has no option 'proj_dim'"):
        build(cfg)
    cfg = make_cfg("mvmr", augmentations=[pipeline(32, 1, True), pipeline(32, 1, False)])
    with pytest.raises(SoloConfigError, match="put it first"):
        build(cfg)


# ---------------------------------------------------------------------------------- regulariser

METHODS_WITH_Z = (
    "vicreg", "byol", "simclr", "barlow_twins", "all4one", "deepclusterv2", "dino", "mocov2plus",
    "mocov3", "nnbyol", "nnclr", "nnsiam", "ressl", "simsiam", "supcon", "swav", "vibcreg", "wmse",
)  # fmt: skip
REGULARIZED = [("base", "feats"), ("mae", "feats"), *((name, "z") for name in METHODS_WITH_Z)]


def clustered(model: Any) -> Any:
    """DeepClusterV2's loss is not a number before it has clustered, which it does between epochs."""
    if model.cfg.method == "deepclusterv2":
        model.on_train_epoch_start = lambda: None
        model.assignments = torch.arange(16).remainder(4).repeat(2, 1)
    return model


@pytest.mark.parametrize(("method", "embeddings"), REGULARIZED)
def test_any_method_carries_the_regulariser(method: str, embeddings: str, images: Tensor) -> None:
    """The method's own loss stays what it is, and exactly the terms are added to it."""
    two = Samples(images, [32, 32])
    alone = fit(clustered(build(make_cfg(method))), two)

    cfg = regularized_cfg(method, representations=["pixels"], weights=3.0, embeddings=embeddings)
    check_pretraining(cfg)
    model = clustered(build(cfg))
    noted: list[Tensor] = []
    assert isinstance(model.mvmr_regularizer, MultiRepresentationRegularizer)
    original = model.mvmr_regularizer.forward_components

    def forward_components(views: list[Tensor], representations: dict[str, Tensor]) -> Any:
        noted.extend(views)
        torch.testing.assert_close(representations["pixels"], three.views[2].flatten(1))
        return original(views, representations)

    model.mvmr_regularizer.forward_components = forward_components
    three = Samples(images, [32, 32, 40])
    together = fit(model, three)

    assert len(noted) == 2
    assert all(z.requires_grad for z in noted)
    assert cfg.data.num_small_crops == 1
    term = together["train_pixels_loss"]
    assert term > 0
    added = together["loss"].item() - alone["loss"].item()
    assert added == pytest.approx(term, rel=1e-3, abs=1e-4)


def test_the_regulariser_test_knows_all_of_solo_learn() -> None:
    from solo.methods import METHODS

    assert {name for name, _ in REGULARIZED} == set(METHODS) - {"linear", "mvmr"}


def test_the_regulariser_changes_the_gradient(images: Tensor) -> None:
    def trained(node: dict[str, Any] | None) -> Tensor:
        model = build(regularized_cfg("vicreg", **node) if node else make_cfg("vicreg"))
        fit(model, Samples(images, [32, 32, *([40] if node else [])]))
        return torch.cat([p.detach().flatten() for p in model.projector.parameters()])

    plain = trained(None)
    zero = trained({"representations": ["pixels"], "weights": 0.0})
    full = trained({"representations": ["pixels"], "weights": 10.0})
    torch.testing.assert_close(plain, zero)
    assert not torch.allclose(plain, full)


def test_small_crops_of_the_method_stay_its_own(images: Tensor) -> None:
    """SimCLR with two small crops and the regulariser's view, which is no crop of SimCLR's."""
    augmentations = [pipeline(32, 2, True), pipeline(24, 2, True), pipeline(40, 1, False)]
    node = {"representations": ["pixels"]}
    cfg = make_cfg("simclr", small_crops=3, augmentations=augmentations, mvmr_regularizer=node)
    model = build(cfg)
    assert (model.num_small_crops, model.num_crops, model.multicrop) == (2, 4, True)
    logged = fit(model, Samples(images, [32, 32, 24, 24, 40]))
    assert torch.isfinite(logged["loss"])
    alone = fit(
        build(make_cfg("simclr", small_crops=2, augmentations=augmentations[:2])),
        Samples(images, [32, 32, 24, 24]),
    )
    assert logged["train_nce_loss"] == pytest.approx(alone["train_nce_loss"], rel=1e-4)


def test_without_the_node_nothing_is_added(images: Tensor) -> None:
    model = build(make_cfg("vicreg"))
    logged = fit(model, Samples(images, [32, 32]))
    assert model.mvmr_regularizer is None
    assert set(model.state_dict()) == set(build(make_cfg("vicreg")).state_dict())
    assert "train_pixels_loss" not in logged


def test_the_regulariser_reads_a_cache_without_images(images: Tensor, tmp_path: Path) -> None:
    """The first run fills the store from the non-augmented view; the second has no such view."""
    node = {"representations": ["pixels"], "cache": str(tmp_path / "store"), "fill_cache": True}
    cfg = regularized_cfg("vicreg", **node)
    filled = fit(build(cfg), Samples(images, [32, 32, 40]))
    cfg = make_cfg("vicreg", mvmr_regularizer={"cache": node["cache"]})
    check_pretraining(cfg)
    read = fit(build(cfg), Samples(images, [32, 32]))
    assert read["train_pixels_loss"] == pytest.approx(filled["train_pixels_loss"], rel=1e-5)
    assert read["loss"].item() == pytest.approx(filled["loss"].item(), rel=1e-4)


def test_the_method_fills_and_reads_a_cache(images: Tensor, tmp_path: Path) -> None:
    data, cfg = Samples(images, [32, 32]), make_cfg("mvmr")
    live = fit(build(cfg), data)
    cfg.method_kwargs.cache = str(tmp_path / "store")
    cfg.method_kwargs.fill_cache = True
    filled = fit(build(cfg), data)
    cfg.method_kwargs.fill_cache = False
    read = fit(build(cfg), data)
    for name in ("pixels", "local_std"):
        term = f"train_{name}_loss"
        assert read[term] == filled[term] == pytest.approx(live[term], rel=1e-2, abs=1e-4)


def test_the_guides_store_fits_the_guides_pipelines(
    photograph_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its command as it stands, but for smaller images."""
    from solo.data.pretrain_dataloader import build_transform_pipeline

    monkeypatch.chdir(tmp_path)
    (command,) = guides.commands("solo", "python -m mvmr_loss.cache fill")
    arguments = shlex.split(command.replace("FOLDER", str(photograph_folder / "test")))[3:]
    size = arguments.index("--image-size") + 1
    assert arguments[size] == "224"
    arguments[size] = "48"
    (pipeline, *_) = OmegaConf.load(str(AUGMENTATION_FILES / "mvmr_224.yaml"))
    pipeline.crop_size = 48
    dataset = ImageFolder(photograph_folder / "test", build_transform_pipeline("custom", pipeline))
    images = torch.stack([dataset[i][0] for i in range(4)])

    def check(store: str) -> None:
        options = check_method_options({"cache": store, "sketch_dim": 1024}, 48)
        representations = build_representations(options, dataset)
        assert representations is not None
        for i, image in enumerate(images):  # compared with a live one in each call
            representations(image, [i])

    main(arguments)
    check("features")
    i = arguments.index("--interpolation")
    arguments[i : i + 2] = []
    main([arguments[0], "bilinear", *arguments[2:]])
    with pytest.raises(ValueError, match="resized, normalised and rounded alike"):
        check("bilinear")


def test_exception_unknown_embeddings(images: Tensor) -> None:
    cfg = regularized_cfg("vicreg", representations=["pixels"], embeddings="q")
    with pytest.raises(
        SoloConfigError, match="VICReg.forward, one of logits, feats, z, but is 'q'"
    ):
        fit(build(cfg), Samples(images, [32, 32, 40]))


def test_regularised_classes_keep_their_names() -> None:
    from solo.methods import METHODS, BaseMethod, VICReg

    from mvmr_loss.adapters.solo import RepresentationRegularized
    from mvmr_loss.adapters.solo.regularizer import regularized

    assert METHODS["vicreg"] is regularized(VICReg)
    assert issubclass(METHODS["vicreg"], (RepresentationRegularized, VICReg))
    for name, method in METHODS.items():
        if issubclass(method, RepresentationRegularized):
            (original,) = [c for c in method.__bases__ if c is not RepresentationRegularized]
            assert (method.__name__, method.__module__) == (original.__name__, original.__module__)
            assert issubclass(original, BaseMethod), name
    assert METHODS["vicreg"].__doc__ == VICReg.__doc__
    assert not issubclass(METHODS["linear"], BaseMethod)


def test_pickling(images: Tensor) -> None:
    """A process that is spawned gets the model pickled."""
    model = build(regularized_cfg("byol", representations=["pixels"])).eval()
    again = pickle.loads(pickle.dumps(model))
    assert type(again) is type(model)
    torch.testing.assert_close(again(images)["z"], model(images)["z"])


def test_own_class_carries_the_regulariser(images: Tensor) -> None:
    from solo.methods import VICReg

    from mvmr_loss.adapters.solo import RepresentationRegularized

    class Mine(RepresentationRegularized, VICReg):  # type: ignore[misc]
        pass

    cfg = regularized_cfg("vicreg", representations=["pixels"])
    torch.manual_seed(0)
    mine = fit(Mine(cfg), Samples(images, [32, 32, 40]))
    tables = fit(build(cfg), Samples(images, [32, 32, 40]))
    assert mine["loss"] == tables["loss"]
    assert "train_pixels_loss" in mine


@pytest.mark.parametrize("method", ["mvmr", "vicreg", "byol"])
def test_resuming_from_a_checkpoint(method: str, images: Tensor, tmp_path: Path) -> None:
    """Weights and drawn augmentations go on; a checkpoint loads for evaluation, too."""
    from lightning.pytorch import Trainer
    from solo.methods import METHODS

    cfg = regularized_cfg(method, representations=["augmented_pixels"])
    if method == "mvmr":
        cfg = make_cfg("mvmr")
        cfg.method_kwargs.representations = ["augmented_pixels"]
    loader = DataLoader(Samples(images, [32, 32, 40][: 2 + (method != "mvmr")]), batch_size=8)
    options = {
        "accelerator": "cpu", "logger": False, "enable_checkpointing": False,
        "enable_progress_bar": False, "enable_model_summary": False,
    }  # fmt: skip

    def drawn(model: nn.Module) -> list[int]:
        return [int(b) for name, b in model.named_buffers() if name.endswith("samples_drawn")]

    trainer = Trainer(max_epochs=1, **options)
    trainer.fit(model := build(cfg), loader)
    trainer.save_checkpoint(tmp_path / "x.ckpt")
    assert drawn(model) == [16]

    loaded = METHODS[method].load_from_checkpoint(tmp_path / "x.ckpt", strict=False, cfg=cfg)
    assert type(loaded) is METHODS[method]
    torch.testing.assert_close(loaded.eval()(images)["z"], model.eval()(images)["z"])
    assert drawn(loaded) == []

    resumed = build(cfg, seed=1)
    Trainer(max_epochs=2, **options).fit(resumed, loader, ckpt_path=tmp_path / "x.ckpt")
    assert drawn(resumed) == [32]


@pytest.mark.slow
def test_two_processes_learn_what_one_learns_from_the_whole_batch(images: Tensor) -> None:
    from lightning.pytorch import Trainer

    cfg = make_cfg("mvmr")
    cfg.method_kwargs.gather_distributed = True

    def trained(processes: int) -> tuple[dict[str, Tensor], Tensor]:
        model = build(cfg)
        # No BatchNorm: its statistics are per process, and would hide an error of the gathering.
        model.backbone[1] = nn.Identity()
        model.projector = nn.Linear(64, 16)
        before = torch.cat([p.detach().flatten() for p in model.parameters()])
        trainer = Trainer(
            accelerator="cpu", devices=processes, strategy="ddp_spawn" if processes > 1 else "auto",
            max_epochs=1, logger=False, enable_checkpointing=False, enable_progress_bar=False,
            enable_model_summary=False,
        )  # fmt: skip
        trainer.fit(model, DataLoader(Samples(images, [32, 32]), batch_size=16 // processes))
        after = torch.cat([p.detach().flatten() for p in model.parameters()])
        terms = {k: v for k, v in trainer.callback_metrics.items() if not k.startswith("train_acc")}
        return terms, after - before

    alone, learnt_alone = trained(1)
    together, learnt_together = trained(2)
    assert together.keys() == alone.keys()
    assert "train_local_std_loss" in alone
    for name, term in alone.items():
        torch.testing.assert_close(together[name], term, rtol=1e-4, atol=1e-6)
    error = (learnt_together - learnt_alone).norm() / learnt_alone.norm()
    assert error < 1e-3


def test_defaults_of_the_regulariser_are_filled() -> None:
    cfg = regularized_cfg("vicreg", representations=["pixels"])
    build(cfg)
    assert OmegaConf.to_container(cfg.mvmr_regularizer) == {
        **REGULARIZER_DEFAULTS,
        "representations": ["pixels"],
    }


def test_exception_regulariser_options() -> None:
    with pytest.raises(AssertionError, match="mvmr_regularizer has no option 'weight'"):
        build(regularized_cfg("vicreg", representations=["pixels"], weight=1.0))
    with pytest.raises(SoloConfigError, match="needs the non-augmented image or a cache"):
        build(make_cfg("vicreg", mvmr_regularizer={"representations": ["pixels"]}))


def test_accuracies_of_few_classes(capsys: pytest.CaptureFixture[str]) -> None:
    """solo-learn asks for the top five; there are three classes."""
    from solo.methods import base, linear

    logits, targets = torch.eye(3), torch.tensor([0, 1, 1])
    for module in (base, linear):
        top1, top5 = module.accuracy_at_k(logits, targets, top_k=(1, 5))
        assert (top1.item(), top5.item()) == (pytest.approx(200 / 3), 100)
    five = base.accuracy_at_k(torch.eye(6), torch.arange(6), top_k=(1, 5))
    assert [value.item() for value in five] == [100, 100]
    assert capsys.readouterr().err.count("the images have 3 classes, so that acc5 is") == 1


@pytest.mark.parametrize("method", ["mvmr", "byol"])
def test_results_are_printed(
    method: str, images: Tensor, capsys: pytest.CaptureFixture[str]
) -> None:
    """Once, in whichever method of solo-learn's."""
    logged = fit(build(make_cfg(method)), Samples(images, [32, 32]))
    (line,) = [s for s in capsys.readouterr().out.splitlines() if "mvmr-loss: results: " in s]
    assert f"train_class_loss {logged['train_class_loss']:.4g}" in line
    assert f"train_acc1 {logged['train_acc1']:.4g}" in line


def test_a_training_without_an_epoch_says_so(capsys: pytest.CaptureFixture[str]) -> None:
    from lightning.pytorch import Trainer

    from mvmr_loss.adapters.solo.results import ResultPrinter

    ResultPrinter().on_fit_end(Trainer(accelerator="cpu", logger=False), None)
    assert "results: none, no epoch was left to train" in capsys.readouterr().out


def test_a_training_without_a_full_batch_says_so(capsys: pytest.CaptureFixture[str]) -> None:
    from mvmr_loss.adapters.solo.results import ResultPrinter

    trainer = SimpleNamespace(is_global_zero=True, callback_metrics={}, num_training_batches=0)
    ResultPrinter().on_fit_end(trainer, None)
    assert "no full batch of optimizer.batch_size images" in capsys.readouterr().out


def test_checkpoints_hold_no_objects(images: Tensor, tmp_path: Path) -> None:
    """Of both kinds, with options that are nested: plain to read, and loaded with the configuration."""
    measure = {"dependence_measure": {"name": "hsic", "kernel": "linear"}}
    plain = make_cfg("mvmr")
    plain.method_kwargs.update(measure)
    for cfg in (plain, regularized_cfg("vicreg", representations=["pixels"], **measure)):
        model, sizes = build(cfg), [32, 32] if cfg is plain else [32, 32, 40]
        from lightning.pytorch import Trainer

        quiet = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False}
        runner = Trainer(accelerator="cpu", max_steps=1, **quiet)
        runner.fit(model, DataLoader(Samples(images, sizes), batch_size=16))
        runner.save_checkpoint(tmp_path / "model.ckpt")
        held = torch.load(tmp_path / "model.ckpt", weights_only=True)
        assert not held.get("hyper_parameters")
        restored = type(model).load_from_checkpoint(tmp_path / "model.ckpt", cfg=cfg)
        for name, value in restored.state_dict().items():
            torch.testing.assert_close(model.state_dict()[name], value)
