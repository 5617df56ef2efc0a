"""Compiled with shapes that vary, everything is what it is without: on drawn batches."""

from __future__ import annotations

import functools

import pytest
import torch
from hypothesis import strategies as st

from mvmr_loss import MVMRLoss
from mvmr_loss.dependence import dependence_measure
from mvmr_loss.representations import folded_sign_sketch
from mvmr_loss.representations.registry import representation_class
from tests.property.cases import Batch, batches, cases
from tests.property.references import SETTINGS, reference

NAMES = ("distance_correlation", "u_distance_correlation_sqr", "hsic", "debiased_cka")
NAMES += ("gaussian_cka",)
# Few shapes and types: each is compiled once.
SHAPES = ((4, 1), (7, 5), (12, 16))
TYPES = (torch.float32, torch.float64)


# Whose images may be small; of augmented pixels each call has a draw of its own.
REPRESENTATIONS = {
    "pixels": {},
    "dct": {},
    "local_std": {},
    "local_binary_patterns": {"cells": 3},
    "hog": {"block_norm": "L2"},
    "scattering": {"L": 3},
    "patch_scattering": {"J": 1, "L": 3, "grid_size": 2},
}


@functools.cache
def compiled(name, shape, dtype):
    return torch.compile(
        dependence_measure(SETTINGS.get(name, name)), fullgraph=True, backend="aot_eager"
    )


@st.composite
def pairs(draw):
    n, d = draw(st.sampled_from(SHAPES))
    kinds = ("plain", "zero", "constant", "duplicates", "outlier", "collapse", "ties")
    seeds, sizes = st.integers(0, 2**20), st.integers(-20, 20)
    dtype = draw(st.sampled_from(TYPES))
    return [
        Batch(draw(st.sampled_from(kinds)), n, d, draw(sizes), draw(seeds), dtype, "plain")
        for _ in range(2)
    ]


def assert_same_gradients(pair, found, expected, *, size, bound):
    """Compares gradients in what a movement of all samples by their distance to the mean changes."""
    for b, ours, theirs in zip(pair, found, expected, strict=True):
        assert torch.isfinite(ours).all()
        x = b.numbers().double()
        natural = size / max(float((x - x.mean(dim=0)).norm(dim=1).mean()), 1e-30)
        error = (ours.double() - theirs.double()).norm()
        assert error <= 1e-2 * theirs.double().norm() + bound * natural * b.n + 1e-37


@cases(None, 400, name=st.sampled_from(NAMES), pair=pairs(), gradient=st.booleans(), reached=0.3)
def test_measures(name, pair, gradient):
    tensors = [b.tensor(requires_grad=gradient) for b in pair]
    measure = dependence_measure(SETTINGS.get(name, name))
    value, plain = compiled(name, tensors[0].shape, pair[0].dtype)(*tensors), measure(*tensors)
    assert value.dtype == plain.dtype
    assert torch.isfinite(value)
    if gradient:
        found, slopes = (torch.autograd.grad(v, tensors) for v in (value, plain))
        assert all(torch.isfinite(g).all() for g in found)
    doubles = [b.numbers().double() for b in pair]
    exact = reference(name, *doubles)
    bound = (1e-7 if pair[0].dtype == torch.float64 else 1e-5) * (10 + exact.condition)
    if bound > 1e-2 or "outlier" in (pair[0].kind, pair[1].kind):
        return False
    rooted = name == "distance_correlation"
    ours, theirs = (v.detach().double() ** (2 if rooted else 1) for v in (value, plain))
    assert (ours - theirs).abs() <= bound * exact.scale + 1e-37
    if gradient and not (rooted and exact.value < 0.01):  # the slope of the root has no bound there
        size = max(float(plain.detach().abs()), 1e-3 * exact.scale)
        assert_same_gradients(pair, found, slopes, size=size, bound=10 * bound)
    return True


