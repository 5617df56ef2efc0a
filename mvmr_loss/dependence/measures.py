"""What every dependence measure does with the matrices: centre, compare, normalise."""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

from mvmr_loss._checks import can_be_seen, check_batch, check_finite, check_int
from mvmr_loss.dependence.blocks import Blocks, products_in_blocks
from mvmr_loss.dependence.matrices import (
    ROUNDINGS,
    diagonal,
    squared_distances,
    without_diagonal,
)
from mvmr_loss.distributed import ALL_ROWS, Rows

# More numbers in a stack of matrices, and they are made one batch at a time.
_STACK_NUMBERS = 2**25

Pairs = Sequence[tuple[int, int]]


class Distance(NamedTuple):
    """The matrix of Euclidean distances to a power.

    Attributes:
        exponent: Exponent of the distance, in (0, 2).
        eps: Floor of the squared distances, at least 0.
    """

    exponent: float = 1.0
    eps: float = 0.0

    def matrices(self, squared: Tensor, units: Tensor, rows: Rows) -> Tensor:
        """Returns the matrices, in units of the units to the power ``exponent``."""
        if self.eps == 0:
            nothing = squared == 0
            floor: float | Tensor = 0.0
        else:
            root = math.sqrt(self.eps) / units[:, None, None]
            least = root.square().to(squared.dtype)
            nothing = squared <= least
            floor = root.pow(self.exponent).to(squared.dtype)
        # 1 in the place of those at the floor: a root has no finite gradient at 0.
        safe = torch.where(nothing, 1.0, squared)
        powers = safe.sqrt() if self.exponent == 1 else safe.pow(self.exponent / 2)
        return torch.where(nothing, floor, powers)

    def slopes(self, squared: Tensor, raw: Tensor, units: Tensor) -> Tensor:
        """Returns the derivatives of the matrices by the squared distances, 0 at the floor."""
        least = (math.sqrt(self.eps) / units[:, None, None]).square().to(squared.dtype)
        nothing = squared <= least
        slopes = self.exponent / 2 * raw / torch.where(nothing, 1.0, squared)
        return torch.where(nothing, 0.0, slopes)


class Gaussian(NamedTuple):
    """The Gaussian kernel matrix.

    Attributes:
        bandwidth: Standard deviation, above 0; None: the median distance between samples.
    """

    bandwidth: float | None = None
    exponent: float = 0.0

    def matrices(self, squared: Tensor, units: Tensor, rows: Rows) -> Tensor:
        """Returns the kernel matrices, which have no unit."""
        if self.bandwidth is None:
            spread = _median(squared.detach(), rows)
            return torch.exp(-squared / (2 * spread[:, None, None]))
        ratio = (units / self.bandwidth).square() / 2
        # Held so that it stays finite in the type: the kernel is 0 there anyway.
        ratio = ratio.clamp(max=torch.finfo(squared.dtype).max ** 0.5).to(squared.dtype)
        power = -squared * ratio[:, None, None]
        if power.dtype == torch.float64:
            return torch.exp(power)
        # A kernel that is near 1 everywhere has float32's digits in what it lacks alone, and centring
        # takes the 1 away; one that is near 0 somewhere has them in itself.
        broad = power.detach().amin((1, 2), keepdim=True) > -1
        return torch.where(broad, torch.expm1(power), torch.exp(power))


class Linear(NamedTuple):
    """The Gram matrix, as far as centring leaves it: minus half of the squared distances."""

    exponent: float = 2.0

    def matrices(self, squared: Tensor, units: Tensor, rows: Rows) -> Tensor:
        """Returns the matrices, in units of the units' square."""
        return squared / -2


class Estimator(NamedTuple):
    """A dependence measure, said in four choices.

    Attributes:
        matrix: What is made of the squared distances.
        corrected: Whether to U-centre (bias-corrected) rather than double-centre.
        normalized: Whether to divide by the norms (a correlation) rather than by a number of pairs.
        rooted: Whether the root of the result is taken.
        pairs_less_one: Whether a biased covariance is over (N - 1)^2 rather than N^2.
    """

    matrix: Distance | Gaussian | Linear
    corrected: bool
    normalized: bool
    rooted: bool = False
    pairs_less_one: bool = False

    def center(self, raw: Tensor, sums: Tensor, all_sums: Tensor, start: int) -> Tensor:
        """Centres rows of symmetric matrices, whose column sums are their row sums.

        Args:
            raw: Tensor of shape (K, rows, N), with a zero diagonal if ``corrected``.
            sums: Its row sums, of shape (K, rows).
            all_sums: The sums of all rows, of shape (K, N).
            start: The place of the first row.

        Returns:
            Tensor of shape (K, rows, N).
        """
        n = raw.shape[2]
        divisor, count = (n - 2, (n - 1) * (n - 2)) if self.corrected else (n, n * n)
        means = all_sums / divisor - (all_sums.sum(dim=1, keepdim=True) / count)
        centered = raw - (sums / divisor)[:, :, None] - means[:, None]
        return without_diagonal(centered, start) if self.corrected else centered


