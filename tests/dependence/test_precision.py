"""Values and gradients in float32 against float64 where digits are easily lost."""

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from mvmr_loss import MVMRLoss
from mvmr_loss.dependence import dependence_measure, matrices
from mvmr_loss.loss import invariance_loss, variance_loss

MEASURES = (
    *("distance_correlation", "distance_correlation_sqr", "u_distance_correlation_sqr"),
    *("distance_covariance", "distance_covariance_sqr", "u_distance_covariance_sqr"),
    *("hsic", "unbiased_hsic", "cka", "debiased_cka"),
)
N, D = 128, 256


def batch(kind):
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(N, D, generator=generator)
    if kind == "outlier":
        x[0] *= 1e5
    elif kind == "outliers":
        x[:5] *= torch.logspace(2, 5, 5)[:, None]
    elif kind == "clusters":
        x = torch.randn(2, D, generator=generator)[torch.arange(N) % 2] + 1e-3 * x
    elif kind == "ten clusters":
        x = torch.randn(10, D, generator=generator)[torch.arange(N) % 10] + 1e-3 * x
    elif kind == "pairs":
        x[1::2] = x[::2] + 1e-3 * x[1::2]
    elif kind == "offset":
        x += 1e4
    return x


@pytest.fixture(params=["kernels", "elsewhere"])
def place(request, monkeypatch):
    """On a CPU, and as on an accelerator."""
    if request.param == "elsewhere":
        monkeypatch.setattr(matrices, "_is_for_kernel", lambda x: False)
    return request.param


@pytest.mark.parametrize("name", MEASURES)
@pytest.mark.parametrize(
    "kind", ["plain", "outlier", "outliers", "clusters", "ten clusters", "pairs", "offset"]
)
def test_as_in_float64(name, kind, place):
    x = batch(kind)
    y = torch.randn(N, 64, generator=torch.Generator().manual_seed(1)) + batch("plain")[:, :64]
    single, double = x.clone().requires_grad_(), x.double().requires_grad_()
    measure = dependence_measure(name)
    value, expected = measure(single, y), measure(double, y.double())
    assert value.dtype == torch.float32
    torch.testing.assert_close(value.double(), expected, rtol=1e-2, atol=1e-6)
    (ours,), (theirs,) = torch.autograd.grad(value, single), torch.autograd.grad(expected, double)
    # Every sample's gradient, not only the largest ones: but for those that vanish.
    sizes = theirs.norm(dim=1)
    seen = sizes > 1e-9 * sizes.max()
    errors = (ours.double() - theirs).norm(dim=1)
    assert (errors[seen] <= 1e-2 * sizes[seen]).all()
    assert errors[~seen].max() <= 1e-9 * sizes.max() if bool((~seen).any()) else True


class LowPrecisionProducts(TorchDispatchMode):
    """Rounds what enters a float32 matrix product, as ``torch.set_float32_matmul_precision`` allows."""

    def __init__(self, bits):
        super().__init__()
        self.bits, self.products = bits, 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        products = ("mm", "addmm", "bmm", "baddbmm", "mv", "dot", "addmv", "matmul")
        if function.overloadpacket.__name__ in products:
            self.products += 1
            args = [self.rounded(a) for a in args]
        return function(*args, **(kwargs or {}))

    def rounded(self, a):
        if not isinstance(a, torch.Tensor) or a.dtype != torch.float32:
            return a
        mantissa, exponent = torch.frexp(a)
        return torch.ldexp((mantissa * 2**self.bits).round() / 2**self.bits, exponent)


@pytest.mark.parametrize("bits", [10, 8])
def test_whatever_precision_of_products_is_set(bits, place):
    z = batch("plain").requires_grad_()
    v = (batch("plain").roll(1, 0) + batch("plain")).requires_grad_()
    ys = {"clusters": batch("clusters"), "squares": batch("plain").square()}
    expected = MVMRLoss()(z, v, ys)
    gradient = torch.autograd.grad(expected, (z, v))
    with LowPrecisionProducts(bits) as mode:
        loss = MVMRLoss()(z, v, ys)
        found = torch.autograd.grad(loss, (z, v))
        assert mode.products > 0 or place == "kernels"
    torch.testing.assert_close(loss, expected, rtol=1e-5, atol=0)
    for ours, theirs in zip(found, gradient, strict=True):
        assert (ours - theirs).norm() <= 1e-4 * theirs.norm()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("scale", [1e-4, 1.0, 200.0])
def test_terms_in_half_precision(dtype, scale):
    generator = torch.Generator().manual_seed(0)
    z, v = ((scale * torch.randn(64, 2048, generator=generator)).to(dtype) for _ in range(2))
    z.requires_grad_()
    for value, expected in (
        (invariance_loss(z, v), invariance_loss(z.float(), v.float())),
        (variance_loss(z), variance_loss(z.float())),
        (MVMRLoss()(z, v), MVMRLoss()(z.float(), v.float())),
    ):
        assert value.dtype == torch.float32
        torch.testing.assert_close(value, expected, rtol=1e-5, atol=1e-7)
        (gradient,) = torch.autograd.grad(value, z)
        assert gradient.dtype == dtype
        assert torch.isfinite(gradient).all()


def test_values_beyond_the_range_are_held_within_it():
    x = 1e25 * batch("plain")
    for name in ("hsic", "cka"):
        value = dependence_measure(name, kernel="linear")(x, x)
        assert value == (torch.finfo(torch.float32).max if name == "hsic" else pytest.approx(1))
    assert torch.isfinite(MVMRLoss()(1e16 * batch("plain"), 1e16 * batch("pairs")))


@pytest.mark.parametrize("spread", [1e-1, 1e-3, 1e-5])
@pytest.mark.parametrize("name", ["hsic", "unbiased_hsic", "cka", "debiased_cka"])
def test_a_kernel_far_broader_than_all_distances_keeps_its_digits(name, spread):
    # As of embeddings of a deep network before its training: scaled to length 1 they are nearly one.
    generator = torch.Generator().manual_seed(0)
    x, y = 1 + spread * torch.randn(2, 64, 32, generator=generator)
    measure = dependence_measure(name, kernel="gaussian", bandwidth=20.0)

    def value_and_gradient(dtype):
        leaf = x.to(dtype).requires_grad_()
        value = measure(leaf, y.to(dtype))
        (grad,) = torch.autograd.grad(value, leaf)
        return value.item(), grad.double()

    (value, grad), (exact, exact_grad) = map(value_and_gradient, (torch.float32, torch.float64))
    assert exact_grad.norm() > 0
    assert value == pytest.approx(exact, rel=1e-3)
    assert (grad - exact_grad).norm() < 2e-2 * exact_grad.norm()


def test_the_identity_term_of_a_nearly_collapsed_network_has_its_gradient():
    criterion = MVMRLoss.from_preset("identity")
    generator = torch.Generator().manual_seed(0)
    noise = torch.randn(2, 32, 16, generator=generator)
    views = [1 + 1e-4 * (noise[0] + 0.3 * part) for part in (noise[1], -noise[1])]

    def gradient(dtype):
        z, v = (view.to(dtype).requires_grad_() for view in views)
        return torch.autograd.grad(criterion(z, v), z)[0].double()

    exact = gradient(torch.float64)
    assert exact.norm() > 0
    assert (gradient(torch.float32) - exact).norm() < 2e-2 * exact.norm()
