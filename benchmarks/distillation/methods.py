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
from mvmr_loss.distillation import (
    DistillationLoss,
    Standardization,
    TeacherRegression,
)


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

    Attributes:
        capturable: Whether a step can be a CUDA graph.
    """

    capturable = True

    def __init__(self, head: nn.Module) -> None:
        super().__init__()
        self.head = head

    def fit(self, embeddings: Tensor) -> None:
        """Looks at the teacher's embeddings of all training images, shape (M, E)."""

    def forward(self, batch: Batch) -> Tensor:
        """Computes the mean over both views of :meth:`compare`, a scalar."""
        return (self.compare(batch.view, batch) + self.compare(batch.augmented, batch)) / 2

    def compare(self, features: Tensor, batch: Batch) -> Tensor:
        """Computes the loss of one view's features, shape (N, D); a scalar."""
        raise NotImplementedError

    def update(self, batch: Batch) -> None:
        """Is called with each batch after its step."""


def projection(widths: Widths, layers: int) -> nn.Module:
    """Builds MV-MR's projection head, 512 wide; with no layers, the loss sees the features."""
    if layers == 0:
        return nn.Identity()
    return MVMRProjectionHead(widths.student, 512, 512, num_layers=layers)


class MVMR(Objective):
    """MV-MR as published, with the teacher as the only representation, or with none.

    Only the augmented view meets the teacher.

    Source: Entropy 26(6):466, 2024 (arXiv 2303.12130).

    Args:
        widths: As every objective has them.
        layers: Of the projection head.
        teacher: Whether there is a teacher.
    """

    def __init__(self, widths: Widths, *, layers: int, teacher: bool = True) -> None:
        super().__init__(projection(widths, layers))
        self.loss = MVMRLoss()
        self.teacher = teacher

    def forward(self, batch: Batch) -> Tensor:
        """Computes the loss."""
        z, z_augmented = self.head(batch.view), self.head(batch.augmented)
        return self.loss(z, z_augmented, {"teacher": batch.teacher} if self.teacher else None)


_PLAIN: dict[str, Any] = {
    "hidden_dim": 0,
    "rotation": "none",
    "dependence_weight": 1.0,
    "stacked": False,
}


class Distillation(Objective):
    """This package's :class:`mvmr_loss.distillation.DistillationLoss`, on both views.

    Args:
        widths: As every objective has them.
        view_weight: Weight of MV-MR's view terms on the features; 0: none.
        **options: Of the loss; if not given a linear head, no rotation, and a dependence of weight 1
            of each view as it is.
    """

    def __init__(self, widths: Widths, *, view_weight: float = 0.0, **options: Any) -> None:
        super().__init__(nn.Identity())
        options = {**_PLAIN, **options}
        self.loss = DistillationLoss(widths.student, {"teacher": widths.teacher}, **options)
        self.views = MVMRLoss()
        self.view_weight = view_weight
        self.capturable = not options.get("anchors")  # How many there are changes.

    def fit(self, embeddings: Tensor) -> None:
        """Takes the teacher's statistics."""
        self.loss.fit({"teacher": embeddings})

    def forward(self, batch: Batch) -> Tensor:
        """Computes the loss."""
        loss: Tensor = self.loss([batch.view, batch.augmented], {"teacher": batch.teacher})
        if self.view_weight:
            loss = loss + self.view_weight * self.views(batch.view, batch.augmented)
        return loss

    def update(self, batch: Batch) -> None:
        """Adds the batch to the anchors."""
        self.loss.update([batch.view, batch.augmented], {"teacher": batch.teacher})


class Mimicry(Objective):
    """Mean squared error to the teacher's embeddings, after a map to their width.

    Source: feature distillation of CLIP-KD, Yang et al., CVPR 2024 (arXiv 2307.12732), section 3.

    Args:
        widths: As every objective has them.
        target: The embeddings "as they are", of length 1 ("normalized"), or "standardized" with one
            scale.
        hidden_dim: Width of a map of two layers; 0: a linear one.
    """

    def __init__(self, widths: Widths, *, target: str, hidden_dim: int = 0) -> None:
        super().__init__(TeacherRegression(*widths[:2], hidden_dim=hidden_dim).head)
        self.target = target
        self.standardize = Standardization(widths.teacher, rotation="none")

    def fit(self, embeddings: Tensor) -> None:
        """Takes the teacher's statistics."""
        self.standardize.fit(embeddings)

    def compare(self, features: Tensor, batch: Batch) -> Tensor:
        """Computes the error."""
        student, teacher = self.head(features), batch.teacher
        if self.target == "normalized":
            student, teacher = F.normalize(student, dim=1), F.normalize(teacher, dim=1)
        elif self.target == "standardized":
            teacher = self.standardize(teacher)
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


