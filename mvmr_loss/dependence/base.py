"""What a dependence measure is to the loss: one centred matrix a batch, and a way to compare two."""

from __future__ import annotations

from abc import ABC, abstractmethod

from torch import Tensor, nn


class DependenceMeasure(nn.Module, ABC):
    """A measure of dependence between two batches that reads each through one n x n matrix.

    The split in two steps is what makes the loss cheap: the embeddings' matrix is made once by
    :meth:`center` and met by every representation through :meth:`compare`.

    A subclass states ``min_samples``, the smallest batch it is defined on, and implements both
    steps. ``measure(x, y)`` is ``measure.compare(measure.center(x), measure.center(y))``.
    """

    min_samples: int = 2

    @abstractmethod
    def center(self, x: Tensor, name: str = "x") -> Tensor:
        """Computes the centred n x n matrix of a batch.

        Args:
            x: Tensor of shape (N, D), or (N, ...), which is flattened; N >= ``min_samples``.
            name: What to call ``x`` in errors.

        Returns:
            Tensor of shape (N, N), float32 or float64, differentiable with respect to ``x``.

        Raises:
            TypeError: If ``x`` is not a floating-point tensor.
            ValueError: If ``x`` has a wrong shape, too few samples or, on a CPU, a non-finite value.
        """

    @abstractmethod
    def compare(self, a: Tensor, b: Tensor) -> Tensor:
        """Computes the dependence of two batches from their centred matrices.

        Args:
            a: Tensor of shape (N, N) from :meth:`center`.
            b: Tensor of shape (N, N) from :meth:`center`.

        Returns:
            Scalar tensor.
        """

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        """Computes the dependence between two batches.

        Args:
            x: Tensor of shape (N, D) or (N, ...).
            y: Tensor of shape (N, E) or (N, ...); D and E may differ.

        Returns:
            Scalar tensor.

        Raises:
            TypeError: If an input is not a floating-point tensor.
            ValueError: If the shapes do not fit, there are too few samples, or, on a CPU, a value
                is not finite.
        """
        a, b = self.center(x, "x"), self.center(y, "y")
        check_same_samples("x", x, "y", y)
        return self.compare(a, b)


def check_same_samples(name_x: str, x: Tensor, name_y: str, y: Tensor) -> None:
    """Raises ValueError if two batches differ in their number of samples."""
    if len(x) != len(y):
        raise ValueError(
            f"{name_x} and {name_y} must have the same number of samples "
            f"but have {len(x)} and {len(y)}."
        )
