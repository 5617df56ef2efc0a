"""The scattering transform against kymatio 0.3.0, live and by stored numbers."""

from functools import lru_cache
from pathlib import Path

import numpy as np
import pytest
import skimage.data
import torch

# kymatio 0.3.0's top-level import fails on SciPy >= 1.17.
from kymatio.scattering2d.backend.torch_backend import backend
from kymatio.scattering2d.frontend.torch_frontend import ScatteringTorch2D

from mvmr_loss.representations import Scattering, scattering
from tests.representations.tester import RepresentationTester

ORACLE = Path(__file__).parents[1] / "oracles" / "scattering.npz"

SIZES = [(32, 32), (96, 96), (224, 224), (40, 57), (31, 33), (97, 64)]
ALL = [(J, L, size) for size in SIZES for J in (1, 2, 3, 4) for L in (4, 6, 8)]
# Every J with every L, every size, and both orders of the larger and the smaller side.
BY_DEFAULT = [(J, L, (32, 32)) for J in (1, 2, 3, 4) for L in (4, 6, 8)] + [
    (2, 8, (96, 96)),
    (3, 6, (96, 96)),
    (1, 4, (224, 224)),
    (4, 4, (40, 57)),
    (3, 8, (40, 57)),
    (2, 6, (31, 33)),
    (4, 8, (31, 33)),
    (1, 8, (97, 64)),
    (3, 4, (97, 64)),
]


class TestScattering(RepresentationTester):
    module = Scattering
    function = staticmethod(scattering)
    options = {"J": 2, "L": 3, "max_order": 2}
    small = (1, 2, 6, 7)
    second_order = False
    wrong = [
        ({"J": 0}, ValueError, "J must be at least 1 but is 0"),
        ({"J": 2.0}, TypeError, "J must be an int but is a float"),
        ({"L": 0}, ValueError, "L must be at least 1 but is 0"),
        ({"L": True}, TypeError, "L must be an int but is a bool"),
        ({"max_order": 3}, ValueError, "max_order must be one of 1, 2 but is 3"),
        ({"max_order": "2"}, TypeError, "max_order must be an int but is a str"),
    ]


def make_images(*shape, dtype=torch.float32):
    return torch.rand(shape, generator=torch.Generator().manual_seed(0), dtype=dtype)


@lru_cache
def photograph():
    return torch.from_numpy(skimage.data.astronaut()).permute(2, 0, 1).float() / 255


def crops(height, width):
    """Two crops of a photograph, of the mean that normalised images have."""
    image = photograph() - 0.45
    return torch.stack([image[:2, i : i + height, j : j + width] for i, j in ((0, 150), (90, 20))])


def assert_equal_path_by_path(actual, expected, tolerance=1e-5):
    """Asserts a relative error of at most ``tolerance`` in every path of (..., K, h, w)."""
    assert actual.shape == expected.shape
    actual, expected = (x.double().movedim(-3, 0).flatten(1) for x in (actual, expected))
    error = torch.linalg.vector_norm(actual - expected, dim=1)
    assert (error <= tolerance * torch.linalg.vector_norm(expected, dim=1)).all()


@pytest.mark.parametrize(
    ("J", "L", "size"),
    BY_DEFAULT + [pytest.param(*s, marks=pytest.mark.slow) for s in ALL if s not in BY_DEFAULT],
)
def test_equals_kymatio(J, L, size):
    images = crops(*size)
    kymatio = ScatteringTorch2D(J, shape=size, L=L, backend=backend)
    assert_equal_path_by_path(scattering(images, J, L), kymatio(images))


@pytest.mark.parametrize("size", [(32, 32), (21, 30)])
def test_first_order_equals_kymatio(size):
    images = crops(*size)
    kymatio = ScatteringTorch2D(3, shape=size, L=6, max_order=1, backend=backend)
    assert_equal_path_by_path(scattering(images, 3, 6, max_order=1), kymatio(images))


