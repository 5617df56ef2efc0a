"""The C++ kernel of the scattering transform against the plain definition."""

import sys

import pytest
import torch

from mvmr_loss.representations import PatchScattering, Scattering, scattering

# The package exports the function of the same name.
module = sys.modules["mvmr_loss.representations.scattering"]


@pytest.fixture
def plain(monkeypatch):
    """Returns what computes the coefficients without the kernel."""

    def compute(*args, **kwargs):
        with monkeypatch.context() as patch:
            patch.setattr(module, "_build_kernel", lambda *_: None)
            return scattering(*args, **kwargs)

    return compute


def make_images(*shape, dtype=torch.float32):
    return torch.rand(shape, generator=torch.Generator().manual_seed(0), dtype=dtype) - 0.4


def assert_equal_path_by_path(actual, expected):
    error = torch.linalg.vector_norm((actual - expected).movedim(2, 0).flatten(1), dim=1)
    size = torch.linalg.vector_norm(expected.movedim(2, 0).flatten(1), dim=1)
    assert actual.shape == expected.shape
    assert (error <= 2e-6 * size).all()


@pytest.mark.usefixtures("kernels_on")
@pytest.mark.parametrize(
    ("size", "J", "L", "max_order"),
    [
        ((32, 32), 2, 8, 2),
        ((96, 96), 2, 8, 2),
        ((31, 45), 3, 6, 2),
        ((64, 40), 4, 8, 2),
        ((16, 16), 4, 3, 2),
        ((4, 5), 2, 1, 2),
        ((30, 21), 1, 4, 2),
        # Angles that fill the lanes more than once, and an order less.
        ((50, 36), 2, 11, 2),
        ((24, 40), 3, 16, 1),
        # Lengths with every radix there is, and with primes above them.
        *(((4 * prime - 8, 4 * 9 - 8), 2, 4, 2) for prime in (3, 5, 7, 11, 13, 17, 29, 53)),
    ],
)
def test_equals_plain(plain, size, J, L, max_order):
    images = make_images(2, 2, *size)
    expected = plain(images, J, L, max_order)
    assert_equal_path_by_path(scattering(images, J, L, max_order), expected)


@pytest.mark.usefixtures("kernels_on")
@pytest.mark.parametrize("threads", [1, 2, 5])
def test_threads_change_nothing(threads):
    images = make_images(1, 3, 20, 24)
    expected = scattering(images)
    torch.set_num_threads(threads)
    assert torch.equal(scattering(images), expected)


@pytest.mark.usefixtures("kernels_on")
def test_constant_images_have_order_0_alone():
    features = scattering(torch.full((1, 1, 24, 20), 0.7))
    torch.testing.assert_close(features[:, :, 0], torch.full((1, 1, 6, 5), 0.7), rtol=1e-4, atol=0)
    assert features[:, :, 1:].abs().max() <= 1e-6
    assert scattering(torch.zeros(1, 1, 24, 20)).abs().max() == 0


@pytest.mark.usefixtures("kernels_on")
def test_is_used_where_it_can_be(monkeypatch):
    images, used = make_images(1, 1, 16, 16), []
    by_kernel = module._scatter_by_kernel
    monkeypatch.setattr(
        module, "_scatter_by_kernel", lambda *args: (used.append(True), by_kernel(*args))
    )

    def uses(images):
        used.clear()
        scattering(images)
        return bool(used)

    assert uses(images)
    assert not uses(images.double())
    with_gradient = images.clone().requires_grad_()
    assert not uses(with_gradient)
    with torch.no_grad():
        assert uses(with_gradient)
    with torch.inference_mode():
        assert uses(images + 0)


@pytest.mark.parametrize("representation", [Scattering, PatchScattering])
def test_function_transforms_have_their_gradient(representation):
    images = make_images(1, 1, 16, 16)
    features = representation(J=1, L=2, differentiable=True)

    def loss(x):
        return features(x).square().sum()

    expected = torch.autograd.grad(loss(images.requires_grad_()), images)[0]
    torch.testing.assert_close(torch.func.grad(loss)(images.detach()), expected)


def test_does_without(monkeypatch, plain):
    monkeypatch.setattr(module, "load_library", lambda name: None)
    module._build_kernel.cache_clear()
    try:
        images = make_images(1, 1, 12, 16)
        assert module._build_kernel(12, 16, 2, 4, 2) is None
        assert torch.equal(scattering(images, 2, 4), plain(images, 2, 4))
    finally:
        module._build_kernel.cache_clear()
