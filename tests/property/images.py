"""What images and representations the property tests draw."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from hypothesis import strategies as st

from tests.property.cases import DTYPES

SIZES = st.integers(-20, 20)
OPTIONS = {
    "pixels": {},
    "dct": {},
    "local_std": {"window_size": st.sampled_from([3, 5, 7])},
    "hog": {
        "orientations": st.integers(1, 12),
        "pixels_per_cell": st.integers(1, 9),
        "cells_per_block": st.integers(1, 2),
        "block_norm": st.sampled_from(["L1", "L2", "L2-Hys"]),
        "gradient": st.sampled_from(["sobel", "central"]),
        "interpolation": st.sampled_from(["linear", "none"]),
    },
    "scattering": {
        "J": st.integers(1, 3),
        "L": st.integers(1, 9),
        "max_order": st.integers(1, 2),
    },
    "patch_scattering": {
        "J": st.integers(1, 2),
        "L": st.integers(1, 8),
        "grid_size": st.integers(1, 4),
    },
    "augmented_pixels": {"seed": st.integers(0, 2**64 - 1), "normalization": st.just("none")},
}


@dataclass(frozen=True)
class Images:
    """How a batch of images is made; a failure prints it."""

    kind: str
    shape: tuple[int, int, int, int]
    size: int
    seed: int
    dtype: torch.dtype
    layout: str

    def numbers(self) -> torch.Tensor:
        """Returns the numbers in the dtype, contiguous."""
        generator = torch.Generator().manual_seed(self.seed)
        x = torch.rand(self.shape, generator=generator, dtype=torch.float64)
        if self.kind == "constant":
            x = torch.full_like(x, 0.3)
        elif self.kind == "black":
            x = x * 0
        elif self.kind == "two values":
            x = x.round()
        elif self.kind == "a point":
            x = x * 0
            x[:, :, 0, -1] = 1
        elif self.kind == "ramp":
            x = x * 0 + torch.linspace(0, 1, self.shape[3], dtype=torch.float64)
        most = torch.finfo(self.dtype).max
        return (x * 10.0**self.size).clamp(-most, most).to(self.dtype)

    def tensor(self) -> torch.Tensor:
        """Returns the same numbers in the drawn layout."""
        x = self.numbers()
        if self.layout == "channels last":
            return x.contiguous(memory_format=torch.channels_last)
        if self.layout == "transposed":
            return x.transpose(2, 3).contiguous().transpose(2, 3)
        if self.layout == "columns":
            return torch.stack([x, x + 1], dim=4).flatten(3)[..., ::2]
        if self.layout == "cut":
            return torch.nn.functional.pad(x, (2, 1, 1, 2))[:, :, 1:-2, 2:-1]
        if self.layout == "negated":
            return torch._neg_view(-x)
        return x


@st.composite
def image_batches(draw, least=1, most=40, sizes=SIZES, *, dtypes=DTYPES):
    """Draws batches of images."""
    shape = (draw(st.integers(1, 4)), draw(st.integers(1, 5)))
    shape += (draw(st.integers(least, most)), draw(st.integers(least, most)))
    layouts = ["plain", "channels last", "transposed", "columns", "cut", "negated"]
    return Images(
        kind=draw(st.sampled_from(["noise", "constant", "black", "two values", "a point", "ramp"])),
        shape=shape,
        size=draw(sizes),
        seed=draw(st.integers(0, 2**20)),
        dtype=draw(st.sampled_from(dtypes)),
        layout=draw(st.sampled_from(layouts)),
    )


@st.composite
def representations(draw, without=()):
    """Draws the name and the options of a representation."""
    name = draw(st.sampled_from([name for name in sorted(OPTIONS) if name not in without]))
    return name, {option: draw(values) for option, values in OPTIONS[name].items()}
