"""The cosine transform against scipy's."""

import sys

import pytest
import scipy.fft
import torch

from mvmr_loss.representations import DCT, dct
from tests.representations.tester import RepresentationTester

SHAPES = [(2, 3, 96, 96), (1, 1, 32, 32), (2, 3, 17, 40), (3, 2, 1, 9), (1, 4, 5, 1), (1, 1, 1, 1)]


class TestDCT(RepresentationTester):
    module = DCT
    function = staticmethod(dct)
    shapes = SHAPES


def make_images(*shape, dtype=torch.float64):
    return torch.rand(shape, generator=torch.Generator().manual_seed(0), dtype=dtype)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.float64, 1e-12)])
def test_equals_scipy(shape, dtype, tolerance):
    images = make_images(*shape)
    expected = torch.from_numpy(scipy.fft.dctn(images.numpy(), type=2, axes=(2, 3), norm="ortho"))
    features = dct(images.to(dtype))
    assert features.dtype == dtype
    error = torch.linalg.vector_norm(features - expected) / torch.linalg.vector_norm(expected)
    assert error < tolerance
    assert (features - expected).abs().max() < tolerance * expected.abs().max()


def test_slices_equal_the_whole(monkeypatch):
    images = torch.rand(5, 3, 12, 20).contiguous(memory_format=torch.channels_last)
    expected = dct(images.double()).float()
    for numbers in (1, 2 * 12 * 20, 10**9):
        monkeypatch.setattr(sys.modules["mvmr_loss.representations.dct"], "_SLICE_CPU", numbers)
        torch.testing.assert_close(dct(images), expected, rtol=1e-5, atol=1e-5)


def test_keeps_distances():
    x, y = make_images(2, 3, 24, 20)
    before = torch.linalg.vector_norm(x - y)
    assert torch.allclose(torch.linalg.vector_norm(dct(x) - dct(y)), before, rtol=1e-12)


def test_constant_images_have_one_coefficient():
    features = dct(torch.full((1, 1, 8, 6), 3.0, dtype=torch.float64))
    assert torch.isclose(features[0, 0, 0, 0], torch.tensor(3.0 * 48**0.5, dtype=torch.float64))
    features[..., 0, 0] = 0
    assert features.abs().max() < 1e-14