def dependence(
    estimator: Estimator,
    batches: Sequence[Tensor],
    pairs: Pairs,
    rows: Rows = ALL_ROWS,
    block_size: int | None = None,
) -> Tensor:
    """Computes the dependence of pairs of batches, each batch's matrix being made once.

    Args:
        estimator: The measure.
        batches: Checked tensors of shape (N, D_k).
        pairs: Which to compare, as places in ``batches``; at least one.
        rows: Which rows of the matrices are computed here.
        block_size: How many rows exist at once; None: all.

    Returns:
        Tensor of shape (pairs,).
    """
    n = len(batches[0])
    matrices: list[Tensor] = []
    if block_size is not None:
        blocks = Blocks(estimator, pairs, rows, block_size)
        products, squares, rounding, units = products_in_blocks(blocks, batches)
    else:
        height = n if rows.stop is None else rows.stop - rows.start
        together = len(batches) * height * n <= _STACK_NUMBERS
        found = []
        for group in [list(batches)] if together else [[x] for x in batches]:
            squared, units = squared_distances(group, rows)
            raw = estimator.matrix.matrices(squared, units, rows)
            if estimator.corrected:
                raw = without_diagonal(raw, rows.start)
            sums = raw.sum(dim=2)
            all_sums = sums if rows.stop is None else rows.concatenate(sums)
            centered = estimator.center(raw, sums, all_sums, rows.start)
            level = (ROUNDINGS * torch.finfo(raw.dtype).eps) ** 2
            rounding = level * raw.detach().square().sum(dim=(1, 2))
            found.append((centered.square().sum(dim=(1, 2)), rounding, units))
            matrices.extend(centered)
        products = torch.stack([(matrices[i] * matrices[j]).sum() for i, j in pairs])
        squares, rounding, units = map(torch.cat, zip(*found, strict=True))
        if rows.stop is not None:
            everything = rows.sum(torch.cat([products, squares, rounding]))
            products, squares, rounding = everything.split([len(pairs), *[len(squares)] * 2])
    dtype = functools.reduce(torch.promote_types, [x.dtype for x in batches], torch.float32)
    if estimator.normalized:
        if isinstance(estimator.matrix, Gaussian):
            # Far narrower than all distances, it sees no two samples, and the gradient would overflow.
            rounding = rounding.clamp(min=torch.finfo(squares.dtype).tiny ** (2 / 3))
        # A norm of rounding is none: its inverse is 0, with a zero gradient.
        inverse = torch.where(squares <= rounding, torch.inf, squares).rsqrt()
    else:
        count = n * (n - 3) if estimator.corrected else (n - int(estimator.pairs_less_one)) ** 2
        # What a norm of rounding is multiplied with is rounding, too; its gradient is none.
        nothing = squares <= rounding
        nothing = torch.stack([nothing[i] | nothing[j] for i, j in pairs])
        products = torch.where(nothing, products - products.detach(), products)
        products, inverse = products / count, units
    first, second = (torch.stack([inverse[pair[side]] for pair in pairs]) for side in (0, 1))
    values = products * (first * second) if estimator.normalized else products
    if estimator.rooted:  # 0 with a zero gradient where a value is not above 0, NaN where it is NaN
        vanishes = values <= 0
        values = torch.where(vanishes, 0.0, torch.where(vanishes, 1.0, values).sqrt())
    if not estimator.normalized:
        power = estimator.matrix.exponent / (2 if estimator.rooted else 1)
        values = in_range(values, (first * second).pow(power), torch.finfo(dtype).max)
    return values.to(dtype)


def in_range(values: Tensor, factors: Tensor, limit: float) -> Tensor:
    """Returns the products, held within a range, with a zero gradient where they are."""
    beyond = factors.isinf() & (values != 0)
    products = (values * torch.where(factors.isinf(), 0.0, factors)).clamp(-limit, limit)
    return torch.where(beyond, values.detach().sign() * limit, products)


