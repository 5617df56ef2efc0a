"""stable-pretraining, unmodified, with the forward functions; in an environment of its own."""

import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

pytest.importorskip("stable_pretraining")

import hydra
import lightning
import stable_pretraining as spt
from omegaconf import OmegaConf
from stable_pretraining.data import transforms as T
from stable_pretraining.forward import simclr
from torchmetrics.classification import MulticlassAccuracy

from mvmr_loss import (
    DistillationLoss,
    MultiRepresentationRegularizer,
    MVMRLoss,
    Representations,
    Teacher,
)
from mvmr_loss.adapters.stable_pretraining import distill, mvmr, regularized
from mvmr_loss.adapters.stable_pretraining.__main__ import main
from tests.adapters import guides

ROOT = Path(__file__).parents[2]
EXAMPLE = ROOT / "examples" / "stable_pretraining_mvmr.py"
SIZE, BATCH = 16, 8


@pytest.fixture(autouse=True)
def _no_runs_in_the_users_cache(tmp_path, monkeypatch):
    """stable-pretraining keeps checkpoints of each run of its command in the user's cache folder."""
    monkeypatch.setenv("SPT_CACHE_DIR", str(tmp_path / "cache"))


def loader(views, n=16):
    images = torch.rand(n, 3, SIZE, SIZE, generator=torch.Generator().manual_seed(0))
    pairs = [(image, i % 4) for i, image in enumerate(images)]
    augment = T.RandomHorizontalFlip()
    transform = T.MultiViewTransform([lambda x: x] + [augment] * (views - 1)) if views else None
    dataset = spt.data.FromTorchDataset(pairs, names=["image", "label"], transform=transform)
    return torch.utils.data.DataLoader(dataset, BATCH, shuffle=True)


def train(views, epochs=1, resumed=None, **parts):
    """Trains in the host, and returns its trainer."""
    torch.manual_seed(0)
    module = spt.Module(
        backbone=nn.Sequential(nn.Flatten(), nn.Linear(3 * SIZE * SIZE, 12), nn.ReLU()),
        optim={"optimizer": {"type": "Adam", "lr": 1e-2}, "scheduler": "ConstantLR"},
        **{"projector": nn.Linear(12, 6), **parts},
    )
    before = module.backbone[1].weight.detach().clone()
    probe = spt.callbacks.OnlineProbe(
        module, "probe", "embedding", "label", probe=nn.Linear(12, 4), loss=nn.CrossEntropyLoss(),
        metrics={"top1": MulticlassAccuracy(4)},
    )  # fmt: skip
    trainer = lightning.Trainer(
        max_epochs=epochs, num_sanity_val_steps=0, callbacks=[probe], accelerator="cpu",
        logger=False, enable_checkpointing=False, enable_progress_bar=False,
    )  # fmt: skip
    trainer.fit(module, loader(views), loader(0), ckpt_path=resumed)
    assert not torch.equal(before, module.backbone[1].weight)
    return trainer


def teacher():
    return Teacher(nn.Sequential(nn.Flatten(), nn.Linear(3 * SIZE * SIZE, 5)))


METHODS = {
    "mvmr": (3, {"forward": mvmr, "loss": MVMRLoss()}),
    "vicreg": (
        3,
        {
            "forward": regularized("stable_pretraining.forward.vicreg"),
            "vicreg_loss": spt.losses.VICRegLoss(),
            "loss": MultiRepresentationRegularizer(),
        },
    ),
    "simclr": (
        3,
        {
            "forward": regularized(simclr),
            "simclr_loss": spt.losses.NTXEntLoss(temperature=0.5),
            "loss": MultiRepresentationRegularizer(),
        },
    ),
    "distill": (0, {"forward": distill, "loss": MultiRepresentationRegularizer()}),
}


