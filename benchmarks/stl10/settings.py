"""Every setting of a run; jsonargparse makes options, files and checks of types of them."""

from __future__ import annotations

import dataclasses
import re
import reprlib
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import yaml

from mvmr_loss import Normalization, preset_settings

PRESETS = Path(__file__).with_name("presets")
NORMALIZATIONS = {"imagenet": Normalization.imagenet(), "cifar": Normalization.cifar10()}


class _PlainLoader(yaml.SafeLoader):
    """Reads plain values. With aliases, a small file could stand for one that no memory holds."""

    def compose_node(self, parent: Any, index: Any) -> Any:
        if self.check_event(yaml.AliasEvent):
            mark = self.peek_event().start_mark
            raise yaml.composer.ComposerError(problem="aliases are not read", problem_mark=mark)
        return super().compose_node(parent, index)


_PlainLoader.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"^[-+]?[0-9.]+[eE][-+]?[0-9]+$"), list("-+0123456789.")
)


def read_yaml(text: str) -> Any:
    """Reads plain YAML; a yaml.YAMLError says what it is instead."""
    try:
        return yaml.load(text, _PlainLoader)
    except RecursionError:
        raise yaml.YAMLError("it is nested too deeply") from None
    except (ValueError, OverflowError) as error:
        raise yaml.YAMLError(str(error)) from error


