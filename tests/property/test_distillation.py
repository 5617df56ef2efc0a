"""Distillation, its bank of anchors, and metrics over minibatches: against references in float64."""

from __future__ import annotations

import pytest
import torch
from hypothesis import strategies as st

from mvmr_loss import DistillationLoss, TeacherRegression
from mvmr_loss.distillation import AnchorBank, Standardization, hadamard, regression_loss
from mvmr_loss.metrics import DebiasedCKA, UDistanceCorrelationSqr
from tests.property.cases import batches, cases, finite_gradients, several
from tests.property.references import cross_reference, reference

KINDS = ("plain", "plain", "zero", "constant", "duplicates", "clusters", "ties", "offset", "line")
SIZES = st.integers(-3, 3)
FLAT = ("plain", "transposed", "columns", "rows", "flipped", "negated")


@st.composite
def problems(draw, *, least=2, sizes=SIZES, kinds=KINDS, views=2):
    """Draws views of one shape and type, and features of two teachers."""
    n, d = draw(st.integers(least, 10)), draw(st.integers(1, 8))
    dtype = (draw(st.sampled_from([torch.float16, torch.bfloat16, torch.float32])),)
    fits = {"widths": st.just(d), "dtypes": dtype, "sizes": sizes, "kinds": kinds, "layouts": FLAT}
    zs = [draw(batches(st.just(n), **fits)) for _ in range(draw(st.integers(1, views)))]
    single = (torch.float16, torch.float32)
    fits = {"dtypes": single, "sizes": sizes, "kinds": kinds, "layouts": FLAT}
    return zs, [draw(batches(st.just(n), **fits)) for _ in range(2)]


@cases(80, 600, order=st.integers(1, 700))
def test_hadamard(order):
    if order > 2 and order % 4:
        with pytest.raises(ValueError, match=f"Hadamard matrix but is {order};"):
            hadamard(order)
        return
    try:
        matrix = hadamard(order)
    except ValueError:
        assert order >= 52, order  # the first that the constructions miss
        return
    assert set(matrix.flatten().tolist()) <= {-1.0, 1.0}
    assert torch.equal(matrix @ matrix.mT, order * torch.eye(order))


@cases(
    60,
    500,
    b=batches(
        st.integers(2, 12), sizes=st.integers(-20, 20), dtypes=(torch.float32, torch.float64)
    ),
    scale=st.sampled_from(["isotropic", "coordinate"]),
    rotation=st.sampled_from(["auto", "none"]),
    cut=st.integers(1, 11),
)
def test_standardization(b, scale, rotation, cut):
    """Fitted in parts, or counted in batches: mean 0, and the variance 1 of all or of each."""
    x, width = b.tensor().flatten(1), b.numbers().shape[1]
    exact = b.numbers().double()
    variances = exact.var(dim=0, correction=0)
    cut = min(cut, len(x) - 1)
    parts = [x[:cut], x[cut:]]
    fitted = Standardization(width, scale=scale, rotation=rotation)
    largest, mean = variances.max().item(), exact.mean(dim=0)
    if variances.mean() <= 1e-10 * mean.square().mean():
        return  # equal, which is refused, or but for rounding
    if not 1e-30 < variances.mean() < 1e36:
        if not torch.finfo(torch.float32).tiny < variances.mean() < torch.finfo(torch.float32).max:
            with pytest.raises(ValueError, match="features must be of a size"):
                fitted.fit(parts)
        return
    found = fitted.fit(parts).eval()(x)
    assert found.dtype == x.dtype
    telling = variances > 1e-6 * variances.mean()
    found = found.double()
    offset = mean.abs().max().item() / largest**0.5
    precision = 1e-5 * (10 + offset)
    if precision > 0.1:
        return
    assert found.mean(dim=0).abs().max() <= precision * (1 + width)
    spread = found.var(dim=0, correction=0)
    if scale == "isotropic":
        assert spread.mean().item() == pytest.approx(1, rel=100 * precision)
        # Distances stay as they are, but for one scale.
        apart = torch.pdist(exact) / variances.mean().sqrt()
        error = torch.pdist(found) - apart
        assert error.abs().max() <= 100 * precision * (apart.max() + 1)
        if fitted.rotation_matrix is not None:
            assert (spread - 1).abs().max() <= 100 * precision * width
    else:
        assert (spread[telling] - 1).abs().max() <= 100 * precision * (
            1 + (largest / variances[telling].min().item()) ** 0.5
        )
    counted = Standardization(width, scale=scale, rotation="none")
    for part in parts:
        counted(part.float())
    plain = Standardization(width, scale=scale, rotation="none").fit(parts)
    torch.testing.assert_close(
        counted.variance, plain.variance, rtol=100 * precision, atol=1e-3 * largest * precision
    )
    torch.testing.assert_close(counted.mean, plain.mean, rtol=1e-4, atol=precision * largest**0.5)


