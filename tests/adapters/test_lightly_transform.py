"""MVMRTransform: which views it makes, of which images, in which data sets."""

import pickle

import numpy as np
import pytest
import torch
import torchvision
from lightly.data import LightlyDataset
from PIL import Image
from torch.utils.data import DataLoader

from mvmr_loss.adapters.lightly import (
    MVMRTransform,
    MVMRViewTransform,
    NonAugmentedViewTransform,
)

GENERATOR = np.random.default_rng(0)


def photo(height=40, width=60, channels=3):
    pixels = GENERATOR.integers(0, 256, (height, width, channels), dtype=np.uint8)
    return Image.fromarray(pixels.squeeze() if channels == 1 else pixels)


@pytest.fixture
def folder(tmp_path):
    for label in ("a", "b"):
        (tmp_path / label).mkdir()
        for i, size in enumerate([(40, 60), (60, 40), (50, 50)]):
            photo(*size).save(tmp_path / label / f"{i}.png")
    return tmp_path


def as_tensor(image):
    return torchvision.transforms.v2.functional.pil_to_tensor(image)


@pytest.mark.parametrize("preset", ["stl10", "cifar", "imagenet"])
@pytest.mark.parametrize("convert", [lambda x: x, as_tensor, lambda x: as_tensor(x) / 255])
def test_smoke(preset, convert):
    transform = getattr(MVMRTransform, preset)(num_augmented_views=2)
    size = {"stl10": 96, "cifar": 32, "imagenet": 224}[preset]
    views = transform(convert(photo()))
    assert [tuple(view.shape) for view in views] == [(3, size, size)] * 3
    assert all(view.dtype == torch.float32 for view in views)
    assert not torch.equal(views[1], views[2])


@pytest.mark.parametrize("size", [(40, 60), (60, 40), (33, 32)])
def test_the_first_view_is_the_resized_centre(size):
    image = photo(*size)
    mean, std = [0.1, 0.2, 0.3], [0.5, 0.6, 0.7]
    view = MVMRTransform(32, normalize={"mean": mean, "std": std})(image)[0]
    scale = 32 / min(size)
    width, height = (int(scale * side) for side in image.size)
    left, top = round((width - 32) / 2), round((height - 32) / 2)
    expected = image.resize((width, height), Image.Resampling.BILINEAR)
    expected = np.asarray(expected.crop((left, top, left + 32, top + 32))) / 255
    expected = (expected - mean) / std
    np.testing.assert_allclose(view.numpy().transpose(1, 2, 0), expected, atol=1e-5)


def test_the_first_view_draws_nothing():
    image, transform = photo(), MVMRTransform(32)
    assert torch.equal(transform(image)[0], transform(image)[0])
    assert not torch.equal(transform(image)[1], transform(image)[1])


def test_images_and_tensors_give_the_same_first_view():
    image = photo(32, 32)
    transform = NonAugmentedViewTransform(32)
    tensor = as_tensor(image)
    torch.testing.assert_close(transform(tensor), transform(image))
    torch.testing.assert_close(transform(tensor / 255), transform(image))


def steps(transform):
    """The transforms of the augmented view by class name, those applied at random unwrapped."""
    found = {}
    for step in transform.transforms[1].transform.transforms:
        name = type(step).__name__
        if name == "RandomApply":
            found[type(step.transforms[0]).__name__] = (step.p, step.transforms[0])
        else:
            found[name] = (getattr(step, "p", 1.0), step)
    return found


@pytest.mark.parametrize(
    ("preset", "jitter", "hue", "grey", "scale", "mode", "blur", "mean"),
    [
        ("stl10", 0.8, 0.2, 0.2, 0.08, "bilinear", (1.0, 9), 0.485),
        ("imagenet", 0.8, 0.2, 0.2, 0.08, "bilinear", (1.0, 23), 0.485),
        ("cifar", 0.4, 0.1, 0.1, 0.2, "bicubic", (0.0, 3), 0.491),
    ],
)
def test_presets_are_the_release_settings(preset, jitter, hue, grey, scale, mode, blur, mean):
    transform = getattr(MVMRTransform, preset)()
    found = steps(transform)
    probability, color = found["ColorJitter"]
    assert probability == 0.8
    strengths = (color.brightness, color.contrast, color.saturation)
    assert strengths == ((pytest.approx(1 - jitter), pytest.approx(1 + jitter)),) * 3
    assert color.hue == (pytest.approx(-hue), pytest.approx(hue))
    assert found["RandomGrayscale"][0] == grey
    assert found["RandomHorizontalFlip"][0] == 0.5
    crop = found["RandomResizedCrop"][1]
    assert (crop.scale, crop.interpolation.value) == ((scale, 1.0), mode)
    assert (found["GaussianBlur"][0], found["GaussianBlur"][1].kernel_size[0]) == blur
    assert found["Normalize"][1].mean[0] == mean


