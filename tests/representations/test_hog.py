"""Histograms of oriented gradients against scikit-image's, kornia's Sobel and a plain loop."""

import math

import kornia
import numpy as np
import pytest
import skimage.data
import skimage.feature
import torch

from mvmr_loss.representations import HOG, hog
from tests.representations.tester import RepresentationTester

PHOTOGRAPHS = {
    "astronaut": lambda: skimage.data.astronaut()[20:149, 150:260],
    "chelsea": lambda: skimage.data.chelsea()[60:188, 100:228],
    "coffee": lambda: skimage.data.coffee()[150:246, 200:310],
    "camera": lambda: skimage.data.camera()[50:170, 180:300, None],
}


class TestHOG(RepresentationTester):
    module = HOG
    function = staticmethod(hog)
    options = {
        "orientations": 5,
        "pixels_per_cell": 4,
        "cells_per_block": 2,
        "block_norm": "L2-Hys",
        "gradient": "sobel",
        "interpolation": "linear",
    }
    second_order = False
    wrong = [
        ({"orientations": 0}, ValueError, "orientations must be at least 1 but is 0"),
        ({"orientations": 9.0}, TypeError, "orientations must be an int but is a float"),
        ({"pixels_per_cell": (8, 8)}, TypeError, "pixels_per_cell must be an int but is a tuple"),
        ({"cells_per_block": 0}, ValueError, "cells_per_block must be at least 1"),
        ({"cells_per_block": 3}, ValueError, "block_norm must be given for blocks of 3 x 3 cells"),
        ({"block_norm": "l2"}, ValueError, "block_norm must be one of None, 'L1'.* but is 'l2'"),
        ({"gradient": "scharr"}, ValueError, "gradient must be one of 'sobel', 'central'"),
        ({"interpolation": "cubic"}, ValueError, "interpolation must be one of 'linear', 'none'"),
    ]


class TestDefaultHOG(RepresentationTester):
    module = HOG
    shapes = [(2, 3, 96, 96), (1, 1, 33, 47)]


class TestDalalTriggs(RepresentationTester):
    module = HOG
    options = TestHOG.options | {"gradient": "central", "interpolation": "none"}
    # A step to another bin is no slope.
    test_gradcheck = None


def make_images(*shape, dtype=torch.float64):
    return torch.rand(shape, generator=torch.Generator().manual_seed(0), dtype=dtype)


def photograph(name):
    return torch.from_numpy(PHOTOGRAPHS[name]().astype(np.float64)).permute(2, 0, 1)[None]


