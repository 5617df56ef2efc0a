"""The mode that works in blocks of rows equals the one that holds whole matrices."""

import functools

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from mvmr_loss import MVMRLoss
from mvmr_loss.dependence import dependence_measure, points

MEASURES = [
    functools.partial(dependence_measure, name)
    for name in ("distance_correlation", "distance_correlation_sqr", "u_distance_correlation_sqr")
]


def batches(n, dtype=torch.float32):
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(n, 9, generator=generator, dtype=dtype)
    y = x[:, :4] ** 2 + 0.5 * torch.randn(n, 4, generator=generator, dtype=dtype) + 10
    return x.requires_grad_(), y.requires_grad_()


@pytest.mark.parametrize("measure", MEASURES)
@pytest.mark.parametrize("exponent", [1.0, 0.6, 1.5])
@pytest.mark.parametrize("block_size", [1, 7, 20, 64])
def test_equals_whole_matrices(measure, exponent, block_size):
    x, y = batches(20)
    whole = measure(exponent=exponent)(x, y)
    blocks = measure(exponent=exponent, block_size=block_size)(x, y)
    torch.testing.assert_close(blocks, whole, rtol=1e-5, atol=1e-6)
    for ours, theirs in zip(
        torch.autograd.grad(blocks, (x, y)), torch.autograd.grad(whole, (x, y)), strict=True
    ):
        assert (ours - theirs).norm() <= 1e-5 * theirs.norm()


@pytest.mark.parametrize(
    "name", ["distance_correlation", "u_distance_correlation_sqr", "u_distance_covariance_sqr"]
)
@pytest.mark.parametrize("exponent", [1.0, 0.6])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("scale", [1.0, 100.0])
def test_the_floor_in_blocks_is_that_of_whole_matrices(name, exponent, dtype, scale):
    x, y = ((scale * t).detach().requires_grad_() for t in batches(20, dtype))
    options = {"exponent": exponent, "eps": 9.0 * scale**2}
    whole = dependence_measure(name, **options)(x, y)
    blocks = dependence_measure(name, **options, block_size=7)(x, y)
    assert (whole - dependence_measure(name, exponent=exponent)(x, y)).abs() > 1e-3 * whole.abs()
    torch.testing.assert_close(blocks, whole, rtol=1e-5, atol=1e-6)
    for ours, theirs in zip(
        torch.autograd.grad(blocks, (x, y)), torch.autograd.grad(whole, (x, y)), strict=True
    ):
        assert (ours - theirs).norm() <= 1e-4 * theirs.norm()


@pytest.mark.parametrize("measure", MEASURES)
def test_gradcheck(measure):
    x, y = (t.detach()[:, :3].requires_grad_() for t in batches(6, torch.float64))
    assert torch.autograd.gradcheck(measure(block_size=4), (x, y))
    assert torch.autograd.gradgradcheck(measure(block_size=4), (x, y))


def test_equals_whole_matrices_on_a_wide_loss():
    """Distances of wide batches hardly vary, which is where centring by sums could lose digits."""
    generator = torch.Generator().manual_seed(1)
    z = torch.randn(64, 8192, generator=generator).requires_grad_()
    v = (z + 0.5 * torch.randn(64, 8192, generator=generator)).detach().requires_grad_()
    ys = {"a": torch.rand(64, 3000, generator=generator), "b": v.detach()[:, :50] ** 2}
    whole = MVMRLoss()(z, v, ys)
    blocks = MVMRLoss(dependence_measure=dependence_measure("distance_correlation", block_size=24))(
        z, v, ys
    )
    torch.testing.assert_close(blocks, whole, rtol=1e-5, atol=0)
    for ours, theirs in zip(
        torch.autograd.grad(blocks, (z, v)), torch.autograd.grad(whole, (z, v)), strict=True
    ):
        assert (ours - theirs).norm() <= 1e-5 * theirs.norm()


@pytest.mark.parametrize("measure", MEASURES)
@pytest.mark.parametrize("scale", [0.0, 1e-30, 1e30])
def test_extreme_scales_and_coincident_points(measure, scale):
    x, y = batches(12)
    x = (scale * torch.cat([x[:6], x[:6]])).detach().requires_grad_()
    value = measure(block_size=5)(x, y)
    torch.testing.assert_close(value, measure()(x, y), rtol=1e-5, atol=1e-6)
    (gradient,) = torch.autograd.grad(value, x)
    assert torch.isfinite(gradient).all()


def test_never_holds_a_square_matrix():
    """No tensor that the computation makes has n x n elements."""
    from torch.utils._python_dispatch import TorchDispatchMode

    largest = 0

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            nonlocal largest
            result = function(*args, **(kwargs or {}))
            for tensor in result if isinstance(result, (tuple, list)) else [result]:
                if isinstance(tensor, torch.Tensor):
                    largest = max(largest, tensor.numel())
            return result

    x, y = batches(300)
    with Watch():
        dependence_measure("distance_correlation", block_size=16)(x, y).backward()
    assert 300 * 16 <= largest < 300 * 300 // 4