class SimilarityPreserving(Objective):
    """Mean squared error between the batch's similarities, each row scaled to length 1.

    Source: Tung and Mori, ICCV 2019 (arXiv 1907.09682), eq. 1 to 4.
    """

    def __init__(self, widths: Widths, *, layers: int) -> None:
        super().__init__(projection(widths, layers))

    def compare(self, features: Tensor, batch: Batch) -> Tensor:
        """Computes the loss; the mean over a row's squares times N, so that it does not vanish."""
        student, teacher = (F.normalize(x @ x.T) for x in (self.head(features), batch.teacher))
        return F.mse_loss(student, teacher) * len(student)


class CKALoss(Objective):
    """One minus the linear CKA with the teacher's embeddings, by lightly's loss.

    Source: Kornblith et al., ICML 2019 (arXiv 1905.00414); lightly's ``PatchKernelAlignmentLoss``,
    for which the batch is the tokens of a single image.
    """

    def __init__(self, widths: Widths, *, layers: int) -> None:
        super().__init__(projection(widths, layers))
        self.loss = PatchKernelAlignmentLoss()
        self.capturable = False  # It looks at a value.

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


class Joined(Objective):
    """A baseline with the dependence on the teacher beside it, on the features.

    Args:
        widths: As every objective has them.
        base: The baseline's key in :data:`METHODS`.
        dependence_weight: Weight of the dependence.
        stacked: Whether it is that of both views as one batch, rather than of each.
        **options: Of the baseline.
    """

    def __init__(
        self,
        widths: Widths,
        *,
        base: str,
        dependence_weight: float,
        stacked: bool = False,
        **options: Any,
    ) -> None:
        super().__init__(nn.Identity())
        self.stacked = stacked
        self.base = METHODS[base].build(widths, **options)
        self.dependence = MultiRepresentationRegularizer(dependence_weight)
        self.capturable = self.base.capturable

    def fit(self, embeddings: Tensor) -> None:
        """Shows the baseline the teacher's embeddings."""
        self.base.fit(embeddings)

    def forward(self, batch: Batch) -> Tensor:
        """Computes the sum."""
        views, teacher = [batch.view, batch.augmented], batch.teacher
        if self.stacked:
            views, teacher = [torch.cat(views)], torch.cat([teacher, teacher])
        loss: Tensor = self.base(batch) + self.dependence(views, {"teacher": teacher})
        return loss


class Method(NamedTuple):
    """A method of the comparison.

    Attributes:
        label: Its name in tables.
        build: From widths and one of the candidates to the objective.
        candidates: Options to choose from on held-out training images, three for each method; one
            where nothing is chosen, as another's options are taken but for what is left out.
    """

    label: str
    build: Callable[..., Objective]
    candidates: tuple[Mapping[str, Any], ...]


# On the features themselves, or through a head as the paper's.
_HEADS = ({"layers": 0}, {"layers": 2}, {"layers": 3})
_ALONE: dict[str, Any] = {"regression_weight": 0.0}
_PHI_S: dict[str, Any] = {"hidden_dim": 512, "rotation": "hadamard"}
_STACKED: dict[str, Any] = {"stacked": True}
_CORRECTED: dict[str, Any] = {"dependence_measure": "u_distance_correlation_sqr"}


def _beside(base: str) -> tuple[dict[str, Any], ...]:
    """Returns the candidates of a relational baseline with the dependence beside it."""
    return tuple(
        {"base": base, "layers": 0, "dependence_weight": weight} for weight in (0.3, 1.0, 3.0)
    )


