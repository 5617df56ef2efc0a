"""The one file in lightly's style against the package: values, gradients, processes, views."""

import ast
import sys
from pathlib import Path

import lightly
import pytest
import torch
from PIL import Image
from skimage import data
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from mvmr_loss import MVMRLoss, MVMRProjectionHead
from mvmr_loss.adapters.lightly import MVMRTransform, self_contained
from mvmr_loss.dependence.definitions import double_centered, pairwise_distances
from tests.test_distributed import run

WEIGHTS = (0.5, 2.0, 1.5, 0.25)
OURS = ("invariance_weight", "variance_weight", "dependence_weight", "representation_weights")
THEIRS = (
    *("lambda_invariance", "lambda_variance"),
    *("lambda_dependence", "lambda_representations"),
)


def batch(n, dtype=torch.float64):
    generator = torch.Generator().manual_seed(0)
    z = torch.randn(n, 6, generator=generator, dtype=dtype)
    z_augmented = z + 0.5 * torch.randn(n, 6, generator=generator, dtype=dtype)
    ys = {
        "b": torch.rand(n, 3, 2, 2, generator=generator, dtype=dtype),
        "a": z.abs().cumsum(dim=1),
    }
    return z, z_augmented, ys


def losses(**options):
    ours = MVMRLoss(**dict(zip(OURS, WEIGHTS, strict=True)), **options)
    return ours, self_contained.MVMRLoss(**dict(zip(THEIRS, WEIGHTS, strict=True)), **options)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("with_representations", [True, False])
@pytest.mark.parametrize("special", ["none", "coinciding", "constant", "collapsed"])
def test_equals_ours(dtype, with_representations, special):
    results = []
    for criterion in losses():
        z, z_augmented, ys = batch(9, dtype)
        if special == "coinciding":
            z[3], z_augmented[3] = z[1], z_augmented[1]
        elif special == "constant":
            ys["b"] = torch.ones_like(ys["b"])
        elif special == "collapsed":
            z = torch.ones_like(z)
        z, z_augmented = z.requires_grad_(), z_augmented.requires_grad_()
        loss = criterion(z, z_augmented, ys if with_representations else None)
        results.append((loss, *torch.autograd.grad(loss, [z, z_augmented])))
    tolerance = 1e-10 if dtype == torch.float64 else 1e-4
    for actual, expected in zip(results[1], results[0], strict=True):
        assert torch.isfinite(actual).all()
        torch.testing.assert_close(actual, expected, rtol=tolerance, atol=tolerance / 10)


def test_components_are_flat_and_unweighted():
    ours, theirs = losses()
    arguments = batch(9)
    components, expected = (
        theirs.forward_components(*arguments),
        ours.forward_components(*arguments),
    )
    for name in ("invariance", "variance", "dependence"):
        torch.testing.assert_close(getattr(components, name), expected.terms[name])
    named = [expected.terms[f"representations/{name}"] for name in "ab"]
    torch.testing.assert_close(components.representations, sum(named))
    weighted = sum(w * term for w, term in zip(WEIGHTS, components[1:], strict=True))
    torch.testing.assert_close(components.total, weighted)


def test_half_precision_is_computed_in_float32():
    z, z_augmented, ys = batch(9, torch.bfloat16)
    loss = self_contained.MVMRLoss()(z, z_augmented, ys)
    assert loss.dtype == torch.float32
    with torch.autocast("cpu", torch.bfloat16):
        again = self_contained.MVMRLoss()(z, z_augmented, ys)
    torch.testing.assert_close(again, loss)
    expected = MVMRLoss()(z, z_augmented, ys)
    torch.testing.assert_close(loss, expected, rtol=1e-4, atol=0)


def test_the_functions_are_the_definitions():
    x, _, _ = batch(7)
    distances = self_contained.pairwise_distances(x)
    torch.testing.assert_close(distances, pairwise_distances(x))
    torch.testing.assert_close(
        self_contained.double_centered(distances), double_centered(distances)
    )


