"""Where rounding ends, the floor of the distances, and types: on both sides of each edge."""

import itertools
import math
import sys

import pytest
import torch

from mvmr_loss.dependence import (
    dependence_measure,
    distance_correlation,
    distance_covariance_sqr,
    list_dependence_measures,
    matrices,
    measures,
    pairwise_distances,
    partial_distance_correlation,
    points,
    u_distance_correlation_sqr,
)
from mvmr_loss.dependence.matrices import squared_distances
from mvmr_loss.distributed import ALL_ROWS, Rows

EPS = torch.finfo(torch.float64).eps


def batch(*shape, seed=0, dtype=torch.float64):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype)


@pytest.mark.parametrize(("roundings", "seen"), [(6, False), (12, False), (24, True), (100, True)])
def test_points_closer_than_rounding_coincide(roundings, seen):
    """A squared distance counts from 16 roundings of both squared norms on, in float64."""
    x = torch.tensor([[1.0], [1.0], [-2.0]], dtype=torch.float64)
    x[1] += (roundings * 2 * EPS) ** 0.5
    distance = pairwise_distances(x)[0, 1].item()
    assert (distance > 0) == seen
    if seen:
        assert distance == pytest.approx((roundings * 2 * EPS) ** 0.5, rel=0.5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize(("size", "seen"), [(4, False), (12, False), (24, True), (100, True)])
@pytest.mark.parametrize("scale", [1.0, 2.0**-6])
@pytest.mark.parametrize("block_size", [None, 4])
def test_a_norm_of_rounding_is_none(size, seen, dtype, scale, block_size):
    """Distances that differ by less than rounding do after centring what equal ones do."""
    if block_size is not None:
        dtype = torch.float64  # in which blocks are centred before they are compared
    eps = torch.finfo(dtype).eps
    # A regular simplex, all of whose distances are equal, but for one that is changed a bit.
    n = 6
    x = torch.eye(n, dtype=torch.float64)
    raw = 1 - torch.eye(n, dtype=torch.float64)
    bump = torch.zeros(n, n, dtype=torch.float64)
    bump[0, 1] = bump[1, 0] = 1
    measure = dependence_measure("u_distance_correlation_sqr", block_size=block_size)
    estimator = measure.estimator
    centered = estimator.center(bump[None], bump.sum(1)[None], bump.sum(1)[None], 0)
    # So large that the norm after centring is `size` roundings of the norm before.
    step = size * eps * raw.norm() / centered.norm()
    squared = ((scale * (raw + step * bump)) ** 2)[None].to(dtype)

    def given(batches, rows):
        return squared.expand(len(batches), n, n), squared.new_ones(len(batches))

    def rows_given(self, rows):
        return squared[0, rows.start : rows.stop]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("mvmr_loss.dependence.measures.squared_distances", given)
        patch.setattr("mvmr_loss.dependence.points.Points.squared_distances", rows_given)
        value = measure(x.to(dtype), x.to(dtype)).item()
    assert value == (pytest.approx(1, abs=1e-6) if seen else 0)


@pytest.mark.parametrize("name", ["distance_correlation", "u_distance_correlation_sqr"])
def test_a_regular_simplex_has_no_dependence_after_u_centring(name):
    x, y = torch.eye(8) * 3 + 0.1, batch(8, 2, dtype=torch.float32)
    x.requires_grad_()
    value = dependence_measure(name)(x, y)
    (gradient,) = torch.autograd.grad(value, x)
    assert torch.isfinite(gradient).all()
    assert (value == 0) == (name == "u_distance_correlation_sqr")


@pytest.mark.parametrize("exponent", [0.5, 1.0, 1.5])
@pytest.mark.parametrize("eps", [1e-4, 0.25, 4.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_floor_is_one_of_squared_distances(exponent, eps, dtype):
    x = torch.tensor([[0.0], [0.5], [0.5], [3.0], [7.0]], dtype=dtype)
    squared = (x - x.T).square()
    expected = squared.clamp(min=eps) ** (exponent / 2)
    found = pairwise_distances(x, exponent=exponent, eps=eps)
    torch.testing.assert_close(found, expected)
    assert found.dtype == dtype
    centered = expected - expected.mean(0) - expected.mean(1, keepdim=True) + expected.mean()
    torch.testing.assert_close(
        distance_covariance_sqr(x, x, exponent=exponent, eps=eps), centered.square().mean()
    )


@pytest.mark.parametrize("eps", [0.0, 1.0])
def test_a_distance_at_the_floor_has_no_gradient(eps):
    x = torch.tensor([[0.0], [0.0 if eps == 0 else 1.0], [5.0]], dtype=torch.float64)
    x.requires_grad_()
    (gradient,) = torch.autograd.grad(pairwise_distances(x, eps=eps)[0, 1], x)
    assert torch.equal(gradient, torch.zeros_like(x))
    (gradient,) = torch.autograd.grad(pairwise_distances(x, eps=eps)[0, 2], x)
    assert gradient.flatten().tolist() == pytest.approx([-1, 0, 1])


@pytest.mark.parametrize(
    "name", ["distance_covariance", "hsic", "debiased_cka", "distance_correlation"]
)
def test_the_type_is_the_widest_of_the_inputs_but_float32_at_least(name):
    measure = dependence_measure(name)
    dtypes = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
    for one, other in itertools.product(dtypes, dtypes):
        x, y = batch(8, 3, dtype=one), batch(8, 2, seed=1, dtype=other)
        x, y = x.requires_grad_(), y.requires_grad_()
        value = measure(x, y)
        assert value.dtype == (torch.float64 if torch.float64 in (one, other) else torch.float32)
        gradients = torch.autograd.grad(value, (x, y))
        assert [g.dtype for g in gradients] == [one, other]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("scale", [1e-3, 1e-1, 10.0])
def test_small_numbers_in_half_precision_are_no_constant(dtype, scale):
    x, y = (scale * batch(12, 5)).to(dtype), batch(12, 3, seed=1)
    for function in (distance_correlation, u_distance_correlation_sqr):
        torch.testing.assert_close(
            function(x, y), function(x.double(), y), rtol=1e-4, atol=1e-5, check_dtype=False
        )
    assert pairwise_distances(x).dtype == torch.float32
    torch.testing.assert_close(pairwise_distances(x), pairwise_distances(x.float()))


@pytest.mark.parametrize("name", list_dependence_measures())
@pytest.mark.parametrize("size", [-18, -12, -7, -4, 4, 12])
def test_gradients_of_a_batch_of_any_spread(name, size):
    """A normalised measure does not feel the spread, whose powers leave float32; about 0.1 or 0."""
    offset = 0.1 if -8 < size < 0 else 0.0
    x = (batch(4, 3) * 10.0**size + offset).float()
    y = batch(4, 2, seed=1).float()
    leaf, expected = (t.requires_grad_() for t in (x.clone(), x.double()))
    value, wide = dependence_measure(name)(leaf, y), dependence_measure(name)(expected, y)
    torch.testing.assert_close(value, wide, rtol=1e-3, atol=1e-38, check_dtype=False)
    (found,), (slope,) = torch.autograd.grad(value, leaf), torch.autograd.grad(wide, expected)
    slope = slope.clamp(-torch.finfo(torch.float32).max, torch.finfo(torch.float32).max)
    assert (found - slope).norm() <= 1e-3 * slope.norm() + 1e-30


@pytest.mark.parametrize("elsewhere", [False, True])
def test_only_the_input_that_wants_a_gradient_gets_one(elsewhere, monkeypatch):
    if elsewhere:
        monkeypatch.setattr(matrices, "_is_for_kernel", lambda x: False)
    x, y = (batch(9, 4, seed=s, dtype=torch.float32) for s in (0, 1))
    both = torch.autograd.grad(distance_correlation(x.requires_grad_(), y.requires_grad_()), (x, y))
    for i in (0, 1):
        pair = [x.detach(), y.detach()]
        pair[i].requires_grad_()
        (found,) = torch.autograd.grad(distance_correlation(*pair), pair[i])
        torch.testing.assert_close(found, both[i])
        assert found.abs().sum() > 0


@pytest.mark.parametrize("n", [1, 5])
def test_the_floor_of_equal_large_samples(n):
    """Found by the property tests: their unit was the least number times the largest of theirs."""
    x = torch.full((n, 3), 1e20, dtype=torch.float64)
    found = pairwise_distances(x, exponent=1.87, eps=4.0)
    torch.testing.assert_close(found, torch.full((n, n), 2**1.87, dtype=torch.float64))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_what_is_done_in_parts_is_the_whole(dtype, monkeypatch):
    """Wide batches and many matrices are made in parts, to bound the memory."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(12, 50, generator=generator, dtype=torch.float64)
    x[6:] = x[:6] + 1e-4 * x[6:]  # close pairs, which float32 computes again
    y, x = x.square().to(dtype), x.to(dtype).requires_grad_()
    measure = dependence_measure("distance_correlation")
    expected = measure.compare([x, y, x], [(0, 1), (1, 2)])
    (gradient,) = torch.autograd.grad(expected.sum(), x)
    monkeypatch.setattr(matrices, "_WIDE_NUMBERS", 40)
    monkeypatch.setattr(measures, "_STACK_NUMBERS", 1)
    for _ in range(2):
        value = measure.compare([x, y, x], [(0, 1), (1, 2)])
        torch.testing.assert_close(value, expected)
        found = torch.autograd.grad(value.sum(), x)[0]
        assert (found - gradient).norm() <= 1e-3 * gradient.norm()
        # And without the kernel.
        monkeypatch.setattr(matrices, "_is_for_kernel", lambda x: False)


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32, torch.float64])
def test_a_kernel_far_narrower_than_all_distances_gives_finite_gradients(dtype):
    measure = dependence_measure("debiased_cka", kernel="gaussian", bandwidth=0.1)
    for seed in range(40):
        torch.manual_seed(seed)
        x, y = (torch.randn(4, 1).to(dtype).requires_grad_() for _ in range(2))
        gradients = torch.autograd.grad(measure(x, y), (x, y))
        assert all(torch.isfinite(gradient).all() for gradient in gradients), seed


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("block_size", [None, 3])
@pytest.mark.parametrize(("norm", "seen"), [(0.4, False), (0.51, True), (0.75, True), (1.1, True)])
def test_from_which_norm_on_a_batch_is_no_constant(dtype, block_size, norm, seen):
    """From the power of two below 65536 of the type's least numbers."""
    x, y = batch(8, 3), batch(8, 2, seed=1, dtype=dtype)
    x = x - x.mean(dim=0)
    measure = dependence_measure("distance_correlation", block_size=block_size)
    expected = measure(x, y.double())
    x = (x / x.norm(dim=1).max() * (norm * 65536)).double() * torch.finfo(dtype).tiny
    value = measure(x.to(dtype).requires_grad_(), y)
    if seen:
        torch.testing.assert_close(value, expected.to(dtype), rtol=1e-5, atol=0)
    else:
        assert value == 0


@pytest.mark.parametrize("name", ["distance_correlation", "u_distance_covariance_sqr"])
@pytest.mark.parametrize("block_size", [None, 3])
def test_an_offset_takes_no_digits_from_the_gradient(name, block_size, monkeypatch):
    monkeypatch.setattr(matrices, "_is_for_kernel", lambda x: False)
    x = (1000 * batch(9, 4)).round().requires_grad_()
    moved = (x.detach() + 2.0**36).requires_grad_()
    y = batch(9, 2, seed=1)
    measure = dependence_measure(name, block_size=block_size)
    (expected,) = torch.autograd.grad(measure(x, y), x)
    (found,) = torch.autograd.grad(measure(moved, y), moved)
    assert (found - expected).norm() <= 1e-8 * expected.norm()


@pytest.mark.parametrize("scale", [1.0, 2.0**-20, 2.0**8])
@pytest.mark.parametrize("block_size", [None, 2])
def test_two_close_samples_beside_some_at_the_mean(scale, block_size):
    """The distances of what is at the mean are of no norm at all."""
    one, other = torch.randint(-4096, 4096, (2, 8), generator=torch.Generator().manual_seed(0))
    near = one + 3 * torch.eye(8, dtype=torch.int64)[0]
    mean = torch.zeros(8)
    x = scale * torch.stack([mean, one, near, mean, -one - near, other, -other]).float()
    x, double = x.requires_grad_(), x.detach().double().requires_grad_()
    y = batch(7, 3)
    measure = dependence_measure("distance_correlation", block_size=block_size)
    value, expected = measure(x, y.float()), dependence_measure("distance_correlation")(double, y)
    torch.testing.assert_close(value, expected.float(), rtol=1e-6, atol=0)
    (found,), (slope,) = torch.autograd.grad(value, x), torch.autograd.grad(expected, double)
    assert (found - slope).norm() <= 1e-5 * slope.norm()


@pytest.mark.parametrize("scale", [2.0**-14, 1.0, 2.0**8])
def test_a_close_pair_is_as_far_apart_as_in_float64(scale):
    x = batch(6, 5).float() * scale
    x[1] = x[0] + 2e-4 * x[1]
    squared, units = squared_distances([x])
    assert squared.dtype == torch.float32
    expected = (x[0].double() - x[1].double()).norm()
    found = squared[0, 0, 1].double().sqrt() * units[0]
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=0)


@pytest.mark.parametrize("fraction", [0.1, 0.8])
def test_what_float32_would_round_off_is_computed_again(fraction):
    """From a fraction of 2^-13 of both squared norms on."""
    for seed in range(10):
        x = batch(2, 64, seed=seed)
        step = x[1] / x[1].norm() * x[0].norm() * (2 * fraction * 2.0**-13) ** 0.5
        x = torch.stack([x[0], x[0] + step, -x[0], -x[0] - step]).float()
        squared, units = squared_distances([x])
        assert squared.dtype == torch.float32
        expected = (x[0].double() - x[1].double()).norm()
        found = squared[0, 0, 1].double().sqrt() * units[0]
        torch.testing.assert_close(found, expected, rtol=1e-6, atol=0)


@pytest.mark.parametrize("scale", [1e-30, 1e-6, 1.0, 1e25])
@pytest.mark.parametrize("kind", ["plain", "close"])
def test_the_op_for_compilers_gives_squared_distances(scale, kind):
    x = batch(12, 5).float()
    if kind == "close":  # too many to be corrected one by one
        x = x[:2].repeat(6, 1) + 1e-4 * x
    x = scale * x
    squared, unit = matrices._distances_on_cpu(x)
    assert squared.dtype == torch.float32
    expected = torch.cdist(x.double(), x.double(), compute_mode="donot_use_mm_for_euclid_dist")
    torch.testing.assert_close(squared.double().sqrt() * unit, expected, rtol=1e-5, atol=0)


@pytest.mark.parametrize("scale", [1e-38, 1e-35, 1e-30])
def test_a_batch_too_small_for_gradients_is_constant_compiled_or_not(scale):
    x = scale * batch(12, 5).float()
    squared, unit = matrices._distances_on_cpu(x)
    (expected,), (expected_unit,) = matrices._SquaredDistances.forward(0, None, x)
    torch.testing.assert_close(squared.double(), expected.double(), rtol=1e-5, atol=0)
    assert unit == expected_unit
    assert bool((squared == 0).all()) == (scale < 1e-30)


def test_wide_batches_are_raised_a_part_at_a_time(monkeypatch):
    from torch.utils._python_dispatch import TorchDispatchMode

    largest = 0

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            nonlocal largest
            result = function(*args, **(kwargs or {}))
            if isinstance(result, torch.Tensor) and result.dtype == torch.float64:
                largest = max(largest, result.numel())
            return result

    monkeypatch.setattr(matrices, "_WIDE_NUMBERS", 40)
    x = batch(4, 100, dtype=torch.float32)
    with Watch():
        squared_distances([x])
    assert largest == 40


class TestPoints:
    """Batches whose distances are made in blocks."""

    @pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
    @pytest.mark.parametrize("scale", [1e-35, 1e-12, 1.0, 3e12])
    def test_their_units_are_those_of_whole_matrices(self, dtype, scale):
        for seed in range(5):
            x = (scale * (batch(7, 3, seed=seed) + 1)).to(dtype)
            (found,) = points.points_of([x.double()])
            _, (unit,) = squared_distances([x.double()])
            assert found.unit == unit
            assert torch.frexp(found.unit).mantissa == 0.5

    @pytest.mark.parametrize("fill", [0.0, 1e-305])
    def test_nothing_but_the_least_numbers_has_the_unit_1(self, fill):
        x = torch.full((5, 2), fill, dtype=torch.float64)
        assert points.points_of([x])[0].unit == squared_distances([x])[1] == 1

    @pytest.mark.parametrize(
        ("size", "single"),
        [
            *((2.0**-18, False), (2.0**-16, False), (2.0**-15, True), (1.0, True)),
            *((2.0**15, True), (2.0**16, False), (2.0**18, False), (float("nan"), False)),
        ],
    )
    def test_products_are_in_float32_where_squares_stay_in_range(self, size, single):
        x = torch.tensor([[size], [-size]])
        with torch.no_grad():
            assert isinstance(points.points_of([x])[0], points.Float32Points) == single
            assert not isinstance(points.points_of([x.double()])[0], points.Float32Points)

    def test_the_gradient_is_in_the_precision_of_the_value(self):
        x = batch(5, 3, dtype=torch.float32)
        one, two = torch.ones(1, dtype=torch.float64), torch.full((1,), 2.0, dtype=torch.float64)
        with torch.no_grad():
            assert isinstance(points.points_of([x], one)[0], points.Float32Points)
            assert not isinstance(points.points_of([x], two)[0], points.Float32Points)
        # A further derivative is made of the plain computation.
        assert not isinstance(points.points_of([x], one)[0], points.Float32Points)

    def test_rows_with_close_samples_are_in_float64(self):
        x = batch(8, 3, dtype=torch.float32)
        x[6] = x[1] + 1e-3 * x[6]
        with torch.no_grad():
            (found,) = points.points_of([x])
            exact = torch.cdist(x.double(), x.double()).square()
            for start, single in ((0, False), (2, True), (4, True), (6, False)):
                rows = found.squared_distances(Rows(start, start + 2))
                error = (rows - exact[start : start + 2]).abs().max()
                assert (error > 1e-10) == single


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("debiased_cka", {}),
        ("distance_correlation", {}),
        ("distance_correlation", {"block_size": 4}),
        ("u_distance_covariance_sqr", {"block_size": 4}),
    ],
)
def test_a_batch_alone(name, options, dtype):
    x = batch(9, 3, dtype=dtype)
    (value,) = dependence_measure(name, **options).compare([x], [(0, 0)])
    torch.testing.assert_close(value, dependence_measure(name)(x, x))


