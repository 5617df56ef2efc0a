"""The folded sign sketch: far fewer numbers with nearly the same distances."""

from __future__ import annotations

import math
import operator
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from mvmr_loss._checks import as_rows, check_float_tensor, check_int
from mvmr_loss._cpu import can_run
from mvmr_loss._cpu.sketch import fold
from mvmr_loss._random import check_seed, random_bits, random_signs
from mvmr_loss.normalization import Normalization
from mvmr_loss.representations._constants import constant
from mvmr_loss.representations.base import Representation

# Values of a slice's signed copy on an accelerator.
_SLICE_ACCELERATOR = 2**27


def folded_sign_sketch(x: Tensor, dim: int, seed: int = 0) -> Tensor:
    r"""Computes a folded sign sketch: random signs, then the sum over slices of width ``dim``.

    The features, with random signs, are cut into slices of width m = ``dim`` (zeros fill up the
    last one), each slice is rotated by a random amount, and the slices are added:

    .. math:: s_j = \sum_b \sigma_{b m + i} \, x_{b m + i}, \qquad i = (j - r_b) \bmod m

    The map is linear, works on each sample for itself, and reads ``x`` once.

    Squared distances are unbiased over the seeds, and for any two vectors, whatever they are, the
    variance of their squared distance, relative to its square, is

    .. math:: \frac{2}{m} \Big(1 - \sum_b p_b^2\Big) \le \frac{2}{m}

    with :math:`p_b` the share of slice b in the squared distance. This is a relative error of the
    distance of at most :math:`1 / \sqrt{2 m}` root mean square over the seeds: 4.4% (m = 256), 2.2%
    (1024), 1.1% (4096). For one seed it is about that, too, averaged over pairs of images.

    Without the rotation, features whose length of a channel is a multiple of m would meet
    themselves: the three mean values of a DCT of 32 x 32 pixels, nearly all of its energy, in one
    column.

    Signs and rotations come from a counter-based generator that is part of this package, so a sketch
    is the same on every device, but for rounding, and with every version.

    Source: feature hashing, whose mean and variance these are, with a rotated position for the
    hash: Weinberger et al., Feature Hashing for Large Scale Multitask Learning, ICML 2009. The module is
    :class:`FoldedSignSketch`.

    Args:
        x: Tensor of shape (N, D), or (N, ...), which is flattened.
        dim: Width m of the sketch, at least 1.
        seed: Seed of the signs, in [0, 2^64).

    Returns:
        Tensor of shape (N, dim), float32 (float64 for float64 input), differentiable with respect
        to ``x``; where D <= dim there is nothing to gain and it is ``x`` itself, of shape (N, D).

    Examples:
        >>> x = torch.arange(12.0).reshape(2, 6)
        >>> folded_sign_sketch(x, dim=4).shape
        torch.Size([2, 4])
        >>> _ = torch.manual_seed(0)
        >>> a, b = torch.randn(2, 1, 100_000)
        >>> distance = torch.linalg.vector_norm(a - b)
        >>> sketched = folded_sign_sketch(a, dim=4096) - folded_sign_sketch(b, dim=4096)
        >>> error = torch.linalg.vector_norm(sketched) / distance - 1
        >>> bool(error.abs() < 0.03)
        True
    """
    sketch: Tensor = FoldedSignSketch(dim, seed)(x)
    return sketch


