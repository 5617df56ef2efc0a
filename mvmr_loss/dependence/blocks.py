"""Products of centred distance matrices of which a few rows exist at a time.

The gradient makes every block again. In float64 a first pass over the blocks sums the rows and a second
one compares them centred; products in float32 are compared as they are in one pass, and centred by their
sums. A few columns of a batch are copied at once.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from mvmr_loss._checks import without_autocast
from mvmr_loss.dependence.matrices import without_diagonal
from mvmr_loss.dependence.points import Float32Points, Points, points_of
from mvmr_loss.distributed import Rows


class Blocks(NamedTuple):
    """What is computed, and how many rows at once.

    Attributes:
        estimator: A distance covariance or correlation.
        pairs: Which batches to compare.
        rows: Which rows of the matrices are this process's.
        size: How many of them exist at once.
    """

    estimator: Any
    pairs: Sequence[tuple[int, int]]
    rows: Rows
    size: int

    def end(self, points: Sequence[Points]) -> int:
        """Returns the row after this process's last one."""
        return len(points[0].batch) if self.rows.stop is None else self.rows.stop

    def parts(self, points: Sequence[Points]) -> Iterator[Rows]:
        """Yields the rows of each block."""
        end = self.end(points)
        for start in range(self.rows.start, end, self.size):
            yield Rows(start, min(start + self.size, end))

    def raw(self, x: Points, part: Rows) -> tuple[Tensor, Tensor]:
        """Returns rows of the squared distances, and of the matrix, both of shape (1, rows, N)."""
        squared = x.squared_distances(part)[None]
        raw = self.estimator.matrix.matrices(squared, x.unit[None], part)
        return squared, without_diagonal(raw, part.start) if self.estimator.corrected else raw

    def row_sums(self, points: Sequence[Points]) -> tuple[Tensor, Tensor]:
        """Returns the sums of all rows, (K, N), and squared norms of this process's roundings, (K,)."""
        first = self.rows.start
        # Written in place: what outlived a block would lie between the holes that blocks leave.
        sums = points[0].unit.new_zeros(len(points), self.end(points) - first)
        squares = sums.new_zeros(len(points))
        for k, x in enumerate(points):
            for part in self.parts(points):
                raw = self.raw(x, part)[1][0]
                sums[k].narrow(0, part.start - first, len(raw)).copy_(raw.sum(dim=1))
                squares[k] += x.level * raw.detach().square().sum()
        return self.rows.concatenate(sums), squares

    def products(self, points: Sequence[Points]) -> tuple[Tensor, Tensor, Tensor]:
        """Returns products of the pairs and squared norms, those of roundings, and all row sums."""
        sums, rounding = self.row_sums(points)
        total = sums.new_zeros(len(self.pairs) + len(points))
        for part in self.parts(points):
            centered = [
                self.center(self.raw(x, part)[1], row, part)
                for x, row in zip(points, sums, strict=True)
            ]
            total += self._multiply(centered)
        return total, rounding, sums

    def products_in_one_pass(self, points: Sequence[Points]) -> tuple[Tensor, Tensor, Tensor]:
        """The same for distances that are no more precise than float32: centred after the products."""
        first, n = self.rows.start, len(points[0].batch)
        own = points[0].unit.new_zeros(len(points), self.end(points) - first)
        total = own.new_zeros(len(self.pairs) + len(points))
        for part in self.parts(points):
            raw = [self.raw(x, part)[1][0] for x in points]
            total += self._multiply(raw)
            for sums, x in zip(own, raw, strict=True):
                sums.narrow(0, part.start - first, len(x)).copy_(x.sum(dim=1))
        rounding = total[len(self.pairs) :] * total.new_tensor([x.level for x in points])
        every = self.rows.concatenate(own)
        corrected = self.estimator.corrected  # the sums as in its center()
        divisor, count = (n - 2, (n - 1) * (n - 2)) if corrected else (n, n * n)
        share = own.shape[1] / n
        both = [*self.pairs, *((k, k) for k in range(len(points)))]
        total -= 2 / divisor * torch.stack([own[i] @ own[j] for i, j in both])
        total += share / count * torch.stack([every[i].sum() * every[j].sum() for i, j in both])
        return total, rounding, every

    def _multiply(self, matrices: Sequence[Tensor]) -> Tensor:
        products = [(matrices[i] * matrices[j]).sum() for i, j in self.pairs]
        return torch.stack(products + [x.square().sum() for x in matrices])

    def center(self, raw: Tensor, sums: Tensor, part: Rows) -> Tensor:
        """Returns rows of the centred matrix, of shape (rows, N)."""
        own = sums[None, part.start : part.stop]
        centered: Tensor = self.estimator.center(raw, own, sums[None], part.start)[0]
        return centered


