"""A folder of image files, read as torchvision does, but for what it would get wrong in silence."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any


def image_folder(root: str | os.PathLike[str], transform: Callable[[Any], Any], size: int) -> Any:
    """Opens a folder with one folder of images a class.

    Images of more than 8 bits a channel, which torchvision cuts off at 255, are an error when they are
    read, and so are those that are so long that resizing them would fill the memory. Of animated ones
    the first picture counts, and a camera's note about its orientation is not followed, as everywhere
    in torchvision.

    Args:
        root: The folder.
        transform: Of each image.
        size: To which the transform resizes the shorter side.

    Returns:
        torchvision's ``ImageFolder``.

    Raises:
        ValueError: If a symbolic link leads back to a folder that it is in.
        FileNotFoundError: If there are no classes, or no images in one of them.
    """
    from torchvision.datasets import ImageFolder

    check_no_loop(Path(root))
    return ImageFolder(str(root), transform, loader=_Loader(size))


class _Loader:
    """Reads an image file; pickled for worker processes."""

    def __init__(self, size: int) -> None:
        self.size = size

    def __call__(self, file: str) -> Any:
        from torchvision.datasets.folder import default_loader

        check_image(file, self.size)
        return default_loader(file)


def check_image(file: str | os.PathLike[str], size: int | None) -> None:
    """Raises if torchvision would cut off an image's values, or resizing it would fill the memory.

    Args:
        file: Of the image.
        size: To which its shorter side will be resized; None: it is not resized.

    Raises:
        ValueError: If it has more than 8 bits a channel, or would have too many pixels.
        Exception: Whatever Pillow raises of a file that is damaged.
    """
    from PIL import Image

    with Image.open(file) as image:
        mode, sides = image.mode, sorted(image.size)
    if mode[0] in "IF":  # I, I;16, I;16B, F
        raise ValueError(
            f"images must have 8 bits a channel but this is of Pillow's mode {mode!r}, whose "
            "values would be cut off at 255; convert it"
        )
    if size is None:
        return
    pixels, most = size**2 * sides[1] // sides[0], Image.MAX_IMAGE_PIXELS
    if most is not None and pixels > most:
        raise ValueError(
            f"images must be of a shape that can be resized but this is {sides[1]} times {sides[0]} "
            f"pixels, and would have {pixels / 1e6:.0f} million"
        )


def check_no_loop(folder: Path, above: frozenset[str] = frozenset()) -> None:
    """Raises if a folder is in itself, by symbolic links; torchvision would walk round and round.

    Args:
        folder: Of images.
        above: The folders that it is in.

    Raises:
        ValueError: If a symbolic link leads back to a folder that it is in.
    """
    real = os.path.realpath(folder)
    if real in above:
        raise ValueError(
            f"a folder of images must not lead back to itself, but {folder} is a symbolic link to a "
            "folder that it is in; remove it."
        )
    with os.scandir(folder) as entries:
        # Files are not looked at one by one: there may be millions of them.
        folders = [
            entry.path
            for entry in entries
            if entry.is_dir(follow_symlinks=False) or (entry.is_symlink() and os.path.isdir(entry))
        ]
    for inner in folders:
        check_no_loop(Path(inner), above | {real})
