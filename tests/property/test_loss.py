"""The loss and the regularizer on drawn views, representations and weights, against a reference."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import strategies as st

from mvmr_loss import MultiRepresentationRegularizer, MVMRLoss, backward_in_chunks
from mvmr_loss.loss import covariance_loss, identity_loss, invariance_loss, variance_loss
from tests.property.cases import KINDS, Batch, batches, cases, finite_gradients, several
from tests.property.references import MEASURES, SETTINGS, reference

WEIGHTS = st.sampled_from([1.0, 0.0, 0.3, -1.0, -0.5, 2.5])
SIZES = st.integers(-20, 20)
POSITIVE = st.sampled_from([1.0, 0.0, 0.3, 2.5])
NAMES = st.sampled_from(sorted(n for n in MEASURES if MEASURES[n].normalized))
ORDINARY = ("plain", "duplicates", "ties", "line", "offset")

ONE_WIDE = [
    Batch(kind, 8, 1, size, 0, torch.bfloat16, "plain")
    for kind, size in (("plain", 0), ("outlier", 15))
]


@st.composite
def problems(draw, *, sizes=SIZES, kinds=KINDS, least=2):
    """Draws views of one shape and type, and representations of any other."""
    n = draw(st.integers(least, 10))
    d = st.just(draw(st.integers(1, 12)))
    dtype = (draw(st.sampled_from([torch.float16, torch.bfloat16, torch.float32, torch.float64])),)
    fits = {"widths": d, "dtypes": dtype, "sizes": sizes}
    flat = ("plain", "transposed", "columns", "rows", "flipped", "negated")
    # A simplex is as wide as it is long.
    own = tuple(kind for kind in kinds if kind != "simplex")
    count = draw(st.integers(2, 4))
    views = [draw(batches(st.just(n), kinds=own, layouts=flat, **fits)) for _ in range(count)]
    others = draw(several(st.integers(0, 3), n, n, sizes=sizes, kinds=kinds))
    return views, others


def spread_of(z, margin, eps=1e-4):
    return (margin - (z.var(dim=0) + eps).sqrt()).clamp(min=0).mean()


def dependence(name, x, y):
    value = reference(name, x, y).value
    if not math.isfinite(value):
        return value.new_zeros(())
    return value.clamp(min=0).sqrt() if MEASURES[name].rooted else value


def reward(weight, value):
    return weight * (1 - value) if weight >= 0 else -weight * value


@cases(
    40,
    1000,
    problem=problems(),
    name=NAMES,
    weights=st.lists(WEIGHTS, min_size=5, max_size=5),
    new=st.lists(POSITIVE, min_size=2, max_size=2),
    second=st.booleans(),
    examples=[
        {
            "problem": (ONE_WIDE, []),
            "name": "cka",
            "weights": [1.0] * 5,
            "new": [1.0, 2.5],
            "second": False,
        }
    ],
)
def test_finite(problem, name, weights, new, second):
    views, others = problem
    criterion = MVMRLoss(
        identity_weight=new[0],
        covariance_weight=new[1],
        dependence_weight=weights[0],
        representation_weights={str(i): weights[i + 1] for i in range(len(others))},
        representation_views="both" if weights[4] == 1 else "augmented",
        dependence_measure=SETTINGS.get(name, name),
    )
    z, *augmented = (b.tensor(requires_grad=True) for b in views)
    ys = {str(i): b.tensor(requires_grad=True) for i, b in enumerate(others)}
    if views[0].n < criterion.measure.min_samples:
        with pytest.raises(ValueError, match="z must have at least 4 samples"):
            criterion(z, augmented, ys)
        return
    # A second head of a width of its own; not of float16, in which two infinite gradients would meet.
    heads = None
    if second and z.dtype != torch.float16:
        heads = [t.flatten(1)[:, :2] for t in (z, *augmented)]
    components = criterion.forward_components(z, augmented, ys, heads)
    largest = max(t.detach().abs().max().double() for t in (z, *augmented))
    documented = 1e18 if new[1] == 0 else 1e9
    beyond = components.total.dtype == torch.float32 and largest > documented
    if beyond:  # infinite, as is documented, or held at the largest number
        assert not components.total.isnan()
    else:
        assert torch.isfinite(components.total)
    assert components.total.dtype == torch.promote_types(z.dtype, torch.float32)
    named = components.as_dict()
    total = named.pop("loss")
    if torch.isfinite(total):
        torch.testing.assert_close(sum(named.values()), total, rtol=1e-5, atol=1e-6)
    for name, term in components.terms.items():
        assert term.dtype == total.dtype
        if name == "variance":
            assert 0 <= term <= 2
        elif name in ("invariance", "covariance"):
            assert term >= 0
        elif name == "identity":
            assert -1e-5 <= term <= 2 + 1e-5
        else:
            assert -1e-5 <= term <= (2 if criterion.measure.min_samples == 4 else 1) + 1e-5 or (
                criterion.measure.min_samples == 4 and term >= -1 - 1e-5
            )
    tensors = [z, *augmented, *ys.values()]

    def again(*tensors):
        z, *augmented = tensors[: len(views)]
        own = None if heads is None else [t.flatten(1)[:, :2] for t in tensors[: len(views)]]
        features = dict(zip(ys, tensors[len(views) :], strict=True))
        return criterion(z, augmented, features, own)

    if total.requires_grad and not beyond:
        finite_gradients(again, tensors)


@cases(
    40,
    1000,
    problem=problems(sizes=st.integers(-2, 2), kinds=ORDINARY, least=4),
    name=NAMES,
    own=st.lists(POSITIVE, min_size=2, max_size=2),
    signed=st.lists(WEIGHTS, min_size=4, max_size=4),
    margin=st.sampled_from([0.0, 1.0, 3.0]),
    both=st.booleans(),
)
def test_value_is_the_references(problem, name, own, signed, margin, both):
    views, others = problem
    criterion = MVMRLoss(
        invariance_weight=own[0],
        variance_weight=own[1],
        dependence_weight=signed[0],
        representation_weights={str(i): signed[i + 1] for i in range(len(others))},
        representation_views="both" if both else "augmented",
        variance_margin=margin,
        dependence_measure=SETTINGS.get(name, name),
    )
    z, *augmented = (b.tensor() for b in views)
    found = criterion.forward_components(
        z, augmented, {str(i): b.tensor() for i, b in enumerate(others)}
    )
    z, *augmented = (b.numbers().double() for b in views)
    ys = [b.numbers().double() for b in others]

    def mean(values):
        return sum(values) / len(values)

    meeting = [z, *augmented] if both else augmented
    expected = {
        "invariance": own[0] * mean([(z - v).square().mean() for v in augmented]),
        "variance": own[1]
        * (spread_of(z, margin) + mean([spread_of(v, margin) for v in augmented])),
        "dependence": mean([reward(signed[0], dependence(name, z, v)) for v in augmented]),
    }
    for i, y in enumerate(ys):
        weight = signed[i + 1]
        expected[f"representations/{i}"] = mean(
            [reward(weight, dependence(name, v, y)) for v in meeting]
        )
    condition = max(
        reference(name, a, b).condition
        for a, b in zip([z, *augmented], [*augmented, z], strict=True)
    )
    condition = max([condition, *(reference(name, y, y).condition for y in ys)])
    rooted = MEASURES[name].rooted
    bound = 1e-5 * (10 + condition)
    if bound > 1e-2:
        return
    for term, value in found.as_dict().items():
        if term == "loss":
            continue
        exact = expected[term].item()
        if term in ("invariance", "variance"):
            assert value.item() == pytest.approx(exact, rel=1e-4, abs=1e-5)
        else:
            # Where a root is near 0 its error is that of the square, to the half.
            assert abs(value.item() - exact) <= 3 * (bound**0.5 if rooted else bound)
    rough = 3 * (bound**0.5 if rooted else bound) * 10
    assert found.total.item() == pytest.approx(sum(expected.values()).item(), rel=1e-4, abs=rough)


@cases(
    30,
    500,
    problem=problems(
        kinds=("plain", "outlier", "clusters", "ties"), least=4, sizes=st.integers(-20, 18)
    ),
    name=NAMES,
)
def test_regularizer_is_the_sum_of_its_terms(problem, name):
    views, others = problem
    if not others:
        return
    weights = {str(i): (-1.0) ** i * (i + 1) for i in range(len(others))}
    regularizer = MultiRepresentationRegularizer(
        weights, dependence_measure=SETTINGS.get(name, name)
    )
    embeddings = [b.tensor() for b in views]
    ys = {str(i): b.tensor() for i, b in enumerate(others)}
    found = regularizer.forward_components(embeddings, ys)
    one_each = sum(
        reward(w, torch.stack([regularizer.measure(v, ys[k]) for v in embeddings]).mean())
        for k, w in weights.items()
    )
    doubles = [b.numbers().double() for b in (*views, *others)]
    condition = max(reference(name, a, b).condition for a in doubles for b in doubles)
    bound = 1e-5 * (10 + condition)
    if bound > 1e-2:
        return
    # Where a root is near 0 its error is that of the square, to the half.
    rough = 30 * (bound**0.5 if MEASURES[name].rooted else bound)
    torch.testing.assert_close(
        found.total.double(), one_each.double(), rtol=1e-3, atol=rough, check_dtype=False
    )
    # As part of the whole loss, with nothing else in it.
    whole = MVMRLoss(
        invariance_weight=0,
        variance_weight=0,
        dependence_weight=0,
        representation_weights=weights,
        representation_views="both",
        dependence_measure=SETTINGS.get(name, name),
    )(embeddings[0], embeddings[1:], ys)
    torch.testing.assert_close(whole, found.total, rtol=1e-4, atol=rough)


@cases(60, 1000, b=batches(sizes=st.integers(-20, 18)), margin=st.sampled_from([0.0, 1.0, 1e3]))
def test_variance(b, margin):
    z = b.tensor(requires_grad=True)
    loss = variance_loss(z.flatten(1), margin)
    (gradient,) = torch.autograd.grad(loss, z)
    assert torch.isfinite(gradient).all()
    assert 0 <= loss <= margin
    expected = spread_of(b.numbers().double(), margin)
    # The variance of numbers far from 0 has the rounding of their squares.
    size = b.numbers().double().abs().max().item()
    precision = 1e-12 if b.dtype == torch.float64 else 1e-5
    assert loss.item() == pytest.approx(expected.item(), rel=1e-4, abs=precision * (1 + 10 * size))


@cases(
    60,
    800,
    b=batches(),
    examples=[
        {"b": Batch("collapse", 2, 2, 14, 0, torch.float32, "plain")},
        # One coordinate has no covariance: what its rounding left was the negative largest number.
        {"b": Batch("outlier", 8, 1, 15, 0, torch.bfloat16, "plain")},
    ],
)
def test_covariance(b):
    z = b.tensor(requires_grad=True)
    loss = covariance_loss(z.flatten(1))
    assert torch.isfinite(loss)
    assert loss >= 0
    finite_gradients(lambda z: covariance_loss(z.flatten(1)), [z])
    covariance = torch.atleast_2d(torch.cov(b.numbers().double().T))
    off = covariance - torch.diag(covariance.diagonal())
    expected = off.square().sum().item() / len(covariance)
    limit = torch.finfo(loss.dtype).max
    # Rounding is that of the sum of all squares, and of the mean.
    size = (b.numbers().double() - b.numbers().double().mean(0)).abs().max().item()
    offset = b.numbers().double().abs().max().item() / size if size > 0 else 0
    precision = (1e-13 if b.dtype == torch.float64 else 1e-5) * (1 + offset)
    if precision < 0.1 and expected < limit / 10:
        error = abs(loss.item() - expected)
        # And that of a constant, which is some units in the last place of its values.
        least = (1e-6 * b.numbers().double().abs().max().item()) ** 4
        assert error <= precision * covariance.square().sum().item() * 10 + least + 1e-37


@cases(40, 800, problem=problems(sizes=st.integers(-20, 20), least=3))
def test_identity(problem):
    views = [b.tensor(requires_grad=True) for b in problem[0]]
    loss = identity_loss(views)
    assert -1e-5 <= loss <= 2 + 1e-5
    finite_gradients(lambda *views: identity_loss(views), views)
    # Of the directions alone: the lengths do not matter.
    plain = [b.numbers() for b in problem[0]]
    if all(v.double().norm(dim=1).min() > 0.1 and v.abs().max() < 1e3 for v in plain):
        longer = [v * torch.tensor([2.0, 4.0, 0.5])[torch.arange(len(v)) % 3, None] for v in plain]
        longer = [v.to(plain[0].dtype) for v in longer]
        torch.testing.assert_close(identity_loss(longer), loss, rtol=1e-3, atol=1e-3)


HALF = [Batch("plain", 4, 3, 4, seed, torch.float16, "plain") for seed in (0, 1)]


# In half precision its squares were beyond the range.
@cases(
    40,
    500,
    problem=problems(sizes=st.integers(-20, 18)),
    examples=[{"problem": (HALF, [])}],
)
def test_invariance(problem):
    z, v = (b.tensor(requires_grad=True) for b in problem[0][:2])
    loss = invariance_loss(z, v)
    gradients = torch.autograd.grad(loss, (z, v))
    expected = (z.detach().double() - v.detach().double()).square().mean().item()
    if expected < 1e36:  # else the sum of squares leaves float32's range
        assert loss.item() == pytest.approx(expected, rel=1e-4, abs=1e-37)
    # float16's are infinite beyond its range, which GradScaler looks for.
    assert all(torch.isfinite(g).all() for g in gradients if g.dtype != torch.float16)


@cases(
    15,
    300,
    problem=problems(sizes=st.just(0), kinds=ORDINARY, least=4),
    size=st.integers(1, 12),
)
def test_chunks_are_the_whole(problem, size):
    views = [b.numbers().double() for b in problem[0]]
    network = torch.nn.Linear(views[0].shape[1], 5, dtype=torch.float64)
    with torch.no_grad():
        generator = torch.Generator().manual_seed(0)
        network.weight.copy_(torch.randn(network.weight.shape, generator=generator))

    def criterion(*embeddings):
        return MVMRLoss()(embeddings[0], embeddings[1:])

    loss = criterion(*map(network, views))
    expected = torch.autograd.grad(loss, network.weight)[0]
    found = backward_in_chunks(network, views, criterion, size)
    torch.testing.assert_close(found, loss.detach())
    torch.testing.assert_close(network.weight.grad, expected, rtol=1e-6, atol=1e-9)


def test_a_batch_prints_how_it_is_made():
    b = Batch("ties", 3, 2, 0, 1, torch.float32, "negated")
    assert eval(repr(b)) == b
    assert b.tensor().is_neg()
    assert torch.equal(b.tensor(), b.numbers())
