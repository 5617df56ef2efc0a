"""What is compared: each method's loss on two views of a batch, and the options it is chosen from."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import torch
from lightly.loss import PatchKernelAlignmentLoss
from torch import Tensor, nn
from torch.nn import functional as F

from mvmr_loss import MultiRepresentationRegularizer, MVMRLoss, MVMRProjectionHead
from mvmr_loss.dependence import pairwise_distances


class Batch(NamedTuple):
    """What a loss may look at.

    Attributes:
        view: The student's features of the images as they are, shape (N, D).
        augmented: Its features of the augmented images, shape (N, D).
        teacher: The teacher's embeddings of the images as they are, shape (N, E).
        labels: Classes, shape (N,).
    """

    view: Tensor
    augmented: Tensor
    teacher: Tensor
    labels: Tensor


class Widths(NamedTuple):
    """Numbers of the student's features, the teacher's embedding and the classes."""

    student: int
    teacher: int
    classes: int


class Objective(nn.Module):
    """A loss with the layers it trains beside the student.

    Args:
        head: What turns the student's features into what the loss sees.
    """

    def __init__(self, head: nn.Module) -> None:
        super().__init__()
        self.head = head

    def forward(self, batch: Batch) -> Tensor:
        """Computes the mean over both views of :meth:`compare`, a scalar."""
        return (self.compare(batch.view, batch) + self.compare(batch.augmented, batch)) / 2

    def compare(self, features: Tensor, batch: Batch) -> Tensor:
        """Computes the loss of one view's features, shape (N, D); a scalar."""
        raise NotImplementedError


def projection(widths: Widths, layers: int) -> nn.Module:
    """Builds MV-MR's projection head, 512 wide; with no layers, the loss sees the features."""
    if layers == 0:
        return nn.Identity()
    return MVMRProjectionHead(widths.student, 512, 512, num_layers=layers)


class MVMR(Objective):
    """MV-MR with the teacher as the only representation, or with none.

    Only the augmented view meets the teacher, as the method has it, unless ``both_views``.

    Source: Entropy 26(6):466, 2024 (arXiv 2303.12130).

    Args:
        widths: As every objective has them.
        layers: Of the projection head.
        teacher: Whether there is a teacher.
        teacher_weight: Weight of its term; 1 is the published one.
        both_views: Whether the view as it is meets the teacher, too; the term is then a mean.
        **options: Of the loss: weights of the view terms, 1 if not given, and the measure.
    """

    def __init__(
        self,
        widths: Widths,
        *,
        layers: int,
        teacher: bool,
        teacher_weight: float = 1.0,
        both_views: bool = False,
        **options: Any,
    ) -> None:
        super().__init__(projection(widths, layers))
        self.view_terms = MVMRLoss(**options)
        self.teacher_term = MultiRepresentationRegularizer(
            teacher_weight, dependence_measure=self.view_terms.measure
        )
        self.teacher = teacher
        self.both_views = both_views

    def forward(self, batch: Batch) -> Tensor:
        """Computes the loss."""
        z, z_augmented = self.head(batch.view), self.head(batch.augmented)
        loss = self.view_terms(z, z_augmented)
        if self.teacher:
            views = [z, z_augmented] if self.both_views else [z_augmented]
            loss = loss + self.teacher_term(views, {"teacher": batch.teacher})
        return loss


class TeacherTerm(Objective):
    """MV-MR's dependence on the teacher alone."""

    def __init__(self, widths: Widths, *, layers: int) -> None:
        super().__init__(projection(widths, layers))
        self.loss = MultiRepresentationRegularizer()

    def compare(self, features: Tensor, batch: Batch) -> Tensor:
        """Computes one minus the distance correlation with the teacher's embeddings."""
        return self.loss(self.head(features), {"teacher": batch.teacher})


class Mimicry(Objective):
    """Mean squared error to the teacher's embeddings, after a linear map.

    Source: feature distillation of CLIP-KD, Yang et al., CVPR 2024 (arXiv 2307.12732), section 3.
    """

    def __init__(self, widths: Widths, *, normalized: bool) -> None:
        super().__init__(nn.Linear(widths.student, widths.teacher))
        self.normalized = normalized

    def compare(self, features: Tensor, batch: Batch) -> Tensor:
        """Computes the error, of embeddings of length 1 where ``normalized``."""
        student, teacher = self.head(features), batch.teacher
        if self.normalized:
            student, teacher = F.normalize(student, dim=1), F.normalize(teacher, dim=1)
        return F.mse_loss(student, teacher)


