"""HSIC and CKA against formulas written out from the papers."""

import itertools

import pytest
import torch

from mvmr_loss.dependence import cka, hsic

KERNELS = pytest.mark.parametrize("kernel", ["linear", "gaussian"])


def batch(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def gram(x, kernel, bandwidth=None):
    n = len(x)
    distances = [[float((x[i] - x[j]).norm()) for j in range(n)] for i in range(n)]
    if bandwidth is None:
        pairs = sorted(distances[i][j] for i, j in itertools.combinations(range(n), 2))
        bandwidth = pairs[(len(pairs) - 1) // 2]
    if kernel == "linear":
        return torch.stack([torch.stack([u @ v for v in x]) for u in x])
    return torch.exp(-(torch.tensor(distances, dtype=torch.float64) ** 2) / (2 * bandwidth**2))


def biased(k, other):
    """Gretton et al. 2005, definition 2."""
    n = len(k)
    h = torch.eye(n, dtype=k.dtype) - 1 / n
    return torch.trace(k @ h @ other @ h) / (n - 1) ** 2


def unbiased(k, other):
    """Song et al. 2012, eq. 4: over all tuples of different samples, without any matrix algebra."""
    n = len(k)
    pairs = list(itertools.permutations(range(n), 2))
    triples = list(itertools.permutations(range(n), 3))
    quadruples = list(itertools.permutations(range(n), 4))
    return (
        sum(k[i, j] * other[i, j] for i, j in pairs) / len(pairs)
        + sum(k[i, j] * other[q, r] for i, j, q, r in quadruples) / len(quadruples)
        - 2 * sum(k[i, j] * other[i, q] for i, j, q in triples) / len(triples)
    )


@KERNELS
@pytest.mark.parametrize("bandwidth", [None, 1.3])
@pytest.mark.parametrize("n", [4, 6, 7])
def test_hsic_equals_its_definition(kernel, bandwidth, n):
    if kernel == "linear" and bandwidth is not None:
        bandwidth = None
    x = batch(n, 3) + 4
    y = batch(n, 2, seed=1) + x[:, :2].square()
    k, other = (gram(t, kernel, bandwidth) for t in (x, y))
    options = {"kernel": kernel, "bandwidth": bandwidth}
    assert hsic(x, y, **options).item() == pytest.approx(biased(k, other).item(), rel=1e-9)
    assert hsic(x, y, unbiased=True, **options).item() == pytest.approx(
        unbiased(k, other).item(), rel=1e-9
    )


@KERNELS
def test_cka_equals_its_definition(kernel):
    x = batch(6, 3) + 4
    y = batch(6, 2, seed=1) + x[:, :2].square()
    k, other = (gram(t, kernel) for t in (x, y))
    for debiased, criterion in ((False, biased), (True, unbiased)):
        expected = criterion(k, other) / (criterion(k, k) * criterion(other, other)).sqrt()
        value = cka(x, y, kernel=kernel, debiased=debiased)
        assert value.item() == pytest.approx(expected.item(), rel=1e-9)


def test_linear_cka_equals_its_feature_form():
    """Kornblith et al. 2019, eq. 3.3: |Y'X|^2 / (|X'X| |Y'Y|) of centred features."""
    x, y = batch(200, 7) + 1, batch(200, 5, seed=1).cumsum(0)
    u, v = x - x.mean(0), y - y.mean(0)
    expected = (v.T @ u).norm() ** 2 / ((u.T @ u).norm() * (v.T @ v).norm())
    assert cka(x, y).item() == pytest.approx(expected.item(), rel=1e-9)


def test_no_gradient_flows_through_the_median():
    x, y = batch(8, 3).requires_grad_(), batch(8, 2, seed=1)
    with torch.no_grad():
        pairs = torch.pdist(x).sort().values
        bandwidth = pairs[(len(pairs) - 1) // 2].item()
        k_y = gram(y, "gaussian")
    k_x = torch.exp(-(x[:, None] - x).square().sum(-1) / (2 * bandwidth**2))
    torch.testing.assert_close(
        torch.autograd.grad(hsic(x, y), x), torch.autograd.grad(biased(k_x, k_y), x)
    )


def test_median_of_mostly_coincident_points():
    x = torch.zeros(8, 2, dtype=torch.float64)
    x[0] = 3.0
    expected = gram(x, "gaussian", bandwidth=(torch.pdist(x) ** 2).mean().sqrt().item())
    assert hsic(x, x).item() == pytest.approx(biased(expected, expected).item(), rel=1e-9)


@pytest.mark.parametrize("bandwidth", [1e-30, 1e30])
def test_extreme_bandwidth(bandwidth):
    x = batch(8, 3).float().requires_grad_()
    value = hsic(x, x, bandwidth=bandwidth)
    assert torch.isfinite(value)
    assert torch.isfinite(torch.autograd.grad(value, x)[0]).all()
    expected = biased(torch.eye(8), torch.eye(8)).item() if bandwidth < 1 else 0.0
    assert value.item() == pytest.approx(expected, abs=1e-6)
