"""Writes dcor.json: what dcor computes for drawn batches.

python -m tests.oracles.make_dcor

dcor compiles itself for most of a minute when it is first imported, so that only a slow test does it
anew. For each of :func:`values` the file holds a number, or a matrix as lists.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

PATH = Path(__file__).with_name("dcor.json")

FUNCTIONS = [
    "distance_covariance",
    "distance_covariance_sqr",
    "distance_correlation",
    "distance_correlation_sqr",
    "u_distance_covariance_sqr",
    "u_distance_correlation_sqr",
]
EXPONENTS = [1.0, 0.5, 1.7]
# 150 rows is more than one block of the Gram matrix.
SHAPES = [(4, 3, 2), (20, 5, 7), (33, 1, 1), (150, 300, 40)]
PARTIAL_SHAPES = [(4, 3), (25, 4), (60, 1)]
CENTERINGS = ["double_centered", "u_centered"]


def batch(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    """Draws a batch."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype)


def pair(n: int, d: int, e: int) -> tuple[Tensor, Tensor]:
    """Draws two batches that are related, far from the origin."""
    x = batch(n, d)
    return x, 10 + (x.abs() @ batch(d, e, seed=1)) * 1e3 + batch(n, e, seed=2)


def ties() -> tuple[Tensor, Tensor]:
    """Returns batches of coinciding points."""
    x = torch.tensor([0.0, 0, 1, 1, 2, 2, 2, 5], dtype=torch.float64)[:, None]
    return x, torch.tensor([1.0, 0, 0, 1, 1, 0, 3, 3], dtype=torch.float64)[:, None]


def wide() -> tuple[Tensor, Tensor]:
    """Draws a batch that is wider than a slice."""
    return batch(20, 9000) + 2, batch(20, 5)


def three(n: int, d: int) -> tuple[Tensor, Tensor, Tensor]:
    """Draws two batches that have a third one in common."""
    z = batch(n, 2)
    x = batch(n, d, seed=1) + z[:, :1]
    return x, x.square() + batch(n, d, seed=2) - z[:, 1:], z


def distances() -> Tensor:
    """Returns a matrix of distances."""
    x = batch(9, 4)
    return (x[:, None] - x).norm(dim=-1)


def key(*parts: Any) -> str:
    """Returns the name of a value."""
    return " ".join(map(str, parts))


def values() -> dict[str, Any]:
    """Computes all of them with dcor."""
    import dcor

    found: dict[str, Any] = {}
    for name in FUNCTIONS:
        function = getattr(dcor, name)
        for shapes in SHAPES:
            x, y = (t.numpy() for t in pair(*shapes))
            for exponent in EXPONENTS:
                found[key(name, shapes, exponent)] = float(function(x, y, exponent=exponent))
        found[key(name, "ties")] = float(function(*(t.numpy() for t in ties())))
    found["wide"] = float(dcor.distance_correlation(*(t.numpy() for t in wide())))
    for shape in PARTIAL_SHAPES:
        batches = [t.numpy() for t in three(*shape)]
        found[key("partial", shape)] = float(dcor.partial_distance_correlation(*batches))
    for name in CENTERINGS:
        found[name] = getattr(dcor, name)(distances().numpy()).tolist()
    return found


if __name__ == "__main__":
    PATH.write_text(json.dumps(values(), indent=1) + "\n")
