"""The distillation task."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from timm.task import FeatureDistillationTask
from timm.task.distillation import FeatureDistillationTrainableModule
from timm.utils.model import unwrap_model
from torch import Tensor, nn

from mvmr_loss import (
    DistillationLoss,
    MultiRepresentationRegularizer,
    Normalization,
    Representations,
    preset_settings,
)

from .. import GATHER_DISTRIBUTED, fixed  # noqa: TID252 - of the same checkout

# The name of the teacher among the representations.
TEACHER = "teacher"


class _StudentWithHeads(FeatureDistillationTrainableModule):
    """A student, and the loss with its heads where timm's module has a projection.

    What is there timm trains, clips, averages and keeps in checkpoints beside the student's state.
    """

    def forward(  # type: ignore[override]
        self,
        input: Tensor,  # noqa: A002 - timm's name
        teachers: Mapping[str, Tensor],
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Computes the logits, and ``kd_loss`` with its weighted terms.

        Here, and not in the task: DistributedDataParallel asks that all parameters are used within.
        """
        student: Any = self.student
        loss: Any = self.projection
        feature_map = student.forward_features(input)
        logits = student.forward_head(feature_map)
        features = student.forward_head(feature_map, pre_logits=True).flatten(1)
        components = loss.forward_components(features, teachers)
        if self.training:
            loss.update(features, teachers)
        return logits, components.as_dict("kd_")


