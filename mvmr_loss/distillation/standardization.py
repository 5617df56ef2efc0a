"""Features standardised by statistics of the whole data set, with one scale or one a coordinate."""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Iterator
from typing import Any, Literal

import torch
from torch import Tensor, nn

from mvmr_loss._checks import (
    as_rows,
    check_batch,
    check_bool,
    check_choice,
    check_finite,
    check_int,
    low_precision_to_float32,
    without_autocast,
)
from mvmr_loss.cache import RepresentationCache
from mvmr_loss.distributed import world_size

Rotation = Literal["auto", "hadamard", "none"]
Scale = Literal["isotropic", "coordinate"]
# A coordinate whose variance is below this beside their mean says nothing but rounding.
_NOTHING = 1e-12
# Widths up to this are rotated unless told otherwise; the matrix has the square of it.
_ROTATED = 4096


class Standardization(nn.Module):
    """Standardises features: less their mean, over one scale for all coordinates or one for each.

    One scale, ``"isotropic"``, leaves the features' shape as it is: right for a network's features,
    whose coordinates that vary little say little. With the rotation ``"hadamard"`` (PHI-S) every
    coordinate then has the variance 1: the principal components are spread evenly over all
    coordinates, so that a loss which looks at each coordinate, as smooth L1 does, treats all alike.
    Distances and angles stay as they are, whatever the rotation.

    A scale for each coordinate, ``"coordinate"``, is right for handcrafted representations, in which
    brightness varies most and says least: nearest neighbours among scattering coefficients have the
    same class far more often after it.

    The statistics are those of :meth:`fit`, of a whole data set. A module that was never fitted
    keeps those of all batches seen in training, without a rotation; it adds to its buffers in place,
    as BatchNorm does.

    Source: PHI-S, Ranzinger et al., 2024 (arXiv 2410.01680), section 3.

    Args:
        width: Number E of a feature's coordinates.
        scale: ``"isotropic"`` or ``"coordinate"``. A coordinate that is constant, or has a millionth
            of the others' deviation, becomes 0.
        rotation: ``"hadamard"``, for which E must be the order of a matrix that :func:`hadamard`
            knows, as most widths of networks are; ``"none"``; or ``"auto"``, the first where E, up to
            4096, and the scale, ``"isotropic"``, allow.
        gather_distributed: If True, batches are counted over all processes. :meth:`fit` is to be
            given the same features in each.

    Raises:
        TypeError: If an argument is of a wrong type.
        ValueError: If one is out of range.

    Examples:
        >>> features = torch.tensor([[1.0, 0.0], [3.0, 0.0], [2.0, 3.0], [2.0, -3.0]])
        >>> standardize = Standardization(2).fit(features)
        >>> standardize(features).square().mean(dim=0).round(decimals=4)
        tensor([1., 1.])
    """

    mean: Tensor
    variance: Tensor
    count: Tensor
    fitted: Tensor
    rotation_matrix: Tensor | None

    def __init__(
        self,
        width: int,
        *,
        scale: Scale = "isotropic",
        rotation: Rotation = "auto",
        gather_distributed: bool = False,
    ) -> None:
        super().__init__()
        self.width = check_int("width", width, minimum=1)
        self.scale = check_choice("scale", scale, ("isotropic", "coordinate"))
        self.rotation = check_choice("rotation", rotation, ("auto", "hadamard", "none"))
        self.gather_distributed = check_bool("gather_distributed", gather_distributed)
        if rotation == "hadamard":
            hadamard(width)  # raises here, not after the features were computed
            if scale == "coordinate":
                raise ValueError(
                    "rotation must be 'auto' or 'none' with scale='coordinate', which gives every "
                    "coordinate the same variance without, but is 'hadamard'."
                )
        isotropic = scale == "isotropic"
        rotated = rotation == "hadamard" or (
            rotation == "auto" and isotropic and width <= _ROTATED and _hadamard(width) is not None
        )
        self.register_buffer("mean", torch.zeros(width))
        self.register_buffer("variance", torch.ones(() if isotropic else width))
        self.register_buffer("count", torch.zeros((), dtype=torch.int64))
        # A number, as count is: averages of weights are taken of buffers, too, and not of truths.
        self.register_buffer("fitted", torch.zeros((), dtype=torch.int64))
        self.register_buffer("rotation_matrix", torch.eye(width) if rotated else None)
        self._warned = rotation != "hadamard"

    def _apply(self, fn: Any, recurse: bool = True) -> Standardization:
        """Moves the buffers, but keeps float32: the squares of features leave half precision's range."""
        before = dict(self._buffers)
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        for name, buffer in before.items():
            now = self._buffers[name]
            if buffer is not None and now is not None and now.dtype in (torch.half, torch.bfloat16):
                self._buffers[name] = buffer.to(now.device)
        return self

    @torch.no_grad()
    def fit(self, features: Tensor | Iterable[Tensor]) -> Standardization:
        """Takes the statistics of a whole data set, for good.

        Args:
            features: Tensor of shape (N, E), N >= 2, or an iterable of parts of it, such as
                :func:`stored_features`.

        Returns:
            The module itself.

        Raises:
            TypeError: If a part is no floating-point tensor.
            ValueError: If there are fewer than 2 features, a part is of another width, a value is
                not finite, all features are equal, or their variance is beyond the range of float32.
        """
        if not isinstance(features, Iterable):
            raise TypeError(
                f"features must be a tensor, or an iterable of parts, but are {features!r}."
            )
        if self.count > 0 and not self.fitted:
            warnings.warn(
                f"{int(self.count)} features were standardised by the statistics of their batches "
                "before fit, which changes what a head is trained to predict: call fit before the "
                "training.",
                stacklevel=2,
            )
        count, total = 0, torch.zeros(self.width, dtype=torch.float64)
        # Of wide features the squares alone, where they are not rotated.
        rotated = self.rotation_matrix is not None
        products = torch.zeros((self.width,) * (1 + rotated), dtype=torch.float64)
        origin: Tensor | None = None
        for part in [features] if isinstance(features, Tensor) else features:
            part = self._checked(part).detach().double().cpu()
            check_finite("features", part)
            # About a point among them, so that a large mean costs no digits.
            origin = part.mean(dim=0) if origin is None else origin
            part = part - origin
            count += len(part)
            total += part.sum(dim=0)
            products += part.mT @ part if rotated else part.square().sum(dim=0)
        if count < 2 or origin is None:
            raise ValueError(f"features must be of at least 2 samples but are of {count}.")
        shift = total / count
        covariance = products / count - (torch.outer(shift, shift) if rotated else shift.square())
        each = covariance.diagonal() if rotated else covariance
        if not each.mean() > 1e-12 * (origin + shift).square().mean():
            raise ValueError("features must differ between samples but are all equal.")
        limits = torch.finfo(self.variance.dtype)
        if not limits.tiny < each.mean() < limits.max:
            raise ValueError(
                f"features must be of a size whose square {self.variance.dtype} holds but have a "
                f"variance of {each.mean():.3g}; scale them."
            )
        self.mean.copy_(origin + shift)
        self.variance.copy_(self._over_coordinates(each))
        self.count.fill_(count)
        self.fitted.fill_(1)
        if self.rotation_matrix is not None:
            components = torch.linalg.eigh(covariance).eigenvectors
            even = hadamard(self.width).double() / self.width**0.5
            self.rotation_matrix.copy_(even @ components.mT)
        return self

    def forward(self, features: Tensor) -> Tensor:
        """Standardises features; in training, a module that was not fitted counts them first.

        Args:
            features: Tensor of shape (N, E), or (N, ...), which is flattened.

        Returns:
            Tensor of shape (N, E), float32 at least.

        Raises:
            TypeError: If ``features`` is no floating-point tensor.
            ValueError: If it is of another width.
        """
        features = low_precision_to_float32(self._checked(features))
        if self.training:
            self._count(features.detach())
            if not self._warned and not torch.compiler.is_compiling():
                self._warned = True
                if not self.fitted:
                    warnings.warn(
                        "rotation='hadamard' needs the statistics of the whole data set: without fit, "
                        "features are not rotated.",
                        stacklevel=2,
                    )
        return self.apply_statistics(features)

    def apply_statistics(self, features: Tensor) -> Tensor:
        """Standardises features (N, E), which may be none, by the statistics as they are."""
        features = low_precision_to_float32(features)
        # What is all equal is nothing but its mean.
        tells = self.variance > _NOTHING * self.variance.mean()
        scale = torch.where(tells, self.variance, torch.inf).rsqrt()
        standardized = (features - self.mean) * scale
        if self.rotation_matrix is not None:
            with without_autocast(standardized):
                standardized = standardized @ self.rotation_matrix.to(standardized.dtype).mT
        return standardized

    def extra_repr(self) -> str:
        """Returns the arguments, for printing."""
        return f"{self.width}, scale={self.scale!r}, rotation={self.rotation!r}"

    def _checked(self, features: Tensor) -> Tensor:
        """Returns features of shape (N, E)."""
        check_batch("features", features)
        features = as_rows(features)
        if features.shape[1] != self.width:
            raise ValueError(
                f"features must have shape (N, {self.width}) but have {tuple(features.shape)}; state "
                "the width of the teacher's features."
            )
        return features

    @torch.no_grad()
    def _count(self, features: Tensor) -> None:
        """Adds a batch to the statistics, unless they were fitted.

        Source: Chan, Golub and LeVeque, The American Statistician 37(3), 1983, eq. 2.1.
        """
        number: int | Tensor = len(features)
        mean = features.mean(dim=0)
        square = self._over_coordinates((features - mean).square().mean(dim=0))
        if self.gather_distributed and world_size() > 1:
            # Moments about the common origin 0 suffice for one batch.
            own = square + self._over_coordinates(mean.square())
            sums = torch.cat([mean.new_ones(1), mean, own.reshape(-1)]).double() * len(features)
            torch.distributed.all_reduce(sums)
            number, moments = sums[0].to(self.count.dtype), sums[1:] / sums[0]
            mean = moments[: self.width]
            square = moments[self.width :].view(square.shape)
            square = (square - self._over_coordinates(mean.square())).to(features.dtype)
            mean = mean.to(features.dtype)
        # A batch that is not finite, whose squares are not either, would spoil them for good.
        usable = square.amax() < torch.inf
        square = torch.where(usable, square, 0.0)
        added = torch.where(usable & (self.fitted == 0), number, 0)
        self.count.add_(added)
        share = added / self.count.clamp(min=1)
        rest = 1 - share
        change = torch.where(usable, mean - self.mean, 0.0)
        # Weighted before they are squared, which may leave the range: the first batch's weight is 0.
        between = self._over_coordinates((rest.sqrt() * change).square())
        # Not a change of what is there: at first that is 1, beside which small variances have no digits.
        self.variance.mul_(rest).addcmul_(share, square + between)
        self.mean.addcmul_(share, change)

    def _over_coordinates(self, x: Tensor) -> Tensor:
        """Returns the mean over coordinates where one scale is for all."""
        return x.mean() if self.scale == "isotropic" else x


