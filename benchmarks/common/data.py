"""Folders of images with clear errors, and whole data sets as one tensor."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torchvision
from PIL import Image
from torch import Tensor
from torchvision.transforms.v2 import functional as TF

from benchmarks.harness.loops import progress
from mvmr_loss.cache.folder import check_image, check_no_loop


class Data(NamedTuple):
    """Images, uint8 of shape (N, 3, H, W), and labels, to train on and to test on."""

    train_images: Tensor
    train_labels: Tensor
    test_images: Tensor
    test_labels: Tensor
    classes: Sequence[str]


class ImageFolder(torchvision.datasets.ImageFolder):
    """torchvision's ImageFolder (``folder/class/*.jpg``) with errors that name the remedy.

    Args:
        root: Folder with one folder of images a class.
        transform: Applied to each PIL image (RGB).
        image_size: To which shorter sides are resized afterwards: images that are so long that this
            would fill the memory are errors. None: they are not resized.

    Raises:
        FileNotFoundError: If the folder does not exist.
        ValueError: If it has no folders of classes, a class has no images, or a symbolic link leads
            back to a folder that it is in; and, when an image is read, if it cannot be, or has more
            than 8 bits a channel.
    """

    def __init__(
        self,
        root: str | Path,
        transform: Callable[[Image.Image], Any] | None = None,
        *,
        image_size: int | None = None,
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
        check_no_loop(root)
        extensions = torchvision.datasets.folder.IMG_EXTENSIONS
        for name in classes:
            files = (file for *_, found in os.walk(root / name, followlinks=True) for file in found)
            if not any(file.lower().endswith(extensions) for file in files):
                raise ValueError(
                    f"{root / name} must have at least one image ({', '.join(extensions)}) but has "
                    "none; add images or remove the folder."
                )
        super().__init__(str(root), transform=transform, loader=_Loader(image_size))


class _Loader:
    """Reads an image file; pickled for worker processes."""

    def __init__(self, image_size: int | None) -> None:
        self.image_size = image_size

    def __call__(self, path: str) -> Image.Image:
        try:
            check_image(path, self.image_size)
            image: Image.Image = torchvision.datasets.folder.pil_loader(path)
        except Exception as error:  # Pillow raises whatever a damaged file leads to.
            raise ValueError(
                f"{path} cannot be read as an image ({str(error) or repr(error)}); replace or remove "
                "the file."
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
