"""The mid-level losses: dependence alone, and with a regression through trained heads."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn
from torchdistill.losses.registry import register_mid_level_loss

from mvmr_loss import MultiRepresentationRegularizer

from .. import GATHER_DISTRIBUTED  # noqa: TID252 - of the same checkout
from .student import DISTILLATION

# The name of a teacher's output where it is one tensor.
TEACHER = "teacher"


class _OfTwoLayers(nn.Module):
    """What compares a layer of the student with one of the teacher."""

    def __init__(
        self,
        student_module_path: str,
        teacher_module_path: str,
        student_module_io: str = "output",
        teacher_module_io: str = "output",
    ) -> None:
        super().__init__()
        self.student_module_path, self.student_module_io = student_module_path, student_module_io
        self.teacher_module_path, self.teacher_module_io = teacher_module_path, teacher_module_io

    def forward(
        self, student_io_dict: Mapping[str, Any], teacher_io_dict: Mapping[str, Any], *_: Any
    ) -> Tensor:
        """Computes the loss from what the hooks of both models recorded.

        Args:
            student_io_dict: Path -> ``input`` or ``output`` -> tensor of shape (N, ...).
            teacher_io_dict: Likewise; the value may be a mapping from names to such tensors.
            *_: The targets, which are not used.

        Returns:
            Scalar tensor.

        Raises:
            ValueError: If a module or its input or output was not recorded, or shapes do not fit.
        """
        student = _recorded(
            "student", student_io_dict, self.student_module_path, self.student_module_io
        )
        teacher = _recorded(
            "teacher", teacher_io_dict, self.teacher_module_path, self.teacher_module_io
        )
        named = teacher if isinstance(teacher, Mapping) else {TEACHER: teacher}
        features = {name: y.detach() for name, y in named.items()}
        return self._compare(student_io_dict, student.flatten(1), features)

    def _compare(
        self, student_io_dict: Mapping[str, Any], student: Tensor, teachers: Mapping[str, Tensor]
    ) -> Tensor:
        """Computes the loss of the student's features, shape (N, D), and the teacher's by name."""
        raise NotImplementedError


@register_mid_level_loss
class DependenceLoss(_OfTwoLayers):
    """One minus the dependence of a student's features on a teacher's: a mid-level loss of torchdistill.

    Any two layers will do, of any widths, flattened. The teacher may put out several representations by
    name, as :class:`FixedRepresentations` does; each is a term then.

    Source: MV-MR, Entropy 26(6):466, 2024 (arXiv 2303.12130), the terms of the representations.

    Args:
        student_module_path: Path of the student's module, such as ``"avgpool"``; ``"."`` is the model.
        teacher_module_path: Path of the teacher's module, likewise.
        student_module_io: ``"input"`` or ``"output"`` of that module.
        teacher_module_io: Likewise.
        loss: Options of :class:`~mvmr_loss.MultiRepresentationRegularizer`, such as
            ``{"dependence_measure": "debiased_cka"}``; ``gather_distributed`` is True unless given.

    Raises:
        TypeError: If ``loss`` is no mapping or one of its options unknown.
        ValueError: If an option is out of range.

    Examples:
        >>> import torch
        >>> criterion = DependenceLoss("layer", "layer")
        >>> x = torch.rand(8, 4, 2, 2)
        >>> criterion({"layer": {"output": x}}, {"layer": {"output": 2 * x}}).round(decimals=3)
        tensor(0.)
    """

    def __init__(
        self,
        student_module_path: str,
        teacher_module_path: str,
        student_module_io: str = "output",
        teacher_module_io: str = "output",
        loss: Mapping[str, Any] | None = None,
    ) -> None:
        super().__init__(
            student_module_path, teacher_module_path, student_module_io, teacher_module_io
        )
        if not isinstance(loss, Mapping | None):
            raise TypeError(
                "loss must be a mapping of options of mvmr_loss.MultiRepresentationRegularizer, such as "
                f"{{'dependence_measure': 'debiased_cka'}}, but is a {type(loss).__name__}."
            )
        self.dependence = MultiRepresentationRegularizer(
            **{"gather_distributed": GATHER_DISTRIBUTED, **(loss or {})}
        )

    def _compare(
        self, student_io_dict: Mapping[str, Any], student: Tensor, teachers: Mapping[str, Tensor]
    ) -> Tensor:
        loss: Tensor = self.dependence(student, teachers)
        return loss


@register_mid_level_loss
class RegressionDependenceLoss(_OfTwoLayers):
    """Regression onto a teacher's features through heads, and dependence on them: a mid-level loss.

    It is the :class:`~mvmr_loss.DistillationLoss` of a student in :class:`StudentWithHeads`, where its
    options are. Any two layers will do, as of :class:`DependenceLoss`; the student's is best the one
    before the classifier.

    Source: as of :class:`~mvmr_loss.DistillationLoss`.

    Args:
        student_module_path: Path of the student's module, such as ``"student_model.avgpool"``.
        teacher_module_path: Path of the teacher's module; ``"."`` is the model.
        student_module_io: ``"input"`` or ``"output"`` of that module.
        teacher_module_io: Likewise.
    """

    def _compare(
        self, student_io_dict: Mapping[str, Any], student: Tensor, teachers: Mapping[str, Tensor]
    ) -> Tensor:
        distil = student_io_dict.get(DISTILLATION, {}).get("output")
        if distil is None:
            raise ValueError(
                "the student must be in StudentWithHeads for RegressionDependenceLoss but has no heads; "
                "give it auxiliary_model_wrapper: {key: StudentWithHeads, kwargs: {embedding_dim: ..., "
                "teacher_dims: ...}}, and no other wrapper around that."
            )
        loss: Tensor = distil(student, teachers)
        return loss


def _recorded(who: str, io_dict: Mapping[str, Any], path: str, io: str) -> Any:
    """Returns what a hook recorded."""
    found = io_dict.get(path, {}).get(io)
    if found is None:
        known = [f"{io} of {path!r}" for path, values in io_dict.items() for io in values]
        raise ValueError(
            f"the {who}'s {io} of {path!r} must be recorded but only {', '.join(known) or 'nothing'} "
            f"is; add {path!r} to forward_hook: {io} of the {who} in the configuration."
        )
    return found
