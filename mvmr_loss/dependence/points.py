"""Batches of which squared distances are made a few rows at a time, from a few columns at a time."""

from __future__ import annotations

import functools
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from mvmr_loss._checks import can_be_seen
from mvmr_loss.dependence.matrices import CLOSE, ROUNDINGS, SMALL, WIDE
from mvmr_loss.distributed import Rows

# So many numbers of a batch are copied at once: 4 or 8 MiB.
_FEW_NUMBERS = 2**20
_FEW_COLUMNS = 128


class Points:
    """A batch of which blocks of rows of squared distances are made, a few columns at a time.

    Args:
        batch: Tensor of shape (N, D), float32 or float64.
        tiny: The least normal number of the type in which gradients are wanted.
        unit: As below; None: one in which no norm is above 1.

    Attributes:
        unit: What the root of a squared distance is to be multiplied by, a power of two.
        level: Which part of the sum of a matrix's squares is rounding.
    """

    def __init__(self, batch: Tensor, tiny: float, unit: Tensor | None = None) -> None:
        wide = WIDE.get(batch.device.type, torch.float64)
        self.batch = batch
        self.level = (ROUNDINGS * torch.finfo(wide).eps) ** 2
        # In units of the largest number, then of the largest norm: neither the mean nor a square shall
        # leave the range.
        self._largest = _power_of_two(torch.linalg.vector_norm(batch.detach(), torch.inf).to(wide))
        means, norms = [], []
        for columns in _few_columns(batch):
            x = batch[:, columns].to(wide, copy=True).div_(self._largest)
            means.append(x.mean(dim=0))
            x = x.sub_(means[-1])
            norms.append(torch.einsum("nd, nd -> n", x, x))
        self._mean = torch.cat(means)
        norm = torch.stack(norms).sum(dim=0)
        longest = _power_of_two(4 * norm.detach().max().sqrt())
        # Gradients are of the order of 1 / unit: the margin keeps them within the range.
        constant = self._largest * longest < 2 * 65536 * tiny
        self.unit = torch.where(constant, 1.0, self._largest * longest) if unit is None else unit
        within = 1 / longest if unit is None else self._largest / unit
        self._within = torch.where(constant, 0.0, within)
        self._norms = norm * self._within.square()

    def squared_distances(self, rows: Rows) -> Tensor:
        """Returns rows of the squared distances, of shape (rows, N), as :func:`squared_distances`."""
        part = slice(rows.start, rows.stop)
        total = self._norms[part, None] + self._norms
        squared = total
        for x in self._about_mean():
            squared = torch.addmm(squared, x[part], x.T, alpha=-2)
        nothing = squared <= ROUNDINGS * torch.finfo(total.dtype).eps * total
        nothing.diagonal(rows.start).fill_(True)
        return squared.masked_fill_(nothing, 0.0)

    def pull(self, grad: Tensor, rows: Rows) -> Tensor:
        """Returns the gradient of rows of a batch from that of its squared distances, on both sides."""
        # A matrix is symmetric, and so is its gradient: a distance is in the rows of two samples.
        grad = 4 / self.unit * grad
        sums = grad.sum(dim=1, keepdim=True)
        columns = [
            torch.addmm(sums.to(x.dtype) * x[rows.start : rows.stop], grad.to(x.dtype), x, alpha=-1)
            for x in self._about_mean()
        ]
        return torch.cat(columns, dim=1).to(self.batch.dtype)

    def _about_mean(self) -> Iterator[Tensor]:
        for columns in _few_columns(self.batch):
            wide = self.batch[:, columns].to(self._mean.dtype, copy=True)
            yield wide.div_(self._largest).sub_(self._mean[columns]).mul_(self._within)


class Float32Points(Points):
    """The same with products in float32, of blocks in which that loses no digits."""

    def __init__(self, batch: Tensor, tiny: float) -> None:
        self.batch, self._tiny = batch, tiny
        self.level = (ROUNDINGS * torch.finfo(batch.dtype).eps) ** 2
        self.unit = batch.new_ones((), dtype=torch.float64)
        self._close: set[Rows] = set()
        means = []
        self._norms = batch.new_zeros(len(batch), dtype=torch.float64)
        for columns in _few_columns(batch):
            x = batch[:, columns]
            means.append(x.mean(dim=0))
            self._norms += torch.linalg.vector_norm(x - means[-1], dim=1).square()
        self._mean = torch.cat(means)

    @property
    def is_sane(self) -> bool:
        """Whether squares and gradients stay within float32's range; False for what is not finite."""
        return bool(SMALL < self._norms.max() < 1 / SMALL)

    @functools.cached_property
    def _in_float64(self) -> Points:
        return Points(self.batch, self._tiny, self.unit)

    def squared_distances(self, rows: Rows) -> Tensor:
        """As of the base class; in float64 where rows have other points too close to them."""
        part = slice(rows.start, rows.stop)
        total = self._norms[part, None] + self._norms
        squared = total.clone()
        for x in self._about_mean():
            squared.sub_((x @ x[part].T).T, alpha=2)
        close = squared <= CLOSE * total
        if close.count_nonzero() > len(squared):  # more than the diagonal
            self._close.add(rows)
            return self._in_float64.squared_distances(rows)
        return squared.masked_fill_(close, 0.0)

    def pull(self, grad: Tensor, rows: Rows) -> Tensor:
        """As of the base class, in the precision of the rows' distances."""
        if rows in self._close:
            return self._in_float64.pull(grad, rows)
        return super().pull(grad, rows)

    def _about_mean(self) -> Iterator[Tensor]:
        for columns in _few_columns(self.batch):
            yield self.batch[:, columns] - self._mean[columns]


def points_of(batches: Sequence[Tensor], units: Tensor | None = None) -> list[Points]:
    """Returns float32 or float64 batches as points, in given units or in their own."""
    tiny = torch.finfo(functools.reduce(torch.promote_types, [x.dtype for x in batches])).tiny
    each = [None] * len(batches) if units is None else units.unbind()
    return [_points(x, tiny, unit) for x, unit in zip(batches, each, strict=True)]


def _points(batch: Tensor, tiny: float, unit: Tensor | None) -> Points:
    # A further derivative is made of the plain computation.
    seen = can_be_seen(batch) and not torch.is_grad_enabled()
    if batch.dtype == torch.float32 and seen and (unit is None or unit == 1):
        points = Float32Points(batch, tiny)
        if points.is_sane:
            return points
    return Points(batch, tiny, unit)


def _few_columns(x: Tensor) -> Iterator[slice]:
    # Not so few that adding the products takes longer than making them.
    count = max(_FEW_COLUMNS, _FEW_NUMBERS // len(x))
    for start in range(0, x.shape[1], count):
        yield slice(start, start + count)


def _power_of_two(x: Tensor) -> Tensor:
    """Returns the power of two that is at most a number but more than its half; 1 for 0."""
    x = torch.where(x == 0, 1.0, x)
    return x / (2 * torch.frexp(x).mantissa)