@pytest.mark.parametrize("differentiable", [False, True])
def test_equals_stored_numbers(differentiable):
    """Without a gradient a C++ kernel may do the work, with one it never does."""
    with np.load(ORACLE) as stored:
        names = [name.removeprefix("image_") for name in stored if name.startswith("image_")]
        assert len(names) == 9
        for name in names:
            J, L = (int(number) for number in name.split("_")[:2])
            image = torch.from_numpy(stored[f"image_{name}"])
            expected = torch.from_numpy(stored[f"coefficients_{name}"])
            features = scattering(image[None].requires_grad_(differentiable), J, L)[0, 0]
            assert_equal_path_by_path(features.detach(), expected)


def test_float64():
    images = crops(40, 33).double()
    features = scattering(images, 3, 4)
    assert features.dtype == torch.float64
    assert_equal_path_by_path(scattering(images.float(), 3, 4), features, tolerance=2e-6)


@pytest.mark.parametrize("shape", [(2, 3, 32, 32), (1, 1, 4, 4), (2, 5, 17, 9), (1, 2, 5, 40)])
@pytest.mark.parametrize("options", [{}, {"L": 1}, {"J": 1, "L": 3}, {"max_order": 1}])
def test_cardinality(shape, options):
    module = Scattering(**options)
    features = module(make_images(*shape))
    assert features.shape == (shape[0], *module.output_shape(*shape[1:]))
    assert features.dtype == torch.float32
    assert torch.isfinite(features).all()


def test_number_of_paths():
    assert Scattering().output_shape(3, 96, 96) == (3, 81, 24, 24)
    assert Scattering(J=4, L=6).output_shape(1, 35, 64) == (1, 1 + 24 + 6 * 36, 2, 4)
    assert Scattering(J=4, L=6, max_order=1).output_shape(1, 35, 64) == (1, 25, 2, 4)


@pytest.mark.parametrize("value", [0.0, 0.7, -1000.0])
def test_constant_images_have_order_0_alone(value):
    features = scattering(torch.full((1, 2, 24, 20), value), J=2, L=4)
    torch.testing.assert_close(
        features[:, :, 0], torch.full((1, 2, 6, 5), value), rtol=1e-4, atol=0
    )
    assert features[:, :, 1:].abs().max() <= 1e-5 * abs(value)


def test_homogeneous():
    images = crops(32, 32)
    features = scattering(-3 * images)
    expected = 3 * scattering(images)
    expected[:, :, 0] *= -1
    torch.testing.assert_close(features, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("parts", [1, 3])
def test_slices_change_nothing(parts):
    # Twelve images of three channels are worked on in several slices, a part of them in fewer.
    images = make_images(12, 3, 48, 48)
    expected = torch.cat([scattering(part) for part in images.split(parts)])
    torch.testing.assert_close(scattering(images), expected)


def test_gradient_does_not_change_the_numbers():
    images = crops(32, 32)
    with torch.no_grad():
        expected = scattering(images, J=3, L=4)
    features = scattering(images.requires_grad_(), J=3, L=4)
    torch.testing.assert_close(features.detach(), expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("value", [0.0, 0.5])
def test_zero_modulus_has_zero_gradient(value):
    images = torch.full((1, 1, 16, 16), value, dtype=torch.float64, requires_grad=True)
    features = Scattering(J=2, L=4, differentiable=True)(images)
    (gradient,) = torch.autograd.grad(features.sum(), images)
    assert torch.isfinite(gradient).all()
    if value == 0:
        (of_order_0,) = torch.autograd.grad(scattering(images)[:, :, 0].sum(), images)
        torch.testing.assert_close(gradient, of_order_0, rtol=0, atol=1e-12)


def test_compiled_once_it_serves_several_sizes():
    compiled = torch.compile(Scattering(J=1, L=2), fullgraph=True, backend="eager")
    for shape in ((2, 3, 16, 16), (2, 3, 12, 20), (5, 3, 12, 20), (1, 1, 9, 31)):
        images = make_images(*shape)
        torch.testing.assert_close(compiled(images), scattering(images, J=1, L=2))