def regression_reference(prediction, target, cosine_weight=1.0, smooth_l1_weight=1.0):
    lengths = [t.norm(dim=1).clamp(min=1e-100) for t in (prediction, target)]
    cosine = (prediction * target).sum(dim=1) / lengths[0] / lengths[1]
    away = (prediction - target).abs()
    smooth = torch.where(away < 1, away.square() / 2, away - 0.5)
    return cosine_weight * (1 - cosine.mean()) + smooth_l1_weight * smooth.mean()


@st.composite
def predictions(draw):
    n, d = st.just(draw(st.integers(1, 8))), st.just(draw(st.integers(1, 12)))
    dtype = (draw(st.sampled_from([torch.float16, torch.bfloat16, torch.float32, torch.float64])),)
    kinds = ("plain", "plain", "zero", "duplicates", "ties", "offset", "one hot")
    fits = {"widths": d, "dtypes": dtype, "kinds": kinds, "layouts": FLAT}
    return draw(batches(n, sizes=st.integers(-20, 20), **fits)), draw(
        batches(n, sizes=st.integers(-1, 1), **fits)
    )


@cases(
    60,
    600,
    pair=predictions(),
    weights=st.lists(st.sampled_from([0.0, 0.3, 1.0, 2.5]), min_size=2, max_size=2),
)
def test_regression_loss(pair, weights):
    prediction, target = pair[0].tensor(requires_grad=True), pair[1].tensor()
    names = dict(zip(("cosine_weight", "smooth_l1_weight"), weights, strict=True))
    loss = regression_loss(prediction, target, **names)
    assert loss.dtype == torch.promote_types(prediction.dtype, torch.float32)
    assert loss >= -1e-5
    assert torch.isfinite(loss)
    finite_gradients(lambda x: regression_loss(x, target, **names), [prediction])
    leaf = pair[0].numbers().double().requires_grad_()
    expected = regression_reference(leaf, pair[1].numbers().double(), *weights)
    assert loss.item() == pytest.approx(expected.item(), rel=1e-4, abs=1e-5)
    assert regression_loss(target, target) <= 1 + 1e-5


@cases(40, 400, problem=problems(), hidden=st.integers(0, 5), seen=st.booleans())
def test_teacher_regression(problem, hidden, seen):
    views, (teacher, _) = problem
    zs = [b.tensor(requires_grad=True) for b in views]
    y = teacher.tensor()
    torch.manual_seed(0)
    module = TeacherRegression(zs[0].shape[1], y.shape[1], hidden_dim=hidden).train(not seen)
    loss = module(zs, y)
    gradients = torch.autograd.grad(loss, [*zs, *module.parameters()], allow_unused=True)
    assert torch.isfinite(loss)
    assert all(torch.isfinite(g).all() for g in gradients)
    target = module.eval().standardization(y)
    expected = torch.stack([regression_loss(module.head(z.float()), target) for z in zs]).mean()
    torch.testing.assert_close(loss, expected)


WEIGHTS = st.sampled_from([1.0, 0.0, 0.4, 2.0])


@cases(
    60,
    500,
    problem=problems(least=4, kinds=("plain", "plain", "duplicates", "ties", "offset", "line")),
    regression=st.lists(WEIGHTS, min_size=2, max_size=2),
    dependence=st.lists(st.sampled_from([1.0, -0.5, 2.0]), min_size=2, max_size=2),
    scale=st.sampled_from(["isotropic", "coordinate"]),
    anchors=st.integers(0, 9),
    steps=st.integers(1, 3),
    stacked=st.booleans(),
)
def test_distillation(problem, regression, dependence, scale, anchors, steps, stacked):
    views, teachers = problem
    names = ("a", "b")
    zs = [b.tensor(requires_grad=True) for b in views]
    ys = {name: b.tensor() for name, b in zip(names, teachers, strict=True)}
    torch.manual_seed(0)
    loss = DistillationLoss(
        zs[0].shape[1],
        {name: y.shape[1] for name, y in ys.items()},
        regression_weight=dict(zip(names, regression, strict=True)),
        dependence_weight=dict(zip(names, dependence, strict=True)),
        hidden_dim=0,
        scale=scale,
        anchors=anchors,
        stacked=stacked,
    ).eval()
    for step in range(1, steps):
        loss.update([z.detach().roll(step, 0) for z in zs], {k: y + step for k, y in ys.items()})
    components = loss.forward_components(zs, ys)
    named = components.as_dict()
    total = named.pop("loss")
    torch.testing.assert_close(sum(named.values()), total, rtol=1e-5, atol=1e-6)
    finite_gradients(lambda *zs: loss(list(zs), ys), zs)
    kept = ([], {}) if loss.bank is None else loss.bank.samples()
    for name, weight, b in zip(names, dependence, teachers, strict=True):
        squares = []
        met = [view.numbers().double() for view in views]
        for z in [torch.cat(met)] if stacked else met:
            y = b.numbers().double().repeat(len(met) if stacked else 1, 1)
            if len(kept[0]):
                banks = kept[0].double(), kept[1][name].double()
                found = cross_reference(z, y, torch.cat([z, banks[0]]), torch.cat([y, banks[1]]))
            else:
                found = reference("distance_correlation", z, y)
            squares.append(found)
        bound = 1e-5 * (10 + max(s.condition for s in squares))
        if bound > 1e-2:
            continue
        value = torch.stack([s.value.clamp(min=0).sqrt() for s in squares]).mean().item()
        term = components.terms[f"dependence/{name}"].item()
        assert abs(term - (1 - value if weight > 0 else value)) <= 10 * bound**0.5
        if min(s.value for s in squares) > 0.05:
            assert abs(term - (1 - value if weight > 0 else value)) <= 100 * bound