def test_presets_can_be_overridden():
    transform = MVMRTransform.cifar(64, cj_prob=0.3, interpolation="nearest", normalize=None)
    views = transform(photo())
    assert views[0].shape == (3, 64, 64)
    assert all(view.min() >= 0 and view.max() <= 1 for view in views)
    assert steps(transform)["ColorJitter"][0] == 0.3


def test_resize_size_keeps_the_middle_only():
    image = Image.new("RGB", (64, 64))
    image.paste((255, 255, 255), (16, 16, 48, 48))
    options = {"normalize": None, "interpolation": "nearest"}
    assert NonAugmentedViewTransform(32, 64, **options)(image).min() == 1
    assert NonAugmentedViewTransform(32, **options)(image).min() == 0


def test_one_channel():
    normalize = {"mean": [0.5], "std": [0.5]}
    views = MVMRTransform(32, normalize=normalize)(photo(channels=1))
    assert [tuple(view.shape) for view in views] == [(1, 32, 32)] * 2


@pytest.mark.parametrize("num_workers", [0, 1])
@pytest.mark.parametrize("kind", ["lightly", "torchvision"])
def test_data_sets(folder, kind, num_workers):
    transform = pickle.loads(pickle.dumps(MVMRTransform(32, num_augmented_views=2)))
    if kind == "lightly":
        dataset = LightlyDataset(str(folder), transform=transform)
    else:
        dataset = torchvision.datasets.ImageFolder(folder, transform)
    views, targets, *_ = next(iter(DataLoader(dataset, 6, num_workers=num_workers)))
    assert [tuple(view.shape) for view in views] == [(6, 3, 32, 32)] * 3
    assert targets.tolist() == [0, 0, 0, 1, 1, 1]
    torch.testing.assert_close(
        views[0][0], NonAugmentedViewTransform(32)(Image.open(folder / "a" / "0.png"))
    )


@pytest.mark.parametrize(
    ("options", "error", "match"),
    [
        ({"input_size": 0}, ValueError, "input_size must be at least 1 but is 0"),
        ({"input_size": 32.0}, TypeError, "input_size must be an int but is a float"),
        ({"resize_size": 16}, ValueError, "resize_size must be at least 32 but is 16"),
        ({"num_augmented_views": 0}, ValueError, "num_augmented_views must be at least 1"),
        (
            {"cj_prob": 1.5},
            ValueError,
            "cj_prob must be finite and at least 0 and at most 1 but is 1.5",
        ),
        (
            {"min_scale": 0},
            ValueError,
            "min_scale must be finite and at most 1 and above 0 but is 0",
        ),
        ({"interpolation": "cubic"}, ValueError, "interpolation must be 'bilinear'"),
        ({"normalize": {"mean": [0.5]}}, ValueError, "normalize must be"),
        ({"normalize": {"mean": [0.5], "std": [0.0]}}, ValueError, "normalize must be"),
        ({"solarize": 0.5}, TypeError, "solarize"),
    ],
)
def test_exception(options, error, match):
    with pytest.raises(error, match=match):
        MVMRTransform(**{"input_size": 32, **options})


@pytest.mark.parametrize("transform", [NonAugmentedViewTransform(32), MVMRViewTransform(32)])
def test_exception_image(transform):
    with pytest.raises(ValueError, match=r"image must have 3 channels.*but has 1; convert it"):
        transform(photo(channels=1))
    with pytest.raises(TypeError, match=r"must be a PIL image or a torch\.Tensor but is a ndarray"):
        transform(np.zeros((3, 32, 32)))
    with pytest.raises(ValueError, match=r"image must have shape \(C, H, W\).*image by image"):
        transform(torch.zeros(2, 3, 32, 32))
    with pytest.raises(ValueError, match="uint8 or floating-point"):
        transform(torch.zeros(3, 32, 32, dtype=torch.int64))