def products_in_blocks(
    blocks: Blocks, batches: Sequence[Tensor]
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Computes the products of centred matrices.

    Args:
        blocks: Of what, and how.
        batches: Tensors of shape (N, D_k).

    Returns:
        In the wide type, over the rows of all processes: the products of the pairs; the squared norms;
        those of their roundings; and the units of the batches. The first two are
        differentiable any number of times, but a gradient that can be differentiated keeps all blocks.
    """
    raised = [x.float() if x.element_size() < 4 else x for x in batches]
    function: Any = _ProductsInBlocks.apply
    if torch.compiler.is_compiling():  # which stops at it where no gradient is asked for
        if not torch.is_grad_enabled() or not any(x.requires_grad for x in raised):
            function = _ProductsInBlocks.forward
    else:  # what was made in inference mode cannot be kept for a gradient
        raised = [x.clone() if x.is_inference() else x for x in raised]
    own, rounding, units, _ = function(blocks, *raised)
    everything = blocks.rows.sum(torch.cat([own, rounding]))
    products, squares, rounding = everything.split([len(blocks.pairs), *[len(batches)] * 2])
    return products, squares, rounding, units


class _ProductsInBlocks(torch.autograd.Function):
    """The products of the pairs and the squared norms, in one tensor, over this process's rows."""

    @staticmethod
    def forward(blocks: Blocks, *batches: Tensor) -> tuple[Tensor, ...]:
        with without_autocast(batches[0]):
            points = points_of(batches)
            single = all(isinstance(x, Float32Points) for x in points)
            products = blocks.products_in_one_pass if single else blocks.products
            total, rounding, sums = products(points)
        units = torch.stack([x.unit for x in points])
        return total, rounding, units, sums

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        ctx.blocks, *batches = inputs
        ctx.mark_non_differentiable(*output[1:])
        ctx.save_for_backward(*batches, *output[2:])

    @staticmethod
    def backward(ctx: Any, grad: Tensor, *_: Tensor) -> tuple[Tensor | None, ...]:
        with without_autocast(grad):
            return _ProductsInBlocks._gradients(ctx, grad)

    @staticmethod
    def _gradients(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        blocks: Blocks = ctx.blocks
        *batches, units, sums = ctx.saved_tensors
        points = points_of(batches, units)
        if torch.is_grad_enabled():  # for a further derivative
            sums, _rounding = blocks.row_sums(points)
        grad_products, grad_squares = grad.split([len(blocks.pairs), len(batches)])
        wanted = [k for k in range(len(batches)) if ctx.needs_input_grad[1 + k]]
        gradients: list[Any] = [
            torch.zeros_like(x) if k in wanted else None for k, x in enumerate(batches)
        ]
        for part in blocks.parts(points):
            centered, slopes = [], {}
            for k, (x, row) in enumerate(zip(points, sums, strict=True)):
                squared, raw = blocks.raw(x, part)
                centered.append(blocks.center(raw, row, part))
                if k in wanted:
                    slopes[k] = blocks.estimator.matrix.slopes(squared, raw, x.unit[None])[0]
            for k in wanted:
                # Centring is a projection: the gradient of a product is the other one, centred.
                weight = 2 * grad_squares[k] * centered[k]
                for g, (i, j) in zip(grad_products, blocks.pairs, strict=True):
                    for own, other in ((i, j), (j, i)):
                        if own == k:
                            weight = weight + g * centered[other]
                pull = points[k].pull(weight * slopes[k], part)
                gradients[k][part.start : part.stop] = pull
        return None, *gradients
