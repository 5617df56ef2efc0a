import pytest
import torch
from PIL import Image

from benchmarks.common import photographs
from benchmarks.common.photographs import PHOTOGRAPHS, Photographs

FIRST_CROPS = [("astronaut", 4, 12), ("astronaut", 296, 24)]


def pixels_of(dataset, size):
    """Returns the set of (photograph, x, y) that the crops cover."""
    return {
        (name, x, y)
        for name, left, top in dataset.crops
        for x in range(left, left + size)
        for y in range(top, top + size)
    }


def test_smoke():
    dataset = Photographs("train")
    image, label = dataset[0]
    assert image.size == (64, 64)
    assert image.mode == "RGB"
    assert label == 0
    assert len(dataset) == 270 * len(PHOTOGRAPHS)
    assert torch.tensor(dataset.targets).bincount().tolist() == [270] * len(PHOTOGRAPHS)
    assert len(Photographs("test")) == 70 * len(PHOTOGRAPHS)


def test_splits_share_no_pixel():
    train, test = (Photographs(split) for split in ("train", "test"))
    assert not pixels_of(train, 64) & pixels_of(test, 64)


def test_every_crop_lies_within_one_tile():
    for split in ("train", "test"):
        for _, left, top in Photographs(split).crops:
            assert left // 96 == (left + 63) // 96
            assert top // 96 == (top + 63) // 96


def test_every_crop_shows_something():
    for split in ("train", "test"):
        dataset = Photographs(split)
        black = sum(max(high for _, high in image.getextrema()) < 8 for image, _ in dataset)
        assert black / len(dataset) < 0.01


def test_deterministic():
    assert Photographs("test").crops == Photographs("test").crops
    assert Photographs("test").crops != Photographs("test", seed=1).crops
    # The draws themselves: a change of them would silently change every published figure.
    assert Photographs("test", crops_per_class=2).crops[:2] == FIRST_CROPS


def test_transform():
    image, _ = Photographs("test", crops_per_class=1, transform=lambda image: image.size)[3]
    assert image == (64, 64)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"split": "validation"}, "split must be 'train' or 'test' but is 'validation'"),
        ({"crops_per_class": 0}, "crops_per_class must be at least 1 but is 0"),
        ({"crop_size": 100}, "crop_size and tile_size must satisfy"),
        ({"tile_size": 300}, "crop_size and tile_size must satisfy"),
    ],
)
def test_exception(arguments, message):
    with pytest.raises(ValueError, match=message):
        Photographs(**arguments)


def test_without_scikit_image(monkeypatch):
    monkeypatch.setattr(photographs.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ImportError, match="pip install scikit-image"):
        Photographs()


def test_photograph_absent(monkeypatch):
    absent = PHOTOGRAPHS["cat"]._replace(file="absent.png")
    monkeypatch.setitem(photographs.PHOTOGRAPHS, "cat", absent)
    with pytest.raises(FileNotFoundError, match=r"absent\.png is not among the pictures"):
        Photographs()


def test_licences_are_free():
    assert {photograph.licence for photograph in PHOTOGRAPHS.values()} <= {
        "CC0 1.0",
        "public domain",
    }


def test_images_are_real_crops():
    dataset = Photographs("test", crops_per_class=1)
    name, left, top = dataset.crops[0]
    whole = dataset._images[name]
    assert isinstance(whole, Image.Image)
    assert dataset[0][0].getpixel((5, 7)) == whole.getpixel((left + 5, top + 7))
