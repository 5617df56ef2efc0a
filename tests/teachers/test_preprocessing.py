from __future__ import annotations

import pytest
import torch
from torchvision.transforms import v2
from torchvision.transforms.v2 import functional as TF

from mvmr_loss import Teacher, TeacherPreprocessing
from mvmr_loss.teachers import IMAGENET_STD
from tests.teachers.networks import CIFAR_MEAN, CIFAR_STD, IMAGES

# The preprocessing by itself.


@pytest.mark.parametrize("interpolation", ["nearest", "bilinear", "bicubic"])
@pytest.mark.parametrize("size", [(40, 61), (97, 33), (33, 32)])
@pytest.mark.parametrize("resize", [None, 32, 50, (24, 40)])
@pytest.mark.parametrize("crop", [None, (24, 24), (31, 30), (64, 57)])
def test_preprocessing_is_torchvisions(interpolation, size, resize, crop):
    image = TF.pil_to_tensor(IMAGES["square"].resize(size[::-1]))[None]
    transform = v2.Compose(
        [
            v2.Resize(resize, interpolation=v2.InterpolationMode(interpolation), antialias=True)
            if resize
            else v2.Identity(),
            v2.CenterCrop(crop) if crop else v2.Identity(),
            v2.ToDtype(torch.float32, scale=True),
            v2.Normalize(CIFAR_MEAN, CIFAR_STD),
        ]
    )
    preprocessing = TeacherPreprocessing(resize, crop, CIFAR_MEAN, CIFAR_STD, interpolation)
    pixels, expected = preprocessing(image.float() / 255), transform(image)
    assert pixels.shape == expected.shape
    levels = (pixels - expected).abs().max() * max(CIFAR_STD) * 255
    assert levels < (2.2 if resize and interpolation != "nearest" else 1e-3)


def test_preprocessing_can_be_given(images):
    teacher = Teacher(lambda x: x, preprocessing={"resize": [20, 24], "crop": 8, "mean": [0, 0, 0]})
    assert teacher.preprocessing == TeacherPreprocessing((20, 24), (8, 8), (0, 0, 0), IMAGENET_STD)
    assert teacher.output_shape(3, 16, 16) == (3, 8, 8)


def test_part_of_the_librarys_preprocessing_can_be_changed():
    options = {"source": "timm", "model": "test_resnet"}
    with pytest.warns(UserWarning, match="random weights"):
        own, changed = Teacher(**options), Teacher(**options, preprocessing={"resize": None})
    assert changed.preprocessing == own.preprocessing._replace(resize=None)


def test_grey_images_become_the_teachers_three_channels():
    grey = torch.rand(2, 1, 8, 8)
    teacher = Teacher(
        lambda x: x, preprocessing={"mean": (0, 0, 0), "std": (1, 1, 1)}, mean=[0.5], std=[0.5]
    )
    pixels = teacher(grey * 2 - 1)
    torch.testing.assert_close(pixels, ((grey * 255).round() / 255).expand(-1, 3, -1, -1))
