"""Distance covariance and correlation, biased and bias-corrected, and partial distance correlation."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from mvmr_loss.dependence._gram_cpu import unit_centered_distances
from mvmr_loss.dependence.base import DependenceMeasure, check_same_samples
from mvmr_loss.dependence.blockwise import blockwise_correlation
from mvmr_loss.dependence.centering import (
    centered,
    inner_product,
    root,
    scaled_inner_product,
    unit_norm,
)
from mvmr_loss.dependence.distances import (
    about_mean,
    centered_gram,
    check_batch,
    check_distance_options,
    saturated,
    scaled_distances,
)


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
    a, b = _centered_pair(x, y, exponent, eps, corrected=False, unit=False)
    return _covariance_sqr(a, b)


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
    a, b = _centered_pair(x, y, exponent, eps, corrected=False, unit=False)
    return _covariance(a, b)


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
    a, b = _centered_pair(x, y, exponent, eps, corrected=False, unit=True)
    return inner_product(a, b)


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
    a, b = _centered_pair(x, y, exponent, eps, corrected=False, unit=True)
    return root(inner_product(a, b))


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
    a, b = _centered_pair(x, y, exponent, eps, corrected=True, unit=False)
    return _u_covariance_sqr(a, b)


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
    a, b = _centered_pair(x, y, exponent, eps, corrected=True, unit=True)
    return inner_product(a, b)


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
    a, b = _centered_pair(x, y, exponent, eps, corrected=True, unit=True)
    c = centered_distances("z", z, exponent, eps, corrected=True, unit=True)
    check_same_samples("x", x, "z", z)
    rest_a = unit_norm(a - inner_product(a, c) * c, a)
    rest_b = unit_norm(b - inner_product(b, c) * c, b)
    return inner_product(rest_a, rest_b)


def centered_distances(
    name: str, x: Tensor, exponent: float, eps: float, *, corrected: bool, unit: bool
) -> Tensor:
    """Computes the centred distance matrix of a batch.

    Args:
        name: What to call ``x`` in errors.
        x: Tensor of shape (N, D) or (N, ...).
        exponent: Exponent of the distance.
        eps: Floor of the squared distances.
        corrected: U-centred if True, doubly centred if False.
        unit: Divided by its norm if True, in the units of ``x`` if False.

    Returns:
        Tensor of shape (N, N).
    """
    check_distance_options(exponent, eps)
    min_samples = 4 if corrected else 2
    if unit and eps == 0:
        ready = unit_centered_distances(check_batch(name, x, min_samples), exponent, corrected)
        if ready is not None:
            return ready
    gram = centered_gram(name, x, min_samples=min_samples, eps=eps)
    distances = scaled_distances(gram, exponent=exponent, eps=eps)
    a = centered(distances, corrected=corrected)
    return unit_norm(a, distances) if unit else saturated(a, gram.unit, exponent)


def _centered_pair(
    x: Tensor, y: Tensor, exponent: float, eps: float, *, corrected: bool, unit: bool
) -> tuple[Tensor, Tensor]:
    a = centered_distances("x", x, exponent, eps, corrected=corrected, unit=unit)
    b = centered_distances("y", y, exponent, eps, corrected=corrected, unit=unit)
    check_same_samples("x", x, "y", y)
    return a, b


def _covariance_sqr(a: Tensor, b: Tensor) -> Tensor:
    return scaled_inner_product(a, b, a.numel())


def _u_covariance_sqr(a: Tensor, b: Tensor) -> Tensor:
    return scaled_inner_product(a, b, len(a) * (len(a) - 3))


def _covariance(a: Tensor, b: Tensor) -> Tensor:
    """Returns the root of the covariance; the square itself might over- or underflow."""
    peaks = [m.detach().abs().amax() for m in (a, b)]
    units = [torch.where(peak == 0, torch.ones_like(peak), peak) for peak in peaks]
    covariance = root(inner_product(a / units[0], b / units[1]) / a.numel())
    return covariance * units[0].sqrt() * units[1].sqrt()


class _DistanceMeasure(DependenceMeasure):
    """What the distance-based measures share: exponent, floor and centring."""

    corrected = False
    unit = True

    def __init__(self, *, exponent: float = 1.0, eps: float = 0.0) -> None:
        super().__init__()
        check_distance_options(exponent, eps)
        self.exponent = exponent
        self.eps = eps

    def center(self, x: Tensor, name: str = "x") -> Tensor:
        """Computes the centred distance matrix of a batch; see the base class."""
        return centered_distances(
            name, x, self.exponent, self.eps, corrected=self.corrected, unit=self.unit
        )

    def extra_repr(self) -> str:
        """Returns the options, for printing."""
        return f"exponent={self.exponent}, eps={self.eps}"


class _CorrelationMeasure(_DistanceMeasure):
    """What the distance correlations share: the mode that works in blocks of rows."""

    def __init__(
        self, *, exponent: float = 1.0, eps: float = 0.0, block_size: int | None = None
    ) -> None:
        super().__init__(exponent=exponent, eps=eps)
        if block_size is not None:
            if isinstance(block_size, bool) or not isinstance(block_size, int):
                raise TypeError(f"block_size must be an int but is a {type(block_size).__name__}.")
            if block_size < 1:
                raise ValueError(f"block_size must be at least 1 but is {block_size}.")
            if eps > 0:
                raise ValueError(f"eps must be 0 with a block_size but is {eps}.")
        self.block_size = block_size

    def center(self, x: Tensor, name: str = "x") -> Tensor:
        """Computes the centred distance matrix; in block mode the batch about its mean instead."""
        if self.block_size is not None:
            return about_mean(name, x, min_samples=self.min_samples)
        return super().center(x, name)

    def compare(self, a: Tensor, b: Tensor) -> Tensor:
        """Computes the squared distance correlation from what :meth:`center` gave."""
        if self.block_size is not None:
            return blockwise_correlation(
                a, b, corrected=self.corrected, exponent=self.exponent, block_size=self.block_size
            )
        return inner_product(a, b)

    def extra_repr(self) -> str:
        """Returns the options, for printing."""
        mode = "" if self.block_size is None else f", block_size={self.block_size}"
        return super().extra_repr() + mode


class DistanceCorrelation(_CorrelationMeasure):
    """The distance correlation as a module and strategy; see :func:`distance_correlation`.

    The default of MV-MR. With ``eps=0`` coincident points have a zero gradient, so the floor of the
    authors' release is not needed for finite gradients; ``eps=1e-4`` reproduces the release.

    Args:
        exponent: Exponent of the Euclidean distance, in (0, 2).
        eps: Floor of the squared distances.
        block_size: If given, at most this many rows of a distance matrix exist at once: memory grows
            as N x block_size, not N x N, and the distances are computed again for each comparison
            and in the backward pass. ``eps`` must be 0, and there is no double backward.

    Raises:
        TypeError: If an option is not a number.
        ValueError: If an option is out of range.

    Examples:
        >>> x = torch.arange(1.0, 17.0).reshape(4, 4)
        >>> round(DistanceCorrelation()(x, x).item(), 4)
        1.0
    """

    def compare(self, a: Tensor, b: Tensor) -> Tensor:
        """Computes the distance correlation from what :meth:`center` gave."""
        return root(super().compare(a, b))


class DistanceCorrelationSqr(_CorrelationMeasure):
    """The squared distance correlation as a module; see :func:`distance_correlation_sqr`.

    Args:
        exponent: Exponent of the Euclidean distance, in (0, 2).
        eps: Floor of the squared distances.
        block_size: If given, at most this many rows of a distance matrix exist at once: memory grows
            as N x block_size, not N x N, and the distances are computed again for each comparison
            and in the backward pass. ``eps`` must be 0, and there is no double backward.

    Raises:
        TypeError: If an option is not a number.
        ValueError: If an option is out of range.

    Examples:
        >>> x, y = torch.arange(1.0, 17.0).reshape(4, 4), torch.tensor([1.0, 0.0, 0.0, 1.0])
        >>> round(DistanceCorrelationSqr()(x, y).item(), 4)
        0.2774
    """


class UDistanceCorrelationSqr(_CorrelationMeasure):
    """The bias-corrected squared distance correlation; see :func:`u_distance_correlation_sqr`.

    Args:
        exponent: Exponent of the Euclidean distance, in (0, 2).
        eps: Floor of the squared distances.
        block_size: If given, at most this many rows of a distance matrix exist at once: memory grows
            as N x block_size, not N x N, and the distances are computed again for each comparison
            and in the backward pass. ``eps`` must be 0, and there is no double backward.

    Raises:
        TypeError: If an option is not a number.
        ValueError: If an option is out of range.

    Examples:
        >>> x, y = torch.arange(1.0, 17.0).reshape(4, 4), torch.tensor([1.0, 0.0, 0.0, 1.0])
        >>> round(UDistanceCorrelationSqr()(x, y).item(), 4)
        -0.5
    """

    min_samples = 4
    corrected = True


class DistanceCovariance(_DistanceMeasure):
    """The distance covariance as a module; see :func:`distance_covariance`.

    Args:
        exponent: Exponent of the Euclidean distance, in (0, 2).
        eps: Floor of the squared distances.

    Raises:
        TypeError: If an option is not a number.
        ValueError: If an option is out of range.

    Examples:
        >>> x = torch.arange(1.0, 17.0).reshape(4, 4)
        >>> round(DistanceCovariance()(x, x).item(), 4)
        7.2111
    """

    unit = False

    def compare(self, a: Tensor, b: Tensor) -> Tensor:
        """Computes the distance covariance from two centred matrices."""
        return _covariance(a, b)


class DistanceCovarianceSqr(_DistanceMeasure):
    """The squared distance covariance as a module; see :func:`distance_covariance_sqr`.

    Args:
        exponent: Exponent of the Euclidean distance, in (0, 2).
        eps: Floor of the squared distances.

    Raises:
        TypeError: If an option is not a number.
        ValueError: If an option is out of range.

    Examples:
        >>> x, y = torch.arange(1.0, 17.0).reshape(4, 4), torch.tensor([1.0, 0.0, 0.0, 1.0])
        >>> round(DistanceCovarianceSqr()(x, y).item(), 4)
        1.0
    """

    unit = False

    def compare(self, a: Tensor, b: Tensor) -> Tensor:
        """Computes the squared distance covariance from two centred matrices."""
        return _covariance_sqr(a, b)


class UDistanceCovarianceSqr(_DistanceMeasure):
    """The unbiased squared distance covariance; see :func:`u_distance_covariance_sqr`.

    Args:
        exponent: Exponent of the Euclidean distance, in (0, 2).
        eps: Floor of the squared distances.

    Raises:
        TypeError: If an option is not a number.
        ValueError: If an option is out of range.

    Examples:
        >>> x, y = torch.arange(1.0, 17.0).reshape(4, 4), torch.tensor([1.0, 0.0, 0.0, 1.0])
        >>> round(UDistanceCovarianceSqr()(x, y).item(), 4)
        -2.6667
    """

    min_samples = 4
    corrected = True
    unit = False

    def compare(self, a: Tensor, b: Tensor) -> Tensor:
        """Computes the unbiased squared distance covariance from two centred matrices."""
        return _u_covariance_sqr(a, b)


class PartialDistanceCorrelation(nn.Module):
    """The partial distance correlation as a module; see :func:`partial_distance_correlation`.

    It needs three batches and so is no :class:`DependenceMeasure`.

    Args:
        exponent: Exponent of the Euclidean distance, in (0, 2).
        eps: Floor of the squared distances.

    Raises:
        TypeError: If an option is not a number.
        ValueError: If an option is out of range.

    Examples:
        >>> x = torch.tensor([1.0, 1.0, 2.0, 2.0, 3.0])
        >>> y = torch.tensor([1.0, 2.0, 1.0, 2.0, 1.0])
        >>> z = torch.tensor([1.0, 2.0, 2.0, 1.0, 2.0])
        >>> round(PartialDistanceCorrelation()(x, y, z).item(), 4)
        -0.5
    """

    def __init__(self, *, exponent: float = 1.0, eps: float = 0.0) -> None:
        super().__init__()
        check_distance_options(exponent, eps)
        self.exponent = exponent
        self.eps = eps

    def forward(self, x: Tensor, y: Tensor, z: Tensor) -> Tensor:
        """Computes the partial distance correlation of ``x`` and ``y`` given ``z``.

        Args:
            x: Tensor of shape (N, D) or (N, ...), N >= 4.
            y: Tensor of shape (N, E) or (N, ...).
            z: Tensor of shape (N, F) or (N, ...).

        Returns:
            Scalar tensor.

        Raises:
            TypeError: As :func:`partial_distance_correlation`.
            ValueError: As :func:`partial_distance_correlation`.
        """
        return partial_distance_correlation(x, y, z, exponent=self.exponent, eps=self.eps)

    def extra_repr(self) -> str:
        """Returns the options, for printing."""
        return f"exponent={self.exponent}, eps={self.eps}"
