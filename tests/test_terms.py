"""The terms that are not the paper's, the second head's embeddings, and the presets."""

import pytest
import torch
from torch.nn import functional as F

from mvmr_loss import MVMRLoss, list_presets, preset_settings
from mvmr_loss.dependence.definitions import (
    u_centered,
    u_distance_correlation_sqr,
    u_product,
)
from mvmr_loss.loss import covariance_loss, identity_loss, invariance_loss, variance_loss


def drawn(*shape, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator, dtype=torch.float64)


def stacked(views):
    """Rows of one view after those of another, unlike the code, of length 1, and their images."""
    rows = F.normalize(torch.cat(views), dim=1)
    return rows, torch.arange(len(views[0])).repeat(len(views))


def reference_identity(views, bandwidth=0.5):
    z, image = stacked(views)
    kernel = u_centered(
        torch.exp(-torch.cdist(z, z).square() / (2 * bandwidth**2)).fill_diagonal_(0)
    )
    label = u_centered((image[:, None] == image).double().fill_diagonal_(0))
    norms = u_product(kernel, kernel) * u_product(label, label)
    return 1 - u_product(kernel, label) / norms.sqrt()


@pytest.mark.parametrize("count", [2, 3, 5])
def test_identity_is_the_debiased_cka_with_the_label(count):
    views = [drawn(6, 4, seed=i) + drawn(6, 4, seed=9) for i in range(count)]
    torch.testing.assert_close(identity_loss(views), reference_identity(views))
    # Neither scale nor the order of views and images matters.
    scaled = [views[i].roll(2, 0) * torch.arange(1.0, 7)[:, None] for i in reversed(range(count))]
    rolled = [view.roll(2, 0) for view in views]
    torch.testing.assert_close(identity_loss(scaled), identity_loss(rolled))
    torch.testing.assert_close(identity_loss(rolled), identity_loss(views))


def test_identity_by_another_measure():
    views = [drawn(6, 4), drawn(6, 4, seed=1)]
    z, image = stacked(views)
    label = F.one_hot(image).double()
    for measure in ("u_distance_correlation_sqr", {"name": "u_distance_correlation_sqr"}):
        expected = 1 - u_distance_correlation_sqr(z, label)
        torch.testing.assert_close(identity_loss(views, measure), expected)


def test_identity_sees_views_together_and_images_apart():
    z = torch.eye(8)
    assert identity_loss([z, z, z]) < 1e-6
    assert identity_loss([z, z.roll(1, 0)]) > 1
    assert identity_loss([torch.ones(8, 3), torch.ones(8, 3)]) == 1  # collapsed