def stored_features(
    cache: RepresentationCache, name: str, batch_size: int = 1024
) -> Iterator[Tensor]:
    """Yields the features of a store, of all samples, in parts.

    Args:
        cache: The store.
        name: Which representation's, such as ``"teacher"``.
        batch_size: Samples in a part.

    Yields:
        Tensors of shape (batch_size, E), float32.

    Raises:
        ValueError: If the store has no such representation, or lacks samples.
    """
    if name not in cache.widths:
        raise ValueError(f"name must be one of {', '.join(cache.widths)} but is {name!r}.")
    missing = int((~cache.is_valid()).sum())
    if missing:
        raise ValueError(
            f"the store at {cache.path} must have all {cache.num_samples} samples but lacks "
            f"{missing}; fill it first: python -m mvmr_loss.cache fill. Images that cannot be read "
            "must leave the data set."
        )
    for start in range(0, cache.num_samples, batch_size):
        indices = range(start, min(start + batch_size, cache.num_samples))
        yield cache.read(indices, [name])[name]


def hadamard(order: int) -> Tensor:
    """Builds a Hadamard matrix: entries of 1 and -1, orthogonal rows.

    Source: Sylvester's doubling and Paley's two constructions, Journal of Mathematics and Physics
    12, 1933.

    Args:
        order: 1, 2, or a multiple of 4 that they reach, such as 384, 768, 1024, 1152, 1280, 1536.

    Returns:
        Tensor of shape (order, order).

    Raises:
        ValueError: If the constructions do not reach that order.

    Examples:
        >>> h = hadamard(12)
        >>> bool((h @ h.mT == 12 * torch.eye(12)).all())
        True
    """
    matrix = _hadamard(order)
    if matrix is None:
        raise ValueError(
            f"a width for rotation='hadamard' must be the order of a Hadamard matrix but is {order}; "
            "use rotation='none'."
        )
    return matrix