class RKDDistance(Objective):
    """Relational knowledge distillation by distances: Huber loss on those over their mean.

    Source: Park et al., CVPR 2019 (arXiv 1904.05068), eq. 5 to 7.
    """

    def __init__(self, widths: Widths, *, layers: int) -> None:
        super().__init__(projection(widths, layers))

    def compare(self, features: Tensor, batch: Batch) -> Tensor:
        """Computes the loss over all pairs of images."""
        student, teacher = (relative_distances(x) for x in (self.head(features), batch.teacher))
        return F.smooth_l1_loss(student, teacher)


def relative_distances(x: Tensor) -> Tensor:
    """Computes the distance of each pair over the mean distance, shape (N (N - 1) / 2,).

    Examples:
        >>> relative_distances(torch.tensor([[0.0], [1.0], [3.0]]))
        tensor([0.5000, 1.5000, 1.0000])
    """
    i, j = torch.triu_indices(len(x), len(x), 1, device=x.device)
    distances = pairwise_distances(x)[i, j]
    return distances / distances.mean()


class CKALoss(Objective):
    """One minus the linear CKA with the teacher's embeddings, by lightly's loss.

    Source: Kornblith et al., ICML 2019 (arXiv 1905.00414); lightly's ``PatchKernelAlignmentLoss``,
    for which the batch is the tokens of a single image.
    """

    def __init__(self, widths: Widths, *, layers: int) -> None:
        super().__init__(projection(widths, layers))
        self.loss = PatchKernelAlignmentLoss()

    def compare(self, features: Tensor, batch: Batch) -> Tensor:
        """Computes the loss; zeros make both equally wide, which a linear kernel does not see."""
        student, teacher = self.head(features), batch.teacher
        width = max(student.shape[1], teacher.shape[1])
        student, teacher = (F.pad(x, (0, width - x.shape[1]))[None] for x in (student, teacher))
        return self.loss(student, teacher)


class Supervised(Objective):
    """Cross-entropy of a linear classifier with the labels."""

    def __init__(self, widths: Widths, *, label_smoothing: float) -> None:
        super().__init__(nn.Linear(widths.student, widths.classes))
        self.label_smoothing = label_smoothing

    def compare(self, features: Tensor, batch: Batch) -> Tensor:
        """Computes the cross-entropy."""
        return F.cross_entropy(
            self.head(features), batch.labels, label_smoothing=self.label_smoothing
        )


class Method(NamedTuple):
    """A method of the comparison.

    Attributes:
        label: Its name in tables.
        build: From widths and one of the candidates to the objective.
        candidates: Options to choose from on held-out training images, two for each method.
    """

    label: str
    build: Callable[..., Objective]
    candidates: tuple[Mapping[str, Any], Mapping[str, Any]]


# On the features themselves, or through the paper's head of three layers.
_HEADS = ({"layers": 0}, {"layers": 3})

# What the variants below led to.
_STRONG_TEACHER = {"teacher_weight": 100.0, "both_views": True}

METHODS = {
    "mvmr": Method(
        "MV-MR, published weights", MVMR, tuple({**head, "teacher": True} for head in _HEADS)
    ),
    "mvmr_strong": Method(
        "MV-MR, strong teacher term",
        MVMR,
        tuple({**head, "teacher": True, **_STRONG_TEACHER} for head in _HEADS),
    ),
    "teacher_term": Method("teacher term alone", TeacherTerm, _HEADS),
    "mimicry": Method(
        "MSE mimicry, linear map", Mimicry, ({"normalized": False}, {"normalized": True})
    ),
    "rkd": Method("RKD, distances", RKDDistance, _HEADS),
    "cka": Method("CKA", CKALoss, _HEADS),
    "no_teacher": Method(
        "MV-MR without teacher", MVMR, tuple({**head, "teacher": False} for head in _HEADS)
    ),
    "supervised": Method(
        "supervised", Supervised, ({"label_smoothing": 0.0}, {"label_smoothing": 0.1})
    ),
}

# Changes to MV-MR on the features themselves, to see what limits it; judged on held-out training images.
VARIANTS: dict[str, Mapping[str, Any]] = {
    "no-invariance": {"invariance_weight": 0.0},
    "no-variance": {"variance_weight": 0.0},
    "no-view-dependence": {"dependence_weight": 0.0},
    "teacher-10": {"teacher_weight": 10.0},
    "teacher-100": {"teacher_weight": 100.0},
    "both-views-1": {"both_views": True},
    "both-views-10": {"both_views": True, "teacher_weight": 10.0},
    "both-views-100": {"both_views": True, "teacher_weight": 100.0},
    "both-views-10-view-dependence-only": {
        **{"both_views": True, "teacher_weight": 10.0},
        **{"invariance_weight": 0.0, "variance_weight": 0.0},
    },
    "both-views-100-bias-corrected": {
        **{"both_views": True, "teacher_weight": 100.0},
        "dependence_measure": "u_distance_correlation_sqr",
    },
}
