"""The cosine transform against scipy's."""

import sys

import pytest
import scipy.fft
import torch

from mvmr_loss.representations import DCT, dct

SHAPES = [(2, 3, 96, 96), (1, 1, 32, 32), (2, 3, 17, 40), (3, 2, 1, 9), (1, 4, 5, 1), (1, 1, 1, 1)]


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


@pytest.mark.parametrize("shape", SHAPES)
def test_cardinality(shape):
    assert DCT()(make_images(*shape)).shape == (shape[0], *DCT().output_shape(*shape[1:]))


def test_module_single_batch_and_strides():
    images = make_images(4, 3, 12, 10)
    expected = dct(images)
    assert torch.equal(DCT()(images), expected)
    torch.testing.assert_close(DCT()(images[1]), expected[1:2])
    strided = images.transpose(2, 3).contiguous().transpose(2, 3)
    torch.testing.assert_close(DCT()(strided), expected)
    channels_last = images.to(memory_format=torch.channels_last)
    torch.testing.assert_close(DCT()(channels_last), expected)
    assert DCT()(images.half()).dtype == torch.float32


def test_gradcheck():
    images = make_images(2, 2, 3, 5).requires_grad_()
    assert torch.autograd.gradcheck(DCT(differentiable=True), images)
    assert torch.autograd.gradgradcheck(DCT(differentiable=True), images)
    assert not DCT()(images).requires_grad


def test_basis_kept_from_inference_mode_serves_a_gradient():
    images = make_images(1, 1, 7, 11)
    with torch.inference_mode():
        dct(images)
    images.requires_grad_()
    dct(images).sum().backward()
    assert torch.isfinite(images.grad).all()


@pytest.mark.parametrize("size", [(12, 12), (9, 16)])
def test_compile(size):
    images = make_images(2, 3, *size)
    compiled = torch.compile(DCT(), fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(images), dct(images))


def test_exception():
    with pytest.raises(ValueError, match=r"images must have shape \(N, C, H, W\)"):
        dct(torch.zeros(4, 4))
    with pytest.raises(ValueError, match="images must be finite"):
        DCT()(torch.full((1, 1, 4, 4), float("inf")))
    with pytest.raises(TypeError, match="images must be a torch"):
        dct("image")