@dataclass
class Settings:
    """Pretrains a backbone without labels, evaluates it and writes a folder of results.

    Args:
        method: The method: MV-MR is mvmr_loss's for lightly, the others have lightly's losses and heads.
        objective: mvmr's preset: paper, identity, or features, which learned best in short trainings;
            distillation, the best known, or distillation_paper, of a teacher among the representations.
        representations: Representations for any method: names, or mappings such as
            '{name: hog, orientations: 9}'. None: the objective's for mvmr, none for the others.
        representation_weight: Weight of each representation's term; negative rewards independence.
            None: the objective's for mvmr, 1 for the others. Not where all of them are distilled.
        distillation: Options of mvmr_loss.DistillationLoss for mvmr, such as
            {teacher_dims: {teacher: 384}}, which names the teachers among the representations. None:
            the objective's.
        view_terms: Whether mvmr has its terms between the views; a distillation needs none.
        cache: Folder in which representations of the non-augmented images, a
            teacher's among them, are kept once computed. None: they are computed in each step.
        dependence_measure: Measure of dependence of the representation terms, and of mvmr.
        temperature: simclr's temperature.
        momentum: byol's momentum at the start; it ends at 1.
        projector_hidden_dim: Width of the projector's hidden layers.
        projector_output_dim: Width of the embeddings.
        backbone: small (for CPUs), or the name of a torchvision or timm model.
        stem: Stem of torchvision's ResNets: small is 3x3 with stride 1, the max-pool stays.
        data: stl10, cifar10, photographs (embedded, no download), or a folder that has train/ and
            test/, optionally unlabeled/, each with one folder of images a class.
        data_dir: Where stl10 or cifar10 lie, or are downloaded to.
        download: Download stl10 or cifar10 if they are not there.
        image_size: Images are resized and centre-cropped to this side.
        normalization: Whose mean and standard deviation.
        num_workers: Worker processes that read images.
        crop_scale_min: Least area of the random crop.
        color_jitter: Strengths: brightness, contrast, saturation, hue.
        color_jitter_probability: Probability of the jitter.
        grayscale_probability: Probability of the greying.
        blur: Gaussian blur, kernel 2 int(0.05 size) + 1.
        epochs: Epochs of pretraining.
        batch_size: Images a step, of all processes together.
        optimizer: The optimiser.
        learning_rate: Learning rate after the warm-up; it ends at a hundredth, on a cosine.
        weight_decay: Weight decay, of all but biases and normalisation layers.
        warmup_epochs: Epochs of linear warm-up.
        seed: Draws weights, order, augmentation and label subsets.
        knn_k: Neighbours of the weighted kNN; all training images if there are fewer.
        knn_temperature: Temperature of the weighted kNN.
        probe_optimizer: sgd is lightly's linear evaluation; adam the paper's.
        probe_epochs: Epochs of the linear classifier.
        probe_learning_rate: Its learning rate; with sgd, for 256 images a step.
        ten_crop_resize: Images are resized by this factor before ten crops are cut.
        labels: Learn from these parts of the labels, linear and fine-tuned: fractions such as 0.01,
            or folds for STL10's ten.
        finetune_epochs: Epochs of fine-tuning.
        finetune_batch_size: Images a step of fine-tuning, at most.
        finetune_learning_rate: Learning rate of fine-tuning, SGD, for 256 images a step.
        monitor_every: Epochs between evaluations during pretraining, on a tenth of the labelled
            training images and never on test images; 0 means never.
        accelerator: cpu, gpu, mps, auto: as Lightning's Trainer.
        devices: Processes, one a device; the embeddings are gathered.
        precision: As Lightning's Trainer: 32-true, 16-mixed, bf16-mixed.
        checkpoint_every: Epochs between checkpoints.
        max_steps: Stop pretraining after this many steps, to try it out; -1 is never.
    """

    method: Literal["mvmr", "vicreg", "barlowtwins", "simclr", "byol"] = "mvmr"
    objective: Literal["paper", "identity", "features", "distillation", "distillation_paper"] = (
        "paper"
    )
    representations: list[Any] | None = None
    representation_weight: float | None = None
    distillation: dict[str, Any] | None = None
    view_terms: bool = True
    cache: str | None = None
    dependence_measure: str = "distance_correlation"
    temperature: float = 0.5
    momentum: float = 0.99
    projector_hidden_dim: int = 2048
    projector_output_dim: int = 2048

    backbone: str = "resnet18"
    stem: Literal["small", "imagenet"] = "small"

    data: str = "photographs"
    data_dir: str = "data"
    download: bool = False
    image_size: int = 96
    normalization: Literal["imagenet", "cifar"] = "imagenet"
    num_workers: int = 0
    crop_scale_min: float = 0.08
    color_jitter: list[float] = field(default_factory=lambda: [0.8, 0.8, 0.8, 0.2])
    color_jitter_probability: float = 0.8
    grayscale_probability: float = 0.2
    blur: bool = True

    epochs: int = 100
    batch_size: int = 256
    optimizer: Literal["adam", "adamw", "sgd", "lars"] = "adam"
    learning_rate: float = 1e-3
    weight_decay: float = 1e-6
    warmup_epochs: float = 10.0
    seed: int = 0

    knn_k: int = 200
    knn_temperature: float = 0.1
    probe_optimizer: Literal["sgd", "adam"] = "sgd"
    probe_epochs: int = 90
    probe_learning_rate: float = 0.1
    ten_crop_resize: float = 1.143
    labels: list[float | str] = field(default_factory=list)
    finetune_epochs: int = 50
    finetune_batch_size: int = 64
    finetune_learning_rate: float = 0.05
    monitor_every: int = 10

    accelerator: str = "auto"
    devices: int = 1
    precision: str = "32-true"
    checkpoint_every: int = 1
    max_steps: int = -1

    def __post_init__(self) -> None:
        """Checks ranges; types and choices are checked where the settings are read."""
        for name in (
            *("epochs", "image_size", "devices", "checkpoint_every", "projector_hidden_dim"),
            *("projector_output_dim", "knn_k", "probe_epochs", "finetune_epochs", "temperature"),
            *("finetune_batch_size", "knn_temperature", "learning_rate", "probe_learning_rate"),
            "finetune_learning_rate",
        ):
            self._check(name, getattr(self, name) > 0, "above 0")
        for name in ("num_workers", "monitor_every", "weight_decay", "warmup_epochs", "seed"):
            self._check(name, getattr(self, name) >= 0, "at least 0")
        for name in ("momentum", "color_jitter_probability", "grayscale_probability"):
            self._check(name, 0 <= getattr(self, name) <= 1, "in [0, 1]")
        self._check("crop_scale_min", 0 < self.crop_scale_min <= 1, "in (0, 1]")
        self._check("color_jitter", len(self.color_jitter) == 4, "four numbers")
        self._check("ten_crop_resize", self.ten_crop_resize >= 1, "at least 1")
        self._check("max_steps", self.max_steps == -1 or self.max_steps > 0, "above 0, or -1")
        for part in self.labels:
            fraction = not isinstance(part, str) and 0 < part <= 1
            self._check("labels", fraction or part == "folds", "fractions in (0, 1], or 'folds'")
        folds = "folds" in self.labels
        self._check("labels", not folds or self.data == "stl10", "fractions: only stl10 has folds")
        share = self.batch_size % self.devices == 0 and self.batch_size >= 4 * self.devices
        needed = f"a multiple of devices ({self.devices}), at least 4 for each"
        self._check("batch_size", share, needed)

    def _check(self, name: str, valid: bool, needed: str) -> None:
        if not valid:
            raise ValueError(f"{name} must be {needed} but is {getattr(self, name)!r}.")

    @property
    def representation_names(self) -> list[Any]:
        """The representations, with the method's default filled in."""
        if self.representations is None:
            preset = preset_settings(self.objective)
            return list(preset.representations) if self.method == "mvmr" else []
        return self.representations

    @property
    def label(self) -> str:
        """A name for tables: the method, and its representations where they are not the default."""
        if self.method == "mvmr":
            name = "mvmr" if self.objective == "paper" else f"mvmr, {self.objective}"
            return name if self.representation_names else f"{name}, no representations"
        return f"{self.method} + representations" if self.representation_names else self.method

    def as_dict(self) -> dict[str, Any]:
        """Returns the settings as plain values."""
        return dataclasses.asdict(self)


def read_file(path: Path) -> Settings:
    """Reads the settings that a run has written.

    Args:
        path: The YAML file.

    Returns:
        The settings.

    Raises:
        FileNotFoundError: If there is no such file.
        TypeError: If a setting is of the wrong type.
        ValueError: If it is not a mapping of known settings in their ranges.
    """
    if not path.is_file():
        raise FileNotFoundError(f"{path} must be a file of settings, but there is no such file.")
    try:
        content = read_yaml(path.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} must be YAML but cannot be read: {error}") from error
    if not isinstance(content, dict):
        shown = reprlib.repr(content)
        raise ValueError(f"{path} must hold settings as 'name: value' but holds {shown}.")
    for name in content:
        if name not in Settings.__dataclass_fields__:
            raise ValueError(f"{path} has an unknown setting {reprlib.repr(name)}.")
    return Settings(**content)