@pytest.mark.parametrize("shape", [(6, 20), (20, 6), (2, 3), (5, 1)])
def test_covariance_is_the_sum_of_squared_covariances(shape):
    z = drawn(*shape) + 3
    covariance = torch.atleast_2d(torch.cov(z.T))
    expected = (covariance - covariance.diagonal().diag()).square().sum() / shape[1]
    torch.testing.assert_close(covariance_loss(z), expected, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("term", [covariance_loss, lambda z: identity_loss([z, z.flip(1)])])
def test_derivatives(term):
    z = drawn(5, 3).requires_grad_()
    assert torch.autograd.gradcheck(term, z)
    assert torch.autograd.gradgradcheck(term, z)
    wide = drawn(4, 7).requires_grad_()
    assert torch.autograd.gradcheck(term, wide)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
@pytest.mark.parametrize("scale", [1e-30, 1e-3, 1.0, 30.0])
def test_values_and_gradients_in_lower_precision(dtype, scale):
    z = (drawn(16, 8) * scale).to(dtype)
    v = (drawn(16, 8, seed=1) * scale).to(dtype)
    for term in (lambda *x: covariance_loss(x[0]), lambda *x: identity_loss(list(x))):
        x = z.clone().requires_grad_()
        value = term(x, v)
        expected = term(z.double(), v.double())
        assert value.dtype == torch.float32
        torch.testing.assert_close(value, expected.float(), rtol=1e-4, atol=1e-6)
        value.backward()
        assert torch.isfinite(x.grad).all()


@pytest.mark.parametrize("scale", [1e-38, 3e9, 1e10, 1e13, 1e20, 1e38])
@pytest.mark.parametrize("shape", [(8, 5), (8, 1), (5, 8)])
def test_extreme_scales(scale, shape):
    z = (drawn(*shape).clamp(-3, 3) / 3 * scale).float().requires_grad_()
    for term in (covariance_loss(z), identity_loss([z, z.flip(0)])):
        assert torch.isfinite(term)
        assert torch.isfinite(torch.autograd.grad(term, z)[0]).all()
    assert covariance_loss(z) >= -1e-6 * min(scale**4, 1e38)


def test_covariance_has_a_gradient_as_far_as_it_says():
    z = drawn(8, 5).float()
    z = z / z.abs().max()
    # By the deviation from the mean, of which 4e9 is the fourth root of float32's largest.
    for scale, there in ((1e9, True), (1e10, False)):
        x = (scale * z).requires_grad_()
        (gradient,) = torch.autograd.grad(covariance_loss(x), x)
        assert (gradient.abs().max() > 0) == there


@pytest.mark.parametrize("shape", [(64, 16), (16, 64)])
@pytest.mark.parametrize("scale", [1.0, 1e3, 1e5])
def test_covariance_beside_one_large_coordinate(shape, scale):
    z = drawn(*shape).float()
    z[:, 0] *= scale
    values, gradients = [], []
    for x in (z.requires_grad_(), z.detach().double().requires_grad_()):
        values.append(covariance_loss(x))
        gradients.append(torch.autograd.grad(values[-1], x)[0])
    torch.testing.assert_close(values[0].double(), values[1], rtol=1e-5, atol=0)
    assert (gradients[0] - gradients[1]).norm() <= 1e-5 * gradients[1].norm()


TERMS = {
    "invariance": lambda *views: invariance_loss(*views),
    "variance": lambda *views: variance_loss(views[-1]),
    "covariance": lambda *views: covariance_loss(views[-1]),
    "identity": lambda *views: identity_loss(views),
}


@pytest.mark.parametrize("term", TERMS)
@pytest.mark.parametrize(
    ("view", "error", "match"),
    [
        (torch.zeros(4, 3, 2), ValueError, r"must have shape \(N, D\) but has shape \(4, 3, 2\)"),
        (torch.zeros(0, 3), ValueError, "none of them 0"),
        (torch.zeros(4, 3, dtype=torch.int64), TypeError, "must have a floating-point dtype"),
        ([[1.0]], TypeError, "must be a torch.Tensor but is a list"),
    ],
    ids=str,
)
def test_terms_look_at_their_input(term, view, error, match):
    with pytest.raises(error, match=match):
        TERMS[term](torch.zeros(4, 3), view)


@pytest.mark.parametrize("term", ["variance", "covariance", "identity"])
def test_terms_of_a_batch_need_two_images(term):
    with pytest.raises(ValueError, match="must have at least 2 samples.*but has 1"):
        TERMS[term](torch.zeros(1, 3), torch.zeros(1, 3))


@pytest.mark.parametrize("term", ["invariance", "identity"])
def test_terms_of_views_need_the_same_shape(term):
    with pytest.raises(ValueError, match=r"same shape as the other.*\(4, 3\), but has.*\(4, 1\)"):
        TERMS[term](torch.zeros(4, 3), torch.zeros(4, 1))
    with pytest.raises(ValueError, match="views must be two or more but are 1"):
        identity_loss([torch.zeros(4, 3)])


def test_covariance_in_the_unit_of_the_largest_magnitude():
    z = torch.tensor([[1e-37, 1e-37], [-1e3, -2e3], [-5.0, -1e3]])
    torch.testing.assert_close(covariance_loss(z), covariance_loss(z.double()).float())


def test_identity_of_negative_rows():
    z, v = -drawn(6, 4).abs(), -drawn(6, 4, seed=1).abs()
    torch.testing.assert_close(identity_loss([z, v]), reference_identity([z, v]))


class TestLoss:
    def test_terms_are_there_when_asked_for(self):
        z, v = drawn(8, 5), drawn(8, 5, seed=1)
        plain = MVMRLoss().forward_components(z, v)
        assert "identity" not in plain.terms
        assert "covariance" not in plain.terms
        found = MVMRLoss(identity_weight=2.0, covariance_weight=0.1).forward_components(z, v)
        torch.testing.assert_close(found.terms["identity"], identity_loss([z, v]))
        expected = covariance_loss(z) + covariance_loss(v)
        torch.testing.assert_close(found.terms["covariance"], expected)
        more = 2 * found.terms["identity"] + 0.1 * expected
        torch.testing.assert_close(found.total, plain.total + more)

    def test_several_views(self):
        z, views = drawn(8, 5), [drawn(8, 5, seed=i) for i in (1, 2, 3)]
        found = MVMRLoss(identity_weight=1, covariance_weight=1).forward_components(z, views)
        torch.testing.assert_close(found.terms["identity"], reference_identity([z, *views]))
        others = torch.stack([covariance_loss(v) for v in views]).mean()
        torch.testing.assert_close(found.terms["covariance"], covariance_loss(z) + others)

    def test_a_second_head_meets_the_representations(self):
        z, v, y = drawn(8, 5), drawn(8, 5, seed=1), {"y": drawn(8, 7, seed=2)}
        second = [drawn(8, 3, seed=3), drawn(8, 3, seed=4)]
        found = MVMRLoss().forward_components(z, v, y, second)
        each = [MVMRLoss().forward_components(s, s, y).terms["representations/y"] for s in second]
        torch.testing.assert_close(found.terms["representations/y"], torch.stack(each).mean())
        alone = MVMRLoss().forward_components(z, v)
        for name in ("invariance", "variance", "dependence"):
            torch.testing.assert_close(found.terms[name], alone.terms[name])
        assert MVMRLoss()(z, v, y, second[0]) != MVMRLoss()(z, v, y, second[1])

    @pytest.mark.parametrize(
        ("second", "message"),
        [
            (drawn(7, 3), r"representation_embeddings must have shape \(8, E\) but has .*\(7, 3\)"),
            ([drawn(8, 3), drawn(8, 3, 1)], r"representation_embeddings\[1\] must have shape"),
        ],
    )
    def test_a_second_head_of_another_shape(self, second, message):
        with pytest.raises(ValueError, match=message):
            MVMRLoss()(drawn(8, 5), drawn(8, 5), {"y": drawn(8, 2)}, second)

    @pytest.mark.parametrize("name", ["identity_weight", "covariance_weight"])
    def test_weights_are_checked(self, name):
        with pytest.raises(ValueError, match=f"{name} must be .*-1"):
            MVMRLoss(**{name: -1})

    def test_a_nan_does_not_pass(self):
        z = drawn(8, 5)
        z[3, 2] = torch.nan
        with pytest.raises(ValueError, match=r"z must be finite"):
            MVMRLoss.from_preset("identity")(z, drawn(8, 5))

    def test_compiled(self):
        z, v, y = drawn(8, 5).float(), drawn(8, 5, seed=1).float(), {"y": drawn(8, 7).float()}
        criterion = MVMRLoss.from_preset("identity", covariance_weight=0.1)
        compiled = torch.compile(criterion, fullgraph=True, backend="aot_eager")
        torch.testing.assert_close(compiled(z, [v, v], y), criterion(z, [v, v], y))


class TestPresets:
    def test_the_papers_is_the_default(self):
        z, v, y = drawn(8, 5), drawn(8, 5, seed=1), {"y": drawn(8, 7)}
        assert MVMRLoss.from_preset("paper")(z, v, y) == MVMRLoss()(z, v, y)
        assert repr(MVMRLoss.from_preset("paper")) == repr(MVMRLoss())

    def test_options_take_the_presets_place(self):
        for name in list_presets():
            assert MVMRLoss.from_preset(name, variance_margin=2.0).variance_margin == 2.0
        assert MVMRLoss.from_preset("identity", identity_weight=3).identity_weight == 3

    def test_identity_alone(self):
        z, v = drawn(8, 5), drawn(8, 5, seed=1)
        torch.testing.assert_close(MVMRLoss.from_preset("identity")(z, v), identity_loss([z, v]))

    def test_unknown(self):
        with pytest.raises(ValueError, match=r"preset must be one of paper, .* but is 'papers'"):
            MVMRLoss.from_preset("papers")

    def test_options_are_a_copy(self):
        preset_settings("identity").loss["identity_weight"] = 7
        assert preset_settings("identity").loss["identity_weight"] == 1.0


@pytest.mark.parametrize(
    ("option", "message"),
    [
        ({"eps": 0.0}, "eps must be above 0 but is 0.0"),
        ({"margin": -1}, "margin must be at least 0 but is -1"),
    ],
)
def test_options_of_the_variance_term(option, message):
    with pytest.raises(ValueError, match=message):
        variance_loss(torch.randn(4, 3), **option)


def test_errors_name_the_measure_they_are_of():
    with pytest.raises(ValueError, match="identity_measure must be one of .* but is 'foo'"):
        MVMRLoss(identity_measure="foo")
