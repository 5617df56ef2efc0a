"""Distance correlation from other matrices than N x N: with anchors, and of tokens within an image."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from mvmr_loss._checks import (
    as_rows,
    check_batch,
    check_bool,
    check_finite,
    check_number,
    without_autocast,
)
from mvmr_loss.dependence.matrices import ROUNDINGS, WIDE
from mvmr_loss.dependence.measures import DependenceMeasure


def cross_distance_correlation(
    x: Tensor,
    y: Tensor,
    x_anchors: Tensor,
    y_anchors: Tensor,
    *,
    exponent: float = 1.0,
    rooted: bool = True,
) -> Tensor:
    """Computes the distance correlation of the distances to anchors (biased estimator).

    The matrices are those of the distances from N samples to M anchors, double-centred over rows and
    columns. Anchors are seen in both spaces, row i of ``x_anchors`` and of ``y_anchors`` being one
    sample, so that a batch is compared with more samples than it has. Where the samples are their own
    anchors, this is :func:`distance_correlation`; with others, the covariance may be negative.

    Source: Szekely, Rizzo and Bakirov, Annals of Statistics 35(6), 2007, definition 5, with M
    columns in place of N.

    Args:
        x: Tensor of shape (N, D) or (N, ...), which is flattened. Half precision is raised to float32.
        y: Tensor of shape (N, E) or (N, ...).
        x_anchors: Tensor of shape (M, D), M >= 2.
        y_anchors: Tensor of shape (M, E).
        exponent: Exponent of the Euclidean distance, in (0, 2).
        rooted: Whether the root is taken; without, this is the squared distance correlation.

    Returns:
        Scalar tensor in [0, 1] up to rounding, in [-1, 1] if not ``rooted``. It is 0, with a zero
        gradient, where a matrix is constant up to rows and columns and, if ``rooted``, where the
        covariance is not above 0.

    Raises:
        TypeError: If an input is not a floating-point tensor.
        ValueError: If the shapes do not fit, there are fewer than 2 samples or anchors, the exponent
            is out of range or, on a CPU, a value is not finite.

    Examples:
        >>> x = torch.arange(1.0, 17.0).reshape(4, 4)
        >>> y = torch.tensor([[1.0], [0.0], [0.0], [1.0]])
        >>> round(cross_distance_correlation(x, y, x, y).item(), 4)
        0.5266
        >>> round(cross_distance_correlation(x[:2], y[:2], x, y, rooted=False).item(), 4)
        0.5774
    """
    exponent = check_number("exponent", exponent, above=0, below=2)
    check_bool("rooted", rooted)
    named = {"x": x, "y": y, "x_anchors": x_anchors, "y_anchors": y_anchors}
    for name, batch in named.items():
        check_batch(name, batch, 2)
        check_finite(name, batch)
    flat = {name: as_rows(batch) for name, batch in named.items()}
    for other, first in (("y", "x"), ("y_anchors", "x_anchors")):
        if len(flat[other]) != len(flat[first]):
            raise ValueError(
                f"{first} and {other} must have the same number of samples but have "
                f"{len(flat[first])} and {len(flat[other])}."
            )
    for first in ("x", "y"):
        widths = flat[first].shape[1], flat[f"{first}_anchors"].shape[1]
        if widths[0] != widths[1]:
            raise ValueError(
                f"{first}_anchors must be as wide as {first}, {widths[0]}, but are {widths[1]} wide."
            )
    a, b = (CenteredDistances.of(flat[n], flat[f"{n}_anchors"], exponent) for n in ("x", "y"))
    return a.correlation(b, rooted=rooted).to(_result_dtype(x, y))


def token_distance_correlation(
    x: Tensor, y: Tensor, *, exponent: float = 1.0, corrected: bool = False
) -> Tensor:
    """Computes the squared distance correlation between the tokens of each image, of two networks.

    Each image has its own T x T matrices, of the distances between its tokens or patches. What one
    token has to do with another is compared, so that the networks' widths need not be equal and no
    head is needed, as in the distillation of dense features.

    Source: Szekely, Rizzo and Bakirov, Annals of Statistics 35(6), 2007, definition 5; corrected,
    Szekely and Rizzo, Annals of Statistics 42(6), 2014, definition 3.

    Args:
        x: Tensor of shape (N, T, D), T >= 2 (4 if ``corrected``). Half precision is raised to float32.
        y: Tensor of shape (N, T, E), the same tokens in the same order.
        exponent: Exponent of the Euclidean distance, in (0, 2).
        corrected: Whether to correct the bias (U-centred).

    Returns:
        Tensor of shape (N,), in [0, 1] up to rounding, in [-1, 1] if ``corrected``; 0, with a zero
        gradient, where the tokens of an image are all equal.

    Raises:
        TypeError: If an input is not a floating-point tensor.
        ValueError: If the shapes do not fit, there are too few tokens, the exponent is out of range
            or, on a CPU, a value is not finite.

    Examples:
        >>> x = torch.arange(1.0, 17.0).reshape(1, 4, 4)
        >>> y = torch.tensor([[[1.0], [0.0], [0.0], [1.0]]])
        >>> token_distance_correlation(x, x), token_distance_correlation(x, y)
        (tensor([1.]), tensor([0.2774]))
    """
    exponent = check_number("exponent", exponent, above=0, below=2)
    least = 4 if check_bool("corrected", corrected) else 2
    for name, tokens in (("x", x), ("y", y)):
        check_batch(name, tokens)
        check_finite(name, tokens)
        if tokens.ndim != 3 or tokens.shape[1] < least:
            raise ValueError(
                f"{name} must have shape (N, T, D) with at least {least} tokens T but has shape "
                f"{tuple(tokens.shape)}; feature maps (N, D, H, W) become tokens by "
                f"{name}.flatten(2).mT."
            )
    if x.shape[:2] != y.shape[:2]:
        raise ValueError(
            "x and y must have the same images and tokens but have shapes "
            f"{tuple(x.shape)} and {tuple(y.shape)}; resize the larger feature map to the other's."
        )
    a, b = (CenteredDistances.of(t, t, exponent, corrected=corrected) for t in (x, y))
    return a.correlation(b).to(_result_dtype(x, y))


class TokenDistanceCorrelation(DependenceMeasure):
    """The mean over images of :func:`token_distance_correlation`, as a measure.

    Source: see :func:`token_distance_correlation`.

    Args:
        exponent: Exponent of the Euclidean distance, in (0, 2).
        corrected: Whether to correct the bias.

    Examples:
        >>> tokens = torch.arange(24.0).reshape(2, 4, 3)
        >>> 1 - TokenDistanceCorrelation()(tokens, tokens.sin())  # a term to minimise
        tensor(0.6438)
    """

    min_samples = 1

    def __init__(self, *, exponent: float = 1.0, corrected: bool = False) -> None:
        super().__init__()
        self.exponent = check_number("exponent", exponent, above=0, below=2)
        self.corrected = check_bool("corrected", corrected)

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        """Computes the mean over images.

        Args:
            x: Tensor of shape (N, T, D).
            y: Tensor of shape (N, T, E).

        Returns:
            Scalar tensor.
        """
        options = {"exponent": self.exponent, "corrected": self.corrected}
        return token_distance_correlation(x, y, **options).mean()  # type: ignore[arg-type]

    def extra_repr(self) -> str:
        """Returns the options, for printing."""
        return f"exponent={self.exponent}, corrected={self.corrected}"


class CenteredDistances(NamedTuple):
    """Distances from samples to anchors, centred, and the inverse of their norm.

    Attributes:
        matrices: Tensor of shape (..., N, M).
        inverse: One over the norm of each matrix, shape (...); 0 where it is of rounding only.
    """

    matrices: Tensor
    inverse: Tensor

    @classmethod
    def of(
        cls, x: Tensor, anchors: Tensor, exponent: float = 1.0, *, corrected: bool = False
    ) -> CenteredDistances:
        """Computes them for checked samples (..., N, D) and anchors (..., M, D)."""
        raw = _distances(x, anchors, exponent)
        centered = _u_centered(raw) if corrected else _double_centered(raw)
        squares = centered.square().sum(dim=(-2, -1))
        level = (ROUNDINGS * torch.finfo(raw.dtype).eps) ** 2
        # A norm of rounding is none: its inverse is 0, with a zero gradient.
        rounding = level * raw.detach().square().sum(dim=(-2, -1))
        return cls(centered, torch.where(squares <= rounding, torch.inf, squares).rsqrt())

    def correlation(self, other: CenteredDistances, *, rooted: bool = False) -> Tensor:
        """Computes the squared distance correlation of each pair of matrices, or its root."""
        products = (self.matrices * other.matrices).sum(dim=(-2, -1))
        value = products * self.inverse * other.inverse
        if not rooted:
            return value
        vanishes = value <= 0
        return torch.where(vanishes, 0.0, torch.where(vanishes, 1.0, value).sqrt())


def _result_dtype(x: Tensor, y: Tensor) -> torch.dtype:
    return torch.promote_types(torch.promote_types(x.dtype, y.dtype), torch.float32)


def _distances(x: Tensor, anchors: Tensor, exponent: float) -> Tensor:
    """Computes distances to a power, in a unit of their own: (..., N, D), (..., M, D) -> (..., N, M).

    Coinciding points have a distance of 0, with a zero gradient.
    """
    wide = WIDE.get(x.device.type, torch.float64)
    x, anchors = x.to(wide), anchors.to(wide)
    # The correlation has no unit; squares of this one stay within the type's range.
    unit = torch.maximum(x.detach().abs().amax(), anchors.detach().abs().amax())
    unit = torch.where(unit == 0, 1.0, unit)
    x, anchors = x / unit, anchors / unit
    center = anchors.mean(dim=-2, keepdim=True)
    x, anchors = x - center, anchors - center
    norms = x.square().sum(dim=-1)[..., :, None] + anchors.square().sum(dim=-1)[..., None, :]
    with without_autocast(x):
        squared = norms - 2 * (x @ anchors.mT)
    nothing = squared <= ROUNDINGS * torch.finfo(wide).eps * norms.detach()
    return torch.where(nothing, 0.0, torch.where(nothing, 1.0, squared).pow(exponent / 2))


def _double_centered(a: Tensor) -> Tensor:
    """Subtracts row and column means of the last two dimensions."""
    rows, columns = a.mean(dim=-1, keepdim=True), a.mean(dim=-2, keepdim=True)
    return a - rows - columns + rows.mean(dim=-2, keepdim=True)


def _u_centered(a: Tensor) -> Tensor:
    """Subtracts row and column means of the entries off the diagonal, which is set to 0."""
    n = a.shape[-1]
    rows, columns = a.sum(dim=-1, keepdim=True), a.sum(dim=-2, keepdim=True)
    total = rows.sum(dim=-2, keepdim=True)
    centered = a - (rows + columns) / (n - 2) + total / ((n - 1) * (n - 2))
    diagonal = torch.eye(n, dtype=torch.bool, device=a.device)
    return centered.masked_fill(diagonal, 0.0)
