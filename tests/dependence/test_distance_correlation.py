"""The distance-based measures against dcor and against the authors' release of MV-MR."""

import json

import numpy as np
import pytest
import torch

from mvmr_loss import dependence
from mvmr_loss.dependence import (
    definitions,
    dependence_measure,
    distance_correlation,
    distance_covariance,
    pairwise_distances,
    partial_distance_correlation,
    u_distance_covariance_sqr,
)
from mvmr_loss.dependence.definitions import double_centered, u_centered
from mvmr_loss.dependence.distance_correlation import distance_estimator
from mvmr_loss.dependence.measures import Distance, Estimator
from tests.oracles import make_dcor
from tests.oracles.make_dcor import EXPONENTS, FUNCTIONS, PARTIAL_SHAPES, SHAPES, batch, pair

STORED = json.loads(make_dcor.PATH.read_text())


@pytest.mark.slow
def test_what_is_stored_is_dcors():
    found = make_dcor.values()
    assert list(found) == list(STORED)
    for key, value in found.items():
        np.testing.assert_allclose(value, STORED[key], rtol=1e-10, atol=1e-14, err_msg=key)


@pytest.mark.parametrize("name", FUNCTIONS)
@pytest.mark.parametrize("exponent", EXPONENTS)
@pytest.mark.parametrize("shapes", SHAPES)
def test_equals_dcor(name, exponent, shapes):
    value = getattr(dependence, name)(*pair(*shapes), exponent=exponent)
    expected = STORED[make_dcor.key(name, shapes, exponent)]
    assert value.item() == pytest.approx(expected, rel=1e-9, abs=0)


@pytest.mark.parametrize("name", FUNCTIONS)
def test_equals_dcor_on_ties(name):
    value = getattr(dependence, name)(*make_dcor.ties())
    assert value.item() == pytest.approx(STORED[make_dcor.key(name, "ties")], rel=1e-9, abs=0)


def test_wider_than_a_slice():
    value = distance_correlation(*make_dcor.wide())
    assert value.item() == pytest.approx(STORED["wide"], rel=1e-9)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_gradient_in_slices_equals_that_of_the_whole(dtype):
    """A gradient that is to be differentiated is made in one piece."""
    x, y = batch(70, 2500).to(dtype).requires_grad_(), batch(70, 30, seed=1).to(dtype)
    value = distance_correlation(x, y)
    (whole,) = torch.autograd.grad(value, x, create_graph=True)
    (sliced,) = torch.autograd.grad(value, x)
    torch.testing.assert_close(sliced, whole.detach())


def test_an_estimator_is_the_plain_one_unless_told():
    assert distance_estimator() == Estimator(Distance(1.0, 0.0), False, True, False)


@pytest.mark.parametrize("shape", PARTIAL_SHAPES)
def test_partial_equals_dcor(shape):
    value = partial_distance_correlation(*make_dcor.three(*shape))
    assert value.item() == pytest.approx(STORED[make_dcor.key("partial", shape)], rel=1e-9, abs=0)


def test_partial_exponent_by_its_definition():
    x, y, z = batch(12, 3), batch(12, 2, seed=1).cumsum(0), batch(12, 2, seed=2).cumsum(0)
    a, b, c = (u_centered(torch.cdist(t, t).pow(0.7)) for t in (x, y, z))
    expected_a = a - (a * c).sum() / c.square().sum() * c
    expected_b = b - (b * c).sum() / c.square().sum() * c
    expected = (expected_a * expected_b).sum() / (expected_a.norm() * expected_b.norm())
    value = partial_distance_correlation(x, y, z, exponent=0.7)
    assert value.item() == pytest.approx(expected.item(), rel=1e-9)