def _hadamard(order: int) -> Tensor | None:
    pair = torch.tensor([[1.0, 1.0], [1.0, -1.0]])
    if order in (1, 2):
        return pair[:order, :order]
    if order % 4:
        return None
    if _is_prime(order - 1):
        square = torch.nn.functional.pad(_jacobsthal(order - 1), (1, 0, 1, 0))
        square[0, 1:], square[1:, 0] = 1, -1
        return square + torch.eye(order)
    half = order // 2
    if half % 4 == 2 and _is_prime(half - 1):
        square = torch.nn.functional.pad(_jacobsthal(half - 1), (1, 0, 1, 0), value=1.0)
        square[0, 0] = 0
        diagonal = torch.tensor([[1.0, -1.0], [-1.0, -1.0]])
        return torch.kron(square, pair) + torch.kron(torch.eye(half), diagonal)
    smaller = _hadamard(half)
    return None if smaller is None else torch.kron(pair, smaller)


def _jacobsthal(prime: int) -> Tensor:
    """Returns whether i - j is a square (1), 0, or no square (-1) modulo a prime, for all i and j."""
    character = -torch.ones(prime)
    character[torch.arange(prime).square() % prime] = 1
    character[0] = 0
    i = torch.arange(prime)
    return character[(i[:, None] - i) % prime]


def _is_prime(n: int) -> bool:
    return n > 1 and all(n % d for d in range(2, int(n**0.5) + 1))
