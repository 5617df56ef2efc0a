"""What a teacher asks of a source, and gets."""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

from torch import nn

from mvmr_loss.backbones import HEADS
from mvmr_loss.teachers.preprocessing import TeacherPreprocessing

_WEIGHT_SUFFIXES = (".pt", ".pth", ".ckpt", ".bin", ".tar", ".safetensors")


class Request(NamedTuple):
    """What a source is asked for."""

    model: str | None
    weights: str | None
    options: dict[str, Any]
    prefix: str | None
    keep_head: bool

    def name(self, source: str) -> str:
        """Returns the model's name after checking that there is one."""
        if not isinstance(self.model, str) or not self.model:
            raise ValueError(f"model must name a network of {source} but is {self.model!r}.")
        return self.model

    def file(self) -> Path | None:
        """Returns the checkpoint file, if the weights are one."""
        file = self._file()
        if file is None and self.prefix is not None:
            raise ValueError(
                f"prefix must be None unless weights are a checkpoint file but is {self.prefix!r}."
            )
        return file

    def _file(self) -> Path | None:
        if self.weights is None:
            return None
        path = Path(self.weights).expanduser()
        if path.is_file():
            return path
        if path.suffix in _WEIGHT_SUFFIXES or os.sep in self.weights.removeprefix("hf-hub:"):
            if path.is_dir() or (self.weights.count("/") == 1 and path.suffix == ""):
                return None  # A folder or OWNER/NAME of a hub.
            raise FileNotFoundError(f"weights must be a file or a tag but {path} does not exist.")
        return None

    def library_options(self) -> dict[str, Any]:
        """Returns the options for a library, whose reader of weights must not unpickle objects."""
        for name in ("weights_only", "load_weights_only"):
            if not self.options.get(name, True):
                raise ValueError(
                    f"model_options must not have {name}={self.options[name]!r}, with which weights "
                    "may run code when loaded; leave it out."
                )
        return dict(self.options)

    def warn_if_random(self, source: str) -> None:
        """Warns of a teacher that knows nothing."""
        if self.weights is None:
            warnings.warn(
                f"the teacher {source}: {self.model} has random weights because weights is None.",
                stacklevel=4,
            )


# The network, and how to learn the library's preprocessing, which is asked only where it matters.
Loaded = tuple[nn.Module, Callable[[], TeacherPreprocessing | None]]


def keeps_head(layer: str | None) -> bool:
    """Tells whether a layer is (in) a classifier, by the names that libraries use."""
    return layer is not None and layer.split(".")[0] in HEADS
