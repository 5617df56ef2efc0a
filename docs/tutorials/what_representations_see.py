"""
What every representation sees of a photograph
==============================================

The representations of MV-MR are fixed maps from an image to numbers. Here all of them look at one
photograph. As a script it writes the picture to a file: ``python what_representations_see.py
picture.png``.
"""

import sys

import matplotlib.pyplot as plt
import torch
from matplotlib.collections import LineCollection
from skimage import data
from torchvision.transforms.v2 import functional as TF

from mvmr_loss import Normalization, Representations
from mvmr_loss.representations import augmented_pixels, dct, hog, local_std, scattering

photograph = TF.resize(TF.to_image(data.astronaut()), [96, 96])
images = TF.to_dtype(photograph, torch.float32, scale=True)[None]
images.shape

# %%
# By name they are computed together, flattened, ready for the loss. It sees them through distances
# alone, so that their sizes need not agree.

names = ["pixels", "augmented_pixels", "scattering", "patch_scattering", "hog", "local_std", "dct"]
names += ["local_binary_patterns"]
representations = Representations(names, normalization="none")
for name, features in representations(images).items():
    print(f"{name:21} {features.shape[1]:>7,} numbers")

# %%
# Each is a function as well, whose result still has the image's layout. Of the scattering we look
# at first-order coefficients, the largest over directions at a fine and a coarse scale; of HOG at
# each cell's histogram, as lines along the edges; of the DCT at magnitudes in decibels, lowest
# frequencies in the upper left corner.

normalization = Normalization([0.0] * 3, [1.0] * 3)
augmented = augmented_pixels(images, seed=3, normalization=normalization)
deviation = local_std(images).mean(1)[0]
spectrum = 20 * dct(images).mean(1)[0].abs().clamp_min(1e-3).log10()
coefficients = scattering(images).mean(1)[0]
fine, coarse = coefficients[1:9].amax(0), coefficients[9:17].amax(0)
histograms = hog(images, orientations=8).mean(1)[0]


def edges(histograms, cell=8):
    """Draws each cell's bins as lines through its centre, along the edge, as long as the bin is full."""
    bins, rows, columns = histograms.shape
    angle = torch.arange(bins) * torch.pi / bins + torch.pi / 2
    along = torch.stack([angle.cos(), angle.sin()], dim=1)[:, None, None]
    y, x = torch.meshgrid(torch.arange(rows), torch.arange(columns), indexing="ij")
    centre = (torch.stack([x, y], dim=-1) + 0.5)[None] * cell - 0.5
    length = (histograms / histograms.amax()).sqrt() * cell / 2
    half = along * length[..., None]
    lines = torch.stack([centre - half, centre + half], dim=-2).reshape(-1, 2, 2)
    return LineCollection(lines.numpy(), colors="white", linewidths=0.9)


figure, axes = plt.subplots(2, 4, figsize=(11, 5.9), layout="constrained")
pictures = {
    "pixels": images[0].permute(1, 2, 0),
    "augmented_pixels": augmented[0].permute(1, 2, 0).clamp(0, 1),
    "local_std": deviation,
    "hog": torch.zeros(96, 96),
    "scattering, fine scale": fine,
    "scattering, coarse scale": coarse,
    "scattering, averages": coefficients[0],
    "dct": spectrum,
}
for place, (title, picture) in zip(axes.flat, pictures.items()):
    place.imshow(picture, cmap="gray" if title == "hog" else "magma")
    place.set_title(title, fontsize=12)
    place.set_axis_off()
    if title == "hog":
        place.add_collection(edges(histograms))
if len(sys.argv) > 1:
    figure.savefig(sys.argv[1], dpi=80)

# %%
# ``augmented_pixels`` are drawn anew at each call; all others are the same whenever they are
# computed, and can be kept on disk. ``patch_scattering`` is the scattering of each of 4 x 4
# patches.
