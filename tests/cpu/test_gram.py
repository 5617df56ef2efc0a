"""The C++ kernel of Gram matrices against the plain definitions."""

import pytest
import torch

from mvmr_loss import MVMRLoss
from mvmr_loss._cpu import gram as kernel_module
from mvmr_loss.dependence import definitions, distance_correlation, pairwise_distances

SHAPES = [(1, 1), (2, 3), (5, 7), (24, 128), (25, 129), (100, 1000), (257, 513), (1100, 40)]

pytestmark = pytest.mark.usefixtures("kernels_on")


def make_batch(n, d, offset=3.0):
    return torch.randn(n, d, generator=torch.Generator().manual_seed(n + d)) + offset


def relative_error(actual, expected):
    assert actual.shape == expected.shape
    return (actual - expected).norm() / expected.norm().clamp(min=1e-30)


@pytest.mark.parametrize(("n", "d"), SHAPES)
@pytest.mark.parametrize("threads", [1, 2, 5])
def test_gram_equals_definition(n, d, threads, monkeypatch):
    monkeypatch.setattr(kernel_module, "_threads", lambda x: threads)
    x = make_batch(n, d)
    gram = kernel_module.centered_gram(x)
    centered = x.double() - x.double().mean(dim=0)
    assert torch.equal(gram, gram.T)
    # Of a single sample, or the same numbers, only the rounding of the mean is left.
    assert (gram - centered @ centered.T).norm() <= 1e-6 * centered.square().sum() + 1e-9
    assert torch.equal(gram, kernel_module.centered_gram(x))


@pytest.mark.parametrize(("n", "d"), SHAPES)
@pytest.mark.parametrize("threads", [1, 3])
def test_product_equals_definition(n, d, threads, monkeypatch):
    monkeypatch.setattr(kernel_module, "_threads", lambda x: threads)
    x, weight = make_batch(n, d), make_batch(n, n, 0.0)
    product = kernel_module.product_about_mean(weight.T, x)
    expected = weight.T.double() @ (x.double() - x.double().mean(dim=0))
    assert (product - expected).norm() <= 2e-6 * expected.norm() + 1e-5


@pytest.mark.parametrize("exponent", [0.5, 1.0, 1.7])
@pytest.mark.parametrize(
    "x",
    [
        make_batch(4, 1),
        make_batch(64, 300),
        make_batch(257, 100),
        make_batch(6, 30).repeat(5, 1),  # duplicates
        make_batch(30, 4).round(),  # ties
        torch.ones(20, 5),  # nothing but coincident points
    ],
    ids=["narrow", "usual", "large", "duplicates", "ties", "constant"],
)
def test_distances_equal_definition(x, exponent):
    actual = pairwise_distances(x, exponent=exponent)
    expected = definitions.pairwise_distances(x.double(), exponent)
    torch.testing.assert_close(actual.double(), expected, rtol=1e-4, atol=0)


def test_strides():
    wide = make_batch(20, 90)
    x = wide[:, 5:60]
    assert x.stride() == (90, 1)
    assert torch.equal(kernel_module.centered_gram(x), kernel_module.centered_gram(x.contiguous()))
    weight = make_batch(20, 20)
    assert torch.equal(
        kernel_module.product_about_mean(weight, x),
        kernel_module.product_about_mean(weight, x.contiguous()),
    )
    assert kernel_module.centered_gram(wide.T) is None
    torch.testing.assert_close(
        pairwise_distances(wide.T), pairwise_distances(wide.T.contiguous()), rtol=1e-5, atol=1e-4
    )


def test_of_no_rows_there_is_no_matrix():
    found = kernel_module.centered_gram(torch.ones(0, 5))
    assert found is None or found.shape == (0, 0)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), 1e-30, 1e30, 0.0])
@pytest.mark.parametrize("d", [3, 16])
def test_leaves_what_needs_care_to_the_definition(value, d):
    x = torch.full((5, d), 0.0 if abs(value) > 1e-30 or value != value else value / 2)
    x[2, d - 1] = value
    assert kernel_module.centered_gram(x) is None


@pytest.mark.parametrize(
    ("threads", "sums", "used"), [(4, 4 * 64, 4), (4, 3 * 64, 3), (5, 3 * 64, 3), (7, 3 * 64, None)]
)
def test_large_batches_have_as_many_threads_as_there_is_room_for(threads, sums, used, monkeypatch):
    """And none where torch's product is faster by more threads."""
    x, given = make_batch(8, 16), []
    library = kernel_module.load_library("gram")

    class Library:
        def centered_gram(self, *arguments):
            given.append(arguments[-1])
            return library.centered_gram(*arguments)

    monkeypatch.setattr(kernel_module, "load_library", lambda name: Library())
    monkeypatch.setattr(kernel_module, "_threads", lambda x: threads)
    monkeypatch.setattr(kernel_module, "_MAX_SUMS", sums)
    assert (kernel_module.centered_gram(x) is None) == (used is None)
    assert given == [] if used is None else [used]


def test_is_used_where_it_can_be(monkeypatch):
    x = make_batch(8, 16)
    assert kernel_module.centered_gram(x) is not None
    assert kernel_module.centered_gram(x.double()) is None
    monkeypatch.setattr(kernel_module, "_MAX_SUMS", 63)
    assert kernel_module.centered_gram(x) is None
    monkeypatch.undo()
    with_gradient = x.clone().requires_grad_()
    calls = []
    for name in ("centered_gram", "product_about_mean"):
        kernel = getattr(kernel_module, name)
        monkeypatch.setattr(
            kernel_module, name, lambda *a, kernel=kernel: calls.append(kernel) or kernel(*a)
        )
    MVMRLoss()(with_gradient, with_gradient + x, {"y": x}).backward()
    assert len(calls) == 5  # a matrix for each of three, and the gradient of each view's


def test_gradient_equals_definition(monkeypatch):
    x, y = make_batch(30, 70), make_batch(30, 9)

    def gradient(x):
        x = x.clone().requires_grad_()
        distance_correlation(x, y.to(x.dtype)).backward()
        return x.grad

    actual, expected = gradient(x), gradient(x.double())
    assert relative_error(actual, expected) <= 2e-5
