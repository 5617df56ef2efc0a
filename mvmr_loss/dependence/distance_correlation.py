"""Distance covariance and correlation, biased and bias-corrected, and partial distance correlation."""

from __future__ import annotations

import functools
import math

import torch
from torch import Tensor

from mvmr_loss._checks import check_batch, check_finite, check_number
from mvmr_loss.dependence.matrices import WIDE, squared_distances
from mvmr_loss.dependence.measures import Distance, Estimator, compare_two, dependence
from mvmr_loss.distributed import ALL_ROWS


def distance_estimator(
    *,
    exponent: float = 1.0,
    eps: float = 0.0,
    corrected: bool = False,
    normalized: bool = True,
    rooted: bool = False,
) -> Estimator:
    """Returns a distance covariance or correlation after checking its options."""
    if not (type(exponent) is float and 0 < exponent < 2):
        exponent = check_number("exponent", exponent, above=0, below=2)
    if not (type(eps) is float and 0 <= eps < math.inf):
        eps = check_number("eps", eps, minimum=0)
    return Estimator(Distance(exponent, eps), corrected, normalized, rooted)


def distance_covariance_sqr(
    x: Tensor, y: Tensor, *, exponent: float = 1.0, eps: float = 0.0
) -> Tensor:
    """Computes the squared distance covariance, the biased estimator (V-statistic).

    Source: Szekely, Rizzo and Bakirov, Annals of Statistics 35(6), 2007, definition 4.

    Args:
        x: Tensor of shape (N, D) or (N, ...), which is flattened; N >= 2. Half precision is raised
            to float32.
        y: Tensor of shape (N, E) or (N, ...).
        exponent: Exponent of the Euclidean distance, in (0, 2).
        eps: Floor of the squared distances, see :func:`pairwise_distances`.

    Returns:
        Scalar tensor, at least 0 up to rounding; a value beyond the dtype's range is held within it.
        A non-finite input makes it NaN on an accelerator or under ``torch.compile``.

    Raises:
        TypeError: If an input is not a floating-point tensor.
        ValueError: If the shapes do not fit, N < 2, an option is out of range or, on a CPU, a value
            is not finite.

    Examples:
        >>> x = torch.arange(1.0, 17.0).reshape(4, 4)
        >>> y = torch.tensor([[1.0], [0.0], [0.0], [1.0]])
        >>> round(distance_covariance_sqr(x, x).item(), 3)
        52.0
        >>> round(distance_covariance_sqr(x, y).item(), 3)
        1.0
    """
    estimator = distance_estimator(exponent=exponent, eps=eps, normalized=False)
    return compare_two(estimator, x, y)


def distance_covariance(x: Tensor, y: Tensor, *, exponent: float = 1.0, eps: float = 0.0) -> Tensor:
    """Computes the distance covariance, the root of :func:`distance_covariance_sqr` (biased).

    Source: Szekely, Rizzo and Bakirov, Annals of Statistics 35(6), 2007, definition 4.

    Args:
        x: Tensor of shape (N, D) or (N, ...), as for :func:`distance_covariance_sqr`.
        y: Tensor of shape (N, E) or (N, ...).
        exponent: Exponent of the Euclidean distance, in (0, 2).
        eps: Floor of the squared distances, see :func:`pairwise_distances`.

    Returns:
        Scalar tensor, at least 0; where it is 0, so is its gradient.

    Raises:
        TypeError: As :func:`distance_covariance_sqr`.
        ValueError: As :func:`distance_covariance_sqr`.

    Examples:
        >>> x = torch.arange(1.0, 17.0).reshape(4, 4)
        >>> round(distance_covariance(x, x).item(), 4)
        7.2111
    """
    estimator = distance_estimator(exponent=exponent, eps=eps, normalized=False, rooted=True)
    return compare_two(estimator, x, y)


def distance_correlation_sqr(
    x: Tensor, y: Tensor, *, exponent: float = 1.0, eps: float = 0.0
) -> Tensor:
    """Computes the squared distance correlation, the biased estimator (V-statistic).

    Its value on independent data is far from 0, see :func:`distance_correlation`.

    Source: Szekely, Rizzo and Bakirov, Annals of Statistics 35(6), 2007, definition 5.

    Args:
        x: Tensor of shape (N, D) or (N, ...), as for :func:`distance_covariance_sqr`.
        y: Tensor of shape (N, E) or (N, ...).
        exponent: Exponent of the Euclidean distance, in (0, 2).
        eps: Floor of the squared distances, see :func:`pairwise_distances`.

    Returns:
        Scalar tensor in [0, 1] up to rounding; 0, with a zero gradient, where ``x`` or ``y`` is
        constant.

    Raises:
        TypeError: As :func:`distance_covariance_sqr`.
        ValueError: As :func:`distance_covariance_sqr`.

    Examples:
        >>> x = torch.arange(1.0, 17.0).reshape(4, 4)
        >>> y = torch.tensor([[1.0], [0.0], [0.0], [1.0]])
        >>> round(distance_correlation_sqr(x, y).item(), 4)
        0.2774
    """
    estimator = distance_estimator(exponent=exponent, eps=eps)
    return compare_two(estimator, x, y)


