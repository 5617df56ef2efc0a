"""The random augmentation: its steps against torch's and kornia's, its draws, and repeated runs."""

import copy
import math
import pickle

import kornia
import pytest
import skimage.data
import torch
import torch.nn.functional as F

from mvmr_loss.normalization import Normalization
from mvmr_loss.representations import AugmentedPixels, augmented_pixels
from mvmr_loss.representations.augmented_pixels import (
    _crop_boxes,
    _crop_resize_flip,
    _jitter_colors,
    _shift_hue,
)
from tests.processes import run
from tests.representations.tester import EAGER, RepresentationTester

NOTHING = {
    "crop_scale": (1.0, 1.0),
    "flip_probability": 0.0,
    "color_jitter_probability": 0.0,
    "grayscale_probability": 0.0,
    "blur": False,
}
UNIT = {"normalization": "none"}


class TestAugmentedPixels(RepresentationTester):
    module = AugmentedPixels
    function = staticmethod(augmented_pixels)
    # torch 2.6 divides the graph of forward and backward for a quarter of an hour and more.
    gradient_compiles_from = (2, 7)
    options = {
        "seed": 1,
        "normalization": ((0.5, 0.25, 0.25), (0.5, 0.5, 0.25)),
        "crop_scale": (0.25, 1.0),
        "flip_probability": 0.25,
        "color_jitter": (0.125, 0.125, 0.125, 0.0625),
        "color_jitter_probability": 0.5,
        "grayscale_probability": 0.25,
        "blur": True,
    }
    shapes = [(4, 3, 96, 96), (2, 3, 40, 64), (3, 1, 32, 32), (2, 5, 24, 9)]
    second_order = False
    forward_mode = False  # torch has none of grid_sample
    wrong = [
        ({"seed": -1}, ValueError, "seed must be at least 0"),
        ({"seed": "0"}, TypeError, "seed must be an int but is a str"),
        ({"normalization": "no"}, ValueError, "normalization must be one of 'imagenet'"),
        ({"crop_scale": (0.0, 1.0)}, ValueError, r"crop_scale must be two ascending numbers"),
        ({"crop_scale": (0.5, 0.2)}, ValueError, r"crop_scale must be two ascending numbers"),
        ({"flip_probability": 1.5}, ValueError, "flip_probability must be .* at most 1 but is 1.5"),
        ({"grayscale_probability": "no"}, TypeError, "grayscale_probability must be a number"),
        ({"blur": "no"}, TypeError, "blur must be True or False but is 'no'"),
        ({"color_jitter": (1, 1, 1)}, ValueError, "color_jitter must be 4 finite numbers"),
        ({"color_jitter": (1, 1, 1, 0.6)}, ValueError, "hue, at most 0.5"),
    ]

    def images(self, *shape, dtype=torch.float32):
        # Away from colours of 0 and 1, where they are clamped.
        return 0.2 * super().images(*shape, dtype=dtype)

    def test_not_cacheable(self):
        assert AugmentedPixels.cacheable is False

    def test_compiled_counts(self):
        module = self.make()
        compiled, reference = EAGER(module), self.make()
        for _ in range(2):
            torch.testing.assert_close(compiled(self.images()), reference(self.images()))
        assert int(module.samples_drawn) == 8


def make_images(*shape, dtype=torch.float32):
    return torch.rand(shape, generator=torch.Generator().manual_seed(0), dtype=dtype)


@pytest.fixture(scope="module")
def photographs():
    image = torch.from_numpy(skimage.data.astronaut()).permute(2, 0, 1) / 255
    return torch.stack([image[:, i : i + 96, j : j + 96] for i in (0, 120) for j in (150, 230)])


@pytest.mark.parametrize("shape", [(1, 3, 1, 1), (2, 1, 1, 7), (2, 3, 5, 1)])
def test_tiny_images(shape):
    features = AugmentedPixels(**UNIT)(make_images(*shape))
    assert features.shape == shape
    assert torch.isfinite(features).all()


@pytest.mark.parametrize("size", [(32, 32), (17, 40)])
@pytest.mark.parametrize("flip", [False, True])
def test_crop_equals_interpolate(size, flip):
    images = make_images(6, 3, *size, dtype=torch.float64)
    generator = torch.Generator().manual_seed(1)
    trials, place = torch.rand(6, 20, generator=generator), torch.rand(6, 2, generator=generator)
    box = _crop_boxes(trials, place, *size, (0.08, 1.0))
    result = _crop_resize_flip(images, box, torch.full((6,), flip))
    for image, features, *sides in zip(images, result, *box, strict=True):
        top, left, height, width = (int(side) for side in sides)
        crop = image[None, :, top : top + height, left : left + width]
        assert crop.shape[2:] == (height, width)
        expected = F.interpolate(crop, size, mode="bilinear", align_corners=False)
        expected = expected.flip(-1) if flip else expected
        torch.testing.assert_close(features[None], expected, rtol=1e-9, atol=1e-9)