def test_units_have_no_gradient():
    x = batch(6, 3).requires_grad_()
    squared, units = squared_distances([x])
    assert squared.requires_grad
    assert not units.requires_grad
    blocks = measures.Blocks(
        measures.Estimator(measures.Distance(), False, True), [(0, 0)], ALL_ROWS, 4
    )
    products, squares, _, units = measures.products_in_blocks(blocks, [x])
    assert products.requires_grad
    assert squares.requires_grad
    assert not units.requires_grad


@pytest.mark.parametrize("value", [-2.0, -1.0, 0.0, 0.5, 1.0])
@pytest.mark.parametrize("factor", [1e-3, 1.0, 1e200, float("inf")])
def test_products_are_held_within_a_range(value, factor):
    values = torch.tensor([value], dtype=torch.float64, requires_grad=True)
    found = measures.in_range(values, torch.tensor([factor], dtype=torch.float64), 100.0)
    assert found == max(-100.0, min(100.0, value * factor if value else 0.0))
    (gradient,) = torch.autograd.grad(found.sum(), values)
    assert gradient == (factor if abs(value * factor) <= 100 else 0) or value == 0
    assert torch.isfinite(gradient)


@pytest.mark.parametrize(("dtype", "largest"), [(torch.float32, 1e-11), (torch.float64, 1e-90)])
def test_a_kernel_that_hardly_sees_the_closest_samples(dtype, largest):
    """As long as the squares of its values are far from the least number of the type."""
    x = torch.tensor([[0.0], [1.0], [2.1], [3.3]], dtype=dtype, requires_grad=True)
    bandwidth = (-2 * math.log(largest)) ** -0.5
    measure = dependence_measure("debiased_cka", kernel="gaussian", bandwidth=bandwidth)
    value = measure(x, x)
    assert value.item() == pytest.approx(1, abs=1e-5)
    assert torch.isfinite(torch.autograd.grad(value, x)[0]).all()