@pytest.mark.parametrize("noise", [1e-3, 1e-2, 0.1])
def test_partial_of_little_that_is_left(noise):
    draw = torch.Generator().manual_seed(286)
    x, e, f = (torch.randn(6, 2, generator=draw) for _ in range(3))
    z = x + noise * e
    y = z + noise * f
    value = partial_distance_correlation(x, y, z)
    exact = partial_distance_correlation(x.double(), y.double(), z.double())
    assert exact.abs() > 0.1
    torch.testing.assert_close(value, exact.float(), rtol=1e-6, atol=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_partial_of_nothing_but_rounding(dtype):
    x, y = (torch.randn(12, 3, generator=torch.Generator().manual_seed(s)) for s in (0, 1))
    x, y = x.to(dtype), y.to(dtype)
    for z in (3 * x, x / 7 + 1, x @ torch.linalg.qr(y[:3])[0]):
        assert partial_distance_correlation(x, y, z) == 0
        assert partial_distance_correlation(y, x, z) == 0


def test_covariance_of_points_all_equally_far_has_a_gradient():
    x, y = torch.eye(8, requires_grad=True), torch.randn(8, 3, generator=torch.Generator())
    value = u_distance_covariance_sqr(x, y)
    assert value == 0
    (gradient,) = torch.autograd.grad(value, x)
    shifted = x.detach().double() + 1e-6 * gradient.double()
    expected = u_distance_covariance_sqr(shifted, y.double()) / 1e-6
    assert gradient.square().sum().item() == pytest.approx(expected.item(), rel=1e-3)


def test_partial_degenerate():
    x, y = batch(12, 3).requires_grad_(), batch(12, 2, seed=1).requires_grad_()
    assert partial_distance_correlation(x, x, y).item() == pytest.approx(1, abs=1e-9)
    for value in (
        partial_distance_correlation(x, y, y),
        partial_distance_correlation(x, 0 * y, y),
        partial_distance_correlation(x, x.square(), 0 * y),
    ):
        assert torch.isfinite(value)
        assert all(torch.isfinite(g).all() for g in torch.autograd.grad(value, (x, y)))
    assert partial_distance_correlation(x, y, y) == 0
    assert partial_distance_correlation(x, 3 * y + 1, y).abs() < 1e-6


def test_partial_exception():
    x = batch(8, 3)
    with pytest.raises(ValueError, match="x and z must have the same number of samples but have 8"):
        partial_distance_correlation(x, x, x[:5])
    with pytest.raises(ValueError, match="z must have at least 4 samples .* but has 3"):
        partial_distance_correlation(x, x, x[:3])


def release(x, y):
    """The dependence of the authors' release, from its description.

    Squared distances held at 1e-4 inside the root, on the diagonal too; doubly centred; the
    correlation is the root of the covariance over the root of the product of the root variances.
    """
    centered = []
    for t in (x, y):
        a = (t[:, None] - t[None]).square().sum(-1).clamp(min=1e-4).sqrt()
        centered.append(a - a.mean(0, keepdim=True) - a.mean(1, keepdim=True) + a.mean())
    a, b = centered
    covariance, variance_a, variance_b = (t.mean().sqrt() for t in (a * b, a * a, b * b))
    return covariance / (variance_a * variance_b).sqrt()


@pytest.mark.parametrize("scale", [1.0, 3e-3])
def test_eps_reproduces_the_release(scale):
    # At the small scale a part of the distances is below the floor of 0.01.
    x, y = scale * batch(24, 4), scale * batch(24, 6, seed=1)
    x.requires_grad_()
    value, expected = dependence_measure("distance_correlation", eps=1e-4)(x, y), release(x, y)
    assert value.item() == pytest.approx(expected.item(), rel=1e-12)
    torch.testing.assert_close(
        torch.autograd.grad(value, x), torch.autograd.grad(expected, x), rtol=1e-8, atol=1e-12
    )
    assert abs(distance_correlation(x, y).item() - expected.item()) > 1e-6


def test_eps_on_a_collapsed_batch():
    x, y = (1e-3 * batch(8, 4)).requires_grad_(), batch(8, 4, seed=1)
    value = distance_correlation(x, y, eps=1e-4)
    assert value == 0  # all its distances are at the floor: constant, where the release has 0 / 0
    assert (torch.autograd.grad(value, x)[0] == 0).all()


@pytest.mark.parametrize("exponent", [1.0, 0.5])
def test_pairwise_distances(exponent):
    x = batch(150, 6) + 5
    distances = pairwise_distances(x, exponent=exponent)
    torch.testing.assert_close(distances, (x[:, None] - x).norm(dim=-1) ** exponent)
    torch.testing.assert_close(distances, distances.T, rtol=1e-12, atol=0)
    assert (distances.diagonal() == 0).all()
    assert pairwise_distances(x[:1]).tolist() == [[0.0]]


def test_pairwise_distances_of_duplicates():
    x = (batch(40, 20_000, dtype=torch.float32) + 3).repeat(4, 1)
    distances = pairwise_distances(x)
    same = torch.arange(160)[:, None] % 40 == torch.arange(160) % 40
    assert ((distances == 0) == same).all()


def test_pairwise_distances_floor():
    x = torch.tensor([[0.0], [0.001], [1.0]])
    distances = pairwise_distances(x, eps=1e-4)
    expected = [[0.01, 0.01, 1], [0.01, 0.01, 0.999], [1, 0.999, 0.01]]
    torch.testing.assert_close(distances, torch.tensor(expected))


def test_beyond_the_range_is_held_within_it():
    x = torch.tensor([[-3e38, 3e38], [3e38, -3e38], [0.0, 0.0], [1.0, 1.0]], requires_grad=True)
    distances = pairwise_distances(x)
    assert distances[0, 1] == torch.finfo(torch.float32).max
    value = dependence.distance_covariance_sqr(x, x)
    assert 1e37 < value < float("inf")
    assert torch.isfinite(torch.autograd.grad(value, x)[0]).all()


@pytest.mark.parametrize("scale", [1e30, 1e-30])
def test_covariance_keeps_its_scale(scale):
    x, y = batch(16, 4, dtype=torch.float32), batch(16, 3, seed=1, dtype=torch.float32)
    expected = scale * distance_covariance(x, y).item()
    assert distance_covariance(scale * x, scale * y).item() == pytest.approx(expected, rel=1e-4)


@pytest.mark.parametrize("ours", [double_centered, u_centered])
def test_centering(ours):
    centered = ours(make_dcor.distances())
    theirs = torch.tensor(STORED[ours.__name__], dtype=torch.float64)
    torch.testing.assert_close(centered, theirs)
    assert centered.sum(0).abs().max() < 1e-12
    assert torch.autograd.gradcheck(ours, batch(5, 5).requires_grad_())


@pytest.mark.parametrize("name", FUNCTIONS)
def test_the_plain_definitions_have_the_same_defaults(name):
    x, y = batch(9, 5), batch(9, 3, seed=1)
    plain, ours = (getattr(module, name)(x, y) for module in (definitions, dependence))
    torch.testing.assert_close(plain, ours)
    torch.testing.assert_close(definitions.pairwise_distances(x), pairwise_distances(x))


@pytest.mark.parametrize("name", FUNCTIONS)
@pytest.mark.parametrize("exponent", [1.0, 0.5])
@pytest.mark.parametrize("form", ["function", "float32", "blocks"])
def test_equals_the_plain_definition(name, exponent, form):
    """In value, gradient and gradient of the gradient."""
    x = batch(14, 5).requires_grad_()
    y = (batch(14, 3, seed=1) + x[:, :3] ** 2).detach()
    expected = getattr(definitions, name)(x, y, exponent)
    if form == "blocks":
        value = dependence_measure(name, exponent=exponent, block_size=5)(x, y)
    else:
        dtype = torch.float32 if form == "float32" else torch.float64
        value = getattr(dependence, name)(x.to(dtype), y.to(dtype), exponent=exponent)
    rtol = 1e-4 if form == "float32" else 1e-9
    torch.testing.assert_close(value.double(), expected, rtol=rtol, atol=rtol * 1e-2)
    first, wanted = (torch.autograd.grad(v, x, create_graph=True)[0] for v in (value, expected))
    assert (first - wanted).norm() <= rtol * wanted.norm()
    first, wanted = (torch.autograd.grad(g.square().sum(), x)[0] for g in (first, wanted))
    assert (first - wanted).norm() <= rtol * wanted.norm()
