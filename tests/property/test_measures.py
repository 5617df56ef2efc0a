"""Every dependence measure on drawn batches: finite, in range, as the reference, however computed."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import strategies as st

from mvmr_loss.dependence import (
    TokenDistanceCorrelation,
    cross_distance_correlation,
    definitions,
    distance_correlation_sqr,
    hsic,
    pairwise_distances,
    partial_distance_correlation,
    token_distance_correlation,
    u_distance_correlation_sqr,
)
from mvmr_loss.dependence import dependence_measure as registered
from tests.property.cases import (
    DTYPES,
    KINDS,
    Batch,
    batches,
    cases,
    finite_gradients,
    several,
    with_gradient,
)
from tests.property.references import (
    MEASURES,
    SETTINGS,
    cross_reference,
    double_centered,
    matrix,
    partial_reference,
    reference,
    u_centered,
)

NAMES = st.sampled_from(sorted(MEASURES))
TWO = several(st.just(2), least=4)
THREE = several(st.just(3), least=4)


def dependence_measure(name, **options):
    return registered(SETTINGS.get(name, name), **options)


def precision(*drawn: Batch) -> float:
    """Returns the bound: float32's, or float64's."""
    if any(b.dtype != torch.float64 for b in drawn):
        return 1e-5
    # By a sample 1e5 away ten digits of the others' squared distances are lost.
    return 1e-6 if any(b.kind == "outlier" for b in drawn) else 1e-7


def made(kind, seed=0, *, size=0, n=6, d=3, dtype=torch.float32):
    return Batch(kind, n, d, size, seed, dtype, "plain")


# Whose spread, 1e-7, is far below its size, 0.1: gradients of normalised measures were NaN.
SPREAD = [
    {"name": name, "pair": [made("collapse", size=-1), made("plain", 1)]}
    for name in ("distance_correlation", "cka", "debiased_cka", "gaussian_cka")
]
# Where float32 loses the digits of distances.
LOST = [
    {"name": name, "pair": [made(kind, n=12), made("plain", 1, n=12)]}
    for name in ("distance_correlation", "u_distance_correlation_sqr")
    for kind in ("outlier", "clusters")
]


@cases(60, 2500, name=NAMES, pair=several(st.just(2)), examples=SPREAD)
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


@cases(60, 2500, name=NAMES, pair=TWO, examples=SPREAD + LOST)
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


@cases(40, 1500, name=NAMES, pair=TWO, examples=SPREAD + LOST)
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
    # Far narrower than all distances: gradients of the debiased CKA were NaN.
    examples=[
        {
            "name": "debiased_gaussian_cka",
            "pair": [made("plain", seed, n=4, d=1, dtype=dtype) for seed in (s, s + 1)],
            "bandwidth": -1.0,
        }
        for s in range(0, 20, 2)
        for dtype in (torch.float16, torch.float32)
    ],
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
    assert partial_distance_correlation(x, y, x) == 0
    numbers = [b.numbers().double() for b in pair]
    if 1e-6 * reference("u_distance_correlation_sqr", *numbers).condition > 0.1:
        return  # whether anything is left but rounding is a matter of rounding
    nothing = torch.zeros(len(x), 1, dtype=torch.float64)
    value = partial_distance_correlation(x, y, nothing)
    expected = u_distance_correlation_sqr(x, y)
    torch.testing.assert_close(value, expected, check_dtype=False, rtol=1e-4, atol=1e-4)


@cases(
    40,
    800,
    b=batches(st.integers(1, 12)),
    exponent=st.floats(0.1, 1.9),
    eps=st.sampled_from([0.0, 0.0, 1e-4, 1.0]),
    # Equal large samples: their unit was the least number times the largest of theirs.
    examples=[
        {"b": made("constant", size=20, n=n, dtype=torch.float64), "exponent": 1.87, "eps": 4.0}
        for n in (1, 5)
    ],
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


@st.composite
def anchored(draw):
    """Draws samples, and anchors of the same widths, in two spaces."""
    n, m = st.just(draw(st.integers(2, 12))), st.just(draw(st.integers(2, 12)))
    drawn = []
    for _ in "xy":
        d, size = st.just(draw(st.integers(1, 12))), draw(st.integers(-3, 3) | st.integers(-20, 20))
        kinds = tuple(kind for kind in KINDS if kind != "simplex")
        fits = {"widths": d, "kinds": kinds, "layouts": ("plain", "transposed", "rows", "negated")}
        sizes = st.just(size)
        drawn.append([draw(batches(count, sizes=sizes, **fits)) for count in (n, m)])
    return drawn


@cases(
    60,
    600,
    spaces=anchored(),
    exponent=st.sampled_from([1.0, 0.5, 1.7]),
    rooted=st.booleans(),
    reached=0.15,
)
def test_cross_distance_correlation(spaces, exponent, rooted):
    (x, x_anchors), (y, y_anchors) = spaces
    tensors = [b.tensor(requires_grad=True) for b in (x, y, x_anchors, y_anchors)]

    def function(*tensors):
        return cross_distance_correlation(*tensors, exponent=exponent, rooted=rooted)

    value = function(*tensors)
    assert value.dtype in (torch.float32, torch.float64)
    assert (0 if rooted else -1) - 1e-5 <= value <= 1 + 1e-5
    finite_gradients(function, tensors)
    if x.kind not in LOSING and y.kind not in LOSING:
        own = function(*tensors[:2], *tensors[:2]).item()
        square = distance_correlation_sqr(*tensors[:2], exponent=exponent).item()
        assert own ** (2 if rooted else 1) == pytest.approx(square, abs=1e-3)
    doubles = [b.numbers().double() for b in (x, y, x_anchors, y_anchors)]
    expected = cross_reference(*doubles, exponent)
    bound = precision(x, y, x_anchors, y_anchors) * (10 + expected.condition)
    if bound > 1e-2:
        return False
    exact = expected.value.clamp(min=0) if rooted else expected.value
    found = value.detach().double() ** (2 if rooted else 1)
    assert (found - exact).abs() <= bound
    return True


# Where the distances of a batch alone have no digits left.
LOSING = ("constant", "collapse", "offset", "outlier", "clusters", "zero", "two samples")


@st.composite
def token_pairs(draw):
    """Draws tokens of some images, of two networks."""
    n, t = draw(st.integers(1, 4)), draw(st.integers(4, 9))
    return n, [
        draw(batches(st.just(n * t), layouts=("plain", "transposed", "rows", "negated")))
        for _ in range(2)
    ]


@cases(
    60,
    600,
    tokens=token_pairs(),
    exponent=st.sampled_from([1.0, 0.5, 1.7]),
    corrected=st.booleans(),
)
def test_token_distance_correlation(tokens, exponent, corrected):
    count, pair = tokens
    options = {"exponent": exponent, "corrected": corrected}
    x, y = (b.tensor(requires_grad=True) for b in pair)
    images = [t.unflatten(0, (count, -1)) for t in (x, y)]
    value = token_distance_correlation(*images, **options)
    assert value.shape == (count,)
    assert torch.isfinite(value).all()
    assert ((-1 if corrected else 0) - 1e-5 <= value).all()
    assert (value <= 1 + 1e-5).all()
    measure = TokenDistanceCorrelation(**options)
    assert torch.equal(measure(*images), value.mean())

    def mean(x, y):
        return measure(*[t.unflatten(0, (count, -1)) for t in (x, y)])

    finite_gradients(mean, [x, y])
    name = "u_distance_correlation_sqr" if corrected else "distance_correlation_sqr"
    doubles = [b.numbers().double().unflatten(0, (count, -1)) for b in pair]
    scales = [t.abs().amax() for t in doubles]
    for found, a, b in zip(value, *doubles, strict=True):
        expected = reference(name, a, b, exponent=exponent)
        # One unit is for all images: an image far below it has fewer digits.
        spreads = [(t - t.mean(dim=0)).norm() for t in (a, b)]
        lost = max(
            float(s / d) if d > 0 else float("inf") for s, d in zip(scales, spreads, strict=True)
        )
        bound = precision(*pair) * (10 + expected.condition)
        if bound <= 1e-2 and lost < 1e3:
            assert (found.double() - expected.value).abs() <= bound


@cases(30, 300, pair=several(st.just(2), least=4, sizes=st.integers(-3, 3)), name=NAMES)
def test_definitions_are_the_references(pair, name):
    x, y = (b.numbers().double().flatten(1) for b in pair)
    for t in (x, y):
        a = definitions.pairwise_distances(t)
        torch.testing.assert_close(a, matrix(t, "distance"))
        rough = 1e-12 * float(a.max()) * len(a) + 1e-300
        for ours, theirs in (
            (definitions.double_centered, double_centered),
            (definitions.u_centered, u_centered),
        ):
            c = ours(a)
            torch.testing.assert_close(c, theirs(a), rtol=0, atol=rough)
            assert c.sum(dim=0).abs().max() <= 10 * rough
            assert c.sum(dim=1).abs().max() <= 10 * rough
            torch.testing.assert_close(ours(c), c, rtol=0, atol=10 * rough)
        assert (definitions.u_centered(a).diagonal() == 0).all()
    if hasattr(definitions, name):
        expected = reference(name, x, y)
        value = getattr(definitions, name)(x, y)
        if expected.condition < 1e6 and expected.value > 1e-6 * expected.scale:
            exact = expected.value.sqrt() if MEASURES[name].rooted else expected.value
            assert value.item() == pytest.approx(exact.item(), rel=1e-6)


def test_all_dtypes_are_drawn():
    assert set(DTYPES) == {torch.float16, torch.bfloat16, torch.float32, torch.float64}