def test_crop_boxes_distribution():
    generator = torch.Generator().manual_seed(0)
    trials, place = (
        torch.rand(4000, 20, generator=generator),
        torch.rand(4000, 2, generator=generator),
    )
    top, left, height, width = _crop_boxes(trials, place, 96, 96, (0.08, 1.0))
    assert min(top.min(), left.min()) == 0
    assert (top + height).max() == (left + width).max() == 96
    area, ratio = height * width / 96**2, width / height
    assert 0.075 < area.min() < 0.1
    assert area.max() > 0.95
    assert 0.73 < ratio.min() < 0.78
    assert 1.28 < ratio.max() < 1.37
    # In the middle of a free range as often above as below.
    free = 96 - height
    position = top[free > 20] / free[free > 20]
    assert abs(position.mean() - 0.5) < 0.03
    assert abs(ratio.log().mean()) < 0.02


@pytest.mark.parametrize(("size", "expected"), [((10, 100), (10, 13)), ((100, 10), (13, 10))])
def test_crop_that_never_fits_is_central(size, expected):
    trials = torch.cat((torch.ones(1, 10), torch.full((1, 10), 0.5)), dim=1)
    top, left, height, width = _crop_boxes(trials, torch.full((1, 2), 0.9), *size, (1.0, 1.0))
    assert (int(height), int(width)) == expected
    assert (int(top), int(left)) == tuple((a - b) // 2 for a, b in zip(size, expected, strict=True))


@pytest.mark.parametrize("shift", [-0.5, -0.13, 0.0, 0.2, 0.5])
def test_hue_equals_kornia(photographs, shift):
    images = torch.cat((photographs, photographs.mean(1, keepdim=True).expand(-1, 3, -1, -1)))
    result = _shift_hue(images, torch.full((len(images),), shift))
    expected = kornia.enhance.adjust_hue(images, 2 * math.pi * torch.full((len(images),), shift))
    torch.testing.assert_close(result, expected, rtol=0, atol=2e-6)


@pytest.mark.parametrize(
    ("permutation", "names"),
    list(enumerate(("bcs", "bsc", "csb", "cbs", "sbc", "scb"))),
)
def test_jitter_equals_kornia(photographs, permutation, names):
    n = len(photographs)
    draws = torch.rand(n, 4, generator=torch.Generator().manual_seed(permutation))
    order = torch.full((n,), (permutation + 0.5) / 6)
    chosen = torch.tensor([True] * (n - 1) + [False])
    result = _jitter_colors(photographs, chosen, draws, order, (0.8, 0.8, 0.8, 0.2))

    operators = {
        "b": kornia.enhance.adjust_brightness_accumulative,
        "c": kornia.enhance.adjust_contrast_with_mean_subtraction,
        "s": kornia.enhance.adjust_saturation_with_gray_subtraction,
    }
    expected = photographs
    for name in names:
        expected = operators[name](expected, 0.2 + 1.6 * draws[:, "bcs".index(name)])
    expected = kornia.enhance.adjust_hue(expected, 2 * math.pi * 0.2 * (2 * draws[:, 3] - 1))
    torch.testing.assert_close(result[:-1], expected[:-1], rtol=0, atol=5e-6)
    torch.testing.assert_close(result[-1], photographs[-1], rtol=0, atol=5e-6)


def test_nothing_is_the_identity(photographs):
    features = augmented_pixels(photographs, **UNIT, **NOTHING)
    torch.testing.assert_close(features, photographs, rtol=0, atol=1e-5)


def test_flip(photographs):
    options = UNIT | NOTHING | {"flip_probability": 1.0}
    features = augmented_pixels(photographs, **options)
    torch.testing.assert_close(features, photographs.flip(-1), rtol=0, atol=1e-5)


def test_grey(photographs):
    options = UNIT | NOTHING | {"grayscale_probability": 1.0}
    features = augmented_pixels(photographs, **options)
    expected = kornia.color.rgb_to_grayscale(photographs).expand(-1, 3, -1, -1)
    torch.testing.assert_close(features, expected, rtol=0, atol=1e-5)


def test_blur(photographs):
    features = augmented_pixels(photographs, **(UNIT | NOTHING | {"blur": True}))

    def roughness(x):
        return x.diff(dim=-1).square().mean(dim=(1, 2, 3))

    assert (roughness(features) < roughness(photographs)).all()
    torch.testing.assert_close(
        features.mean(dim=(2, 3)), photographs.mean(dim=(2, 3)), rtol=0, atol=0.02
    )
    small = photographs[..., :19, :19]
    unblurred = augmented_pixels(small, **(UNIT | NOTHING | {"blur": True}))
    torch.testing.assert_close(unblurred, small, rtol=0, atol=1e-5)


def test_normalisation_is_undone_and_redone(photographs):
    imagenet = Normalization.imagenet()
    mean, std = (torch.tensor(v).view(1, 3, 1, 1) for v in (imagenet.mean, imagenet.std))
    expected = (augmented_pixels(photographs, seed=3, **UNIT) - mean) / std
    features = augmented_pixels((photographs - mean) / std, seed=3)
    torch.testing.assert_close(features, expected, rtol=0, atol=1e-4)


@pytest.mark.parametrize("channels", [1, 2, 5])
def test_other_channel_counts_have_no_colours(channels):
    images = make_images(3, channels, 32, 32)
    geometric = {"color_jitter_probability": 0.0, "grayscale_probability": 0.0}
    features = augmented_pixels(images, seed=2)
    assert torch.equal(features, augmented_pixels(images, seed=2, **geometric))
    assert torch.equal(features[:, :1], augmented_pixels(images[:, :1], seed=2))


def test_draws_are_per_sample(photographs):
    same = photographs[:1].expand(16, -1, -1, -1)
    features = AugmentedPixels(**UNIT)(same).flatten(1)
    assert torch.pdist(features).min() > 1


def test_slices_repeat_and_advance(photographs):
    images = photographs.repeat(5, 1, 1, 1)
    whole, again = AugmentedPixels(seed=7, **UNIT), AugmentedPixels(seed=7, **UNIT)
    first = whole(images)
    in_slices = torch.cat([again(part) for part in images.split(8)])
    torch.testing.assert_close(in_slices, first, rtol=0, atol=1e-6)
    second = whole(images)
    assert not torch.allclose(second, first)
    torch.testing.assert_close(again(images), second, rtol=0, atol=1e-6)
    assert int(whole.samples_drawn) == 40
    torch.testing.assert_close(
        augmented_pixels(images, seed=7, start=20, **UNIT), second, rtol=0, atol=1e-6
    )
    assert not torch.allclose(AugmentedPixels(seed=8, **UNIT)(images), first)


def test_resume_continues_exactly(photographs):
    module = AugmentedPixels(seed=3, **UNIT)
    module(photographs)
    state = copy.deepcopy(module.state_dict())
    expected = [module(photographs) for _ in range(2)]
    resumed = AugmentedPixels(seed=3, **UNIT)
    resumed.load_state_dict(state)
    for features in expected:
        assert torch.equal(resumed(photographs), features)


def check_processes(number, _, made_before):
    images = make_images(4, 3, 24, 24)
    before = pickle.loads(made_before)
    # Its own in each process, though all have one seed; made before there was a group, or within.
    for module in (copy.deepcopy(before), before, AugmentedPixels(seed=7)):
        expected = augmented_pixels(images, seed=7, start=number * 2**38)
        torch.testing.assert_close(module(images), expected)
        assert int(module.samples_drawn) == 4
    if number:
        assert not torch.allclose(expected, augmented_pixels(images, seed=7))
    # What rank 0 has saved goes on here where this process stopped.
    module, resumed = AugmentedPixels(seed=7), AugmentedPixels(seed=7)
    module(images)
    state = [module.state_dict()]
    torch.distributed.broadcast_object_list(state)
    resumed.load_state_dict(state[0])
    torch.testing.assert_close(resumed(images), module(images))
    torch.testing.assert_close(EAGER(AugmentedPixels(seed=7))(images), expected)


def test_each_process_draws_its_own(tmp_path):
    run(2, tmp_path, check_processes, pickle.dumps(AugmentedPixels(seed=7)))


def test_torch_generator_plays_no_part(photographs):
    before = torch.get_rng_state()
    first = augmented_pixels(photographs)
    assert torch.equal(torch.get_rng_state(), before)
    torch.manual_seed(5)
    assert torch.equal(augmented_pixels(photographs), first)


def test_eval_mode_and_inference_mode_draw_as_well(photographs):
    module = AugmentedPixels().eval()
    with torch.inference_mode():
        first = module(photographs)
    assert not torch.allclose(module(photographs), first)


@pytest.mark.parametrize("value", [0.0, 0.5, 1.0])
def test_constant_images_stay_constant(value):
    images = torch.full((8, 3, 24, 24), value)
    features = augmented_pixels(images, **UNIT)
    assert features.std(dim=(2, 3)).max() < 1e-5
    assert features.min() >= -1e-6
    assert features.max() <= 1 + 1e-6


@pytest.mark.parametrize(
    ("start", "error", "match"),
    [
        (-1, ValueError, "start must be at least 0 but is -1"),
        (2**56 + 1, ValueError, "start must be at most 72057594037927936"),
        (True, TypeError, "start must be an int but is a bool"),
        (torch.tensor(-1), ValueError, "start must be at least 0 but is -1"),
        (
            torch.tensor(1.5),
            ValueError,
            r"0-dimensional int64 .* of shape \(\) and dtype torch.float",
        ),
        (torch.arange(4), ValueError, r"0-dimensional int64 tensor but is of shape \(4,\)"),
    ],
)
def test_wrong_start(start, error, match):
    with pytest.raises(error, match=match):
        augmented_pixels(make_images(1, 3, 8, 8), start=start)
    assert augmented_pixels(make_images(1, 3, 8, 8), start=2**56).isfinite().all()