@pytest.mark.parametrize("name", METHODS)
def test_trains_in_the_host(name):
    views, parts = METHODS[name]
    spec = {"teacher": teacher()} if name == "distill" else ["pixels", "local_std"]
    logged = train(views, **parts, representations=Representations(spec)).callback_metrics
    term = "fit/representations/" + ("teacher" if name == "distill" else "pixels")
    assert torch.isfinite(logged[term])
    assert torch.isfinite(logged["fit/loss"])
    assert torch.isfinite(logged["train/probe_loss"])
    assert 0 <= logged["eval/probe_top1"] <= 1
    if name in ("vicreg", "simclr"):
        assert logged["fit/regularized_loss"] > logged["fit/loss"]


@pytest.mark.parametrize(("forward", "views"), [(mvmr, 2), (distill, 2), (distill, 0)])
def test_the_heads_are_trained_and_left_behind(forward, views):
    on_features = DistillationLoss(12, {"teacher": 5})
    before = [p.detach().clone() for p in on_features.parameters()]
    parts = {"loss": on_features, "projector": None}
    if forward is mvmr:
        parts = {"loss": MVMRLoss(), "distillation": on_features}
    representations = Representations({"teacher": teacher()})
    trainer = train(views, forward=forward, representations=representations, **parts)
    heads = list(on_features.parameters())
    assert not any(torch.equal(*pair) for pair in zip(before, heads, strict=True))
    module = trainer.lightning_module
    assert list(module.backbone.state_dict()) == ["1.weight", "1.bias"]
    for term in ("fit/regression/teacher", "fit/dependence/teacher", "fit/loss"):
        assert torch.isfinite(trainer.callback_metrics[term])


@pytest.mark.parametrize("forward", [mvmr, distill])
def test_statistics_of_a_full_store_and_not_of_a_resumed_training(forward, tmp_path):
    def run(**options):
        on_features = DistillationLoss(12, {"pixels": 768})
        parts = {"loss": on_features, "projector": None}
        if forward is mvmr:
            parts = {"loss": MVMRLoss(), "distillation": on_features}
        representations = Representations(["pixels"], cache=tmp_path / "store")
        trainer = train(2, forward=forward, representations=representations, **parts, **options)
        return trainer, on_features.regressions["pixels"].standardization

    trainer, standardization = run()  # fills the store
    assert (standardization.fitted, standardization.count) == (False, 16)
    trainer.save_checkpoint(tmp_path / "first.ckpt")
    _, standardization = run(epochs=2, resumed=tmp_path / "first.ckpt")
    assert (standardization.fitted, standardization.count) == (False, 32)
    trainer, standardization = run()
    assert standardization.fitted
    trainer.save_checkpoint(tmp_path / "second.ckpt")
    (tmp_path / "store").rename(tmp_path / "gone")  # and made anew
    _, standardization = run(epochs=2, resumed=tmp_path / "second.ckpt")
    assert standardization.fitted


def test_the_sample_index_feeds_the_cache(tmp_path):
    representations = Representations(["pixels", "local_std"], cache=tmp_path / "store")
    train(2, epochs=2, forward=mvmr, loss=MVMRLoss(), representations=representations)
    alone = Representations(None, cache=tmp_path / "store")
    images = torch.stack([image for image, _ in loader(0).dataset.dataset])
    pixels = alone(None, torch.arange(16))["pixels"]
    torch.testing.assert_close(pixels, images.flatten(1), rtol=1e-2, atol=1e-3)


