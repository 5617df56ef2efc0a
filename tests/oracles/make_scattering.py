"""Writes scattering.npz: what kymatio 0.3.0 computes for crops of a photograph.

python tests/oracles/make_scattering.py

For each setting the file holds an image, of shape (H, W), and its coefficients, (K, h, w), in float32
as kymatio gives them, under the names image_J_L_HxW and coefficients_J_L_HxW.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import skimage.data
import torch

# kymatio 0.3.0's top-level import fails on SciPy >= 1.17.
from kymatio.scattering2d.backend.torch_backend import backend
from kymatio.scattering2d.frontend.torch_frontend import ScatteringTorch2D

PATH = Path(__file__).with_name("scattering.npz")

SETTINGS = [
    (1, 4, (9, 12)),
    (1, 8, (32, 32)),
    (2, 4, (17, 40)),
    (2, 6, (31, 33)),
    (2, 8, (32, 32)),
    (3, 6, (24, 50)),
    (3, 8, (32, 32)),
    (4, 4, (45, 33)),
    (4, 8, (32, 32)),
]


def main() -> None:
    """Computes the coefficients of every setting and writes the file."""
    photograph = skimage.data.camera().astype(np.float32) / 255
    arrays = {}
    for J, L, (height, width) in SETTINGS:
        image = photograph[80 : 80 + height, 200 : 200 + width].copy()
        kymatio = ScatteringTorch2D(J, shape=(height, width), L=L, backend=backend)
        name = f"{J}_{L}_{height}x{width}"
        arrays[f"image_{name}"] = image
        arrays[f"coefficients_{name}"] = kymatio(torch.from_numpy(image)).numpy()
    np.savez_compressed(PATH, **arrays)


if __name__ == "__main__":
    main()
