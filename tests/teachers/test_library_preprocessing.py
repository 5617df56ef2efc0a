"""What libraries do with images: the same here, or refused when the teacher is built."""

from __future__ import annotations

import warnings

import numpy as np
import pytest
import torch
from PIL import Image

from mvmr_loss import Teacher, TeacherPreprocessing
from mvmr_loss.teachers.preprocessing import check_same
from mvmr_loss.teachers.sources.transformers import _of_processor

COMPLETE = {
    "resize": 32,
    "crop": (32, 32),
    "mean": (0.5, 0.5, 0.5),
    "std": (0.5, 0.5, 0.5),
    "interpolation": "bicubic",
}
REFUSED = "preprocessing must be given for .*, with resize, crop, mean, std, interpolation: "


@pytest.fixture(autouse=True)
def _quiet():
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*random weights.*")
        yield


def image(height: int, width: int) -> torch.Tensor:
    """A smooth image of 8-bit colours, shape (3, H, W)."""
    rows, columns = torch.arange(height)[:, None], torch.arange(width)[None]
    waves = [torch.sin(rows / (5 + 2 * i) + columns / (9 - 2 * i)) * 100 for i in range(3)]
    return (torch.stack(waves) + 127).round().to(torch.uint8)


def assert_same(own, librarys, height, width):
    pixels = image(height, width)
    expected = librarys(Image.fromarray(pixels.permute(1, 2, 0).contiguous().numpy()))
    ours = own(pixels[None] / 255)[0]
    assert ours.shape == expected.shape
    levels = (ours - expected).abs() * torch.tensor(own.std)[:, None, None] * 255
    assert levels.max() < 3
    assert levels.mean() < 0.4


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("MobileViTImageProcessor", {}),
        ("MobileViTImageProcessor", {"do_flip_channel_order": False}),
        ("EfficientNetImageProcessor", {}),
        ("EfficientNetImageProcessor", {"rescale_factor": 1 / 127.5, "rescale_offset": True}),
        ("ViTImageProcessor", {"do_rescale": False}),
        ("ViTImageProcessor", {"do_normalize": False}),
        ("BitImageProcessor", {}),
        ("ConvNextImageProcessor", {}),
        ("SiglipImageProcessor", {}),
    ],
)
@pytest.mark.parametrize("shape", [(70, 111), (300, 233)])
def test_processors_of_transformers(name, options, shape):
    transformers = pytest.importorskip("transformers")
    if name.startswith("EfficientNet") and transformers.__version__ < "5":
        pytest.skip("transformers 4 resizes to the nearest pixel, which is refused with a reason")
    processor = getattr(transformers, name)(**options)
    own = _of_processor(name, processor)
    assert_same(own, lambda x: processor(x, return_tensors="pt").pixel_values[0], *shape)


@pytest.mark.parametrize(
    "name",
    [
        "PerceiverImageProcessor",
        "TextNetImageProcessor",
        "EomtImageProcessor",
        "VivitImageProcessor",
        "LevitImageProcessor",
        "Pix2StructImageProcessor",
        "ImageGPTImageProcessor",
        "GLPNImageProcessor",
        "SamImageProcessor",
    ],
)
def test_processors_that_do_more_are_refused(name):
    transformers = pytest.importorskip("transformers")
    with pytest.raises(ValueError, match=REFUSED):
        _of_processor(name, getattr(transformers, name)())


def test_refused_unless_given_in_full():
    pytest.importorskip("transformers")
    ones = [1, 1, 1, 1]
    named = {
        "source": "transformers",
        "model": "glpn",
        "model_options": {
            "hidden_sizes": [8, 8, 8, 8],
            "depths": ones,
            "num_attention_heads": ones,
        },
    }
    for partial in (None, {"resize": 32, "crop": 32}):
        with pytest.raises(ValueError, match=REFUSED):
            Teacher(**named, preprocessing=partial)
    given = TeacherPreprocessing(**COMPLETE)
    for full in (COMPLETE, given):
        assert Teacher(**named, preprocessing=full).preprocessing == given