# In the order in which they are run: the most telling first.
METHODS = {
    "regression": Method(
        "cosine + smooth L1",
        Distillation,
        (
            {"dependence_weight": 0.0},
            {"dependence_weight": 0.0, "hidden_dim": 512},
            {"dependence_weight": 0.0, **_PHI_S},
        ),
    ),
    "regression_dependence": Method(
        "cosine + smooth L1 + dependence",
        Distillation,
        (
            {"dependence_weight": 0.3, **_PHI_S, **_STACKED},
            {"dependence_weight": 0.3, **_PHI_S, **_STACKED, "directions": True},
            {"dependence_weight": 1.0, **_PHI_S, **_STACKED},
        ),
    ),
    "mimicry": Method(
        "MSE mimicry",
        Mimicry,
        (
            {"target": "normalized"},
            {"target": "standardized"},
            {"target": "standardized", "hidden_dim": 512},
        ),
    ),
    "dependence": Method(
        "dependence alone",
        Distillation,
        (
            _ALONE,
            {**_ALONE, **_STACKED},
            {**_ALONE, **_STACKED, "directions": True},
        ),
    ),
    # What stacking the views does, and what anchors do, which come without it.
    "regression_dependence_each_view": Method(
        "cosine + smooth L1 + dependence of each view",
        Distillation,
        (
            {"dependence_weight": 0.3, **_PHI_S},
            {"dependence_weight": 0.3, **_PHI_S, "directions": True},
            {"dependence_weight": 1.0, **_PHI_S},
        ),
    ),
    # The recommended one without its dependence, else equal to it.
    "regression_rotated": Method(
        "cosine + smooth L1, rotated", Distillation, ({"dependence_weight": 0.0, **_PHI_S},)
    ),
    "dependence_corrected": Method(
        "dependence alone, bias-corrected",
        Distillation,
        (
            {**_ALONE, **_CORRECTED},
            {**_ALONE, **_CORRECTED, **_STACKED},
            {**_ALONE, **_CORRECTED, **_STACKED, "directions": True},
        ),
    ),
    "published": Method("MV-MR, published weights", MVMR, _HEADS),
    "regression_dependence_anchors": Method(
        "cosine + smooth L1 + dependence, anchors",
        Distillation,
        (
            {"dependence_weight": 0.3, **_PHI_S, "anchors": 512},
            {"dependence_weight": 0.3, **_PHI_S, "anchors": 1024},
            {"dependence_weight": 1.0, **_PHI_S, "anchors": 1024},
        ),
    ),
    "rkd": Method("RKD, distances", RKDDistance, _HEADS),
    "mimicry_dependence": Method(
        "MSE mimicry + dependence",
        Joined,
        (
            {"base": "mimicry", "target": "standardized", "dependence_weight": 0.3},
            {"base": "mimicry", "target": "standardized", "dependence_weight": 1.0},
            {
                **{"base": "mimicry", "target": "standardized", "hidden_dim": 512},
                "dependence_weight": 0.3,
            },
        ),
    ),
    "dependence_anchors": Method(
        "dependence alone, anchors",
        Distillation,
        (
            {**_ALONE, "anchors": 512},
            {**_ALONE, "anchors": 1024},
            {**_ALONE, "anchors": 2048},
        ),
    ),
    "regression_dependence_views": Method(
        "cosine + smooth L1 + dependence + view terms",
        Distillation,
        (
            {"dependence_weight": 0.3, **_PHI_S, "view_weight": 0.03},
            {"dependence_weight": 0.3, **_PHI_S, "view_weight": 0.1},
            {"dependence_weight": 0.3, **_PHI_S, "view_weight": 1.0},
        ),
    ),
    "cka": Method("CKA", CKALoss, _HEADS),
    "similarity": Method("similarity-preserving", SimilarityPreserving, _HEADS),
    "supervised": Method(
        "supervised",
        Supervised,
        ({"label_smoothing": 0.0}, {"label_smoothing": 0.1}, {"label_smoothing": 0.2}),
    ),
    "no_teacher": Method(
        "MV-MR without teacher",
        MVMR,
        (
            {"layers": 0, "teacher": False},
            {"layers": 2, "teacher": False},
            {"layers": 3, "teacher": False},
        ),
    ),
    "rkd_dependence": Method("RKD + dependence", Joined, _beside("rkd")),
    "cka_dependence": Method("CKA + dependence", Joined, _beside("cka")),
    "similarity_dependence": Method(
        "similarity-preserving + dependence", Joined, _beside("similarity")
    ),
}

_WIDE: dict[str, Any] = {"hidden_dim": 2048}
_MSE: dict[str, Any] = {"target": "standardized"}
# The candidates where a method's learning rate is chosen, too: the best ones above, and wide heads.
WITH_RATES: dict[str, tuple[Mapping[str, Any], ...]] = {
    "regression": tuple(
        {"dependence_weight": 0.0, **head} for head in ({"hidden_dim": 512}, _PHI_S, _WIDE)
    ),
    "regression_dependence": (
        {"dependence_weight": 0.3, **_PHI_S, **_STACKED},
        {"dependence_weight": 0.1, **_PHI_S, **_STACKED},
        {"dependence_weight": 0.1, **_WIDE, **_STACKED},
    ),
    "mimicry": (_MSE, {**_MSE, "hidden_dim": 512}, {**_MSE, **_WIDE}),
    "mimicry_dependence": tuple(
        {"base": "mimicry", **_MSE, **head, "dependence_weight": weight, **_STACKED}
        for head, weight in (({"hidden_dim": 512}, 0.1), ({"hidden_dim": 512}, 0.3), (_WIDE, 0.1))
    ),
}
