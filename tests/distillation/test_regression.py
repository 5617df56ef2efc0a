"""Regression onto a teacher's features."""

import pytest
import torch
from torch.nn import functional as F

from mvmr_loss.distillation import TeacherRegression, regression_loss


@pytest.fixture
def pair():
    torch.manual_seed(0)
    return torch.randn(5, 7, dtype=torch.float64), torch.randn(5, 7, dtype=torch.float64)


def test_loss_equals_the_definition(pair):
    prediction, target = pair
    cosines = [
        (p @ t) / (p.square().sum().sqrt() * t.square().sum().sqrt())
        for p, t in zip(prediction, target, strict=True)
    ]
    difference = (prediction - target).abs()
    smooth = torch.where(difference < 1, difference.square() / 2, difference - 0.5).mean()
    expected = 0.5 * (1 - torch.stack(cosines).mean()) + 2 * smooth
    found = regression_loss(prediction, target, cosine_weight=0.5, smooth_l1_weight=2)
    torch.testing.assert_close(found, expected)
    leaf = prediction.clone().requires_grad_()
    assert torch.autograd.gradcheck(lambda p: regression_loss(p, target), leaf)


def test_zero_predictions_have_a_finite_gradient(pair):
    zero = torch.zeros(5, 7, requires_grad=True)
    regression_loss(zero, pair[1].float()).backward()
    assert zero.grad.isfinite().all()


def test_half_precision_is_raised(pair):
    found = regression_loss(*(x.bfloat16() for x in pair))
    assert found.dtype == torch.float32


@pytest.mark.parametrize(
    ("change", "error", "match"),
    [
        ({"target": torch.randn(5, 6)}, ValueError, "one shape"),
        ({"target": torch.ones(5, 7).long()}, TypeError, "floating-point"),
        ({"cosine_weight": -1.0}, ValueError, "cosine_weight must be finite and at least 0"),
        ({"smooth_l1_weight": "1"}, TypeError, "smooth_l1_weight must be a number"),
    ],
)
def test_loss_errors(pair, change, error, match):
    with pytest.raises(error, match=match):
        regression_loss(**{"prediction": pair[0], "target": pair[1], **change})


def test_module_is_the_function_of_head_and_standardised_features_as_a_mean_over_views():
    torch.manual_seed(0)
    features = 3 + 2 * torch.randn(50, 6)
    module = TeacherRegression(4, 6, cosine_weight=0.3, rotation="none")
    module.standardization.fit(features)
    z, v = torch.randn(2, 8, 4)
    target = (features - features.mean(0)) / features.var(0, correction=0).mean().sqrt()
    expected = torch.stack(
        [regression_loss(module.head(x), target[:8], cosine_weight=0.3) for x in (z, v)]
    ).mean()
    torch.testing.assert_close(module([z, v], features[:8].view(8, 2, 3)), expected)
    torch.testing.assert_close(module([z, v], target[:8], standardized=True), expected)
    with torch.inference_mode():  # of which no gradient can keep anything
        made = 1 * target[:8]
    found = module([z.requires_grad_(), v], made, standardized=True)
    assert torch.autograd.grad(found, z)[0].isfinite().all()


def test_the_head_learns_what_is_linear_and_two_layers_more():
    torch.manual_seed(0)
    z = torch.randn(64, 4)
    features = F.normalize(z @ torch.randn(4, 6)).square()
    losses = []
    for hidden in (0, 32):
        module = TeacherRegression(4, 6, hidden_dim=hidden)
        module.standardization.fit(features)
        optimizer = torch.optim.Adam(module.parameters(), lr=0.02)
        for _ in range(150):
            optimizer.zero_grad()
            loss = module(z, features)
            loss.backward()
            optimizer.step()
        losses.append(loss.item())
    assert losses[0] < 1.4
    assert losses[1] < 0.5 * losses[0]


def test_the_head_is_as_wide_as_the_embeddings_or_512():
    widths = [TeacherRegression(d, 6).head[0].out_features for d in (4, 1000)]
    assert widths == [512, 1000]
    assert isinstance(TeacherRegression(4, 6, hidden_dim=0).head, torch.nn.Linear)


def test_module_errors():
    module = TeacherRegression(4, 6)
    for other in (torch.randn(3, 5), torch.randn(4, 4), torch.randn(3, 4, 1)):
        with pytest.raises(ValueError, match=r"embeddings\[1\] must have shape \(3, 4\), a row"):
            module([torch.randn(3, 4), other], torch.randn(3, 6))
    with pytest.raises(ValueError, match=r"embeddings must have shape \(2, 4\)"):
        module(torch.randn(3, 4), torch.randn(2, 6))
    # As many rows in all as there are of features.
    with pytest.raises(ValueError, match=r"embeddings\[0\] must have shape \(3, 4\)"):
        module([torch.randn(2, 4), torch.randn(4, 4)], torch.randn(3, 6))
    # Neither spread over the widths nor flattened, which only the standardisation does.
    for shape in ((3, 1), (3, 2, 3)):
        with pytest.raises(ValueError, match=r"features must have shape \(N, 6\) where they are"):
            module(torch.randn(3, 4), torch.randn(shape), standardized=True)
    with pytest.raises(TypeError, match="features must be a"):
        module(torch.randn(3, 4), "features")
    with pytest.raises(ValueError, match="rotation must be one of"):
        TeacherRegression(4, 6, rotation="pca")
    with pytest.raises(TypeError, match="hidden_dim must be an int"):
        TeacherRegression(4, 6, hidden_dim=1.5)


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_what_is_not_finite_is_named(pair, value):
    prediction, target = (x.clone() for x in pair)
    target[1, 2] = value
    with pytest.raises(ValueError, match="target must be finite"):
        regression_loss(prediction, target)
    regression = TeacherRegression(7, 7)
    with pytest.raises(ValueError, match="features must be finite"):
        regression(prediction.float(), target.float())
    with pytest.raises(ValueError, match=r"embeddings\[1\] must be finite"):
        regression([prediction.float(), target.float()], prediction.float())


def test_a_regression_of_nothing_is_refused():
    with pytest.raises(ValueError, match="cosine_weight and smooth_l1_weight must not both be 0"):
        TeacherRegression(7, 7, cosine_weight=0, smooth_l1_weight=0)
    with pytest.raises(TypeError, match="gather_distributed must be True or False"):
        TeacherRegression(7, 7, gather_distributed="no")