def test_the_guide_runs(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    program = "\n".join(guides.blocks("stable_pretraining", "python"))
    assert program.count('"weights": "default"') == 1
    namespace = {"loader": loader(2)}
    with pytest.warns(UserWarning, match="random weights"):  # no download
        exec(program.replace('"weights": "default"', '"weights": None'), namespace)
    module = namespace["module"]
    assert module.forward.__name__ == "distill"
    assert module.loss.fit_if_full(module.representations)
    assert not list(namespace["no_head"].parameters())
    logger, module.log_dict = {}, lambda named, **_: logger.update(named)
    batch = next(iter(namespace["loader"]))
    module.representations.cache = None
    assert torch.isfinite(module(batch, stage="fit")["loss"])
    assert "fit/regression/teacher" in logger


def test_the_guides_modules_in_yaml(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    texts = guides.blocks("stable_pretraining", "yaml")
    kinds = {"mvmr": MVMRLoss, "distill": DistillationLoss}
    for text, (name, kind) in zip(texts, kinds.items(), strict=True):
        parts = OmegaConf.create(text.replace("weights: default", "weights: null")).module
        assert hydra.utils.get_method(parts.forward).__name__ == name
        representations = hydra.utils.instantiate(parts.representations)
        loss = hydra.utils.instantiate(parts.loss)
        assert isinstance(loss, kind)
        on_features = loss
        if name == "mvmr":
            on_features = hydra.utils.instantiate(parts.distillation)
        assert on_features.teacher_dims == representations.sizes(3, 64, 64)


def test_the_guides_regularized_in_yaml():
    """The text's ``forward: {...}``, on the host's VICReg."""
    joined = " ".join(guides.text("stable_pretraining").split())
    (text,) = re.findall(r"`(forward: \{_target_: [^`]*regularized[^`]*\})`", joined)
    forward = hydra.utils.instantiate(OmegaConf.create(text).forward)
    assert forward.keywords["forward"] is spt.forward.vicreg
    parts = {"vicreg_loss": spt.losses.VICRegLoss(), "loss": MultiRepresentationRegularizer()}
    trainer = train(3, forward=forward, **parts, representations=Representations(["pixels"]))
    logged = trainer.callback_metrics
    assert logged["fit/regularized_loss"] > logged["fit/loss"]


def run(folder, *command):
    done = subprocess.run(
        [sys.executable, *command], cwd=folder, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    return done.stdout


@pytest.mark.parametrize("options", [[], ["--vicreg"]])
def test_the_example_runs_from_anywhere(tmp_path, options):
    output = run(tmp_path, str(EXAMPLE), "--steps", "2", "--batch-size", "16", *options)
    for figure in ("eval/probe_top1", "eval/knn_top1", "rankme"):
        assert re.search(rf"^{figure}: \d+\.\d+$", output, re.M)


def test_the_configuration_runs(tmp_path, photograph_folder):
    (tmp_path / "images").mkdir()
    (tmp_path / "images" / "train").symlink_to(photograph_folder / "train")
    (tmp_path / "images" / "val").symlink_to(photograph_folder / "test")
    classes = len(list((photograph_folder / "train").iterdir()))
    (copy,) = guides.commands("stable_pretraining", "cp ")
    (start,) = guides.commands("stable_pretraining", "python -m mvmr_loss")
    guides.run(copy, tmp_path)
    options = [
        *(f"num_classes={classes}", "batch_size=8", "size=32", "num_workers=0", "max_epochs=1"),
        *("trainer.limit_train_batches=2", "trainer.accelerator=cpu"),
        *("module.projector.hidden_dim=64", "module.projector.output_dim=64"),
    ]
    output = guides.run(" ".join([start, *options]), tmp_path)
    for figure in ("fit/regression/scattering", "eval/probe_top1", "eval/knn_top1", "rankme"):
        assert figure in output


@pytest.mark.parametrize(
    ("text", "arguments", "match"),
    [
        (None, [], "must be a YAML file but is none"),
        ("a: 1", ["b"], "'b' must be KEY=VALUE"),
        ("data: ???", [], "Missing mandatory value: data"),
        ("data: {}", [], "must have module, trainer but has not"),
        (
            "{data: {_target_: no.such}, module: {}, trainer: {}}",
            *([], "data of .* cannot be built"),
        ),
    ],
)
def test_errors_of_the_command(tmp_path, monkeypatch, text, arguments, match):
    monkeypatch.chdir(tmp_path)
    if text is not None:
        (tmp_path / "config.yaml").write_text(text)
    with pytest.raises(SystemExit, match=match):
        main(["config.yaml", *arguments])