def distance_correlation(
    x: Tensor, y: Tensor, *, exponent: float = 1.0, eps: float = 0.0
) -> Tensor:
    """Computes the distance correlation, biased and non-squared: the dependence measure of MV-MR.

    The biased estimator has no zero: on independent data it grows with the width at fixed N.
    On Gaussians, N = 256, it is 0.82, 0.970, 0.985 and 0.996 at D = E = 128, 1024, 2048 and 8192
    (means of three draws), where :func:`u_distance_correlation_sqr` is within 0.011 of 0.

    With ``eps=1e-4`` it is the measure of the authors' release of MV-MR, which holds every squared
    distance, also on the diagonal, at 1e-4 or above.

    Source: Szekely, Rizzo and Bakirov, Annals of Statistics 35(6), 2007, definition 5; MV-MR,
    Entropy 26(6):466, 2024 (arXiv 2303.12130).

    Args:
        x: Tensor of shape (N, D) or (N, ...), as for :func:`distance_covariance_sqr`.
        y: Tensor of shape (N, E) or (N, ...).
        exponent: Exponent of the Euclidean distance, in (0, 2).
        eps: Floor of the squared distances, see :func:`pairwise_distances`.

    Returns:
        Scalar tensor in [0, 1] up to rounding; 0, with a zero gradient, where ``x`` or ``y`` is
        constant.

    Raises:
        TypeError: As :func:`distance_covariance_sqr`.
        ValueError: As :func:`distance_covariance_sqr`.

    Examples:
        >>> x = torch.arange(1.0, 17.0).reshape(4, 4)
        >>> y = torch.tensor([[1.0], [0.0], [0.0], [1.0]])
        >>> round(distance_correlation(x, y).item(), 4)
        0.5266
    """
    estimator = distance_estimator(exponent=exponent, eps=eps, rooted=True)
    return compare_two(estimator, x, y)


def u_distance_covariance_sqr(
    x: Tensor, y: Tensor, *, exponent: float = 1.0, eps: float = 0.0
) -> Tensor:
    """Computes the squared distance covariance, the unbiased estimator (U-centred).

    Source: Szekely and Rizzo, Annals of Statistics 42(6), 2014, proposition 1.

    Args:
        x: Tensor of shape (N, D) or (N, ...), which is flattened; N >= 4. Half precision is raised
            to float32.
        y: Tensor of shape (N, E) or (N, ...).
        exponent: Exponent of the Euclidean distance, in (0, 2).
        eps: Floor of the squared distances, see :func:`pairwise_distances`.

    Returns:
        Scalar tensor, which may be negative; about 0 on independent data. A value beyond the
        dtype's range is held within it.

    Raises:
        TypeError: If an input is not a floating-point tensor.
        ValueError: If the shapes do not fit, N < 4, an option is out of range or, on a CPU, a value
            is not finite.

    Examples:
        >>> x = torch.arange(1.0, 17.0).reshape(4, 4)
        >>> y = torch.tensor([[1.0], [0.0], [0.0], [1.0]])
        >>> round(u_distance_covariance_sqr(x, y).item(), 4)
        -2.6667
    """
    estimator = distance_estimator(exponent=exponent, eps=eps, corrected=True, normalized=False)
    return compare_two(estimator, x, y)


def u_distance_correlation_sqr(
    x: Tensor, y: Tensor, *, exponent: float = 1.0, eps: float = 0.0
) -> Tensor:
    """Computes the squared distance correlation, bias-corrected (U-centred).

    Source: Szekely and Rizzo, Journal of Multivariate Analysis 117, 2013; Annals of Statistics
    42(6), 2014, definition 3.

    Args:
        x: Tensor of shape (N, D) or (N, ...), as for :func:`u_distance_covariance_sqr`.
        y: Tensor of shape (N, E) or (N, ...).
        exponent: Exponent of the Euclidean distance, in (0, 2).
        eps: Floor of the squared distances, see :func:`pairwise_distances`.

    Returns:
        Scalar tensor in [-1, 1] up to rounding, about 0 on independent data; 0, with a zero
        gradient, where the distances of ``x`` or of ``y`` are all equal.

    Raises:
        TypeError: As :func:`u_distance_covariance_sqr`.
        ValueError: As :func:`u_distance_covariance_sqr`.

    Examples:
        >>> x = torch.arange(1.0, 17.0).reshape(4, 4)
        >>> y = torch.tensor([[1.0], [0.0], [0.0], [1.0]])
        >>> round(u_distance_correlation_sqr(x, y).item(), 4)
        -0.5
    """
    estimator = distance_estimator(exponent=exponent, eps=eps, corrected=True)
    return compare_two(estimator, x, y)


