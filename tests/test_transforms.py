"""Derivatives other than plain backward, and tensors that hold no values."""

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.flop_counter import FlopCounterMode

from mvmr_loss import MultiRepresentationRegularizer, MVMRLoss
from mvmr_loss.dependence import dependence_measure

MEASURES = (
    *("distance_correlation", "u_distance_correlation_sqr", "distance_covariance"),
    *("hsic", "cka", "debiased_cka"),
)


def data(dtype=torch.float32):
    generator = torch.Generator().manual_seed(0)
    z = torch.randn(12, 6, generator=generator, dtype=torch.float64)
    v = z + torch.randn(12, 6, generator=generator, dtype=torch.float64)
    y = {"y": torch.randn(12, 3, generator=generator, dtype=torch.float64) + z[:, :3]}
    return z.to(dtype), v.to(dtype), {name: t.to(dtype) for name, t in y.items()}


def functions():
    """Name -> function of one batch."""
    _, v, ys = data()
    found = {name: lambda x, m=name: dependence_measure(m)(x, v.to(x.dtype)) for name in MEASURES}
    found["loss"] = lambda x: MVMRLoss()(x, v.to(x.dtype), ys)
    found["regularizer"] = lambda x: MultiRepresentationRegularizer()(x, ys)
    return found


every_function = pytest.mark.parametrize("name", functions())


@every_function
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_torch_func(name, dtype):
    function, x = functions()[name], data(dtype)[0]
    leaf = x.clone().requires_grad_()
    value = function(leaf)
    (gradient,) = torch.autograd.grad(value, leaf)
    close = {"rtol": 1e-4, "atol": 1e-6}
    torch.testing.assert_close(torch.func.grad(function)(x), gradient, **close)
    torch.testing.assert_close(torch.func.jacrev(function)(x), gradient, **close)
    torch.testing.assert_close(torch.func.jacfwd(function)(x), gradient, **close)
    direction = torch.randn(x.shape, generator=torch.Generator().manual_seed(3), dtype=dtype)
    primal, tangent = torch.func.jvp(function, (x,), (direction,))
    torch.testing.assert_close(primal, value.detach(), **close)
    torch.testing.assert_close(tangent, (gradient * direction).sum(), rtol=1e-3, atol=1e-5)
    several = torch.stack([x, 2 * x + 1, x.square()])
    torch.testing.assert_close(
        torch.vmap(function)(several), torch.stack([function(t) for t in several]), **close
    )
    torch.testing.assert_close(
        torch.vmap(torch.func.grad(function))(several),
        torch.stack([torch.func.grad(function)(t) for t in several]),
        **close,
    )


@every_function
def test_several_gradients_at_once(name):
    function, x = functions()[name], data()[0].requires_grad_()
    value = function(x)
    (gradients,) = torch.autograd.grad(
        value, x, torch.tensor([1.0, 2.0]), is_grads_batched=True, retain_graph=True
    )
    (gradient,) = torch.autograd.grad(value, x)
    torch.testing.assert_close(gradients, torch.stack([gradient, 2 * gradient]))


@every_function
def test_hessian(name):
    function, x = functions()[name], data(torch.float64)[0][:, :2].contiguous()
    _, v, ys = data(torch.float64)
    if name in MEASURES:
        hessian = torch.func.hessian(function)(x)
        expected = torch.autograd.functional.hessian(function, x)
        torch.testing.assert_close(hessian, expected, rtol=1e-6, atol=1e-9)
    else:
        assert torch.autograd.gradgradcheck(function, data(torch.float64)[0].requires_grad_())


def test_functional_call():
    z, v, ys = data()
    network = torch.nn.Linear(6, 4)

    def loss(parameters):
        embed = [torch.func.functional_call(network, parameters, (x,)) for x in (z, v)]
        return MVMRLoss()(*embed, ys)

    gradients = torch.func.grad(loss)(dict(network.named_parameters()))
    loss(dict(network.named_parameters())).backward()
    for name, parameter in network.named_parameters():
        torch.testing.assert_close(gradients[name], parameter.grad, rtol=1e-4, atol=1e-6)


@every_function
def test_without_values(name):
    x = data()[0]
    if name in MEASURES:
        other = dependence_measure(name)
        meta = torch.empty(x.shape, device="meta", requires_grad=True)
        other(meta, meta * 2).backward()
        assert meta.grad.shape == x.shape
        with FakeTensorMode():
            fake = torch.empty(x.shape, requires_grad=True)
            other(fake, fake * 2).backward()
    else:
        with FakeTensorMode():
            fake = torch.empty(x.shape, requires_grad=True)
            loss = MVMRLoss() if name == "loss" else MultiRepresentationRegularizer()
            arguments = (fake, fake * 2) if name == "loss" else (fake,)
            loss(*arguments, {"y": torch.empty(12, 3)}).backward()
    assert fake.grad.shape == x.shape


def test_work_is_counted():
    """A product of each batch with itself, and one with each of the embeddings for the gradient."""
    z, v, ys = data()
    with FlopCounterMode(display=False) as counter:
        MVMRLoss()(z.requires_grad_(), v.requires_grad_(), ys).backward()
    products = [(12, 12, 6)] * 4 + [(12, 12, 3)]
    assert counter.get_total_flops() == sum(2 * a * b * c for a, b, c in products)