def plain_hog(images, orientations=24, cell=8):
    """The default setting, pixel by pixel from its description."""
    gradients = kornia.filters.spatial_gradient(images, normalized=False)
    n, c, h, w = images.shape
    result = torch.zeros(n, c, orientations, h // cell, w // cell, dtype=torch.float64)
    for a, b, i, j in np.ndindex(n, c, h // cell * cell, w // cell * cell):
        dx, dy = gradients[a, b, :, i, j].tolist()
        t = math.atan2(dy, dx) % math.pi * orientations / math.pi
        k, amount = math.floor(t), math.hypot(dx, dy) / cell**2
        result[a, b, k % orientations, i // cell, j // cell] += amount * (1 - t + k)
        result[a, b, (k + 1) % orientations, i // cell, j // cell] += amount * (t - k)
    return result


@pytest.mark.parametrize("name", PHOTOGRAPHS)
@pytest.mark.parametrize("block_norm", ["L1", "L1-sqrt", "L2", "L2-Hys"])
@pytest.mark.parametrize(
    ("orientations", "pixels_per_cell", "cells_per_block"), [(9, 8, 3), (24, 8, 1), (12, 5, 2)]
)
def test_equals_scikit_image(name, block_norm, orientations, pixels_per_cell, cells_per_block):
    images = photograph(name)
    features = hog(
        images,
        orientations,
        pixels_per_cell,
        cells_per_block,
        block_norm,
        gradient="central",
        interpolation="none",
    )
    for channel, of_channel in zip(images[0].numpy(), features[0], strict=True):
        expected = skimage.feature.hog(
            channel,
            orientations,
            (pixels_per_cell, pixels_per_cell),
            (cells_per_block, cells_per_block),
            block_norm,
            feature_vector=False,
        )
        if cells_per_block == 1:
            of_channel = of_channel[:, None, None]
        # scikit-image: block row and column, row and column in the block, bin.
        of_channel = of_channel.permute(3, 4, 1, 2, 0).numpy()
        np.testing.assert_allclose(of_channel, expected, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("shape", [(2, 2, 16, 24), (1, 1, 19, 13)])
def test_default_equals_plain_loop(shape):
    images = make_images(*shape)
    torch.testing.assert_close(hog(images), plain_hog(images), rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(hog(images.float()), plain_hog(images).float(), rtol=1e-4, atol=1e-5)


def test_sobel_equals_kornia():
    images = photograph("coffee")
    # One bin holds all of the magnitude, and a cell of one pixel is the pixel.
    magnitude = hog(images, orientations=1, pixels_per_cell=1)[:, :, 0]
    expected = kornia.filters.spatial_gradient(images, normalized=False).norm(dim=2)
    torch.testing.assert_close(magnitude, expected, rtol=1e-12, atol=1e-10)


@pytest.mark.parametrize("interpolation", ["linear", "none"])
def test_bins_hold_the_mean_magnitude(interpolation):
    images = photograph("chelsea")
    features = hog(images, interpolation=interpolation)
    magnitude = kornia.filters.spatial_gradient(images, normalized=False).norm(dim=2)
    expected = torch.nn.functional.avg_pool2d(magnitude, 8)
    torch.testing.assert_close(features.sum(2), expected)
    assert features.min() >= 0


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("interpolation", ["linear", "none"])
@pytest.mark.parametrize(
    ("dx", "dy", "expected"),
    [
        (1, 0, 0),
        (-1, 0, 0),
        (1, 1, 6),
        (-1, -1, 6),
        (0, 1, 12),
        (0, -1, 12),
        (-1, 1, 18),
        (1, -1, 18),
    ],
)
def test_bin_convention(dx, dy, expected, interpolation, dtype):
    y, x = torch.meshgrid(torch.arange(24), torch.arange(24), indexing="ij")
    ramp = (dx * x + dy * y).to(dtype)[None, None]
    middle = hog(ramp, interpolation=interpolation)[0, 0, :, 1, 1]
    magnitude = 8 * math.hypot(dx, dy)
    assert middle.argmax() == expected
    assert middle[expected].item() == pytest.approx(magnitude, rel=1e-5)
    assert middle.sum().item() == pytest.approx(magnitude, rel=1e-5)


@pytest.mark.parametrize("bins", [0.25, 7.5, 22.9, 23.75])
def test_magnitude_is_shared_by_neighbouring_bins(bins):
    angle = bins * math.pi / 24
    y, x = torch.meshgrid(torch.arange(24.0), torch.arange(24.0), indexing="ij")
    ramp = (math.cos(angle) * x + math.sin(angle) * y).double()[None, None]
    middle = hog(ramp)[0, 0, :, 1, 1] / 8
    first, share = math.floor(bins), bins - math.floor(bins)
    expected = torch.zeros(24, dtype=torch.float64)
    expected[first], expected[(first + 1) % 24] = 1 - share, share
    torch.testing.assert_close(middle, expected, rtol=0, atol=1e-5)


def test_rotation_by_a_quarter_turns_the_bins_by_half():
    images = photograph("chelsea")
    turned = hog(torch.rot90(images, dims=(2, 3)))
    expected = torch.rot90(hog(images), dims=(3, 4)).roll(12, dims=2)
    torch.testing.assert_close(turned, expected, rtol=1e-6, atol=1e-6)


def test_mirror_reverses_the_bins():
    images = photograph("chelsea")
    expected = hog(images).flip(4).flip(2).roll(1, dims=2)
    torch.testing.assert_close(hog(images.flip(3)), expected, rtol=1e-6, atol=1e-6)


def test_cell_norm_of_maskfeat():
    features = hog(photograph("astronaut"))
    expected = torch.nn.functional.normalize(features, dim=2)
    normalized = hog(photograph("astronaut"), block_norm="L2")
    torch.testing.assert_close(normalized, expected, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize(
    ("options", "shape"),
    [
        ({}, (2, 3, 96, 96)),
        ({}, (1, 1, 33, 47)),
        ({"orientations": 9, "pixels_per_cell": 7}, (1, 4, 30, 21)),
        ({"cells_per_block": 2, "block_norm": "L1"}, (2, 3, 40, 25)),
        ({"pixels_per_cell": 1}, (1, 2, 1, 1)),
        ({"orientations": 1, "gradient": "central"}, (1, 1, 8, 8)),
        ({"pixels_per_cell": 1, "gradient": "central"}, (1, 1, 1, 2)),
    ],
)
def test_cardinality(options, shape):
    module = HOG(**options)
    features = module(make_images(*shape, dtype=torch.float32))
    assert features.shape == (shape[0], *module.output_shape(*shape[1:]))
    assert torch.isfinite(features).all()


def test_size_in_the_release():
    assert math.prod(HOG().output_shape(3, 96, 96)) == 10_368


def test_rest_beyond_the_last_cell_is_left_out():
    images = make_images(1, 1, 21, 30)
    kwargs = {"gradient": "central"}
    inner = hog(images[..., :17, :25], **kwargs)
    torch.testing.assert_close(hog(images, **kwargs), inner)


@pytest.mark.parametrize("block_norm", [None, "L1", "L1-sqrt", "L2", "L2-Hys"])
@pytest.mark.parametrize("value", [0.0, 0.7])
def test_constant_images(block_norm, value):
    images = torch.full((1, 3, 16, 16), value, requires_grad=True)
    features = HOG(block_norm=block_norm, differentiable=True)(images)
    assert features.abs().max() == 0
    features.sum().backward()
    assert torch.isfinite(images.grad).all()


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"gradient": "central"},
        {"block_norm": "L2"},
        {"cells_per_block": 2, "block_norm": "L2-Hys"},
        {"block_norm": "L1"},
    ],
)
def test_gradcheck(options):
    images = make_images(1, 2, 8, 9).requires_grad_()
    module = HOG(5, 4, **options, differentiable=True)
    assert torch.autograd.gradcheck(module, images, eps=1e-7, atol=1e-5)
    assert not HOG(5, 4, **options)(images).requires_grad


@pytest.mark.parametrize("gradient", ["sobel", "central"])
@pytest.mark.parametrize("interpolation", ["linear", "none"])
@pytest.mark.parametrize("size", [1e-30, 1e-19, 1e15])
def test_slope_does_not_feel_the_size_of_the_images(gradient, interpolation, size):
    """Magnitudes are of the images' size, angles of none: what is between may be of its square."""
    images = torch.rand(2, 1, 6, 5, generator=torch.Generator().manual_seed(0))
    module = HOG(5, 1, gradient=gradient, interpolation=interpolation, differentiable=True)

    def slope(x):
        x.requires_grad_()
        weight = torch.arange(float(module(x).numel())).reshape(module(x).shape)
        return torch.autograd.grad((weight * module(x)).sum(), x)[0]

    torch.testing.assert_close(slope(images * size), slope(images.clone()), rtol=1e-3, atol=1e-2)