def network():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 5)).double()


def check_processes(rank, processes):
    z, z_augmented, ys = batch(5 * processes)
    own = slice(5 * rank, 5 * rank + 5)
    wanted = None
    for criterion in losses(gather_distributed=True):
        net = DistributedDataParallel(network())
        named = {k: y[own] for k, y in ys.items()}
        loss = criterion(net(z[own]), net(z_augmented[own]), named)
        loss.backward()
        found = [loss.detach(), *(p.grad for p in net.parameters())]
        if wanted is None:
            wanted = found
    for actual, expected in zip(found, wanted, strict=True):
        torch.testing.assert_close(actual, expected, rtol=1e-8, atol=1e-10)
    alone = network()
    loss = losses()[1](alone(z), alone(z_augmented), ys)
    loss.backward()
    torch.testing.assert_close(found[0], loss.detach(), rtol=1e-8, atol=0)
    for p, grad in zip(alone.parameters(), found[1:], strict=True):
        torch.testing.assert_close(p.grad, grad, rtol=1e-8, atol=1e-10)


def test_two_processes_equal_ours_and_one(tmp_path):
    run(2, tmp_path, check_processes)


def test_projection_head_is_ours():
    ours, theirs = MVMRProjectionHead(6, 8, 5), self_contained.MVMRProjectionHead(6, 8, 5)
    theirs.load_state_dict(ours.state_dict())
    x = torch.randn(4, 6)
    torch.testing.assert_close(theirs(x), ours(x))


@pytest.mark.parametrize("options", [{}, {"input_size": 64, "resize_size": 80, "normalize": None}])
@pytest.mark.parametrize("kind", ["PIL", "tensor"])
def test_views_are_those_of_our_transform(options, kind):
    photograph = data.astronaut()[:300]
    image = Image.fromarray(photograph)
    if kind == "tensor":
        image = torch.from_numpy(photograph).permute(2, 0, 1)
    views = []
    for transform in (MVMRTransform(**options), self_contained.MVMRTransform(**options)):
        torch.manual_seed(3)
        views.append(transform(image))
    assert len(views[1]) == 2
    for ours, theirs in zip(*views, strict=True):
        torch.testing.assert_close(theirs, ours, rtol=0, atol=0)


@pytest.mark.parametrize("name", THEIRS)
def test_error_of_a_weight(name):
    with pytest.raises(ValueError, match="must be non-negative"):
        self_contained.MVMRLoss(**{name: -1.0})


def test_error_where_distributed_is_missing(monkeypatch):
    monkeypatch.setattr(torch.distributed, "is_available", lambda: False)
    self_contained.MVMRLoss()
    with pytest.raises(ValueError, match="torch.distributed is not available"):
        self_contained.MVMRLoss(gather_distributed=True)


def test_errors():
    loss = self_contained.MVMRLoss()
    with pytest.raises(ValueError, match="eps must be greater than zero, got 0"):
        self_contained.MVMRLoss(eps=0)
    with pytest.raises(ValueError, match=r"same shape \(N, D\), got"):
        loss(torch.rand(4, 2), torch.rand(4, 3))
    with pytest.raises(ValueError, match="Batch size must be greater than one, got 1"):
        loss(torch.rand(1, 2), torch.rand(1, 2))
    with pytest.raises(ValueError, match=r"Representation y must have shape \(4, ...\), got"):
        loss(torch.rand(4, 2), torch.rand(4, 2), {"y": torch.rand(3, 2)})


def test_it_is_one_file_of_lightlys_own_kind():
    source = Path(self_contained.__file__).read_text()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.ImportFrom):
            module = node.module.partition(".")[0]
            assert node.level == 0
            assert module in {"torch", "lightly", *sys.stdlib_module_names}
        assert not isinstance(node, ast.Assert)
        if isinstance(node, ast.FunctionDef):
            assert node.args.vararg is None
            assert node.args.kwarg is None
    assert lightly.__version__ >= "1.5"
