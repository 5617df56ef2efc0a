"""The torchmetrics against the plain definitions, over minibatches, processes and chance."""

import itertools
import pickle
import subprocess
import sys

import pytest
import torch
import torchmetrics

from mvmr_loss.dependence import cka, u_distance_correlation_sqr
from mvmr_loss.dependence.definitions import pairwise_distances, u_centered, u_product
from mvmr_loss.metrics import DebiasedCKA, UDistanceCorrelationSqr
from tests.test_distributed import run

METRICS = {
    "cka": (DebiasedCKA, lambda x: x @ x.T, lambda x, y: cka(x, y, debiased=True)),
    "gaussian": (
        lambda: DebiasedCKA("gaussian", bandwidth=2.0),
        lambda x: torch.exp(-torch.cdist(x, x).square() / 8),
        lambda x, y: cka(x, y, kernel="gaussian", bandwidth=2.0, debiased=True),
    ),
    "distances": (UDistanceCorrelationSqr, pairwise_distances, u_distance_correlation_sqr),
    "exponent": (
        lambda: UDistanceCorrelationSqr(exponent=0.5),
        lambda x: pairwise_distances(x, 0.5),
        lambda x, y: u_distance_correlation_sqr(x, y, exponent=0.5),
    ),
}
every_metric = pytest.mark.parametrize("name", METRICS)


def data(n, seed=0, noise=0.5):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(n, 5, generator=generator, dtype=torch.float64)
    y = x[:, :3].square() + noise * torch.randn(n, 3, generator=generator, dtype=torch.float64)
    return x, y


def off_diagonal(matrix):
    return matrix * (1 - torch.eye(len(matrix), dtype=matrix.dtype))


def covariance(matrix, x, y):
    """The unbiased covariance by the plain definitions."""
    return u_product(*(u_centered(off_diagonal(matrix(t))) for t in (x, y)))


def ratio(matrix, batches):
    sums = [
        sum(len(x) * covariance(matrix, *pair(x, y)) for x, y in batches)
        for pair in (lambda x, y: (x, y), lambda x, y: (x, x), lambda x, y: (y, y))
    ]
    return sums[0] / (sums[1] * sums[2]).sqrt()


