"""Distance correlation with anchors and of tokens, against plain definitions."""

import pytest
import torch

from mvmr_loss.dependence import (
    distance_correlation,
    distance_correlation_sqr,
    u_distance_correlation_sqr,
)
from mvmr_loss.dependence.cross import (
    TokenDistanceCorrelation,
    cross_distance_correlation,
    token_distance_correlation,
)


@pytest.fixture
def samples():
    torch.manual_seed(0)
    x, x_anchors = torch.randn(6, 3, dtype=torch.float64), torch.randn(9, 3, dtype=torch.float64)
    turn = torch.randn(3, 5, dtype=torch.float64)
    noise = torch.randn(15, 5, dtype=torch.float64)
    return x, x @ turn + 0.5 * noise[:6], x_anchors, x_anchors @ turn + 0.5 * noise[6:]


def plain(x, y, x_anchors, y_anchors, exponent):
    """The definition, entry by entry."""
    matrices = []
    for points, anchors in ((x, x_anchors), (y, y_anchors)):
        a = torch.tensor(
            [[sum((p - q) ** 2).item() ** (exponent / 2) for q in anchors] for p in points]
        ).double()
        matrices.append(a - a.mean(1, keepdim=True) - a.mean(0, keepdim=True) + a.mean())
    a, b = matrices
    return (a * b).mean() / ((a * a).mean() * (b * b).mean()).sqrt()


@pytest.mark.parametrize("exponent", [0.5, 1.0, 1.5])
def test_anchors_equal_the_definition(samples, exponent):
    expected = plain(*samples, exponent)
    squared = cross_distance_correlation(*samples, exponent=exponent, rooted=False)
    torch.testing.assert_close(squared, expected, rtol=1e-6, atol=0)
    rooted = cross_distance_correlation(*samples, exponent=exponent)
    torch.testing.assert_close(rooted, expected.sqrt(), rtol=1e-6, atol=0)


def test_of_own_anchors_it_is_the_distance_correlation(samples):
    x, y = samples[:2]
    torch.testing.assert_close(cross_distance_correlation(x, y, x, y), distance_correlation(x, y))


def test_anchors_of_any_shape_are_flattened(samples):
    expected = cross_distance_correlation(*samples)
    for shape in ((-1, 1, 3), (-1, 3, 1, 1)):
        x, x_anchors = (samples[i].reshape(shape) for i in (0, 2))
        found = cross_distance_correlation(x, samples[1], x_anchors, samples[3])
        torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("rooted", [True, False])
def test_anchors_gradients(samples, rooted):
    leaves = [t.clone().requires_grad_() for t in samples]
    assert torch.autograd.gradcheck(
        lambda *t: cross_distance_correlation(*t, rooted=rooted), leaves
    )


def test_gradient_is_finite_where_a_sample_is_its_own_anchor_and_where_all_coincide(samples):
    x, y = samples[0].clone().requires_grad_(), samples[1]
    cross_distance_correlation(
        x, y, torch.cat([x, samples[2]]), torch.cat([y, samples[3]])
    ).backward()
    assert x.grad.isfinite().all()
    assert x.grad.abs().sum() > 0
    constant = torch.ones(6, 3, dtype=torch.float64, requires_grad=True)
    value = cross_distance_correlation(constant, y, constant, y)
    value.backward()
    assert value == 0
    assert (constant.grad == 0).all()


def test_negative_covariance_is_zero_when_rooted():
    x, x_anchors = torch.tensor([[0.0], [1.0]]), torch.tensor([[0.0], [1.0]])
    assert cross_distance_correlation(x, 1 - x, x_anchors, x_anchors, rooted=False) < -0.99
    assert cross_distance_correlation(x, 1 - x, x_anchors, x_anchors) == 0


def test_a_covariance_of_zero_has_no_gradient():
    """Two balanced labels that know nothing of each other."""
    x = torch.tensor([[0.0], [1.0], [0.0], [1.0]], dtype=torch.float64, requires_grad=True)
    y = torch.tensor([[0.0], [0.0], [1.0], [1.0]], dtype=torch.float64)
    value = cross_distance_correlation(x, y, x, y)
    value.backward()
    assert value == 0
    assert (x.grad == 0).all()


@pytest.mark.parametrize("scale", [1e-200, 1e200])
def test_squares_may_leave_the_range_of_the_type(samples, scale):
    expected = cross_distance_correlation(*samples)
    torch.testing.assert_close(cross_distance_correlation(*(t * scale for t in samples)), expected)
    torch.testing.assert_close(
        cross_distance_correlation(samples[0] * scale, samples[1], samples[2] * scale, samples[3]),
        expected,
    )


@pytest.mark.parametrize("far", [0, 2])
def test_far_away_on_one_side_all_distances_are_alike(samples, far):
    given = [-1e200 * (1 + t.abs()) if i == far else t for i, t in enumerate(samples)]
    given[far].requires_grad_()
    value = cross_distance_correlation(*given)
    assert torch.isfinite(value)
    assert torch.isfinite(torch.autograd.grad(value, given[far])[0]).all()