def test_timm_sizes():
    pytest.importorskip("timm")
    teacher = Teacher(source="timm", model="test_vit", model_options={"img_size": 64})
    assert teacher.preprocessing.crop == (64, 64)
    assert teacher(torch.zeros(2, 3, 48, 48)).shape[0] == 2
    wide = {"img_size": (64, 96)}
    with pytest.raises(ValueError, match=REFUSED):
        Teacher(source="timm", model="test_vit", model_options=wide)
    given = {**COMPLETE, "resize": (64, 96), "crop": (64, 96)}
    teacher = Teacher(source="timm", model="test_vit", model_options=wide, preprocessing=given)
    assert teacher(torch.zeros(1, 3, 48, 48)).shape[0] == 1


def test_timm_channels():
    pytest.importorskip("timm")
    named = {"source": "timm", "model": "test_resnet", "model_options": {"in_chans": 1}}
    with pytest.raises(ValueError, match=REFUSED + "it takes 1 channels but timm's mean and std"):
        Teacher(**named)
    given = {**COMPLETE, "mean": [0.5], "std": [0.5]}
    with pytest.raises(ValueError, match="mean and std must have 1 or 1 numbers"):
        Teacher(**named, preprocessing=given)
    teacher = Teacher(**named, preprocessing=given, mean=[0.5], std=[0.5])
    assert teacher(torch.zeros(2, 1, 32, 32)).shape[0] == 2


@pytest.mark.parametrize(
    ("source", "model", "options"),
    [
        ("torchvision", "vit_b_16", {"image_size": 64, "num_classes": 2}),
        ("timm", "test_resnet", {"in_chans": 4}),
        (
            "transformers",
            "vit",
            {"image_size": 64, "hidden_size": 8, "num_attention_heads": 1, "num_hidden_layers": 1},
        ),
        (
            "transformers",
            "vit",
            {"num_channels": 1, "hidden_size": 8, "num_attention_heads": 1, "num_hidden_layers": 1},
        ),
    ],
)
def test_options_that_the_images_do_not_fit(source, model, options):
    pytest.importorskip(source)
    with pytest.raises(ValueError, match="preprocessing"):
        Teacher(source=source, model=model, model_options=options)


def test_transforms_of_torchvision_that_do_more():
    pytest.importorskip("torchvision")
    with pytest.raises(ValueError, match=REFUSED + "its .* is unknown"):
        Teacher(
            source="torchvision", model="raft_small", model_options={}, preprocessing={"crop": 8}
        )


@pytest.mark.parametrize(
    ("librarys", "reason"),
    [
        (lambda x: x.flip(0), "does more than resize, crop and normalise"),
        (lambda x: x * 1.05, "does more than resize, crop and normalise"),
        (lambda x: x.roll(1, dims=2), "does more than resize, crop and normalise"),
        (lambda x: x * float("nan"), "does more than resize, crop and normalise"),
        (lambda x: x[:, 1:], "the library makes"),
        (lambda x: "text", "the library makes str"),
        (lambda x: x[9], "cannot be run here"),
    ],
)
def test_a_difference_is_seen(librarys, reason):
    own = TeacherPreprocessing(64, (56, 56))

    def exact(pil):
        pixels = torch.from_numpy(np.array(pil)).permute(2, 0, 1)
        return own(pixels[None] / 255)[0]

    assert check_same("it", own, exact) is own
    with pytest.raises(ValueError, match=REFUSED + ".*" + reason):
        check_same("it", own, lambda x: librarys(exact(x)))


def test_lanczos_is_refused():
    own = TeacherPreprocessing(interpolation="lanczos")
    with pytest.raises(ValueError, match=REFUSED + "interpolation 'lanczos' is not among"):
        check_same("it", own, lambda x: x)
