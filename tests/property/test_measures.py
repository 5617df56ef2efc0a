"""Every dependence measure on drawn batches: finite, in range, as the reference, however computed."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import strategies as st

from mvmr_loss.dependence import dependence_measure as registered
from mvmr_loss.dependence import (
    hsic,
    pairwise_distances,
    partial_distance_correlation,
    u_distance_correlation_sqr,
)
from tests.property.cases import (
    DTYPES,
    Batch,
    batches,
    cases,
    finite_gradients,
    several,
    with_gradient,
)
from tests.property.references import MEASURES, SETTINGS, matrix, partial_reference, reference

NAMES = st.sampled_from(sorted(MEASURES))
TWO = several(st.just(2), least=4)


THREE = several(st.just(3), least=4)


def dependence_measure(name, **options):
    return registered(SETTINGS.get(name, name), **options)


def precision(*drawn: Batch) -> float:
    """Returns the bound: float32's, or float64's."""
    return 1e-7 if all(b.dtype == torch.float64 for b in drawn) else 1e-5


@cases(60, 2500, name=NAMES, pair=several(st.just(2)))
def test_finite_and_in_range(name, pair):
    measure = dependence_measure(name)
    if pair[0].n < measure.min_samples:
        with pytest.raises(ValueError, match="at least 4 samples"):
            measure(*[b.tensor() for b in pair])
        return
    tensors = [b.tensor(requires_grad=True) for b in pair]
    value = measure(*tensors)
    assert value.dtype in (torch.float32, torch.float64)
    assert torch.isfinite(value)
    finite_gradients(measure, tensors)
    least = -1.0 if measure.estimator.corrected else 0.0
    if measure.estimator.normalized:
        assert least - 1e-5 <= value <= 1 + 1e-5
    if measure.estimator.rooted:
        assert value >= 0


@cases(60, 2500, name=NAMES, pair=TWO)
def test_value_is_the_references(name, pair):
    value = dependence_measure(name)(*[b.tensor() for b in pair])
    expected = reference(name, *[b.numbers().double() for b in pair])
    bound = precision(*pair) * (10 + expected.condition)
    if MEASURES[name].rooted:
        value = value.double().square()
    if any(b.kind in ("clusters", "outlier") for b in pair):
        bound = max(bound, 1e-2)
    if bound > 0.1 or not math.isfinite(expected.condition):
        return  # constant but for rounding: any value of the range
    limit = torch.finfo(value.dtype).max
    error = (value.double() - expected.value.clamp(-limit, limit)).abs()
    # Below the least normal number there are fewer digits.
    assert error <= bound * expected.scale + 1e-37


@cases(40, 1500, name=NAMES, pair=TWO)
def test_gradient_is_the_references(name, pair):
    _, gradients = with_gradient(dependence_measure(name), *pair)
    tensors = [b.numbers().double().requires_grad_() for b in pair]
    expected = reference(name, *tensors)
    value = expected.value.sqrt() if MEASURES[name].rooted else expected.value
    bound = precision(*pair) * (10 + expected.condition) * 10
    if MEASURES[name].rooted and not value > 0.05 * expected.scale**0.5:
        return  # the slope of the root has no bound there
    if bound > 0.1 or not math.isfinite(expected.condition) or expected.scale < 1e-30:
        return
    if value.abs() > torch.finfo(torch.float32).max / 10:
        return  # held within the range, without a gradient
    for b, tensor, ours, theirs in zip(
        pair, tensors, gradients, torch.autograd.grad(value, tensors), strict=True
    ):
        spread = (tensor - tensor.mean(dim=0)).detach().norm(dim=1)
        # What a movement of all samples by their distance to the mean could change.
        natural = value.detach().abs().clamp(min=1e-3 * expected.scale) / spread.mean()
        ours, theirs = ours.double().reshape(theirs.shape), theirs
        if theirs.abs().max() > torch.finfo(b.dtype).max / 10:
            continue
        error = (ours - theirs).norm()
        least = torch.finfo(b.dtype).smallest_normal * ours.numel() ** 0.5
        assert error <= 1e-2 * theirs.norm() + bound * natural * b.n + least


@cases(
    30,
    600,
    name=st.sampled_from([n for n in sorted(MEASURES) if MEASURES[n].kernel == "distance"]),
    pair=TWO,
    block_size=st.integers(1, 14),
    exponent=st.sampled_from([0.5, 1.0, 1.7]),
)
def test_blocks_are_the_whole(name, pair, block_size, exponent):
    value, gradients = with_gradient(dependence_measure(name, exponent=exponent), *pair)
    blocks, others = with_gradient(
        dependence_measure(name, exponent=exponent, block_size=block_size), *pair
    )
    assert torch.isfinite(blocks)
    doubles = [b.numbers().double() for b in pair]
    expected = reference(name, *doubles, exponent=exponent)
    bound = precision(*pair) * (10 + expected.condition)
    if bound > 0.1:
        return
    if MEASURES[name].rooted:
        value, blocks = value.double().square(), blocks.double().square()
    if any(b.kind in ("clusters", "outlier") for b in pair):
        bound = max(bound, 1e-2)
    assert (value - blocks).abs() <= bound * expected.scale + 1e-37


@cases(30, 600, name=NAMES, pair=TWO)
def test_layout_and_order_do_not_matter(name, pair):
    measure = dependence_measure(name)
    value, gradients = with_gradient(measure, *pair)
    plain = [b.numbers().requires_grad_() for b in pair]
    expected = measure(*plain)
    others = torch.autograd.grad(expected, plain)
    condition = reference(name, *[b.numbers().double() for b in pair]).condition
    if 1e-6 * condition > 0.1:
        return
    torch.testing.assert_close(
        value, expected, rtol=1e-3, atol=1e-3 * float(expected.detach().abs())
    )
    for ours, theirs in zip(gradients, others, strict=True):
        assert ours.shape[: theirs.ndim] == theirs.shape


@cases(
    40,
    800,
    name=st.sampled_from([n for n in sorted(MEASURES) if MEASURES[n].kernel == "gaussian"]),
    pair=TWO,
    bandwidth=st.floats(-1.0, 1.0),
)
def test_bandwidth(name, pair, bandwidth):
    """Of the size of one batch, so that the other's kernel may be ones or the identity.

    Gradients in units of a bandwidth 15 orders of magnitude below the data may be beyond float32.
    """
    if pair[1].size - pair[0].size > 12:
        return
    bandwidth = 10.0 ** (pair[0].size + bandwidth)
    measure = dependence_measure(name, bandwidth=bandwidth)
    tensors = [b.tensor(requires_grad=True) for b in pair]
    value = measure(*tensors)
    assert torch.isfinite(value)
    finite_gradients(measure, tensors)
    doubles = [b.numbers().double().requires_grad_() for b in pair]
    expected = reference(name, *doubles, bandwidth=bandwidth)
    if MEASURES[name].normalized and MEASURES[name].corrected:
        kernels = [matrix(x, "gaussian", bandwidth=bandwidth).detach() for x in doubles]
        if min(kernel.fill_diagonal_(0).square().sum() for kernel in kernels) < 1e-20:
            return  # a kernel that sees no two samples: 0 in float32
    bound = precision(*pair) * (10 + expected.condition)
    if bound > 0.1 or any(b.kind in ("clusters", "outlier") for b in pair):
        return
    assert (value.double() - expected.value).abs() <= bound * expected.scale + 1e-37
    if name == "hsic":
        assert torch.equal(hsic(*tensors, bandwidth=bandwidth), value)


@cases(60, 2000, three=THREE)
def test_partial_distance_correlation(three):
    tensors = [b.tensor(requires_grad=True) for b in three]
    value = partial_distance_correlation(*tensors)
    assert value.dtype in (torch.float32, torch.float64)
    assert value.abs() <= 1.01
    finite_gradients(partial_distance_correlation, tensors)
    expected, left, condition = partial_reference(*[b.numbers().double() for b in three])
    bound = precision(*three) * (10 + condition) / max(left, 1e-12)
    if any(b.kind in ("clusters", "outlier") for b in three):
        bound = max(bound, 1e-2 / max(left, 1e-12))
    if bound > 0.1 or not math.isfinite(condition):
        return
    assert (value.double() - expected).abs() <= bound


@cases(30, 400, pair=TWO)
def test_partial_distance_correlation_given_nothing_and_all(pair):
    x, y = (b.tensor() for b in pair)
    nothing = torch.zeros(len(x), 1, dtype=torch.float64)
    value = partial_distance_correlation(x, y, nothing)
    expected = u_distance_correlation_sqr(x, y)
    torch.testing.assert_close(value, expected, check_dtype=False, rtol=1e-4, atol=1e-4)
    assert partial_distance_correlation(x, y, x) == 0


@cases(
    40,
    800,
    b=batches(st.integers(1, 12)),
    exponent=st.floats(0.1, 1.9),
    eps=st.sampled_from([0.0, 0.0, 1e-4, 1.0]),
)
def test_pairwise_distances(b, exponent, eps):
    x = b.tensor(requires_grad=True)
    found = pairwise_distances(x, exponent=exponent, eps=eps)
    finite_gradients(
        lambda x: pairwise_distances(x, exponent=exponent, eps=eps).sum() / b.n**2, [x]
    )
    limit = torch.finfo(found.dtype).max
    assert torch.isfinite(found).all()
    torch.testing.assert_close(found, found.T, rtol=1e-6, atol=0)
    expected = matrix(b.numbers().double(), "distance", exponent, eps).clamp(max=limit)
    if eps:
        expected = expected.clamp(min=eps ** (exponent / 2))
    else:
        assert (found.diagonal() == 0).all()
    # To the power, an error near zero grows.
    close = 1e-3 if b.dtype != torch.float64 else 1e-5
    spread = float(expected.max())
    torch.testing.assert_close(
        found.double(), expected, rtol=1e-2, atol=max(spread * close**exponent, 1e-37)
    )


@cases(
    30,
    400,
    name=NAMES,
    pair=TWO,
    place=st.integers(0, 1),
    bad=st.sampled_from(["nan", "inf", "-inf"]),
)
def test_what_is_not_finite_is_refused(name, pair, place, bad):
    tensors = [b.numbers() for b in pair]
    tensors[place][pair[place].seed % pair[place].n, 0] = float(bad)
    with pytest.raises(ValueError, match=f"{'xy'[place]} must be finite"):
        dependence_measure(name)(*tensors)


def test_all_dtypes_are_drawn():
    assert set(DTYPES) == {torch.float16, torch.bfloat16, torch.float32, torch.float64}
