"""The kernels compute what plain torch does: values and gradients on drawn batches and images."""

from __future__ import annotations

import sys

import pytest
import torch
from hypothesis import strategies as st

from mvmr_loss import MVMRLoss
from mvmr_loss._cpu import build
from mvmr_loss.dependence import dependence_measure, matrices
from mvmr_loss.representations.registry import representation_class
from tests.property.cases import batches, cases, several, with_gradient
from tests.property.images import image_batches, representations
from tests.property.references import MEASURES, SETTINGS, reference

# The package exports the function of the same name.
scattering = sys.modules["mvmr_loss.representations.scattering"]
# Beyond one block of rows, and of sizes that the kernel of distances takes; others are plain anyway.
LARGE = {"most": 60, "dtypes": (torch.float32,), "sizes": st.integers(-3, 3)}
KINDS = ("plain", "plain", "plain", "plain", "offset", "line", "duplicates", "clusters", "ties")


@pytest.fixture(autouse=True)
def _kernels_on():
    if any(build.load_library(name) is None for name in build._SIGNATURES):
        pytest.skip("the kernels cannot be compiled here")


class Calls:
    """Counts how often kernels gave a result."""

    def __init__(self, patch, *names):
        self.counts = dict.fromkeys(names, 0)
        for name in names:
            patch.setattr(matrices.gram_kernel, name, self.counted(name))

    def counted(self, name):
        kernel = getattr(matrices.gram_kernel, name)

        def call(*arguments):
            found = kernel(*arguments)
            self.counts[name] += found is not None
            return found

        return call


def by_kernel_and_plainly(function, *drawn):
    """Returns value and gradients of both, and whether the first was by the kernels alone."""
    with pytest.MonkeyPatch.context() as patch:
        calls = Calls(patch, "centered_gram", "product_about_mean")
        ours = with_gradient(function, *drawn)
        ran = all(count >= len(drawn) for count in calls.counts.values())
        patch.setattr(matrices, "_is_for_kernel", lambda x: False)
        return ours, with_gradient(function, *drawn), ran


def assert_same_gradients(pair, ours, others, *, size, bound):
    """Compares gradients in what a movement of all samples by their distance to the mean changes."""
    for b, one, other in zip(pair, ours, others, strict=True):
        assert torch.isfinite(one).all()
        x = b.numbers().double()
        natural = size / max(float((x - x.mean(dim=0)).norm(dim=1).mean()), 1e-30)
        error = (one.double() - other.double()).norm()
        assert error <= 1e-2 * other.double().norm() + bound * natural * b.n


@cases(
    40,
    1500,
    name=st.sampled_from(sorted(MEASURES)),
    pair=several(st.just(2), least=4, kinds=KINDS, **LARGE),
    reached=0.5,
)
def test_measures(name, pair):
    measure = dependence_measure(SETTINGS.get(name, name))
    (value, ours), (plain, others), ran = by_kernel_and_plainly(measure, *pair)
    expected = reference(name, *[b.numbers().double() for b in pair])
    bound = 1e-5 * (10 + expected.condition)
    if bound > 0.1:
        return False
    rooted = MEASURES[name].rooted
    root = plain.detach().double()
    if rooted:
        value, plain = value.double().square(), plain.double().square()
    assert (value - plain).abs() <= bound * expected.scale + 1e-37
    if rooted and not root > 0.05 * expected.scale**0.5:
        return False  # the slope of the root has no bound there
    size = max(abs(root.item()), 1e-3 * expected.scale)
    assert_same_gradients(pair, ours, others, size=size, bound=10 * bound)
    return ran


@st.composite
def views(draw):
    n, d = draw(st.integers(2, 60)), draw(st.integers(1, 20))
    layouts = ("plain", "transposed", "columns", "rows", "flipped", "negated")
    fits = {"widths": st.just(d), "layouts": layouts, **LARGE}
    del fits["most"]
    return [draw(batches(st.just(n), kinds=KINDS, **fits)) for _ in range(2)]


@cases(30, 1000, pair=views(), reached=0.5)
def test_loss(pair):
    (loss, ours), (plain, others), ran = by_kernel_and_plainly(MVMRLoss(), *pair)
    expected = reference("distance_correlation", *[b.numbers().double() for b in pair])
    bound = 1e-5 * (10 + expected.condition)
    if bound > 1e-2 or not expected.value > 0.01:
        return False
    torch.testing.assert_close(loss, plain, rtol=1e-6, atol=3 * bound)
    assert_same_gradients(pair, ours, others, size=1.0, bound=10 * bound)
    return ran


@cases(
    80,
    1500,
    representation=representations(without=("augmented_pixels",)),
    images=image_batches(8, 40, st.integers(-3, 3), dtypes=(torch.float32,)),
    reached=0.5,
)
def test_representations(representation, images):
    """Without a gradient by the kernel or an op for CPUs, with one plainly."""
    name, options = representation
    module = representation_class(name)(**options)
    plain = representation_class(name)(**options, differentiable=True)
    if min(images.shape[2:]) < module.minimum_size:
        return False
    x = images.tensor()
    made = scattering._build_kernel.cache_info()
    features = module(x)
    if "scattering" in name:  # its kernel was made or found
        assert scattering._build_kernel.cache_info()[:2] != made[:2]
    expected = plain(x.requires_grad_())
    assert expected.requires_grad
    assert not features.requires_grad
    # Of a sum of squares: what is left of a constant is rounding.
    size = max(float(expected.detach().abs().max()), 1e-3 * float(x.detach().abs().max()))
    differ = (features - expected.detach()).abs() > 1e-5 * size
    # An angle at the edge of two bins may fall into the other one by a rounding.
    rounded = name == "hog" and (options["interpolation"] == "none" or "constant" in images.kind)
    assert differ.double().mean() <= (0.2 if rounded else 0)
    return True
