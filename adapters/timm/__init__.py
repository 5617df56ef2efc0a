"""A distillation task for timm: regression and dependence, for any widths of features."""

from __future__ import annotations

MINIMUM_TIMM = "1.0.31"

try:
    import timm.task as _task
except ImportError as error:
    raise ImportError(
        "mvmr_loss.adapters.timm needs timm.task, which cannot be imported; install it with: "
        f"pip install 'timm>={MINIMUM_TIMM}'"
    ) from error
del _task

from .task import DependenceDistillationTask  # noqa: E402

__all__ = ["DependenceDistillationTask"]