class DependenceDistillationTask(FeatureDistillationTask):
    """timm's ``FeatureDistillationTask`` with regression and dependence for its term.

    The features are the pooled ones before the classifier, as there. In place of the mean squared error
    it is :class:`~mvmr_loss.DistillationLoss`, whose defaults are the best known recipe: the student's
    features are regressed onto the teacher's, standardised, through a head, and depend on them. Or it is
    dependence alone (``loss``), which asks for equal relations between the images, not for equal
    features, and needs no head. Widths may differ. Everything else is timm's: the teacher, both
    weights, compilation, EMA, checkpoints, which have the heads beside the student.

    Source: MV-MR, Entropy 26(6):466, 2024 (arXiv 2303.12130), the terms of the representations; see
    :class:`~mvmr_loss.DistillationLoss` for the regression.

    Args:
        student_model: The model to train; a ``pretrained_cfg`` tells its mean and std.
        teacher_model: A timm model's name, whose weights are downloaded; or a module; or a
            ``DistillationTeacher``.
        criterion: Of the logits and the labels. None: timm's of ``criterion_kwargs``.
        criterion_kwargs: Of ``timm.task.create_classification_loss``.
        teacher_pretrained_path: Weights of a teacher that is given by name.
        teacher_pretrained_cfg_overlay: Changes of its ``pretrained_cfg``.
        loss: For dependence alone: a :class:`~mvmr_loss.MultiRepresentationRegularizer`, or a mapping
            of its options; ``gather_distributed`` is True unless given.
        distillation: A :class:`~mvmr_loss.DistillationLoss`, or a mapping of its options.
            ``embedding_dim`` and ``teacher_dims`` are those of the models, and of the representations
            for images of the student's ``input_size``; ``gather_distributed`` is True. All of that
            unless given. None: its defaults, where there is no ``loss``.
        representations: Further fixed features of the same augmented images, treated as the teacher's
            are: what :class:`~mvmr_loss.Representations` takes, sketched to 1024 numbers unless there
            is a ``loss``; or one, of the student's normalisation. None: the teacher alone.
        distill_loss_weight: As in timm: both weights are 1 unless given; of ``task_loss_weight`` alone
            it is the complement to 1.
        task_loss_weight: Of the criterion.
        student_feature_dim: Width of the student's features. None: what the model says. With ``loss``
            it is not needed.
        teacher_feature_dim: Likewise, of the teacher's.
        device: Of buffers.
        dtype: Of buffers.
        verbose: Whether timm logs what it sets up.

    Attributes:
        distillation: The :class:`~mvmr_loss.DistillationLoss`; None with ``loss``.
        dependence: The :class:`~mvmr_loss.MultiRepresentationRegularizer`; None without ``loss``.

    Raises:
        TypeError: If ``loss`` or ``distillation`` is of another form or one of its options unknown.
        ValueError: If both are given, an option is out of range, a representation is called
            "teacher", or representations are of another normalisation than the student's.

    Examples:
        >>> import timm
        >>> student = timm.create_model("test_resnet", num_classes=10)
        >>> teacher = timm.create_model("test_vit", num_classes=10)
        >>> task = DependenceDistillationTask(student, teacher, nn.CrossEntropyLoss(), verbose=False)
        >>> result = task(torch.rand(4, 3, 160, 160), torch.arange(4))
        >>> list(result)
        ['loss', 'output', 'task_loss', 'kd_loss', 'kd_regression/teacher', 'kd_dependence/teacher']
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
        distillation: DistillationLoss | Mapping[str, Any] | None = None,
        representations: Sequence[Any] | Mapping[str, Any] | Representations | None = None,
        distill_loss_weight: float | None = None,
        task_loss_weight: float | None = None,
        student_feature_dim: int | None = None,
        teacher_feature_dim: int | None = None,
        device: torch.device | None = None,
        dtype: torch.dtype | None = None,
        verbose: bool = True,
    ) -> None:
        if loss is not None and distillation is not None:
            raise ValueError(
                "loss must be left out with distillation, which has a dependence of its own, but is "
                f"{loss!r}; give loss for dependence alone, or distillation for regression too."
            )
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
        unwrapped: Any = unwrap_model(student_model)  # type: ignore[no-untyped-call]
        if isinstance(representations, Representations):
            _check_normalization(representations, getattr(unwrapped, "pretrained_cfg", {}))
        elif representations is not None:
            statistics = unwrapped.pretrained_cfg["mean"], unwrapped.pretrained_cfg["std"]
            # Of all their numbers a head would be gigabytes; dependence alone needs none.
            sketch_dim = None if loss is not None else preset_settings("features").sketch_dim
            representations = Representations(
                representations, normalization=statistics, sketch_dim=sketch_dim
            )
        if representations is not None and representations.cache is not None:
            raise ValueError(
                "representations must have no cache, as timm augments each image anew and tells no "
                f"index of it, but have {representations.cache!r}."
            )
        self.representations = representations
        if representations is not None and TEACHER in representations.by_name:
            raise ValueError(
                f"representations must have other names than {TEACHER!r}, which is the teacher's; "
                "give a label: {'mine': {'name': ...}}."
            )
        self.dependence = None if loss is None else _regularizer(loss)
        if loss is None:
            own = self._distillation_loss(distillation, student_feature_dim, teacher_feature_dim)
            self.trainable_module = _StudentWithHeads(student_model, own.to(self.device))

    def _distillation_loss(
        self, distillation: object, student_dim: int | None, teacher_dim: int | None
    ) -> DistillationLoss:
        """Returns the loss from an object or from options, with the widths that the models tell."""
        if isinstance(distillation, DistillationLoss):
            return distillation
        if not isinstance(distillation, Mapping | None):
            raise TypeError(
                "distillation must be a mvmr_loss.DistillationLoss or a mapping of its options, such as "
                f"{{'dependence_weight': 0.3}}, but is a {type(distillation).__name__}."
            )
        options = {"gather_distributed": GATHER_DISTRIBUTED, **(distillation or {})}
        student: Any = unwrap_model(self.trainable_module.student)  # type: ignore[no-untyped-call]
        if "embedding_dim" not in options:
            options["embedding_dim"] = student_dim or self._detect_feature_dim(student)
        if "teacher_dims" not in options:
            width = teacher_dim or self._detect_feature_dim(self.teacher.model)
            size = student.pretrained_cfg["input_size"]
            others = {} if self.representations is None else self.representations.sizes(*size)
            options["teacher_dims"] = {TEACHER: width, **others}
        return DistillationLoss(**options)

    @property
    def distillation(self) -> DistillationLoss | None:
        """The loss with its heads, which is part of the trainable module; None with ``loss``."""
        trainable: Any = unwrap_model(self.trainable_module)  # type: ignore[no-untyped-call]
        loss: DistillationLoss | None = trainable.projection
        return loss

    def forward(self, input: Tensor, target: Tensor) -> dict[str, Tensor]:  # noqa: A002 - timm's name
        """Computes both losses of a batch.

        Args:
            input: Images (N, C, H, W), normalised for the student; N at least 2, or what the measure
                needs.
            target: What the criterion takes, such as labels of shape (N,).

        Returns:
            ``loss``, ``output`` (the logits), ``task_loss``, ``kd_loss``, as of timm's tasks, and each
            weighted term of ``kd_loss``: ``kd_regression/NAME`` and ``kd_dependence/NAME``, or
            ``kd_representations/NAME`` of dependence alone.
        """
        with torch.no_grad():
            statistics: tuple[Any, Any] = self.student_mean, self.student_std
            images = self.teacher.normalize_input(input, *statistics)
            teacher_features = self.teacher(images, return_features=True)
        teachers = {TEACHER: teacher_features}
        if self.representations is not None:
            teachers.update(fixed(self.representations, input))
        if self.dependence is None:
            logits, named = self.trainable_module(input, teachers)
        else:
            logits, features = self.trainable_module(input)
            named = self.dependence.forward_components(features.flatten(1), teachers).as_dict("kd_")
        task_loss = self.criterion(logits, target)
        loss = self.task_loss_weight * task_loss + self.distill_loss_weight * named["kd_loss"]
        return {"loss": loss, "output": logits, "task_loss": task_loss, **named}


def _check_normalization(representations: Representations, config: Mapping[str, Any]) -> None:
    """Raises if representations undo another normalisation than that of the student's images."""
    told = representations.normalization
    if "mean" not in config or "std" not in config:
        return
    done = Normalization(tuple(config["mean"]), tuple(config["std"]))
    if told != done:
        raise ValueError(
            f"representations must be of the student's normalization, mean {done.mean} and std "
            f"{done.std}, but are of mean {told.mean} and std {told.std}; give "
            f"Representations(..., normalization={[list(done.mean), list(done.std)]})."
        )


def _regularizer(loss: object) -> MultiRepresentationRegularizer:
    """Returns the dependence terms from an object or from options."""
    if isinstance(loss, MultiRepresentationRegularizer):
        return loss
    if not isinstance(loss, Mapping):
        raise TypeError(
            "loss must be a mvmr_loss.MultiRepresentationRegularizer or a mapping of its options, such "
            f"as {{'dependence_measure': 'debiased_cka'}}, but is a {type(loss).__name__}."
        )
    return MultiRepresentationRegularizer(**{"gather_distributed": GATHER_DISTRIBUTED, **loss})
