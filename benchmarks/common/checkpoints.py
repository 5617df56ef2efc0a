"""Files of tensors that the benchmarks wrote, or that somebody put in their place."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from mvmr_loss.teachers.checkpoints import load_tensors


@contextmanager
def contents_of(path: Path, what: str) -> Iterator[Any]:
    """Gives what a file holds; whatever goes wrong with it inside is an error that names the file.

    Args:
        path: The file, which is read without unpickling objects.
        what: What it must be, for the error.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If it is damaged, holds objects, or its contents do not fit.

    Examples:
        >>> import tempfile, torch
        >>> path = Path(tempfile.mkdtemp()) / "weights.pt"
        >>> torch.save({"epoch": 3}, path)
        >>> with contents_of(path, "a checkpoint") as content:
        ...     content["epoch"]
        3
    """
    content = load_tensors(path)
    try:
        yield content
    except Exception as error:  # Which one depends on what it holds instead.
        said = (str(error) or "nothing more is known").splitlines()[0]
        raise ValueError(
            f"{path} must be {what} but holds something else ({type(error).__name__}: {said})"
        ) from error
