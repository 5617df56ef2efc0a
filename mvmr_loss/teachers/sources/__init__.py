"""Where teachers come from: one file a source, one table of them all."""

from __future__ import annotations

from collections.abc import Callable

from mvmr_loss.teachers.sources.checkpoint import from_checkpoint
from mvmr_loss.teachers.sources.open_clip import from_open_clip
from mvmr_loss.teachers.sources.request import Loaded, Request
from mvmr_loss.teachers.sources.timm import from_timm
from mvmr_loss.teachers.sources.torchvision import from_torchvision
from mvmr_loss.teachers.sources.transformers import from_transformers

SOURCES: dict[str, Callable[[Request], Loaded]] = {
    "torchvision": from_torchvision,
    "timm": from_timm,
    "open_clip": from_open_clip,
    "transformers": from_transformers,
    "checkpoint": from_checkpoint,
}
