"""The authors' release's formulation of the loss, written from its description.

Source: docs/method.md: V-statistic distance correlation with squared distances clamped at 1e-4, the
distances and centring of both inputs computed anew in each of the K + 1 terms. The sign of the
representation terms is the paper's here, which costs the same.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor
from torch.nn import functional as F


def _distances(x: Tensor) -> Tensor:
    norms = (x * x).sum(dim=1, keepdim=True)
    squared = norms - 2 * (x @ x.T) + norms.T
    return squared.clamp(min=1e-4).sqrt()


def _centered(d: Tensor) -> Tensor:
    return d - d.mean(dim=1) - d.mean(dim=0)[:, None] + d.mean()


def _distance_correlation(x: Tensor, y: Tensor) -> Tensor:
    n = len(x)
    a, b = _centered(_distances(x)), _centered(_distances(y))
    covariance = ((a * b).mean() / n**2).sqrt()
    variances = ((a * a).mean() / n**2).sqrt() * ((b * b).mean() / n**2).sqrt()
    return covariance / variances.sqrt()


def release_loss(z: Tensor, z_augmented: Tensor, representations: Mapping[str, Tensor]) -> Tensor:
    """Computes the objective in the release's formulation.

    Args:
        z: Embeddings of shape (N, D).
        z_augmented: Embeddings of shape (N, D).
        representations: Name -> tensor of shape (N, D_k).

    Returns:
        Scalar tensor.
    """
    loss = F.mse_loss(z, z_augmented)
    for view in (z, z_augmented):
        loss = loss + F.relu(1 - torch.sqrt(view.var(dim=0) + 1e-4)).mean()
    loss = loss + 1 - _distance_correlation(z, z_augmented)
    for y in representations.values():
        loss = loss + 1 - _distance_correlation(z_augmented, y)
    return loss
