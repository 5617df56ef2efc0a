"""A student with the heads of the distillation loss, and the process that fits their targets."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor, nn
from torchdistill.common.main_util import is_main_process
from torchdistill.common.module_util import check_if_wrapped
from torchdistill.core.interfaces.pre_epoch_proc import default_pre_epoch_process_with_teacher
from torchdistill.core.interfaces.registry import register_pre_epoch_proc_func
from torchdistill.models.registry import register_auxiliary_model_wrapper
from torchdistill.models.util import (
    load_full_state_dict,
    save_module_ckpt,
    wrap_if_distributed,
)
from torchdistill.models.wrapper import AuxiliaryModelWrapper

from mvmr_loss import DistillationLoss, Representations
from mvmr_loss.teachers.checkpoints import load_tensors

from .. import GATHER_DISTRIBUTED  # noqa: TID252 - of the same checkout
from .teacher import FixedRepresentations

# Where RegressionDependenceLoss finds, beside what the student's hooks recorded, the loss itself.
DISTILLATION = "distillation"


class StudentWithHeads(AuxiliaryModelWrapper):  # type: ignore[misc, unused-ignore]
    """A student with the distillation loss whose heads are trained with it: a torchdistill wrapper.

    torchdistill trains, moves and wraps for several processes what belongs to a model, and nothing of a
    loss: so it is here, as its own auxiliary modules are, and :class:`RegressionDependenceLoss` takes it
    from here. Paths of the student's modules begin with ``student_model.``.

    A checkpoint of it is one of the student alone, for torchdistill's training script loads it into the
    student. What the loss has is kept by ``ckpt``.

    Args:
        student_model: The student.
        embedding_dim: Width of the student's features that the loss is given.
        teacher_dims: Name of each of the teacher's outputs -> width; ``teacher`` where it is one tensor.
        device: Given by torchdistill.
        device_ids: Likewise.
        distributed: Likewise.
        find_unused_parameters: Of the student's ``DistributedDataParallel``.
        ckpt: A file for the heads, the teachers' statistics and the anchors: read if it is there,
            replaced after each epoch by a whole one. None: they last as long as the training.
        **options: Other options of :class:`~mvmr_loss.DistillationLoss`; ``gather_distributed`` is True
            unless given.

    Attributes:
        student_model: The student.
        distillation: The :class:`~mvmr_loss.DistillationLoss`.

    Raises:
        TypeError: If an option is unknown or of a wrong type.
        ValueError: If one is out of range, or ``ckpt`` cannot be read or is of another loss.

    Examples:
        >>> import torch
        >>> device = torch.device("cpu")
        >>> student = StudentWithHeads(nn.Linear(3, 2), 3, {"teacher": 8}, device=device)
        >>> list(student.state_dict())
        ['weight', 'bias']
        >>> len(list(student.parameters()))  # a head has four
        6
    """

    def __init__(
        self,
        student_model: nn.Module,
        embedding_dim: int,
        teacher_dims: Mapping[str, int],
        *,
        device: Any,
        device_ids: Any = None,
        distributed: bool = False,
        find_unused_parameters: bool | None = None,
        ckpt: str | os.PathLike[str] | None = None,
        **options: Any,
    ) -> None:
        super().__init__()
        distillation = DistillationLoss(
            embedding_dim, teacher_dims, **{"gather_distributed": GATHER_DISTRIBUTED, **options}
        )
        self.student_model = wrap_if_distributed(
            student_model, device, device_ids, distributed, find_unused_parameters
        )
        self.distillation = wrap_if_distributed(distillation, device, device_ids, distributed)
        self.ckpt = ckpt
        self._begun = False
        if ckpt is not None and os.path.exists(ckpt):
            _load(self.distillation, ckpt)
            self._begun = True

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Calls the student."""
        return self.student_model(*args, **kwargs)

    def secondary_forward(self, io_dict: dict[str, Any]) -> None:
        """Puts the loss where the criterion, which knows both models' features, finds it."""
        io_dict[DISTILLATION] = {"output": self.distil}

    def distil(self, features: Tensor, teachers: Mapping[str, Tensor]) -> Tensor:
        """Computes the loss and, in training, adds to the anchors.

        Args:
            features: The student's, shape (N, D).
            teachers: Name -> tensor of shape (N, ...).

        Returns:
            Scalar tensor.

        Raises:
            ValueError: If shapes or names do not fit.
        """
        loss: Tensor = self.distillation(features, teachers)
        if self.training:
            _unwrapped(self.distillation).update(features, teachers)
        return loss

    def fit_if_full(self, representations: Representations) -> None:
        """Takes the statistics of a full store, once, unless the training is resumed from ``ckpt``."""
        if not self._begun:
            _unwrapped(self.distillation).fit_if_full(representations)
        self._begun = True

    def post_epoch_process(self, *_: Any, **__: Any) -> None:
        """Writes what the loss has, if there is a file for it."""
        if self.ckpt is not None:
            # Beside it, and then in its place: a training that is stopped meanwhile leaves the old one.
            path = Path(self.ckpt)
            temporary = path.with_name(f".{path.name}.{os.getpid()}")
            try:
                save_module_ckpt(self.distillation, str(temporary))
                if is_main_process():
                    os.replace(temporary, path)
            finally:
                temporary.unlink(missing_ok=True)

    def state_dict(self, *args: Any, **kwargs: Any) -> Any:
        """Returns the student's."""
        return _unwrapped(self.student_model).state_dict(*args, **kwargs)

    def load_state_dict(self, *args: Any, **kwargs: Any) -> Any:
        """Loads the student's."""
        return _unwrapped(self.student_model).load_state_dict(*args, **kwargs)


register_auxiliary_model_wrapper(StudentWithHeads)


def _load(distillation: nn.Module, ckpt: str | os.PathLike[str]) -> None:
    """Loads what the loss has; an error names the file and the option."""
    try:
        load_full_state_dict(distillation, load_tensors(Path(ckpt)))
    except Exception as error:  # Which one depends on what the file holds.
        said = "; ".join(line.strip() for line in str(error).splitlines()[:2])
        raise ValueError(
            f"ckpt must be a file that a training with the same embedding_dim, teacher_dims and options "
            f"has written, but is {str(ckpt)!r} ({type(error).__name__}: {said}); name another, or "
            "remove it to begin anew."
        ) from error


def _unwrapped(module: Any) -> Any:
    """Returns what DistributedDataParallel wraps, if it does."""
    return module.module if check_if_wrapped(module) else module


@register_pre_epoch_proc_func  # type: ignore[untyped-decorator, unused-ignore]
def fit_to_kept_teacher(self: Any, *args: Any, **kwargs: Any) -> None:
    """Fits the teachers' statistics before the first epoch; a ``pre_epoch_process`` of torchdistill.

    They are those of all images where the store of the teacher is full, and else of the batches seen so
    far.

    Args:
        self: The distillation box, whose teacher is :class:`FixedRepresentations` and whose student
            is in :class:`StudentWithHeads`.
        *args: As torchdistill's own process takes.
        **kwargs: Likewise.

    Raises:
        ValueError: If the models are others.
    """
    kept = [m for m in self.teacher_model.modules() if isinstance(m, FixedRepresentations)]
    if not kept or not isinstance(self.student_model, StudentWithHeads):
        raise ValueError(
            "pre_epoch_process must be left out, or be another, where the teacher is not a "
            "FixedRepresentations or the student not in StudentWithHeads, but it is "
            "'fit_to_kept_teacher'."
        )
    self.student_model.fit_if_full(kept[0].representations)
    default_pre_epoch_process_with_teacher(self, *args, **kwargs)
