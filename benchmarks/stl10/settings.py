"""Every setting of a run: defaults, presets, command line, checks."""

from __future__ import annotations

import argparse
import dataclasses
import math
import reprlib
from collections.abc import Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

import yaml

PRESETS = Path(__file__).with_name("presets")
METHODS = ("mvmr", "vicreg", "barlowtwins", "simclr", "byol")
# The five that the authors' release trains with.
REPRESENTATIONS = ["pixels", "augmented_pixels", "scattering", "hog", "local_std"]
MEAN_STD = {
    "imagenet": ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)),
    "cifar": ((0.491, 0.482, 0.447), (0.247, 0.243, 0.261)),
}


# ruff: noqa: RUF009 (the fields' defaults are made by one function, which makes lists anew)
def _field(default: Any, group: str, text: str, **options: Any) -> Any:
    """Returns a dataclass field that knows its place and words in ``--help``."""
    metadata = {"group": group, "help": text, **options}
    if isinstance(default, (list, tuple)):
        return field(default_factory=lambda: list(default), metadata=metadata)
    return field(default=default, metadata=metadata)


class _PlainLoader(yaml.SafeLoader):
    """Reads plain values. With aliases, a small file could stand for one that no memory holds."""

    def compose_node(self, parent: Any, index: Any) -> Any:
        if self.check_event(yaml.AliasEvent):
            mark = self.peek_event().start_mark
            raise yaml.composer.ComposerError(problem="aliases are not read", problem_mark=mark)
        return super().compose_node(parent, index)


def _read_yaml(text: str) -> Any:
    """Reads plain YAML; a ValueError says what it is instead."""
    try:
        return yaml.load(text, _PlainLoader)
    except RecursionError:
        raise ValueError("it is nested too deeply") from None
    except (yaml.YAMLError, ValueError, OverflowError) as error:
        raise ValueError(str(error)) from error


