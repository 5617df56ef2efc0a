"""A bank of samples seen before, as anchors of the dependence on a teacher."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from mvmr_loss._checks import check_batch, check_finite, check_int


class AnchorBank(nn.Module):
    """The last samples' embeddings with the teachers' features of the same images, first in, first out.

    A dependence within a batch of N compares N x N distances. With a bank of M, each sample has
    N + M others to keep its distance from. Embeddings in it are of earlier steps, as in MoCo's queue.

    What it holds is in checkpoints. Only :meth:`update` writes, in place.

    Source: the queue of MoCo, He et al., CVPR 2020 (arXiv 1911.05722).

    Args:
        size: Number M of samples, at least 1.
        embedding_dim: Width D of the embeddings.
        teacher_dims: Name of each teacher -> width of its features.

    Raises:
        TypeError: If an argument is of a wrong type.
        ValueError: If one is out of range.

    Examples:
        >>> bank = AnchorBank(3, embedding_dim=1, teacher_dims={"teacher": 2})
        >>> for i in (1.0, 2.0):
        ...     bank.update(torch.full((2, 1), i), {"teacher": torch.full((2, 2), i)})
        >>> embeddings, teachers = bank.samples()
        >>> embeddings.flatten(), teachers["teacher"].shape
        (tensor([2., 1., 2.]), torch.Size([3, 2]))
    """

    embeddings: Tensor

    def __init__(self, size: int, embedding_dim: int, teacher_dims: Mapping[str, int]) -> None:
        super().__init__()
        self.size = check_int("size", size, minimum=1)
        width = check_int("embedding_dim", embedding_dim, minimum=1)
        self.register_buffer("embeddings", torch.zeros(self.size, width))
        self.names = tuple(teacher_dims)
        for name, dim in teacher_dims.items():
            dim = check_int(f"teacher_dims[{name!r}]", dim, minimum=1)
            self.register_buffer(f"teacher_{name}", torch.zeros(self.size, dim))
        # How many samples ever came. A plain number: to look at it makes no accelerator wait.
        self._written = 0

    def samples(self) -> tuple[Tensor, dict[str, Tensor]]:
        """Returns the embeddings, shape (M', D), and each teacher's features, shape (M', E).

        M' is the number of samples that are there, at most M.
        """
        there = min(self._written, self.size)
        teachers = {name: getattr(self, f"teacher_{name}")[:there] for name in self.names}
        return self.embeddings[:there], teachers

    @torch.no_grad()
    def update(self, embeddings: Tensor, teachers: Mapping[str, Tensor]) -> None:
        """Writes a batch over the oldest samples.

        Args:
            embeddings: Tensor of shape (N, D).
            teachers: Name -> features of the same images, shape (N, E) or (N, ...), of every teacher.

        Raises:
            TypeError: If one is no floating-point tensor.
            ValueError: If names or shapes do not fit or, on a CPU, a value is not finite.
        """
        if set(teachers) != set(self.names):
            raise ValueError(
                f"teachers must be {', '.join(self.names)} but are {', '.join(teachers)}."
            )
        pairs = [("embeddings", embeddings, self.embeddings)]
        for name in self.names:
            buffer: Tensor = getattr(self, f"teacher_{name}")
            pairs.append((f"teachers[{name!r}]", teachers[name], buffer))
        for label, new, buffer in pairs:
            check_batch(label, new)
            check_finite(label, new)
            if (len(new), new[0].numel()) != (len(embeddings), buffer.shape[1]):
                raise ValueError(
                    f"{label} must have shape {(len(embeddings), buffer.shape[1])} but has shape "
                    f"{tuple(new.shape)}."
                )
        count = min(len(embeddings), self.size)
        start = self._written + len(embeddings) - count
        place = torch.arange(start, start + count, device=self.embeddings.device) % self.size
        for _, new, buffer in pairs:
            buffer[place] = new[-count:].flatten(1).to(buffer)
        self._written += len(embeddings)

    def get_extra_state(self) -> int:
        """Returns how many samples ever came, for checkpoints."""
        return self._written

    def set_extra_state(self, state: Any) -> None:
        """Takes it from a checkpoint."""
        self._written = check_int("the bank's state", state, minimum=0)

    def extra_repr(self) -> str:
        """Returns the size and what is there, for printing."""
        return f"size={self.size}, teachers={', '.join(self.names)}"