@cases(
    60,
    400,
    size=st.integers(1, 12),
    counts=st.lists(st.integers(1, 15), max_size=5),
    b=batches(st.just(75), dtypes=(torch.float32,), layouts=FLAT),
)
def test_bank_holds_the_last(size, counts, b):
    x = b.tensor()
    bank = AnchorBank(size, x.shape[1], {"y": 2})
    y = torch.arange(150.0).view(75, 2)
    start = 0
    for count in counts:
        bank.update(x[start : start + count], {"y": y[start : start + count]})
        start += count
        other = AnchorBank(size, x.shape[1], {"y": 2})
        other.load_state_dict(bank.state_dict())
        bank = other
    embeddings, teachers = bank.samples()
    order = teachers["y"][:, 0].argsort()
    # In turn until there are as many as it holds.
    last = torch.arange(max(0, start - size), start)
    if 0 < start < size:
        last = (torch.arange(size) % start).sort().values
    assert torch.equal(teachers["y"][order], y[last])
    assert torch.equal(embeddings[order], b.numbers()[last])


@st.composite
def minibatches(draw):
    d, e = st.just(draw(st.integers(1, 8))), st.just(draw(st.integers(1, 8)))
    parts = []
    for _ in range(draw(st.integers(1, 4))):
        n = st.just(draw(st.integers(4, 9)))
        fits = {"sizes": st.integers(-2, 2), "kinds": KINDS, "layouts": FLAT}
        parts.append([draw(batches(n, widths=width, **fits)) for width in (d, e)])
    return parts


METRICS = {
    "u_distance_covariance_sqr": UDistanceCorrelationSqr,
    "unbiased_linear_hsic": DebiasedCKA,
}


@cases(40, 400, parts=minibatches(), name=st.sampled_from(sorted(METRICS)))
def test_metrics(parts, name):
    """Minibatches count by their samples; covariance and variances are summed, then divided."""
    metric = METRICS[name]()
    sums = torch.zeros(3, dtype=torch.float64)
    noise = 0.0
    for pair in parts:
        metric.update(*[b.tensor() for b in pair])
        x, y = (b.numbers().double() for b in pair)
        found = [reference(name, *both) for both in ((x, y), (x, x), (y, y))]
        sums += len(x) * torch.stack([f.value for f in found])
        noise = max([noise, *(f.condition for f in found if f.scale > 0)])
    value = metric.compute()
    assert value.dtype == torch.float64
    assert torch.isfinite(value)
    product = sums[1].sqrt() * sums[2].sqrt()
    if noise > 1e6 or not product > 0:
        return
    torch.testing.assert_close(value, sums[0] / product, rtol=1e-5, atol=1e-6)
    if len(parts) == 1:
        assert value.abs() <= 1 + 1e-6


@cases(30, 300, pair=several(st.just(2), least=4, kinds=KINDS, sizes=st.integers(-2, 2)))
def test_metric_of_halves_is_of_their_sums(pair):
    """Two processes, each with its own minibatch, or one with both."""
    tensors = [b.tensor() for b in pair]
    whole, one, other = (UDistanceCorrelationSqr() for _ in range(3))
    for metric, shift in ((one, 0), (other, 1)):
        metric.update(tensors[0].roll(shift, 0), tensors[1])
        whole.update(tensors[0].roll(shift, 0), tensors[1])
    assert torch.equal(one.moments + other.moments, whole.moments)
    assert one.samples + other.samples == whole.samples