def _yaml_value(text: str) -> Any:
    """Reads a name, a number or a mapping such as ``{hog: {orientations: 9}}``."""
    try:
        return _read_yaml(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(f"{text!r} must be a name or YAML ({error}).") from error


@dataclass
class Settings:
    """Every setting of a run; each is a key of the preset files and an option on the command line.

    Raises:
        TypeError: If a setting is of the wrong type.
        ValueError: If a setting is out of range.
    """

    method: str = _field("mvmr", "method", "the method", choices=METHODS)
    representations: list[Any] | None = _field(
        None,
        "method",
        "representations of MV-MR's regulariser, for any method: names, or YAML mappings such as "
        "'{name: hog, orientations: 9}'; no value means none. Default: the paper's five for mvmr, "
        "none for the others",
        nargs="*",
        type=_yaml_value,
    )
    distillation: dict[str, Any] | None = _field(
        None,
        "method",
        "options of mvmr_loss.DistillationLoss for mvmr, as YAML: '{teacher_dims: {teacher: 384}}' "
        "names the teachers among the representations, which leave the loss's own terms",
        type=_yaml_value,
    )
    view_terms: bool = _field(
        True, "method", "whether mvmr has its terms between the views; a distillation needs none"
    )
    representation_weight: float = _field(
        1.0, "method", "weight of each representation's term; negative rewards independence"
    )
    representation_cache: str | None = _field(
        None,
        "method",
        "folder in which representations of the non-augmented images, a teacher's among them, are "
        "kept once computed, and read back in later epochs and runs. Default: they are computed "
        "in each step",
        type=str,
    )
    dependence_measure: str = _field(
        "distance_correlation", "method", "measure of dependence, for the regulariser and mvmr"
    )
    temperature: float = _field(0.5, "method", "simclr's temperature")
    momentum: float = _field(0.99, "method", "byol's momentum at the start; it ends at 1")
    projector_hidden_dim: int = _field(2048, "method", "width of the projector's hidden layers")
    projector_output_dim: int = _field(2048, "method", "width of the embeddings")

    backbone: str = _field(
        "resnet18", "backbone", "small (for CPUs), or the name of a torchvision or timm model"
    )
    stem: str = _field(
        "small",
        "backbone",
        "stem of torchvision's ResNets: small is 3x3 with stride 1, the max-pool stays",
        choices=("small", "imagenet"),
    )

    data: str = _field(
        "photographs",
        "data",
        "stl10, cifar10, photographs (embedded, no download), or a folder that has train/ and "
        "test/, optionally unlabeled/, each with one folder of images a class",
    )
    data_dir: str = _field("data", "data", "where stl10 or cifar10 lie, or are downloaded to")
    download: bool = _field(False, "data", "download stl10 or cifar10 if they are not there")
    image_size: int = _field(96, "data", "images are resized and centre-cropped to this side")
    normalization: str = _field(
        "imagenet", "data", "whose mean and standard deviation", choices=tuple(MEAN_STD)
    )
    num_workers: int = _field(0, "data", "worker processes that read images")
    crop_scale_min: float = _field(0.08, "augmentation", "least area of the random crop")
    color_jitter: list[float] = _field(
        (0.8, 0.8, 0.8, 0.2),
        "augmentation",
        "strengths: brightness contrast saturation hue",
        nargs=4,
        type=float,
    )
    color_jitter_probability: float = _field(0.8, "augmentation", "probability of the jitter")
    grayscale_probability: float = _field(0.2, "augmentation", "probability of the greying")
    blur: bool = _field(True, "augmentation", "Gaussian blur, kernel 2 int(0.05 size) + 1")

    epochs: int = _field(100, "optimisation", "epochs of pretraining")
    batch_size: int = _field(256, "optimisation", "images a step, of all processes together")
    optimizer: str = _field(
        "adam", "optimisation", "the optimiser", choices=("adam", "adamw", "sgd", "lars")
    )
    learning_rate: float = _field(1e-3, "optimisation", "learning rate after the warm-up")
    weight_decay: float = _field(
        1e-6, "optimisation", "weight decay, of all but biases and normalisation layers"
    )
    warmup_epochs: float = _field(10.0, "optimisation", "epochs of linear warm-up")
    final_learning_rate: float = _field(
        1e-6, "optimisation", "learning rate at the end of the cosine schedule"
    )
    seed: int = _field(0, "optimisation", "draws weights, order, augmentation and label subsets")

    knn_k: int = _field(200, "evaluation", "neighbours of the weighted kNN")
    knn_temperature: float = _field(0.1, "evaluation", "temperature of the weighted kNN")
    probe_epochs: int = _field(100, "evaluation", "epochs of the linear probe")
    probe_learning_rate: float = _field(1e-3, "evaluation", "learning rate of the linear probe")
    ten_crop_resize: float = _field(
        1.143, "evaluation", "images are resized by this factor before ten crops are cut"
    )
    labels: list[Any] = _field(
        (),
        "evaluation",
        "fine-tune the whole network on these parts of the labels: fractions such as 0.01 0.1, or "
        "'folds' for STL10's ten folds; no value means none",
        nargs="*",
        type=_yaml_value,
    )
    finetune_epochs: int = _field(50, "evaluation", "epochs of fine-tuning")
    finetune_batch_size: int = _field(64, "evaluation", "images a step of fine-tuning, at most")
    finetune_learning_rate: float = _field(
        1e-3, "evaluation", "learning rate of the classifier in fine-tuning; the backbone's is 1/10"
    )
    monitor_every: int = _field(
        10,
        "evaluation",
        "epochs between kNN accuracies during pretraining, on a tenth of the labelled training "
        "images, never on test images; 0 means never",
    )

    accelerator: str = _field("auto", "machine", "cpu, gpu, mps, auto: as Lightning's Trainer")
    devices: int = _field(1, "machine", "processes, one a device; the embeddings are gathered")
    precision: str = _field("32-true", "machine", "as Lightning's Trainer: 16-mixed, bf16-mixed")
    checkpoint_every: int = _field(1, "machine", "epochs between checkpoints")
    max_steps: int = _field(-1, "machine", "stop pretraining after this many steps, to try it out")

    def __post_init__(self) -> None:
        """Checks types and ranges."""
        for f in fields(self):
            setattr(self, f.name, _checked(f, getattr(self, f.name)))
        positive = "epochs image_size devices checkpoint_every projector_hidden_dim knn_k"
        positive += (
            " projector_output_dim probe_epochs finetune_epochs finetune_batch_size temperature"
        )
        positive += " knn_temperature learning_rate probe_learning_rate finetune_learning_rate"
        for name in positive.split():
            self._check(name, getattr(self, name) > 0, "above 0")
        for name in ["num_workers", "monitor_every", "weight_decay", "warmup_epochs", "seed"]:
            self._check(name, getattr(self, name) >= 0, "at least 0")
        for name in ["momentum", "color_jitter_probability", "grayscale_probability"]:
            self._check(name, 0 <= getattr(self, name) <= 1, "in [0, 1]")
        self._check("crop_scale_min", 0 < self.crop_scale_min <= 1, "in (0, 1]")
        self._check(
            "final_learning_rate",
            0 < self.final_learning_rate <= self.learning_rate,
            f"above 0 and at most learning_rate ({self.learning_rate})",
        )
        self._check("ten_crop_resize", self.ten_crop_resize >= 1, "at least 1")
        self._check("max_steps", self.max_steps == -1 or self.max_steps > 0, "above 0, or -1")
        for part in self.labels:
            fraction = isinstance(part, (int, float)) and 0 < part <= 1
            self._check("labels", fraction or part == "folds", "fractions in (0, 1], or 'folds'")
        self._check(
            "labels",
            "folds" not in self.labels or self.data == "stl10",
            "fractions: only stl10 has folds",
        )
        self._check(
            "batch_size",
            self.batch_size >= 4 * self.devices and self.batch_size % self.devices == 0,
            f"a multiple of devices ({self.devices}), at least 4 for each",
        )

    def _check(self, name: str, valid: bool, needed: str) -> None:
        if not valid:
            raise ValueError(f"{name} must be {needed} but is {getattr(self, name)!r}.")

    @property
    def representation_names(self) -> list[Any]:
        """The representations, with the method's default filled in."""
        if self.representations is None:
            return list(REPRESENTATIONS) if self.method == "mvmr" else []
        return self.representations

    @property
    def label(self) -> str:
        """A name for tables: the method, and its representations where they are not the default."""
        if self.method == "mvmr":
            return "mvmr" if self.representation_names else "mvmr, no representations"
        return f"{self.method} + representations" if self.representation_names else self.method

    def as_dict(self) -> dict[str, Any]:
        """Returns the settings as plain values."""
        return dataclasses.asdict(self)


def _checked(f: dataclasses.Field[Any], value: Any) -> Any:
    """Returns a setting's value after checking its type and choices."""
    kind = str(f.type)
    if kind == "float" and isinstance(value, int) and not isinstance(value, bool):
        value = float(value) if abs(value) < 2**1000 else math.inf
    expected: dict[str, Any] = {"int": int, "float": float, "str": str, "bool": bool}
    expected["dict[str, Any]"] = dict
    kind, _, optional = kind.partition(" | ")
    wanted = (expected.get(kind, list), *([type(None)] if optional else []))
    if not isinstance(value, wanted) or (isinstance(value, bool) and kind != "bool"):
        raise TypeError(f"{f.name} must be of type {f.type} but is {value!r}.")
    if isinstance(value, float) and not math.isfinite(value):
        raise ValueError(f"{f.name} must be finite but is {value}.")
    if "choices" in f.metadata and value not in f.metadata["choices"]:
        raise ValueError(
            f"{f.name} must be one of {', '.join(f.metadata['choices'])} but is {value!r}."
        )
    return value


def preset_names() -> list[str]:
    """Returns the names of the presets.

    Examples:
        >>> preset_names()
        ['paper', 'quick']
    """
    return sorted(path.stem for path in PRESETS.glob("*.yaml"))


def read_file(path: Path) -> dict[str, Any]:
    """Reads settings from a YAML file.

    Args:
        path: The file.

    Returns:
        Name -> value.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If it is not a mapping of known settings.
    """
    if not path.is_file():
        raise FileNotFoundError(f"{path} must be a file of settings, but there is no such file.")
    try:
        content = _read_yaml(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} must be YAML but cannot be read: {error}") from error
    if not isinstance(content, dict):
        shown = reprlib.repr(content)
        raise ValueError(f"{path} must hold settings as 'name: value' but holds {shown}.")
    known = {f.name for f in fields(Settings)}
    for name in content:
        if name not in known:
            raise ValueError(f"{path} has an unknown setting {name!r}; see --help for all of them.")
    return content


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds an option for each setting; one that is not given is left out of the namespace.

    Args:
        parser: The parser.
    """
    groups: dict[str, Any] = {}
    for f in fields(Settings):
        options = dict(f.metadata)
        name, text = options.pop("group"), options.pop("help")
        if name not in groups:
            groups[name] = parser.add_argument_group(name)
        default = Settings.__dataclass_fields__[f.name].default
        if default is dataclasses.MISSING:
            default = f.default_factory()  # type: ignore[misc]
        if default is not None:
            shown = " ".join(map(str, default)) if isinstance(default, list) else default
            text = f"{text} (default: {shown})"
        kind = {"int": int, "float": float, "str": str}.get(str(f.type))
        if str(f.type) == "bool":
            options["action"] = argparse.BooleanOptionalAction
        elif "type" not in options and kind is not None:
            options["type"] = kind
        if "choices" not in options and str(f.type) != "bool":
            options.setdefault("metavar", f.name.rsplit("_", 1)[-1].upper())
        groups[name].add_argument(
            f"--{f.name.replace('_', '-')}",
            default=argparse.SUPPRESS,
            help=text.replace("%", "%%"),
            **options,
        )


def given(arguments: argparse.Namespace) -> dict[str, Any]:
    """Returns the settings that were given on the command line.

    Args:
        arguments: Parsed by a parser that :func:`add_arguments` filled.

    Returns:
        Name -> value.
    """
    return {
        f.name: getattr(arguments, f.name) for f in fields(Settings) if hasattr(arguments, f.name)
    }


def resolve(files: Sequence[Path], overrides: dict[str, Any]) -> Settings:
    """Returns the settings of files, each overriding the one before, and then of ``overrides``.

    Args:
        files: YAML files.
        overrides: Name -> value.

    Returns:
        The settings.

    Raises:
        FileNotFoundError: If a file does not exist.
        TypeError: If a setting is of the wrong type.
        ValueError: If a setting is unknown or out of range.

    Examples:
        >>> resolve([PRESETS / "paper.yaml"], {"epochs": 3}).batch_size
        256
    """
    values: dict[str, Any] = {}
    for path in files:
        values.update(read_file(path))
    return Settings(**{**values, **overrides})
