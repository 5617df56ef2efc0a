"""Real photographs without a download: labelled crops of those inside the scikit-image wheel."""

from __future__ import annotations

import importlib.util
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
from PIL import Image, ImageStat


class Photograph(NamedTuple):
    """One photograph and the terms under which its author or owner gave it to the public.

    Attributes:
        file: Name of the file in scikit-image's data folder.
        title: What it shows, and who made or gave it.
        licence: Its licence, as scikit-image's documentation of the picture states it.
    """

    file: str
    title: str
    licence: str


# Only those whose documentation in scikit-image names CC0 or the public domain. Left out are
# pictures without such words (moon, page, stereo_motorcycle, coins, immunohistochemistry), those
# that are no photographs (logo, phantom, horse, text, cell, ...), and one too small for tiles.
PHOTOGRAPHS = {
    "astronaut": Photograph("astronaut.png", "Astronaut Eileen Collins, NASA", "public domain"),
    "brick": Photograph("brick.png", "Brick wall, CC0Textures", "CC0 1.0"),
    "camera": Photograph("camera.png", "Photographer at work, Lav Varshney", "CC0 1.0"),
    "cat": Photograph("chelsea.png", "Chelsea the cat, Stefan van der Walt", "CC0 1.0"),
    "clock": Photograph("clock_motion.png", "Moving clock, Stefan van der Walt", "public domain"),
    "coffee": Photograph("coffee.png", "Cup of coffee, Rachel Michetti", "CC0 1.0"),
    "galaxies": Photograph("hubble_deep_field.jpg", "Hubble deep field, NASA", "public domain"),
    "grass": Photograph("grass.png", "Grass, linolafett on DeviantArt", "CC0 1.0"),
    "gravel": Photograph("gravel.png", "Gravel, CC0Textures", "CC0 1.0"),
    "retina": Photograph("retina.jpg", "Human retina, Mikael Häggström", "CC0 1.0"),
    "rocket": Photograph("rocket.jpg", "Launch of a Falcon 9, SpaceX", "public domain"),
}

# A tile whose grey levels (0-255) hardly vary says nothing of its photograph: in these pictures,
# only the black corners around the retina do not reach this standard deviation.
MINIMUM_STD = 2.0


class Photographs(torch.utils.data.Dataset[tuple[Any, int]]):
    """Labelled crops of photographs that come with scikit-image; the class is the photograph.

    Each photograph is cut into square tiles; every third one, along diagonals, belongs to the test
    split, the others to the training split. Each crop lies within one tile, so that no pixel is in
    both splits. Crops of one split overlap: there are far fewer independent images than crops.

    The crops are drawn once, from ``seed``: the data set is the same on every machine.

    Args:
        split: ``"train"`` or ``"test"``.
        crops_per_class: Number of crops of each photograph; None means 270 (train) or 70 (test).
        crop_size: Side of a crop in pixels.
        tile_size: Side of a tile in pixels, at least ``crop_size``.
        seed: Draws the crops.
        transform: Applied to each PIL image (RGB, ``crop_size`` square), as in torchvision.

    Attributes:
        classes: Names of the photographs, in order of their label.
        targets: The label of each crop.
        crops: The (photograph's name, left, top) of each crop.

    Raises:
        ImportError: If scikit-image is not installed.
        FileNotFoundError: If this version of scikit-image lacks one of the photographs.
        ValueError: If an argument is out of range.

    Examples:
        >>> dataset = Photographs("test", crops_per_class=2)
        >>> image, label = dataset[3]
        >>> len(dataset), image.size, dataset.classes[label]
        (22, (64, 64), 'brick')
    """

    def __init__(
        self,
        split: str = "train",
        *,
        crops_per_class: int | None = None,
        crop_size: int = 64,
        tile_size: int = 96,
        seed: int = 0,
        transform: Callable[[Image.Image], Any] | None = None,
    ) -> None:
        if split not in ("train", "test"):
            raise ValueError(f"split must be 'train' or 'test' but is {split!r}.")
        if crops_per_class is None:
            crops_per_class = 270 if split == "train" else 70
        if crops_per_class < 1:
            raise ValueError(f"crops_per_class must be at least 1 but is {crops_per_class}.")
        if not 1 <= crop_size <= tile_size <= 128:
            raise ValueError(
                "crop_size and tile_size must satisfy 1 <= crop_size <= tile_size <= 128, so that "
                f"each photograph has tiles for both splits, but are {crop_size} and {tile_size}."
            )
        self.crop_size = crop_size
        self.transform = transform
        self.classes = list(PHOTOGRAPHS)
        self.targets: list[int] = []
        self.crops: list[tuple[str, int, int]] = []
        self._images = {name: _load(photograph) for name, photograph in PHOTOGRAPHS.items()}
        for label, (name, image) in enumerate(self._images.items()):
            tiles = [
                (left, top)
                for row, top in enumerate(range(0, image.height - tile_size + 1, tile_size))
                for column, left in enumerate(range(0, image.width - tile_size + 1, tile_size))
                if ((row + column) % 3 == 0) == (split == "test")
                and _std(image.crop((left, top, left + tile_size, top + tile_size))) >= MINIMUM_STD
            ]
            # Python's generator, seeded by a string, gives the same draws in every version.
            draw = random.Random(f"{seed} {split} {name}")
            for i in range(crops_per_class):
                left, top = tiles[i % len(tiles)]
                left += int(draw.random() * (tile_size - crop_size + 1))
                top += int(draw.random() * (tile_size - crop_size + 1))
                self.crops.append((name, left, top))
                self.targets.append(label)

    def __len__(self) -> int:
        """Returns the number of crops."""
        return len(self.crops)

    def __getitem__(self, index: int) -> tuple[Any, int]:
        """Returns the transformed crop, or a PIL image without a transform, and its label."""
        name, left, top = self.crops[index]
        box = (left, top, left + self.crop_size, top + self.crop_size)
        image = self._images[name].crop(box)
        return (image if self.transform is None else self.transform(image)), self.targets[index]


def _load(photograph: Photograph) -> Image.Image:
    """Reads a photograph from scikit-image's folder, without importing scikit-image."""
    spec = importlib.util.find_spec("skimage")
    if spec is None or not spec.submodule_search_locations:
        raise ImportError(
            "The embedded photographs come with scikit-image, which is not installed; "
            "install it with: pip install scikit-image"
        )
    path = Path(spec.submodule_search_locations[0]) / "data" / photograph.file
    if not path.is_file():
        raise FileNotFoundError(
            f"{photograph.file} is not among the pictures of the installed scikit-image; install "
            "a version that has it with: pip install 'scikit-image>=0.22'"
        )
    with Image.open(path) as image:
        return image.convert("RGB")


def _std(image: Image.Image) -> float:
    """Returns the standard deviation of an image's grey levels, in 0-255."""
    return ImageStat.Stat(image.convert("L")).stddev[0]