@pytest.mark.parametrize("scale", [1e-30, 1.0, 1e30])
def test_scale_and_precision_do_not_matter(samples, scale):
    expected = cross_distance_correlation(*samples)
    scaled = [(t * scale).float() for t in samples]
    value = cross_distance_correlation(*scaled)
    assert value.dtype == torch.float32
    torch.testing.assert_close(value.double(), expected, rtol=1e-5, atol=0)
    with torch.autocast("cpu", torch.bfloat16):
        assert cross_distance_correlation(*scaled) == value
    half = cross_distance_correlation(*(t.bfloat16() for t in samples))
    assert half.dtype == torch.float32


@pytest.mark.parametrize(
    ("change", "match"),
    [
        ({1: torch.randn(5, 5)}, "x and y must have the same number of samples but have 6 and 5"),
        ({3: torch.randn(8, 5)}, "x_anchors and y_anchors must have the same number"),
        ({2: torch.randn(9, 4)}, "x_anchors must be as wide as x, 3, but are 4 wide"),
        ({2: torch.full((9, 3), torch.nan)}, "x_anchors must be finite"),
        ({0: torch.randn(1, 3), 1: torch.randn(1, 5)}, "x must have at least 2 samples"),
    ],
)
def test_anchors_errors(samples, change, match):
    given = [change.get(i, t) for i, t in enumerate(samples)]
    with pytest.raises(ValueError, match=match):
        cross_distance_correlation(*given)


def test_anchors_options_are_checked(samples):
    with pytest.raises(ValueError, match="exponent must be finite and above 0 and below 2"):
        cross_distance_correlation(*samples, exponent=2.0)
    with pytest.raises(TypeError, match="rooted must be True or False"):
        cross_distance_correlation(*samples, rooted="no")


@pytest.mark.parametrize(
    ("corrected", "reference"),
    [(False, distance_correlation_sqr), (True, u_distance_correlation_sqr)],
)
def test_tokens_are_compared_within_each_image(corrected, reference):
    torch.manual_seed(0)
    x, y = torch.randn(3, 7, 4, dtype=torch.float64), torch.randn(3, 7, 6, dtype=torch.float64)
    expected = torch.stack([reference(x[i], y[i], exponent=1.5) for i in range(3)])
    found = token_distance_correlation(x, y, exponent=1.5, corrected=corrected)
    torch.testing.assert_close(found, expected)
    measure = TokenDistanceCorrelation(exponent=1.5, corrected=corrected)
    torch.testing.assert_close(measure(x, y), expected.mean())
    leaves = [t[:2, :5].clone().requires_grad_() for t in (x, y)]
    assert torch.autograd.gradcheck(
        lambda *t: token_distance_correlation(*t, corrected=corrected), leaves
    )


@pytest.mark.parametrize("fill", [0.0, 1.0])
def test_equal_tokens_are_zero_with_zero_gradient(fill):
    x = torch.full((2, 5, 3), fill, requires_grad=True)
    value = token_distance_correlation(x, torch.randn(2, 5, 4))
    value.sum().backward()
    assert (value == 0).all()
    assert (x.grad == 0).all()


@pytest.mark.parametrize(("corrected", "least"), [(False, 2), (True, 4)])
def test_the_least_number_of_tokens(corrected, least):
    measure = TokenDistanceCorrelation(corrected=corrected)
    assert measure.min_samples == 1
    x = torch.randn(1, least, 3, generator=torch.Generator().manual_seed(0))
    assert measure(x, x).item() == pytest.approx(1)
    with pytest.raises(ValueError, match=f"x must .* at least {least} tokens T but has shape"):
        measure(x[:, 1:], x[:, 1:])


@pytest.mark.parametrize("tokens", [8, 64])
def test_equidistant_tokens_have_no_dependence_after_u_centring(tokens):
    x = (torch.eye(tokens) * 3 + 0.1)[None].requires_grad_()
    y = torch.randn(1, tokens, 4, generator=torch.Generator().manual_seed(0))
    value = token_distance_correlation(x, y, corrected=True)
    assert value == 0
    assert (torch.autograd.grad(value.sum(), x)[0] == 0).all()


@pytest.mark.parametrize("exponent", [0.0, 2.0])
def test_token_options_are_checked(exponent):
    match = "exponent must be finite and above 0 and below 2"
    with pytest.raises(ValueError, match=match):
        TokenDistanceCorrelation(exponent=exponent)
    with pytest.raises(ValueError, match=match):
        token_distance_correlation(torch.randn(1, 4, 2), torch.randn(1, 4, 2), exponent=exponent)
    with pytest.raises(TypeError, match="corrected must be True or False"):
        TokenDistanceCorrelation(corrected=1)


@pytest.mark.parametrize(
    ("x", "y", "match"),
    [
        (torch.randn(4, 3), torch.randn(4, 3), "x must have shape"),
        (torch.randn(2, 1, 3), torch.randn(2, 1, 3), "at least 2 tokens"),
        (torch.randn(2, 49, 3), torch.randn(2, 16, 3), "same images and tokens"),
        (torch.randn(2, 4, 3), torch.full((2, 4, 3), torch.inf), "y must be finite"),
    ],
)
def test_tokens_errors(x, y, match):
    with pytest.raises(ValueError, match=match):
        token_distance_correlation(x, y)