@cases(8, 200, pair=pairs(), gradient=st.booleans())
def test_loss(pair, gradient):
    z, v = (b.tensor(requires_grad=gradient) for b in pair)
    features = {"y": v.detach()}
    loss, plain = compiled_loss(z.shape, z.dtype)(z, v, features), MVMRLoss()(z, v, features)
    largest = max(b.numbers().abs().max() for b in pair)
    if largest > 1e18 and z.dtype == torch.float32:  # infinite, as is documented
        assert not loss.isnan()
        assert loss.isinf() == plain.isinf()
        return
    assert torch.isfinite(loss)
    found, slopes = (
        torch.autograd.grad(value, (z, v)) if gradient else () for value in (loss, plain)
    )
    assert all(torch.isfinite(g).all() for g in found)
    doubles = [b.numbers().double() for b in pair]
    conditions = [reference("distance_correlation", v, w) for v, w in (doubles, doubles[1:] * 2)]
    bound = (1e-7 if z.dtype == torch.float64 else 1e-5) * (
        10 + max(exact.condition for exact in conditions)
    )
    vague = bound > 1e-2 or "outlier" in (pair[0].kind, pair[1].kind)
    # Of a dependence that is about 0 the root has the error of the square, to the half.
    rough = 5e-2 if vague else 2 * bound**0.5 if conditions[0].value < 0.01 else 10 * bound
    torch.testing.assert_close(loss, plain, rtol=1e-5, atol=rough)
    if gradient and not vague and conditions[0].value > 0.01:
        assert_same_gradients(pair, found, slopes, size=1.0, bound=10 * bound)


@functools.cache
def compiled_loss(shape, dtype):
    return torch.compile(MVMRLoss(), fullgraph=True, backend="aot_eager")


@cases(
    12,
    300,
    b=batches(
        st.sampled_from([2, 5]),
        widths=st.sampled_from([20, 65]),
        kinds=("plain", "ties", "outlier", "constant"),
        dtypes=TYPES,
        layouts=("plain",),
    ),
    dim=st.just(8),
)
def test_sketch(b, dim):
    x = b.tensor()
    found = compiled_sketch()(x, dim)
    assert torch.equal(found, folded_sign_sketch(x, dim))


@functools.cache
def compiled_sketch():
    return torch.compile(folded_sign_sketch, fullgraph=True, backend="aot_eager")


@pytest.fixture(autouse=True)
def _compiled_anew():
    """Other tests throw away what is compiled; here are more shapes and types than in a training."""
    config = torch._dynamo.config
    limit = "recompile_limit" if hasattr(config, "recompile_limit") else "cache_size_limit"
    with config.patch({limit: 200}):
        yield
    for made in (compiled, compiled_loss, compiled_sketch, compiled_representation):
        made.cache_clear()


@cases(
    None,
    150,
    representation=st.sampled_from(sorted(REPRESENTATIONS)),
    shape=st.sampled_from([(1, 1, 16, 16), (3, 3, 16, 21), (2, 4, 9, 33), (5, 2, 24, 8)]),
    size=st.integers(-3, 3),
    seed=st.integers(0, 2**20),
    gradient=st.booleans(),
)
def test_representations(representation, shape, size, seed, gradient):
    gradient = gradient and representation != "local_binary_patterns"  # which has none
    images = torch.rand(shape, generator=torch.Generator().manual_seed(seed)) * 10.0**size
    name, options = representation, REPRESENTATIONS[representation]
    module = representation_class(name)(**options, differentiable=gradient)
    function = compiled_representation(name, shape, gradient)
    found, plain = (f(images.requires_grad_(gradient)) for f in (function, module))
    most = float(plain.detach().abs().max())
    torch.testing.assert_close(found, plain, rtol=1e-4, atol=1e-5 * most)
    if gradient:
        weights = torch.randn(plain.shape, generator=torch.Generator().manual_seed(seed))
        ours, theirs = (torch.autograd.grad((f * weights).sum(), images)[0] for f in (found, plain))
        assert (ours - theirs).norm() <= 1e-3 * theirs.norm()


@functools.cache
def compiled_representation(name, shape, gradient):
    module = representation_class(name)(**REPRESENTATIONS[name], differentiable=gradient)
    return torch.compile(module, fullgraph=True, backend="aot_eager")
