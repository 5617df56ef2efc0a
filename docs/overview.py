"""Draws the method in one picture: python docs/overview.py docs/overview.png."""

import sys

import torch
from matplotlib.figure import Figure
from matplotlib.patches import FancyArrowPatch, FancyBboxPatch
from skimage import data
from torchvision.transforms.v2 import functional as TF

from mvmr_loss.representations import augmented_pixels, hog, local_std, scattering

BLUE, ORANGE, GREY = "#1f5fa8", "#c8702a", "#555555"


def box(axes, x, y, text, width=1.5, height=0.8, color=BLUE):
    """Draws a rounded box with text about (x, y)."""
    axes.add_patch(
        FancyBboxPatch(
            (x - width / 2, y - height / 2), width, height, boxstyle="round,pad=0.05",
            facecolor="white", edgecolor=color, linewidth=1.6, zorder=2,
        )
    )  # fmt: skip
    axes.text(x, y, text, ha="center", va="center", fontsize=11, color=color, zorder=3)


def arrow(axes, start, end, color=GREY, style="-|>", **options):
    """Draws an arrow."""
    axes.add_patch(
        FancyArrowPatch(
            start,
            end,
            arrowstyle=style,
            mutation_scale=13,
            color=color,
            lw=1.5,
            zorder=1,
            **options,
        )
    )


def picture(axes, image, x, y, title="", size=1.3):
    """Draws an image about (x, y)."""
    half = size / 2
    axes.imshow(image, extent=(x - half, x + half, y - half, y + half), cmap="magma", zorder=2)
    axes.text(x, y - half - 0.1, title, ha="center", va="top", fontsize=10, color=GREY)


def draw():
    """Returns the figure."""
    photograph = TF.resize(TF.to_image(data.astronaut()), [128, 128])
    images = TF.to_dtype(photograph, torch.float32, scale=True)[None]
    augmented = augmented_pixels(images, seed=3, normalization="none")
    sights = {
        "pixels": images[0].permute(1, 2, 0),
        "scattering": scattering(images).mean(1)[0, 1:9].amax(0),
        "HOG": hog(images).mean(1)[0].amax(0),
        "local std": local_std(images).mean(1)[0],
    }
    figure = Figure(figsize=(11, 5.4), layout="constrained")
    axes = figure.subplots()
    picture(axes, images[0].permute(1, 2, 0), 0.9, 3.2, "the image as it is, x", 1.6)
    picture(axes, augmented[0].permute(1, 2, 0).clamp(0, 1), 0.9, 5.7, "augmented, x\u0303", 1.6)
    arrow(axes, (0.9, 4.05), (0.9, 4.55))
    for y, name in ((5.7, "z\u0303"), (3.2, "z")):
        arrow(axes, (1.8, y), (3.1, y))
        arrow(axes, (5.15, y), (7.05, y))
        box(axes, 7.7, y, name, 1.1)
    box(axes, 4.1, 4.45, "network and\nprojection head,\nshared", 1.9, 3.6)
    arrow(axes, (7.7, 3.7), (7.7, 5.2), BLUE, "<|-|>")
    axes.text(
        *(7.5, 4.45), "agree, spread out,\ndepend on each other",
        ha="right", va="center", fontsize=11, color=BLUE,
    )  # fmt: skip
    arrow(axes, (0.9, 2.0), (2.1, 0.9), connectionstyle="angle3,angleA=-90,angleB=180")
    for i, (title, sight) in enumerate(sights.items()):
        picture(axes, sight, 2.9 + 1.5 * i, 0.9, title)
    axes.text(8.5, 0.9, "…, or a frozen\nteacher's features", va="center", fontsize=11, color=GREY)
    arrow(axes, (8.3, 1.75), (8.4, 5.7), ORANGE, "<|-|>", connectionstyle="arc3,rad=0.45")
    axes.text(9.4, 3.7, "depends on\neach of them", va="center", fontsize=11, color=ORANGE)
    axes.set(xlim=(0, 10.7), ylim=(-0.1, 6.6), aspect="equal")
    axes.set_axis_off()
    return figure


if __name__ == "__main__":
    draw().savefig(sys.argv[1], dpi=85, bbox_inches="tight")
