"""Where rounding ends, the floor of the distances, and types: on both sides of each edge."""

import itertools

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
    u_distance_correlation_sqr,
)

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
def test_a_norm_of_rounding_is_none(size, seen, dtype):
    """Distances that differ by less than rounding do after centring what equal ones do."""
    eps = torch.finfo(dtype).eps
    # A regular simplex, all of whose distances are equal, but for one that is changed a bit.
    n = 6
    x = torch.eye(n, dtype=torch.float64)
    raw = 1 - torch.eye(n, dtype=torch.float64)
    bump = torch.zeros(n, n, dtype=torch.float64)
    bump[0, 1] = bump[1, 0] = 1
    measure = dependence_measure("u_distance_correlation_sqr")
    estimator = measure.estimator
    centered = estimator.center(bump[None], bump.sum(1)[None], bump.sum(1)[None], 0)
    # So large that the norm after centring is `size` roundings of the norm before.
    step = size * eps * raw.norm() / centered.norm()
    squared = ((raw + step * bump) ** 2)[None].to(dtype)

    def given(batches, rows):
        return squared.expand(len(batches), n, n), squared.new_ones(len(batches))

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("mvmr_loss.dependence.measures.squared_distances", given)
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