class FoldedSignSketch(nn.Module):
    """Module form of :func:`folded_sign_sketch`; it has no state, nothing to save or to move.

    Args:
        dim, seed: As in :func:`folded_sign_sketch`.

    Examples:
        >>> sketch = FoldedSignSketch(dim=256)
        >>> x = torch.rand(8, 3, 32, 32)
        >>> sketch(x).shape
        torch.Size([8, 256])
        >>> torch.equal(sketch(x)[2:5], sketch(x[2:5]))
        True
    """

    def __init__(self, dim: int, seed: int = 0) -> None:
        super().__init__()
        self.dim = check_int("dim", dim, minimum=1)
        self.seed = check_seed(seed)

    def extra_repr(self) -> str:
        return f"dim={self.dim}, seed={self.seed}"

    def forward(self, x: Tensor) -> Tensor:
        """Computes the sketch, of shape (N, min(dim, D)), of a batch (N, D) or (N, ...)."""
        check_float_tensor("x", x)
        if x.ndim < 2:
            raise ValueError(
                f"x must have shape (N, D) or (N, ...) but has shape {tuple(x.shape)}."
            )
        x = as_rows(x)
        dtype = torch.float64 if x.dtype == torch.float64 else torch.float32
        # Signs are made for one width: a compiler that lets it vary must know.
        width = operator.index(x.shape[1])
        if width <= self.dim:
            return x.to(dtype)
        slices = -(-width // self.dim)
        if not x.is_cpu:
            places, turned = _turned(x.device, self.seed, self.dim, width, dtype)
            return _fold_at_once(x, places, turned, slices, self.dim)
        signs = _signs(x.device, self.seed, width, dtype)
        rotations = _rotations(self.seed, self.dim, slices)
        function = _fold_on_cpu if can_run(x) else _fold
        sketch: Tensor = function(x, signs, rotations, self.dim)
        return sketch


def _fold(x: Tensor, signs: Tensor, rotations: Sequence[int], dim: int) -> Tensor:
    """Adds signed and rotated slices of ``x``, in the dtype of the signs."""
    # Slices of x are added in place: no padded copy and no product as large as x is made. The
    # sketch is twice as wide at first, so that a rotated slice is added in one piece.
    width = x.shape[1]
    unfolded = x.new_zeros(len(x), 2 * dim, dtype=signs.dtype)
    for start, rotation in zip(range(0, width, dim), rotations, strict=False):
        part, sign = x[:, start : start + dim], signs[start : min(start + dim, width)]
        unfolded[:, rotation : rotation + len(sign)].addcmul_(part, sign)
    return unfolded[:, :dim] + unfolded[:, dim:]


def _fold_at_once(x: Tensor, places: Tensor, signs: Tensor, slices: int, dim: int) -> Tensor:
    """Gives what :func:`_fold` does but for rounding, in few launches and in more memory."""

    def folded(part: Tensor) -> Tensor:
        return (
            (part.index_select(1, places).to(signs.dtype) * signs)
            .view(len(part), slices, dim)
            .sum(dim=1)
        )

    # Of so many rows at a time; a compiler joins the copies anyway.
    rows = max(1, _SLICE_ACCELERATOR // (slices * dim))
    if torch.compiler.is_compiling() or len(x) <= rows:
        return folded(x)
    return torch.cat([folded(part) for part in x.split(rows)])


@constant(maxsize=32)
def _turned(seed: int, dim: int, width: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Returns where in ``x`` the coordinates of each rotated slice are, and their signs.

    Beyond the end of ``x`` the place is 0 and so is the sign.
    """
    count = -(-width // dim)
    rotations = torch.tensor(_rotations(seed, dim, count))[:, None]
    start = torch.arange(count)[:, None] * dim
    places = (start + (torch.arange(dim) - rotations) % dim).flatten()
    there = places < width
    places = places.where(there, 0)
    signs = random_signs(seed, 0, width, dtype=dtype)[places]
    return places, signs.where(there, torch.zeros((), dtype=dtype))


@torch.library.custom_op("mvmr_loss::folded_sign_sketch", mutates_args=())
def _fold_on_cpu(x: Tensor, signs: Tensor, rotations: Sequence[int], dim: int) -> Tensor:
    by_kernel = fold(x, signs, rotations, dim)
    return _fold(x, signs, rotations, dim) if by_kernel is None else by_kernel


@_fold_on_cpu.register_fake
def _(x: Tensor, signs: Tensor, rotations: Sequence[int], dim: int) -> Tensor:
    return signs.new_empty(x.shape[0], dim)


@constant(maxsize=32)
def _signs(seed: int, width: int, dtype: torch.dtype) -> Tensor:
    return random_signs(seed, 0, width, dtype=dtype)


def _rotations(seed: int, dim: int, count: int) -> tuple[int, ...]:
    """Returns the rotation of each slice, drawn at positions that no sign is drawn at."""
    return _drawn_rotations(torch.device("cpu"), seed, dim, count)


@constant(maxsize=32)
def _drawn_rotations(seed: int, dim: int, count: int) -> tuple[int, ...]:
    return tuple((random_bits(seed, 2**62, count) % dim).tolist())


class Sketched(Representation):
    """A representation followed by a folded sign sketch, itself a representation.

    Narrow representations pass unchanged: the features are flattened and at most ``dim`` wide.

    Args:
        representation: What to sketch.
        dim, seed: As in :func:`folded_sign_sketch`.

    Examples:
        >>> from mvmr_loss.representations import Pixels
        >>> sketched = Sketched(Pixels(), dim=1024)
        >>> sketched(torch.rand(4, 3, 96, 96)).shape
        torch.Size([4, 1024])
        >>> sketched.output_shape(3, 16, 16)
        (768,)
    """

    def __init__(self, representation: Representation, dim: int, seed: int = 0) -> None:
        if not isinstance(representation, Representation):
            raise TypeError(
                "representation must be a mvmr_loss.representations.Representation "
                f"but is a {type(representation).__name__}."
            )
        super().__init__(differentiable=representation.differentiable)
        self.representation = representation
        self.sketch = FoldedSignSketch(dim, seed)
        self.dim, self.seed = self.sketch.dim, self.sketch.seed
        self.cacheable = representation.cacheable
        self.minimum_size = representation.minimum_size

    def undone(self) -> Normalization | None:
        return self.representation.undone()

    def undoing(self, normalization: Normalization) -> Sketched:
        told = self.representation.undoing(normalization)
        return self if told is self.representation else Sketched(told, self.dim, self.seed)

    def extract(self, images: Tensor) -> Tensor:
        rows = self.representation.as_rows(self.representation.extract(images))
        sketch: Tensor = self.sketch(rows)
        return sketch

    def output_shape(self, channels: int, height: int, width: int) -> tuple[int, ...]:
        return (
            min(self.dim, math.prod(self.representation.output_shape(channels, height, width))),
        )
