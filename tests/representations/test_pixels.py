"""The pixels themselves."""

import pytest
import torch

from mvmr_loss.representations import Pixels


@pytest.mark.parametrize("shape", [(4, 3, 8, 8), (1, 1, 1, 5), (2, 7, 3, 2)])
def test_smoke(shape):
    images = torch.rand(shape)
    features = Pixels()(images)
    assert torch.equal(features, images)
    assert features.shape[1:] == Pixels().output_shape(*shape[1:])


def test_single_image():
    image = torch.rand(3, 8, 8)
    assert torch.equal(Pixels()(image), image[None])


@pytest.mark.parametrize(
    ("dtype", "expected"),
    [
        (torch.float16, torch.float32),
        (torch.bfloat16, torch.float32),
        (torch.float32, torch.float32),
        (torch.float64, torch.float64),
    ],
)
def test_dtype(dtype, expected):
    images = torch.rand(2, 3, 4, 4).to(dtype)
    features = Pixels()(images)
    assert features.dtype == expected
    assert torch.equal(features, images.to(expected))


def test_no_gradient_unless_differentiable():
    images = torch.rand(2, 3, 4, 4, requires_grad=True)
    assert not Pixels()(images).requires_grad
    Pixels(differentiable=True)(images).sum().backward()
    assert torch.equal(images.grad, torch.ones_like(images))


def test_compile():
    images = torch.rand(2, 3, 4, 4)
    assert torch.equal(torch.compile(Pixels(), fullgraph=True, backend="eager")(images), images)


@pytest.mark.parametrize(
    ("images", "error", "message"),
    [
        ([[1.0]], TypeError, "images must be a torch.Tensor but is a list"),
        (torch.zeros(1, 3, 4, 4, dtype=torch.uint8), TypeError, "floating-point dtype"),
        (torch.zeros(4, 4), ValueError, r"shape \(N, C, H, W\)"),
        (torch.zeros(0, 3, 4, 4), ValueError, "none of them 0"),
        (torch.full((1, 3, 4, 4), float("nan")), ValueError, "images must be finite"),
    ],
)
def test_exception(images, error, message):
    with pytest.raises(error, match=message):
        Pixels()(images)