def _median(squared: Tensor, rows: Rows) -> Tensor:
    """Returns the lower median of the squared distances between different samples, of shape (K,).

    Where it is 0, the mean takes its place, and 1 where that is 0 too.
    """
    n = squared.shape[2]
    others = ~diagonal(squared, rows.start)
    if rows.stop is None:
        # Without the diagonal: drop the first entry of every run of n + 1.
        pairs = squared.flatten(1)[:, 1:].unflatten(1, (n - 1, n + 1))[:, :, :-1]
        median = pairs.flatten(1).median(dim=1).values
    else:
        median = _shared_median(squared, others, rows, (n * (n - 1) - 1) // 2)
    mean = rows.sum(squared.sum(dim=(1, 2))) / (n * (n - 1))
    spread = torch.where(median == 0, mean, median)
    return torch.where(spread == 0, 1.0, spread)


def _shared_median(squared: Tensor, others: Tensor, rows: Rows, rank: int) -> Tensor:
    """Returns the value of a rank among those of all processes, by bisection of its bits."""
    # The bits of numbers that are not negative are in the order of the numbers.
    integer = torch.int64 if squared.dtype == torch.float64 else torch.int32
    bits = squared.contiguous().view(integer)
    found = torch.zeros(len(squared), 1, 1, dtype=integer, device=squared.device)
    for bit in range(torch.iinfo(integer).bits - 2, -1, -1):
        trial = found + (1 << bit)
        below = rows.sum(((bits < trial) & others).sum(dim=(1, 2)))
        found = torch.where((below <= rank)[:, None, None], trial, found)
    return found.view(squared.dtype).flatten()


class DependenceMeasure(nn.Module):
    """A measure of dependence between two batches; one's own is a subclass with :meth:`forward`.

    A subclass states ``min_samples``, the smallest batch it is defined on.

    Examples:
        >>> class MeanProduct(DependenceMeasure):
        ...     def forward(self, x, y):
        ...         return (x.flatten(1).mean(1) * y.flatten(1).mean(1)).mean()
        >>> MeanProduct()(torch.ones(4, 2), torch.ones(4, 3))
        tensor(1.)
    """

    min_samples: int = 2

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        """Computes the dependence between two batches.

        Args:
            x: Tensor of shape (N, D) or (N, ...), which is flattened.
            y: Tensor of shape (N, E) or (N, ...); D and E may differ.

        Returns:
            Scalar tensor.
        """
        raise NotImplementedError

    def compare(self, batches: Sequence[Tensor], pairs: Pairs, rows: Rows = ALL_ROWS) -> Tensor:
        """Computes the dependence of several pairs of batches.

        Args:
            batches: Tensors of shape (N, ...).
            pairs: Which to compare, as places in ``batches``.
            rows: Which rows of matrices are computed in this process; all of them where a measure
                is not made of rows.

        Returns:
            Tensor of shape (pairs,).
        """
        values = [self(batches[i], batches[j]) for i, j in pairs]
        for value in values:
            if not isinstance(value, Tensor) or value.ndim != 0:
                shape = tuple(value.shape) if isinstance(value, Tensor) else type(value).__name__
                raise TypeError(
                    f"{type(self).__name__} must return a tensor of shape () but returned {shape}."
                )
        return torch.stack(values)


class MatrixMeasure(DependenceMeasure):
    """A measure that reads each batch through its matrix of squared distances.

    Built by name, see :func:`dependence_measure`. The matrix of a batch is made once however many
    others it meets, all matrices are worked on as one stack, and several processes share the rows.

    Args:
        name: What it is called.
        estimator: What it computes.
        block_size: If given, at most this many rows of a matrix exist at once: memory grows as
            N x block_size, not N x N, and the gradient computes the matrices again.
    """

    def __init__(self, name: str, estimator: Estimator, block_size: int | None = None) -> None:
        super().__init__()
        self.name = name
        self.estimator = estimator
        self.min_samples = 4 if estimator.corrected else 2
        if block_size is not None:
            block_size = check_int("block_size", block_size, minimum=1)
        self.block_size = block_size

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        """Computes the dependence between two batches; see the base class."""
        return compare_two(self.estimator, x, y, self.block_size)

    def compare(self, batches: Sequence[Tensor], pairs: Pairs, rows: Rows = ALL_ROWS) -> Tensor:
        """Computes the dependence of several pairs of batches; see the base class."""
        return dependence(self.estimator, batches, pairs, rows, self.block_size)

    def extra_repr(self) -> str:
        """Returns the name and the options, for printing."""
        options = {**self.estimator.matrix._asdict(), "block_size": self.block_size}
        if not isinstance(self.estimator.matrix, Distance):
            del options["exponent"]
        said = [f"{name}={value!r}" for name, value in options.items() if value is not None]
        return ", ".join([self.name, *said])


def compare_two(
    estimator: Estimator, x: Tensor, y: Tensor, block_size: int | None = None
) -> Tensor:
    """Computes the dependence between two batches after checking them."""
    for name, batch in (("x", x), ("y", y)):
        check_batch(name, batch, 4 if estimator.corrected else 2)
    if len(x) != len(y):
        raise ValueError(
            f"x and y must have the same number of samples but have {len(x)} and {len(y)}."
        )
    if x.device != y.device:
        raise ValueError(f"y must be on {x.device} like x but is on {y.device}.")
    batches = [x.reshape(len(x), -1), y.reshape(len(y), -1)]
    value = dependence(estimator, batches, [(0, 1)], block_size=block_size)[0]
    # Any value that is not finite makes it NaN, so that the batches are looked at only then.
    if can_be_seen(value) and not math.isfinite(value.item()):
        check_finite("x", x)
        check_finite("y", y)
    return value