def partial_distance_correlation(
    x: Tensor, y: Tensor, z: Tensor, *, exponent: float = 1.0, eps: float = 0.0
) -> Tensor:
    """Computes the partial distance correlation of ``x`` and ``y`` given ``z`` (bias-corrected).

    A value of 0 does not imply conditional independence, nor the reverse (section 4.2 there).

    Source: Szekely and Rizzo, Annals of Statistics 42(6), 2014, definition 4.

    Args:
        x: Tensor of shape (N, D) or (N, ...), which is flattened; N >= 4. Half precision is raised
            to float32.
        y: Tensor of shape (N, E) or (N, ...).
        z: Tensor of shape (N, F) or (N, ...): what is held fixed.
        exponent: Exponent of the Euclidean distance, in (0, 2).
        eps: Floor of the squared distances, see :func:`pairwise_distances`.

    Returns:
        Scalar tensor in [-1, 1] up to rounding; 0, with a zero gradient, where nothing of ``x`` or
        ``y`` is left once ``z`` is taken out.

    Raises:
        TypeError: As :func:`u_distance_covariance_sqr`.
        ValueError: As :func:`u_distance_covariance_sqr`.

    Examples:
        >>> x = torch.tensor([1.0, 1.0, 2.0, 2.0, 3.0])
        >>> y = torch.tensor([1.0, 2.0, 1.0, 2.0, 1.0])
        >>> z = torch.tensor([1.0, 2.0, 2.0, 1.0, 2.0])
        >>> round(partial_distance_correlation(x, y, z).item(), 4)
        -0.5
    """
    estimator = distance_estimator(exponent=exponent, eps=eps, corrected=True)
    for name, batch in (("x", x), ("y", y), ("z", z)):
        check_batch(name, batch, 4)
        check_finite(name, batch)
        if len(batch) != len(x):
            raise ValueError(
                f"x and {name} must have the same number of samples "
                f"but have {len(x)} and {len(batch)}."
            )
    dtype = functools.reduce(torch.promote_types, [b.dtype for b in (x, y, z)], torch.float32)
    # What is left is a difference of correlations near 1: float32's digits do not tell it.
    wide = WIDE.get(x.device.type, torch.float64)
    batches = [batch.reshape(len(x), -1).to(wide) for batch in (x, y, z)]
    xy, xz, yz = dependence(estimator, batches, [(0, 1), (0, 2), (1, 2)])
    left = 1 - torch.stack([xz, yz]).square()
    # Below this it is the rounding of the inputs, whose square it has, or of the correlations.
    floor = max((16 * torch.finfo(dtype).eps) ** 2, 16 * torch.finfo(wide).eps)
    vanishes = (left <= floor).any()
    partial = (xy - xz * yz) / torch.where(vanishes, 1.0, left).prod().sqrt()
    return torch.where(vanishes, 0.0, partial).to(dtype)


def pairwise_distances(x: Tensor, *, exponent: float = 1.0, eps: float = 0.0) -> Tensor:
    """Computes the Euclidean distances between all pairs of samples, to a power.

    The distance of coinciding points is exactly 0 and has a zero gradient, as has the diagonal. A
    batch whose norms are below ``65536 finfo.tiny`` counts as constant; distances beyond the dtype's
    range are ``finfo.max``.

    Source: Szekely, Rizzo and Bakirov, Annals of Statistics 35(6), 2007, definition 4.

    Args:
        x: Tensor of shape (N, D) or (N, ...), which is flattened. Half precision is raised to
            float32.
        exponent: Exponent of the distance, in (0, 2).
        eps: Floor of the squared distances, at least 0; it holds for the diagonal too, and a
            distance at the floor has a zero gradient.

    Returns:
        Tensor of shape (N, N), symmetric up to rounding, float32 or float64. A non-finite ``x`` makes
        it NaN on an accelerator or under ``torch.compile``, where values are not looked at.

    Raises:
        TypeError: If ``x`` is not a floating-point tensor.
        ValueError: If ``x`` is empty, an option is out of range or, on a CPU, a value of ``x`` is
            not finite.

    Examples:
        >>> pairwise_distances(torch.tensor([[0.0, 0.0], [3.0, 4.0], [3.0, 0.0]])).round(decimals=4)
        tensor([[0., 5., 3.],
                [5., 0., 4.],
                [3., 4., 0.]])
    """
    matrix = distance_estimator(exponent=exponent, eps=eps).matrix
    check_batch("x", x)
    check_finite("x", x)
    squared, units = squared_distances([x.reshape(len(x), -1)])
    distances = matrix.matrices(squared, units, ALL_ROWS)[0]
    dtype = torch.promote_types(x.dtype, torch.float32)
    scaled = distances * units.pow(exponent)
    return scaled.clamp(max=torch.finfo(dtype).max).to(dtype)
