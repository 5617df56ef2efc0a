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


@cases(None, 400, name=st.sampled_from(NAMES), pair=pairs(), gradient=st.booleans())
def test_measures(name, pair, gradient):
    tensors = [b.tensor(requires_grad=gradient) for b in pair]
    function = compiled(name, tensors[0].shape, pair[0].dtype)
    value, expected = function(*tensors), dependence_measure(SETTINGS.get(name, name))(*tensors)
    assert value.dtype == expected.dtype
    assert torch.isfinite(value)
    if gradient:
        found = torch.autograd.grad(value, tensors)
        assert all(torch.isfinite(g).all() for g in found)
    condition = reference(name, *[b.numbers().double() for b in pair]).condition
    bound = (1e-7 if pair[0].dtype == torch.float64 else 1e-5) * (10 + condition)
    if bound < 1e-2 and "outlier" not in (pair[0].kind, pair[1].kind):
        square = name == "distance_correlation"
        found, expected = (v.double() ** (2 if square else 1) for v in (value, expected))
        assert (found - expected).abs() <= bound


@cases(8, 200, pair=pairs(), gradient=st.booleans())
def test_loss(pair, gradient):
    z, v = (b.tensor(requires_grad=gradient) for b in pair)
    if max(b.size for b in pair) > 6:
        return
    function = compiled_loss(z.shape, z.dtype)
    loss, expected = function(z, v, {"y": v.detach()}), MVMRLoss()(z, v, {"y": v.detach()})
    assert torch.isfinite(loss)
    torch.testing.assert_close(loss, expected, rtol=1e-3, atol=5e-2)
    if gradient:
        assert all(torch.isfinite(g).all() for g in torch.autograd.grad(loss, (z, v)))


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
    for made in (compiled, compiled_loss, compiled_sketch):
        made.cache_clear()


@cases(
    None,
    60,
    name=st.sampled_from(["pixels", "dct", "local_std", "hog", "scattering"]),
    shape=st.sampled_from([(1, 1, 16, 16), (3, 3, 16, 21)]),
    seed=st.integers(0, 2**20),
)
def test_representations(name, shape, seed):
    images = torch.rand(shape, generator=torch.Generator().manual_seed(seed))
    module = representation_class(name)()
    function = torch.compile(module, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(function(images), module(images), rtol=1e-4, atol=1e-5)
