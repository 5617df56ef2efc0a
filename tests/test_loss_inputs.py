"""Which input gets which gradient and type: each alone, in every precision."""

import itertools

import pytest
import torch

from mvmr_loss import MultiRepresentationRegularizer, MVMRLoss
from mvmr_loss.loss import invariance_loss, variance_loss


def inputs(dtype=torch.float64, n=9):
    """z, two augmented views and a representation, each related to the others."""
    generator = torch.Generator().manual_seed(0)
    z, noise, other, y = torch.randn(4, n, 6, generator=generator, dtype=torch.float64)
    return [t.to(dtype) for t in (z, z + 0.3 * noise, z.square() + 0.5 * other, z.abs() + y)]


def loss(z, v, w, y):
    return MVMRLoss(representation_views="both", variance_margin=2.0)(z, [v, w], {"y": y})


def regularizer(z, v, w, y):
    return MultiRepresentationRegularizer()([z, v, w], {"y": y})


def by_blocks(z, v, w, y):
    measure = {"name": "u_distance_correlation_sqr", "block_size": 4}
    return MVMRLoss(dependence_measure=measure)(z, [v, w], {"y": y})


def terms(z, v, w, y):
    return invariance_loss(z, v) + invariance_loss(w, y) + variance_loss(z, margin=3.0)


@pytest.mark.parametrize("function", [loss, regularizer, by_blocks, terms])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_gradient_of_some_inputs_is_that_of_all(function, dtype):
    tensors = [t.requires_grad_() for t in inputs(dtype)]
    expected = torch.autograd.grad(function(*tensors), tensors)
    assert all(grad.abs().sum() > 1e-3 for grad in expected)
    for count in (1, 2, 3):
        for wanted in itertools.combinations(range(4), count):
            some = [t.detach().requires_grad_(i in wanted) for i, t in enumerate(inputs(dtype))]
            found = torch.autograd.grad(function(*some), [some[i] for i in wanted])
            for i, grad in zip(wanted, found, strict=True):
                torch.testing.assert_close(grad, expected[i], rtol=1e-4, atol=1e-7)


def test_a_representation_may_be_learned():
    z, v, _, y = (t.requires_grad_() for t in inputs())
    assert torch.autograd.gradcheck(lambda y: MVMRLoss()(z, v, {"y": y, "same": z}), y)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("scale", [1e-2, 1.0, 100.0])
def test_half_precision_is_float32_of_the_same_numbers(dtype, scale):
    """Values, whatever their size, and gradients, which come back in the type of the input."""
    halves = [(scale * t).to(dtype).requires_grad_() for t in inputs(n=40)]
    singles = [t.detach().float().requires_grad_() for t in halves]
    for function in (loss, regularizer, by_blocks, terms):
        value, expected = function(*halves), function(*singles)
        assert value.dtype == torch.float32
        torch.testing.assert_close(value, expected, rtol=1e-6, atol=1e-6)
        found = torch.autograd.grad(value, halves)
        for ours, theirs in zip(found, torch.autograd.grad(expected, singles), strict=True):
            assert ours.dtype == dtype
            torch.testing.assert_close(ours, theirs.to(dtype), rtol=2e-2, atol=1e-5)


@pytest.mark.parametrize("own", [torch.float32, torch.float64])
@pytest.mark.parametrize("other", [torch.float16, torch.float32, torch.float64])
def test_every_term_has_the_type_of_the_embeddings(own, other):
    z, v, w, y = (t.to(own).requires_grad_() for t in inputs())
    y = y.detach().to(other).requires_grad_()
    components = MVMRLoss(dependence_weight=0).forward_components(z, [v, w], {"y": y})
    assert components.total.dtype == own
    assert {term.dtype for term in components.terms.values()} == {own}
    for tensor, grad in zip(
        (z, v, y), torch.autograd.grad(components.total, (z, v, y)), strict=True
    ):
        assert grad.dtype == tensor.dtype


@pytest.mark.parametrize("count", [1, 2, 3])
def test_every_view_counts_alike(count):
    """In any order and each as much as the others, in every term: none is left out or counted twice."""
    z, v, w, y = inputs()
    views = [v, w, v.roll(1, dims=0) + w][:count]
    for criterion in (
        MVMRLoss(variance_margin=2.0),
        MVMRLoss(representation_views="both", variance_margin=2.0),
    ):
        components = criterion.forward_components(z, views, {"y": y})
        turned = criterion.forward_components(z, views[::-1], {"y": y})
        torch.testing.assert_close(components.terms, turned.terms)
        alone = [criterion.forward_components(z, view, {"y": y}).terms for view in views]
        for name, term in components.terms.items():
            parts = torch.stack([terms[name] for terms in alone])
            if name == "representations/y" and criterion.representation_views == "both":
                # z has its share once, not once for each view.
                own = 1 - criterion.measure(z, y)
                parts = torch.cat([2 * parts - own, own[None]])
            torch.testing.assert_close(term, parts.mean())
    regularizer = MultiRepresentationRegularizer()
    parts = torch.stack([regularizer(view, {"y": y}) for view in views])
    torch.testing.assert_close(regularizer(views, {"y": y}), parts.mean())