def test_a_block_costs_no_more_than_its_share():
    """However small the blocks are: all distances twice, and once more for the gradient."""

    def products(block_size):
        n, d = 64, 32
        x, y = (torch.randn(n, d, requires_grad=True) for _ in range(2))
        with FlopCounterMode(display=False) as counter:
            dependence_measure("distance_correlation", block_size=block_size)(x, y).backward()
        return counter.get_total_flops() / (2 * n * n * d)

    norms = 3 / 64  # of which there are as many as rows
    for block_size in (4, 16, 64):
        # Of two batches: three times the matrix, and the product that is its gradient.
        assert 2 * (2 + 1 + 1) <= products(block_size) <= 2 * (2 + 1 + 1 + norms)


def test_keeps_the_batches_and_row_sums_for_the_gradient():
    x, y = batches(40)
    kept = {}

    def keep(tensor):
        kept[tensor.data_ptr()] = tensor.numel()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        value = dependence_measure("distance_correlation", block_size=8)(x, y)
    numbers = 2 * 40 + 40  # sums, and the last steps on scalars
    assert x.numel() + y.numel() + 2 * 40 <= sum(kept.values()) <= x.numel() + y.numel() + numbers
    value.backward()


@pytest.mark.parametrize("scale", [1e-3, 1.0, 300.0])
def test_functional_transforms_and_further_derivatives(scale):
    """Products in float32 one way, in float64 the other: in the same units."""
    x, y = batches(20)
    x = (scale * x).detach().requires_grad_()
    for name in ("u_distance_correlation_sqr", "distance_covariance"):
        measure = dependence_measure(name, block_size=7)
        (expected,) = torch.autograd.grad(measure(x, y), x)
        found = torch.func.grad(measure)(x.detach(), y.detach())
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5 / scale)
        (found,) = torch.autograd.grad(measure(x, y), x, create_graph=True)
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5 / scale)
        (twice,) = torch.autograd.grad(found.square().sum(), x)
        whole = dependence_measure(name)
        (other,) = torch.autograd.grad(whole(x, y), x, create_graph=True)
        (other,) = torch.autograd.grad(other.square().sum(), x)
        assert (twice - other).norm() <= 1e-3 * other.norm()


@pytest.mark.parametrize("size", [1e-6, 1e-3])
def test_close_points_in_some_blocks(size):
    """Float32 would lose the digits of these; other blocks have none such."""
    x, y = (t.detach() for t in batches(40))
    x[7] = x[3] + size * y[0, 0]
    x[30] = x[31]
    x, double = x.requires_grad_(), x.detach().double().requires_grad_()
    value = dependence_measure("distance_correlation", block_size=5)(x, y)
    expected = dependence_measure("distance_correlation")(double, y.double())
    torch.testing.assert_close(value, expected.float(), rtol=1e-6, atol=0)
    (found,), (slope,) = torch.autograd.grad(value, x), torch.autograd.grad(expected, double)
    assert (found - slope).norm() <= 1e-5 * slope.norm()


def test_compiles_as_one_graph():
    x, y = batches(20)
    measure = dependence_measure("distance_correlation", block_size=7)
    compiled = torch.compile(measure, fullgraph=True, backend="aot_eager")
    with torch.no_grad():  # as in validation
        torch.testing.assert_close(compiled(x, y), measure(x, y))
    without = x.detach(), y.detach()
    torch.testing.assert_close(compiled(*without), measure(*without))
    value, expected = compiled(x, y), measure(x, y)
    torch.testing.assert_close(value, expected)
    torch.testing.assert_close(
        torch.autograd.grad(value, (x, y)), torch.autograd.grad(expected, (x, y))
    )


@pytest.mark.parametrize("offset", [0.0, 1e6])
@pytest.mark.parametrize("scale", [1e-30, 1.0, 1e150])
def test_offsets_and_many_columns(monkeypatch, offset, scale):
    """A few columns at a time, in float64 whose squares leave its range."""
    monkeypatch.setattr(points, "_FEW_NUMBERS", 50)
    monkeypatch.setattr(points, "_FEW_COLUMNS", 1)
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(20, 33, generator=generator, dtype=torch.float64)
    y = x[:, :2].abs() + 0.1
    expected = dependence_measure("distance_correlation")(x, y)
    x = (scale * (x + offset)).requires_grad_()
    value = dependence_measure("distance_correlation", block_size=6)(x, y)
    torch.testing.assert_close(value, expected, rtol=1e-8, atol=0)
    (gradient,) = torch.autograd.grad(value, x)
    assert (gradient != 0).any()
    assert torch.isfinite(gradient).all()


def test_largest_numbers_of_the_type():
    y, _ = batches(10, torch.float64)
    x = y.detach().clamp(-1, 1)
    measure = dependence_measure("distance_correlation", block_size=3)
    for function in (measure, dependence_measure("distance_correlation")):
        torch.testing.assert_close(function(x * 1.7e308, y), function(x, y))


class TestException:
    def test_block_size(self):
        with pytest.raises(ValueError, match="block_size must be at least 1 but is 0"):
            dependence_measure("distance_correlation", block_size=0)
        with pytest.raises(TypeError, match="block_size must be an int but is a float"):
            dependence_measure("distance_correlation", block_size=2.0)

    def test_samples(self):
        x, y = batches(5)
        with pytest.raises(ValueError, match="x must have at least 4 samples"):
            dependence_measure("u_distance_correlation_sqr", block_size=2)(x[:3], y[:3])
        with pytest.raises(ValueError, match="x and y must have the same number of samples"):
            dependence_measure("distance_correlation", block_size=2)(x, y[:4])