@every_metric
def test_one_batch_is_the_function(name):
    build, _, function = METRICS[name]
    x, y = data(12)
    metric = build()
    value = metric(x, y)
    torch.testing.assert_close(value, function(x, y), rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(metric.compute(), value)


@every_metric
def test_batches_of_unequal_size_against_the_definitions(name):
    build, matrix, _ = METRICS[name]
    x, y = data(21)
    batches = list(zip(x.split([8, 8, 5]), y.split([8, 8, 5]), strict=True))
    metric = build()
    for batch in batches:
        metric.update(*batch)
    torch.testing.assert_close(metric.compute(), ratio(matrix, batches), rtol=1e-10, atol=1e-12)
    assert metric.samples == 21
    metric.reset()
    metric.update(*batches[1])
    torch.testing.assert_close(metric.compute(), ratio(matrix, batches[1:2]))


@every_metric
def test_all_minibatches_are_the_whole(name):
    """A U-statistic is the mean of its values over all subsets of a size: unbiased, exactly."""
    build, _, function = METRICS[name]
    x, y = data(7)
    metric, mean = build(), []
    for rows in map(list, itertools.combinations(range(7), 5)):
        metric.update(x[rows], y[rows])
        mean.append(function(x[rows], y[rows]))
    whole = function(x, y)
    torch.testing.assert_close(metric.compute(), whole, rtol=1e-9, atol=1e-12)
    # What is not summed before it is divided is another number.
    assert (torch.stack(mean).mean() - whole).abs() > 1e-3


@every_metric
def test_independent_data_is_about_zero_at_any_size_of_batch(name):
    build, _, _ = METRICS[name]
    generator = torch.Generator().manual_seed(3)
    x, y = torch.randn(2, 1600, 6, generator=generator)
    for size, bound in ((4, 0.15), (16, 0.05), (100, 0.02)):
        metric = build()
        batches = list(zip(x.split(size), y.split(size), strict=True))
        for batch in batches:
            metric.update(*batch)
        assert metric.compute().abs() < bound
        if size == 4:  # where the biased measure is far from zero
            assert torch.stack([cka(*batch) for batch in batches]).mean() > 0.5


def check_processes(rank, processes, name):
    build = METRICS[name][0]
    x, y = data(8 * processes)
    metric, alone = build(), build()
    for i, batch in enumerate(zip(x.split(4), y.split(4), strict=True)):
        alone.update(*batch)
        if i // 2 == rank:
            metric.update(*batch)
    alone.sync_on_compute = alone._to_sync = False
    value = metric.compute()
    torch.testing.assert_close(value, alone.compute(), rtol=1e-12, atol=0)
    assert metric.samples == 8  # what was gathered is not kept


@pytest.mark.parametrize("name", ["cka", "distances"])
def test_processes_are_summed(tmp_path, name):
    run(2, tmp_path, check_processes, name)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_low_precision_is_accumulated_in_float64(dtype):
    x, y = data(16)
    x, y = (1e3 * x).to(dtype), y.to(dtype)
    metric = DebiasedCKA().to(torch.float16)  # which does not touch the state
    metric.update(x, y)
    metric.update(x, y)
    expected = cka(x.double(), y.double(), debiased=True)
    torch.testing.assert_close(metric.compute(), expected, rtol=1e-9, atol=0)


def test_constant_is_zero():
    metric = DebiasedCKA()
    metric.update(torch.ones(5, 3), torch.randn(5, 2))
    assert metric.compute() == 0


@pytest.mark.parametrize("name", METRICS)
@pytest.mark.parametrize("scale", [0.1, 1.0, 3.3])
@pytest.mark.parametrize("n", [5, 7, 8])
def test_points_all_equally_far_are_constant(name, scale, n):
    metric, _, function = METRICS[name]
    metric, x = metric(), scale * torch.eye(n)
    for _ in range(2):
        metric.update(x, 1.7 * x)
    assert metric.compute() == function(x, 1.7 * x) == 0


def test_images_are_flattened_and_a_collection_takes_them():
    x, y = torch.rand(2, 6, 3, 4, 4)
    metrics = torchmetrics.MetricCollection([DebiasedCKA(), UDistanceCorrelationSqr()])
    metrics.update(x, y)
    values = metrics.compute()
    torch.testing.assert_close(values["DebiasedCKA"].float(), cka(x, y, debiased=True))
    assert 0 < values["UDistanceCorrelationSqr"].abs() < 1


def test_the_value_of_a_batch_has_a_gradient():
    x, y = data(8)
    x.requires_grad_()
    DebiasedCKA()(x, y).backward()
    expected = torch.autograd.grad(cka(x, y, debiased=True), x)[0]
    torch.testing.assert_close(x.grad, expected)


def test_state_survives_pickling():
    metric = UDistanceCorrelationSqr()
    metric.update(*data(8))
    torch.testing.assert_close(pickle.loads(pickle.dumps(metric)).compute(), metric.compute())


@pytest.mark.parametrize(
    ("batch", "error", "match"),
    [
        ((torch.rand(3, 2), torch.rand(3, 2)), ValueError, "x must have at least 4 samples"),
        ((torch.rand(5, 2), torch.rand(4, 2)), ValueError, "number of samples but have 5 and 4"),
        (
            (torch.ones(4, 2, dtype=torch.int64), torch.rand(4, 2)),
            TypeError,
            "x must have a floating",
        ),
        ((torch.rand(4, 2), torch.full((4, 2), torch.nan)), ValueError, "y must be finite"),
    ],
)
def test_errors_of_update(batch, error, match):
    metric = DebiasedCKA()
    with pytest.raises(error, match=match):
        metric.update(*batch)
    assert metric.samples == 0


def test_errors_of_options():
    with pytest.raises(ValueError, match="bandwidth must be given for the gaussian kernel"):
        DebiasedCKA("gaussian")
    with pytest.raises(ValueError, match="bandwidth must be None for the linear kernel"):
        DebiasedCKA(bandwidth=1.0)
    with pytest.raises(ValueError, match="exponent must be finite.*below 2"):
        UDistanceCorrelationSqr(exponent=2.0)


@pytest.mark.filterwarnings("ignore:The ``compute`` method of metric")
def test_error_before_the_first_batch():
    with pytest.raises(ValueError, match="update must be called before compute"):
        DebiasedCKA().compute()


def test_torchmetrics_is_imported_by_the_metrics_alone():
    code = """
import sys
sys.modules["torchmetrics"] = None
import mvmr_loss, mvmr_loss.dependence
try:
    import mvmr_loss.metrics
except ImportError as error:
    print(error)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert "pip install 'torchmetrics>=0.11.4'" in done.stdout


@pytest.mark.parametrize("name", METRICS)
@pytest.mark.parametrize("kind", ["constant", "equally far"])
def test_the_gradient_of_no_dependence_is_finite(name, kind):
    x = (torch.ones(6, 6) if kind == "constant" else torch.eye(6)).requires_grad_()
    metric = METRICS[name][0]()
    value = metric(x, torch.randn(6, 3, generator=torch.Generator().manual_seed(0)))
    (grad,) = torch.autograd.grad(value, x)
    assert grad.isfinite().all()
