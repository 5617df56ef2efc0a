"""A bank of samples seen before, as anchors of the dependence on a teacher."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from mvmr_loss._checks import as_rows, check_batch, check_finite, check_int, check_module_name


def check_teacher_dims(teacher_dims: Any) -> dict[str, int]:
    """Returns the width of each teacher's features after checking names and widths."""
    if not isinstance(teacher_dims, Mapping):
        raise TypeError(
            "teacher_dims must be a mapping from a teacher's name to its width, such as "
            f"{{'teacher': 512}}, but is a {type(teacher_dims).__name__}, {teacher_dims!r}."
        )
    for name in teacher_dims:
        check_module_name("teacher_dims", name)
    return {
        name: check_int(f"teacher_dims[{name!r}]", width, minimum=1)
        for name, width in teacher_dims.items()
    }


class AnchorBank(nn.Module):
    """The last samples' embeddings with the teachers' features of the same images, first in, first out.

    A dependence within a batch of N compares N x N distances. With a bank of M, each sample has
    N + M others to keep its distance from. Embeddings in it are of earlier steps, as in MoCo's queue.
    Until M came, those that are there are repeated, so that a compiled step sees one shape.

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
    written: Tensor

    def __init__(self, size: int, embedding_dim: int, teacher_dims: Mapping[str, int]) -> None:
        super().__init__()
        self.size = check_int("size", size, minimum=1)
        width = check_int("embedding_dim", embedding_dim, minimum=1)
        self.register_buffer("embeddings", torch.zeros(self.size, width))
        dims = check_teacher_dims(teacher_dims)
        self.names = tuple(dims)
        for name, dim in dims.items():
            self.register_buffer(f"teacher_{name}", torch.zeros(self.size, dim))
        # How many samples ever came. A tensor: no accelerator waits for it, and what is compiled is not
        # compiled anew for each number, but once for whether there are any.
        self.register_buffer("written", torch.zeros((), dtype=torch.int64))
        self._begun = False

    def samples(self) -> tuple[Tensor, dict[str, Tensor]]:
        """Returns the embeddings, shape (M, D), and each teacher's features, shape (M, E).

        Both have no rows before the first batch.
        """
        buffers = {name: getattr(self, f"teacher_{name}") for name in self.names}
        if not self._begun:
            return self.embeddings[:0], {name: buffer[:0] for name, buffer in buffers.items()}
        there = self.written.clamp(max=self.size)
        rows = torch.arange(self.size, device=self.embeddings.device) % there
        return self.embeddings[rows], {name: buffer[rows] for name, buffer in buffers.items()}

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
        newest = torch.arange(len(embeddings) - count, len(embeddings), device=self.written.device)
        place = (self.written + newest) % self.size
        last = [as_rows(new[-count:]) for _, new, _ in pairs]
        # Where values are not looked at, a sample that is not finite shall not spoil later steps.
        finite = torch.stack([new.isfinite().all(dim=1) for new in last]).all(dim=0)[:, None]
        for new, (_, _, buffer) in zip(last, pairs, strict=True):
            buffer[place] = torch.where(finite, new.to(buffer), buffer[place])
        self.written.add_(len(embeddings))
        self._begun = True

    def _load_from_state_dict(self, *args: Any) -> None:
        super()._load_from_state_dict(*args)
        self._begun = bool(self.written > 0)

    def extra_repr(self) -> str:
        """Returns the size and what is there, for printing."""
        return f"size={self.size}, teachers={', '.join(self.names)}"
