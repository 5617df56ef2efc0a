"""The distillation task."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from timm.task import FeatureDistillationTask
from timm.utils.model import unwrap_model
from torch import Tensor, nn

from mvmr_loss import MultiRepresentationRegularizer, Representations

from .. import GATHER_DISTRIBUTED  # noqa: TID252 - of the same checkout

# The name of the teacher among the representations.
TEACHER = "teacher"


class DependenceDistillationTask(FeatureDistillationTask):
    """timm's ``FeatureDistillationTask`` with dependence on the teacher's features for its term.

    The features are the pooled ones before the classifier, as there. In place of the mean squared error
    it is one minus their distance correlation over the batch, or another measure's: it asks for equal
    relations between the images, not for equal features, so that widths may differ and no projection is
    trained. Everything else is timm's: the teacher, both weights, compilation, EMA, checkpoints.

    Source: MV-MR, Entropy 26(6):466, 2024 (arXiv 2303.12130), the terms of the representations.

    Args:
        student_model: The model to train; a ``pretrained_cfg`` tells its mean and std.
        teacher_model: A timm model's name, whose weights are downloaded; or a module; or a
            ``DistillationTeacher``.
        criterion: Of the logits and the labels. None: timm's of ``criterion_kwargs``.
        criterion_kwargs: Of ``timm.task.create_classification_loss``.
        teacher_pretrained_path: Weights of a teacher that is given by name.
        teacher_pretrained_cfg_overlay: Changes of its ``pretrained_cfg``.
        loss: A :class:`~mvmr_loss.MultiRepresentationRegularizer`, or a mapping of its options;
            ``gather_distributed`` is True unless given.
        representations: Further fixed features that the student's shall depend on, of the same
            augmented images: what :class:`~mvmr_loss.Representations` takes, or one. None: the teacher
            alone.
        distill_loss_weight: As in timm: both weights are 1 unless given; of ``task_loss_weight`` alone
            it is the complement to 1.
        task_loss_weight: Of the criterion.
        student_feature_dim: Taken for the sake of timm's training script, and not needed.
        teacher_feature_dim: Likewise.
        device: Of buffers.
        dtype: Of buffers.
        verbose: Whether timm logs what it sets up.

    Raises:
        TypeError: If ``loss`` is of another form or one of its options unknown.
        ValueError: If an option is out of range, or a representation is called "teacher".

    Examples:
        >>> import timm
        >>> student = timm.create_model("test_resnet", num_classes=10)
        >>> teacher = timm.create_model("test_vit", num_classes=10)
        >>> task = DependenceDistillationTask(student, teacher, nn.CrossEntropyLoss(), verbose=False)
        >>> result = task(torch.rand(4, 3, 160, 160), torch.arange(4))
        >>> list(result)
        ['loss', 'output', 'task_loss', 'kd_loss', 'kd_representations/teacher']
    """

    def __init__(
        self,
        student_model: nn.Module,
        teacher_model: Any,
        criterion: nn.Module | None = None,
        criterion_kwargs: dict[str, Any] | None = None,
        teacher_pretrained_path: str | None = None,
        teacher_pretrained_cfg_overlay: dict[str, Any] | None = None,
        loss: MultiRepresentationRegularizer | Mapping[str, Any] | None = None,
        representations: Sequence[Any] | Mapping[str, Any] | Representations | None = None,
        distill_loss_weight: float | None = None,
        task_loss_weight: float | None = None,
        student_feature_dim: int | None = None,
        teacher_feature_dim: int | None = None,
        device: torch.device | None = None,
        dtype: torch.dtype | None = None,
        verbose: bool = True,
    ) -> None:
        newer: dict[str, Any] = {  # not of every version: a checkout of timm may be of an older one
            "criterion_kwargs": criterion_kwargs,
            "teacher_pretrained_cfg_overlay": teacher_pretrained_cfg_overlay,
        }
        super().__init__(
            student_model,
            teacher_model,
            criterion=criterion,
            teacher_pretrained_path=teacher_pretrained_path,
            **{name: value for name, value in newer.items() if value is not None},
            distill_loss_weight=distill_loss_weight,
            task_loss_weight=task_loss_weight,
            # Equal: no projection from one width to the other is made.
            student_feature_dim=1,
            teacher_feature_dim=1,
            device=device,
            dtype=dtype,
            verbose=False,  # it would tell of these widths
        )
        self.verbose = verbose
        self.dependence = _regularizer(loss)
        if representations is not None and not isinstance(representations, Representations):
            unwrapped: Any = unwrap_model(student_model)  # type: ignore[no-untyped-call]
            statistics = unwrapped.pretrained_cfg["mean"], unwrapped.pretrained_cfg["std"]
            representations = Representations(representations, normalization=statistics)
        self.representations = representations
        if representations is not None and TEACHER in representations.by_name:
            raise ValueError(
                f"representations must have other names than {TEACHER!r}, which is the teacher's; "
                "give a label: {'mine': {'name': ...}}."
            )

    def forward(self, input: Tensor, target: Tensor) -> dict[str, Tensor]:  # noqa: A002 - timm's name
        """Computes both losses of a batch.

        Args:
            input: Images (N, C, H, W), normalised for the student; N at least 2, or what the measure
                needs.
            target: What the criterion takes, such as labels of shape (N,).

        Returns:
            ``loss``, ``output`` (the logits), ``task_loss``, ``kd_loss``, as of timm's tasks, and each
            weighted term of ``kd_loss`` as ``kd_representations/NAME``.
        """
        logits, student_features = self.trainable_module(input)
        task_loss = self.criterion(logits, target)
        with torch.no_grad():
            statistics: tuple[Any, Any] = self.student_mean, self.student_std
            images = self.teacher.normalize_input(input, *statistics)
            teacher_features = self.teacher(images, return_features=True)
        features = {} if self.representations is None else self.representations(input)
        terms = self.dependence.forward_components(
            student_features.flatten(1), {TEACHER: teacher_features, **features}
        )
        loss = self.task_loss_weight * task_loss + self.distill_loss_weight * terms.total
        named = terms.as_dict("kd_")
        return {"loss": loss, "output": logits, "task_loss": task_loss, **named}


def _regularizer(loss: object) -> MultiRepresentationRegularizer:
    """Returns the dependence terms from an object or from options."""
    if isinstance(loss, MultiRepresentationRegularizer):
        return loss
    if not isinstance(loss, Mapping | None):
        raise TypeError(
            "loss must be a mvmr_loss.MultiRepresentationRegularizer or a mapping of its options, such "
            f"as {{'dependence_measure': 'debiased_cka'}}, but is a {type(loss).__name__}."
        )
    return MultiRepresentationRegularizer(
        **{"gather_distributed": GATHER_DISTRIBUTED, **(loss or {})}
    )
