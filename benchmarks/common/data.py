"""Folders of images with clear errors, and whole data sets as one tensor."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torchvision
from PIL import Image
from torch import Tensor
from torchvision.transforms.v2 import functional as TF

from benchmarks.harness.loops import progress


class ImageFolder(torchvision.datasets.ImageFolder):
    """torchvision's ImageFolder (``folder/class/*.jpg``) with errors that name the remedy.

    Args:
        root: Folder with one folder of images a class.
        transform: Applied to each PIL image (RGB).

    Raises:
        FileNotFoundError: If the folder does not exist.
        ValueError: If it has no folders of classes, or a class has no images; and, when an image is
            read, if it cannot be.
    """

    def __init__(
        self, root: str | Path, transform: Callable[[Image.Image], Any] | None = None
    ) -> None:
        root = Path(root).expanduser()
        if not root.is_dir():
            raise FileNotFoundError(
                f"{root} must be a folder with one folder of images a class, but there is no such "
                "folder; check the path."
            )
        classes = sorted(entry.name for entry in root.iterdir() if entry.is_dir())
        if not classes:
            raise ValueError(
                f"{root} must have one folder of images a class but has no folders; "
                "put the images into CLASS/IMAGE.jpg inside it."
            )
        extensions = torchvision.datasets.folder.IMG_EXTENSIONS
        for name in classes:
            files = (root / name).rglob("*")
            if not any(file.suffix.lower() in extensions for file in files):
                raise ValueError(
                    f"{root / name} must have at least one image ({', '.join(extensions)}) but has "
                    "none; add images or remove the folder."
                )
        super().__init__(str(root), transform=transform, loader=_load)


def _load(path: str) -> Image.Image:
    """Reads an image file."""
    try:
        image: Image.Image = torchvision.datasets.folder.pil_loader(path)
    # Pillow raises SyntaxError and ValueError, too, for files that are damaged inside.
    except (OSError, SyntaxError, ValueError) as error:
        raise ValueError(
            f"{path} cannot be read as an image ({error}); replace or remove the file."
        ) from error
    return image


def image_tensor(
    dataset: torch.utils.data.Dataset[tuple[Image.Image, int]],
    image_size: int,
    description: str | None = None,
) -> tuple[Tensor, Tensor]:
    """Reads a whole data set of PIL images into one tensor, resized and centre-cropped to squares.

    Small images are decoded once this way instead of once an epoch.

    Args:
        dataset: Gives (PIL image in RGB, label); has a length.
        image_size: Side of the squares in pixels; the shorter side is resized to it.
        description: Title of the progress bar; None shows none.

    Returns:
        Images, uint8 of shape (N, 3, image_size, image_size), and labels, int64 of shape (N,).

    Raises:
        ValueError: If ``image_size`` is smaller than 1, or an image cannot be read.

    Examples:
        >>> from benchmarks.common.photographs import Photographs
        >>> images, labels = image_tensor(Photographs("test", crops_per_class=2), image_size=32)
        >>> images.shape, images.dtype, labels[:4].tolist()
        (torch.Size([22, 3, 32, 32]), torch.uint8, [0, 0, 1, 1])
    """
    if image_size < 1:
        raise ValueError(f"image_size must be at least 1 but is {image_size}.")
    size = len(dataset)  # type: ignore[arg-type]
    images = torch.empty(size, 3, image_size, image_size, dtype=torch.uint8)
    labels = torch.empty(size, dtype=torch.int64)
    for i in progress(range(size), description, unit="image"):
        image, labels[i] = dataset[i]
        if image.size != (image_size, image_size):
            image = TF.center_crop(TF.resize(image, [image_size]), [image_size])
        images[i] = TF.pil_to_tensor(image)
    return images, labels
