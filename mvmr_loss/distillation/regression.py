"""Regression of a student's embeddings onto a teacher's features."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from mvmr_loss._checks import (
    check_batch,
    check_finite_by,
    check_int,
    check_number,
)
from mvmr_loss._objective import named_views, unit_length
from mvmr_loss.distillation.standardization import Rotation, Scale, Standardization


def regression_loss(
    prediction: Tensor,
    target: Tensor,
    *,
    cosine_weight: float = 1.0,
    smooth_l1_weight: float = 1.0,
) -> Tensor:
    """Computes one minus the cosine similarity, plus the smooth L1 loss, of predicted features.

    Source: Theia (arXiv 2407.20179), section 3.2, and UNIC (arXiv 2408.05088), section 3.1, which
    add the two, on standardised features.

    Args:
        prediction: Tensor of shape (N, E). Half precision is raised to float32.
        target: Tensor of shape (N, E), of variance about 1.
        cosine_weight: Weight of the mean over samples of one minus the cosine.
        smooth_l1_weight: Weight of the mean over all numbers of the smooth L1 loss.

    Returns:
        Scalar tensor, at least 0.

    Raises:
        TypeError: If an input is no floating-point tensor or a weight no number.
        ValueError: If the shapes are not equal, a weight is negative or, on a CPU, a value is not
            finite.

    Examples:
        >>> regression_loss(torch.tensor([[1.0, 0.0]]), torch.tensor([[0.0, 1.0]]))
        tensor(1.5000)
    """
    weights = (
        check_number("cosine_weight", cosine_weight, minimum=0),
        check_number("smooth_l1_weight", smooth_l1_weight, minimum=0),
    )
    for name, x in (("prediction", prediction), ("target", target)):
        check_batch(name, x)
        if x.ndim != 2 or x.shape != prediction.shape:
            raise ValueError(
                "prediction and target must have one shape (N, E) but have "
                f"{tuple(prediction.shape)} and {tuple(target.shape)}."
            )
    loss = _mean_over_views(prediction, target, *weights)
    check_finite_by(loss, {"prediction": prediction, "target": target})
    return loss


def _mean_over_views(
    predictions: Tensor, target: Tensor, cosine_weight: float, smooth_l1_weight: float
) -> Tensor:
    """Computes the loss of predictions of shape (views, N, E), or (N, E) of one."""
    dtype = torch.promote_types(predictions.dtype, torch.float32)
    predictions, target = predictions.to(dtype), target.to(dtype)
    # Of any size of numbers; 0 for features that are 0.
    cosine = 1 - (unit_length(predictions) * unit_length(target)).sum(dim=-1).mean()
    smooth_l1 = F.smooth_l1_loss(predictions, target.expand_as(predictions))
    return cosine_weight * cosine + smooth_l1_weight * smooth_l1


class TeacherRegression(nn.Module):
    """Regression of embeddings onto a teacher's standardised features, through a head.

    The head belongs to the loss, not to the student: give its parameters to the optimiser and leave
    it behind after the training. A teacher of any width will do. In CLIP-KD's comparison regression
    is the strongest single term of distillation.

    Each process compares its own samples; DistributedDataParallel's mean of the gradients is that of
    the whole batch. Wrap the loss in it, or add it to a wrapped model, so that the head is the same
    in all processes.

    Source: CLIP-KD, CVPR 2024 (arXiv 2307.12732), feature distillation; Theia (arXiv 2407.20179);
    UNIC (arXiv 2408.05088); the standardisation: PHI-S (arXiv 2410.01680).

    Args:
        embedding_dim: Width D of the student's embeddings, best of its backbone's features.
        teacher_dim: Width E of the teacher's features.
        hidden_dim: Width of a head of two layers, linear, GELU, linear; None: the larger of D and
            512; 0: one linear layer.
        cosine_weight: Weight of one minus the cosine similarity, at least 0.
        smooth_l1_weight: Weight of the smooth L1 loss, at least 0.
        scale: Of the features, see :class:`Standardization`: ``"isotropic"`` for a network's,
            ``"coordinate"`` for handcrafted ones.
        rotation: Of the features, likewise.
        gather_distributed: Whether features are counted over all processes where they are
            standardised by those seen; see :class:`Standardization`.

    Attributes:
        head: From embeddings to features.
        standardization: Of the teacher's features; ``fit`` it to those of the whole data set.

    Raises:
        TypeError: If an argument is of a wrong type.
        ValueError: If one is out of range.

    Examples:
        >>> _ = torch.manual_seed(0)
        >>> features = torch.randn(100, 32)  # the teacher's, of the whole data set
        >>> regression = TeacherRegression(embedding_dim=8, teacher_dim=32)
        >>> _ = regression.standardization.fit(features)
        >>> z, z_augmented = torch.randn(2, 16, 8)
        >>> regression([z, z_augmented], features[:16]).shape
        torch.Size([])
        >>> len(list(regression.parameters()))  # of the head: for the optimiser
        4
    """

    def __init__(
        self,
        embedding_dim: int,
        teacher_dim: int,
        *,
        hidden_dim: int | None = None,
        cosine_weight: float = 1.0,
        smooth_l1_weight: float = 1.0,
        scale: Scale = "isotropic",
        rotation: Rotation = "auto",
        gather_distributed: bool = False,
    ) -> None:
        super().__init__()
        self.embedding_dim = check_int("embedding_dim", embedding_dim, minimum=1)
        teacher_dim = check_int("teacher_dim", teacher_dim, minimum=1)
        self.cosine_weight = check_number("cosine_weight", cosine_weight, minimum=0)
        self.smooth_l1_weight = check_number("smooth_l1_weight", smooth_l1_weight, minimum=0)
        if cosine_weight == smooth_l1_weight == 0:
            raise ValueError("cosine_weight and smooth_l1_weight must not both be 0.")
        self.standardization = Standardization(
            teacher_dim, scale=scale, rotation=rotation, gather_distributed=gather_distributed
        )
        hidden_dim = max(embedding_dim, 512) if hidden_dim is None else hidden_dim
        self.head: nn.Module = nn.Linear(embedding_dim, teacher_dim)
        if check_int("hidden_dim", hidden_dim, minimum=0):
            self.head = nn.Sequential(
                nn.Linear(embedding_dim, hidden_dim), nn.GELU(), nn.Linear(hidden_dim, teacher_dim)
            )

    def forward(
        self,
        embeddings: Tensor | Sequence[Tensor],
        features: Tensor,
        *,
        standardized: bool = False,
    ) -> Tensor:
        """Computes the mean over views of :func:`regression_loss`.

        Args:
            embeddings: The student's, of shape (N, D), or a list of them, one a view.
            features: The teacher's, of shape (N, E), or (N, ...), which is flattened.
            standardized: Whether they come from the attribute ``standardization``, of shape (N, E).

        Returns:
            Scalar tensor, at least 0.

        Raises:
            TypeError: If an input is no floating-point tensor.
            ValueError: If the shapes do not fit or, on a CPU, a value is not finite.
        """
        named = named_views("embeddings", embeddings)
        check_batch("features", features)
        for name, view in named.items():
            check_batch(name, view)
            if view.shape != (len(features), self.embedding_dim):
                raise ValueError(
                    f"{name} must have shape ({len(features)}, {self.embedding_dim}), a row for each "
                    f"of the features, but has shape {tuple(view.shape)}."
                )
        width = self.standardization.width
        if standardized and features.shape[1:] != (width,):
            raise ValueError(
                f"features must have shape (N, {width}) where they are standardized but have "
                f"shape {tuple(features.shape)}."
            )
        target = features if standardized else self.standardization(features)
        if not torch.compiler.is_compiling() and target.is_inference():
            target = target.clone()  # which a gradient can keep
        target = target.detach()
        # Whatever the embeddings' precision, that of the head. All views at once: as many launches
        # as for one.
        dtype = next(self.head.parameters()).dtype
        predictions = self.head(torch.cat([view.to(dtype) for view in named.values()]))
        predictions = predictions.unflatten(0, (len(named), -1))
        loss = _mean_over_views(predictions, target, self.cosine_weight, self.smooth_l1_weight)
        if not standardized:  # else who standardised them looks, and knows what they are called
            check_finite_by(loss, {**named, "features": features})
        return loss

    def extra_repr(self) -> str:
        """Returns the arguments, for printing."""
        return f"cosine_weight={self.cosine_weight}, smooth_l1_weight={self.smooth_l1_weight}"
