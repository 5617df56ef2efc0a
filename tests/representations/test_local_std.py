"""The local standard deviation against plain sliding windows."""

import numpy as np
import pytest
import scipy.ndimage
import skimage.data
import torch
import torch.nn.functional as F

from mvmr_loss.representations import LocalStd, local_std
from tests.representations.tester import RepresentationTester


class TestLocalStd(RepresentationTester):
    module = LocalStd
    function = staticmethod(local_std)
    options = {"window_size": 5}
    wrong = [
        ({"window_size": 4}, ValueError, "window_size must be odd and at least 3 but is 4"),
        ({"window_size": 1}, ValueError, "window_size must be odd and at least 3 but is 1"),
        ({"window_size": 3.0}, TypeError, "window_size must be an int but is a float"),
    ]


def make_images(*shape, dtype=torch.float64):
    return torch.rand(shape, generator=torch.Generator().manual_seed(0), dtype=dtype)


def test_equals_explicit_loop():
    images = make_images(2, 2, 6, 5)
    padded = np.pad(images.numpy(), ((0, 0), (0, 0), (1, 1), (1, 1)), mode="reflect")
    features = local_std(images).numpy()
    for n in range(2):
        for c in range(2):
            for i in range(6):
                for j in range(5):
                    window = padded[n, c, i : i + 3, j : j + 3]
                    np.testing.assert_allclose(features[n, c, i, j], window.std(), rtol=1e-12)


@pytest.mark.parametrize("window_size", [3, 5, 9])
@pytest.mark.parametrize("shape", [(2, 3, 32, 32), (1, 1, 5, 17), (2, 4, 96, 9)])
def test_equals_unfold(shape, window_size):
    images = make_images(*shape)
    padded = F.pad(images, (window_size // 2,) * 4, mode="reflect")
    windows = padded.unfold(2, window_size, 1).unfold(3, window_size, 1)
    expected = windows.std(dim=(-2, -1), correction=0)
    torch.testing.assert_close(local_std(images, window_size), expected, rtol=1e-12, atol=1e-14)
    features = local_std(images.float(), window_size)
    torch.testing.assert_close(features, expected.float(), rtol=1e-5, atol=1e-6)


def test_equals_scipy_on_a_photograph():
    image = skimage.data.camera()[100:164, 150:230].astype(np.float64)
    expected = scipy.ndimage.generic_filter(image, np.std, size=3, mode="mirror")
    features = local_std(torch.from_numpy(image)[None])
    np.testing.assert_allclose(features[0, 0].numpy(), expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("mean", [1e3, 1e4])
def test_a_large_mean_costs_no_digits(mean):
    # Exact in float32, so that only the formula can lose digits: a difference of squares would.
    deviations = (
        torch.randint(-8, 8, (1, 1, 16, 16), generator=torch.Generator().manual_seed(0)) / 8
    )
    expected = local_std(deviations.double())
    torch.testing.assert_close(
        local_std((deviations + mean).float()).double(), expected, rtol=0, atol=2e-7 * mean
    )


@pytest.mark.parametrize("window_size", [3, 5, 7, 13])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_constant_images_have_exactly_none(window_size, dtype):
    levels = (torch.arange(256, dtype=dtype) / 255 - 0.485) / 0.229
    values = torch.cat([levels, torch.tensor([-3.7, 1e20, 1e-20], dtype=dtype)])
    images = values[:, None, None, None].expand(-1, 1, 8, 9).clone().requires_grad_()
    features = local_std(images, window_size)
    assert features.abs().max() == 0
    assert features.grad_fn is not None
    assert local_std(images.detach(), window_size).abs().max() == 0
    features.sum().backward()
    assert images.grad.abs().max() == 0


def test_flat_regions_have_zero_gradient():
    images = torch.zeros(1, 1, 6, 9)
    images[..., 6:] = torch.rand(6, 3, generator=torch.Generator().manual_seed(0))
    images.requires_grad_()
    local_std(images).sum().backward()
    assert torch.isfinite(images.grad).all()
    assert images.grad[..., :4].abs().max() == 0
    assert images.grad.abs().max() > 0


def test_equivariance():
    images = make_images(2, 3, 10, 12)
    features = local_std(images)
    torch.testing.assert_close(local_std(images.flip(-1)), features.flip(-1))
    torch.testing.assert_close(local_std(images.mT), features.mT)
    torch.testing.assert_close(local_std(-3 * images + 2), 3 * features)