@pytest.mark.parametrize(("roundings", "seen"), [(8, False), (16, False), (17, True), (24, True)])
def test_what_is_left_of_the_partial_correlation(roundings, seen, monkeypatch):
    """Above 16 roundings of what there was."""

    def given(estimator, batches, pairs):
        return torch.tensor([1e-9, 1 - roundings * EPS / 2, 0.0], dtype=torch.float64)

    # The package has a function of the module's name.
    module = sys.modules["mvmr_loss.dependence.distance_correlation"]
    monkeypatch.setattr(module, "dependence", given)
    found = partial_distance_correlation(*[batch(5, 2, seed=i) for i in range(3)]).item()
    assert found == (pytest.approx(1e-9 / (roundings * EPS) ** 0.5) if seen else 0)


@pytest.mark.parametrize("block_size", [None, 4])
def test_a_view_of_the_negative_numbers(block_size):
    """Whose memory holds the positive ones, as of a conjugate's imaginary part."""
    x, y = batch(9, 4, dtype=torch.float32), batch(9, 2, seed=1, dtype=torch.float32)
    plain = (-x).requires_grad_()
    x = torch._neg_view(x).requires_grad_()
    assert x.is_neg()
    measure = dependence_measure("distance_correlation", block_size=block_size)
    value, expected = measure(x, y), measure(plain, y)
    torch.testing.assert_close(value, expected)
    torch.testing.assert_close(torch.autograd.grad(value, x), torch.autograd.grad(expected, plain))


def test_blocks_under_another_default_device():
    x, y = torch.randn(2, 16, 4)
    measure = dependence_measure("distance_correlation", block_size=4)
    with torch.device("meta"):
        found = measure(x, y)
    assert found == measure(x, y)
