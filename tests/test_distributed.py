"""The gathered loss in several gloo processes against one process on the whole batch."""

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from mvmr_loss import MultiRepresentationRegularizer, MVMRLoss
from mvmr_loss.dependence import list_dependence_measures
from mvmr_loss.distillation import DistillationLoss
from mvmr_loss.distributed import ALL_ROWS, gather
from tests.processes import run

BATCH, WIDTH = 6, 5
BLOCKS = {"name": "u_distance_correlation_sqr", "block_size": 4}
# Tested elsewhere, or registered by other tests.
OTHERS = ("distance_correlation", "mean_product")


def network():
    torch.manual_seed(0)
    # No BatchNorm: its statistics are per process, and would hide an error of the gathering.
    return nn.Sequential(nn.Linear(8, 16), nn.Tanh(), nn.Linear(16, WIDTH))


def data(processes):
    """Different content in every process, of uneven scale."""
    generator = torch.Generator().manual_seed(1)
    n = processes * BATCH
    scale = torch.linspace(0.1, 3.0, n)[:, None]
    x = scale * torch.randn(n, 8, generator=generator)
    v = x + 0.3 * torch.randn(n, 8, generator=generator)
    return x, v, {"a": scale[:, None] * torch.rand(n, 3, 4, generator=generator), "b": x.abs()}


def loss_of(kind, net, x, v, ys, gather):
    if kind == "regularizer":
        return MultiRepresentationRegularizer({"a": 1.0, "b": -0.5}, gather_distributed=gather)(
            [net(x), net(v)], ys
        )
    if kind == "identity":
        criterion = MVMRLoss.from_preset(
            "identity", covariance_weight=0.5, variance_weight=1.0, gather_distributed=gather
        )
        views = [net(x), net(v), net(2 * v)]
        return criterion(views[0], views[1:], ys, [view.square() for view in views])
    return MVMRLoss(
        dependence_measure=kind,
        representation_weights={"a": 1.0, "b": -0.5},
        gather_distributed=gather,
    )(net(x), [net(v), net(2 * v)], ys)


def shard(tensor, rank):
    return tensor[rank * BATCH : (rank + 1) * BATCH]


def check_equals_whole_batch(rank, processes, kind):
    x, v, ys = data(processes)
    net = DistributedDataParallel(network())
    loss = loss_of(
        kind, net, shard(x, rank), shard(v, rank), {k: shard(y, rank) for k, y in ys.items()}, True
    )
    loss.backward()
    alone = network()
    expected = loss_of(kind, alone, x, v, ys, False)
    expected.backward()
    torch.testing.assert_close(loss, expected, rtol=1e-5, atol=0)
    actual = torch.cat([p.grad.flatten() for p in net.parameters()])
    wanted = torch.cat([p.grad.flatten() for p in alone.parameters()])
    assert (actual - wanted).norm() / wanted.norm() <= 1e-5


def check_double_backward(rank, processes):
    x, v, ys = data(processes)
    criterion = MVMRLoss(gather_distributed=True)
    z = shard(x, rank).clone().requires_grad_()
    first = torch.autograd.grad(criterion(z, shard(v, rank)), z, create_graph=True)[0]
    second = torch.autograd.grad(first.square().sum(), z)[0]
    whole = x.clone().requires_grad_()
    first = torch.autograd.grad(MVMRLoss()(whole, v), whole, create_graph=True)[0]
    expected = torch.autograd.grad(first.square().sum(), whole)[0]
    # Each derivative is the sum over processes that compute one loss; the squares bring another one.
    torch.testing.assert_close(second / processes**2, shard(expected, rank), rtol=1e-4, atol=1e-6)


DIFFERENT = {
    "batch sizes": lambda x, v, ys, rank: (x[rank:], v[rank:], {}),
    "names": lambda x, v, ys, rank: (x, v, {"ab"[rank]: ys["a"]}),
    "widths of equal totals": lambda x, v, ys, rank: (
        x,
        v,
        {"a": x[:, : 3 + rank], "b": x[:, : 4 - rank]},
    ),
    "shapes of equal totals": lambda x, v, ys, rank: (
        x,
        v,
        {"a": ys["a"].reshape(len(x), 3, 4) if rank else ys["a"].reshape(len(x), 12)},
    ),
    "types": lambda x, v, ys, rank: (x, v, {"a": ys["a"].double() if rank else ys["a"]}),
    "type of embeddings": lambda x, v, ys, rank: (
        (x.double(), v.double(), {}) if rank else (x, v, {})
    ),
    "views": lambda x, v, ys, rank: (x, [v] * (1 + rank), {}),
    "presence": lambda x, v, ys, rank: (x, v, ys if rank else None),
    "widths of embeddings": lambda x, v, ys, rank: (x[:, rank:], v[:, rank:], {}),
}


def check_different_tensors(rank, processes, kind):
    """Every process gets the error, in the first step or after one that was in order."""
    x, v, ys = data(processes)
    x, v, ys = shard(x, rank), shard(v, rank), {k: shard(y, rank) for k, y in ys.items()}
    for steps_before in (0, 1):
        criterion = MVMRLoss(gather_distributed=True)
        for _ in range(steps_before):
            criterion(x, v, ys)
        with pytest.raises(ValueError, match="equal names, shapes and types in all processes") as e:
            criterion(*DIFFERENT[kind](x, v, ys, rank))
        assert "process 0 has" in str(e.value)
        assert "process 1 has" in str(e.value)
        assert torch.isfinite(criterion(x, v, ys))


def check_another_order(rank, processes):
    """Names of a set come in another order in each process."""
    x, v, ys = data(processes)
    z = shard(x, rank).clone().requires_grad_()
    own = {k: shard(y, rank) for k, y in (reversed(ys.items()) if rank else ys.items())}
    ys = {"a": ys["a"], "b": ys["b"]}
    loss = MVMRLoss(gather_distributed=True)(z, shard(v, rank), own)
    whole = x.clone().requires_grad_()
    expected = MVMRLoss()(whole, v, ys)
    torch.testing.assert_close(loss, expected, rtol=1e-5, atol=0)
    loss.backward()
    expected.backward()
    # The mean over processes is what DistributedDataParallel takes.
    torch.testing.assert_close(z.grad / processes, shard(whole.grad, rank), rtol=1e-4, atol=1e-7)


def check_share_of_the_work(rank, processes):
    """A process computes its own rows of the matrices, and holds no others."""
    from torch.utils.flop_counter import FlopCounterMode

    def flops(criterion, *arguments):
        with FlopCounterMode(display=False) as counter:
            criterion(*arguments).backward()
        return counter.get_total_flops()

    x, v, ys = (t.double() if isinstance(t, torch.Tensor) else t for t in data(processes))
    ys = {k: y.double() for k, y in ys.items()}
    own = [shard(t, rank).clone().requires_grad_() for t in (x, v)]
    mine = flops(
        MVMRLoss(gather_distributed=True), *own, {k: shard(y, rank) for k, y in ys.items()}
    )
    whole = flops(MVMRLoss(), x.requires_grad_(), v.requires_grad_(), ys)
    assert mine == whole / processes


def check_compiled(rank, processes):
    x, v, ys = data(processes)
    z, v = shard(x, rank).clone().requires_grad_(), shard(v, rank)
    ys = {k: shard(y, rank) for k, y in ys.items()}
    criterion = MVMRLoss(gather_distributed=True)
    compiled = torch.compile(criterion, fullgraph=True, backend="aot_eager")
    value, expected = compiled(z, v, ys), criterion(z, v, ys)
    torch.testing.assert_close(value, expected, rtol=1e-6, atol=0)
    (gradient,), (wanted,) = torch.autograd.grad(value, z), torch.autograd.grad(expected, z)
    torch.testing.assert_close(gradient, wanted, rtol=1e-5, atol=1e-7)


def check_small_local_batches(rank, processes):
    """Four samples in all are enough for the corrected measure, though each process has two."""
    x, v, _ = data(processes)
    criterion = MVMRLoss(dependence_measure="u_distance_correlation_sqr", gather_distributed=True)
    assert torch.isfinite(criterion(shard(x, rank)[:2], shard(v, rank)[:2]))


class Distilled(nn.Module):
    """A student with the loss that distils into it, so that one wrapper has both."""

    def __init__(self, gather):
        super().__init__()
        self.net = network()
        self.criterion = DistillationLoss(
            WIDTH,
            {"a": 12, "b": 8},
            dependence_weight=0.5,
            anchors=5,
            gather_distributed=gather,
        )

    def forward(self, x, v, ys):
        views = [self.net(x), self.net(v)]
        loss = self.criterion(views, ys)
        self.criterion.update([z.detach() for z in views], ys)
        return loss


def check_distillation(rank, processes):
    """Loss, gradient, statistics and anchors of two steps are those of one process."""
    x, v, ys = data(processes)
    alone = Distilled(gather=False)
    shared = DistributedDataParallel(Distilled(gather=True))
    shared.module.load_state_dict(alone.state_dict())
    own = {k: shard(y, rank) for k, y in ys.items()}
    for sign in (1, -1):
        shared.zero_grad()
        alone.zero_grad()
        loss = shared(sign * shard(x, rank), shard(v, rank), own)
        expected = alone(sign * x, v, ys)
        loss.backward()
        expected.backward()
        # The regression is of a process's own samples: its mean over processes is the whole one.
        dist.all_reduce(loss.data)
        torch.testing.assert_close(loss / processes, expected, rtol=1e-5, atol=0)
        for p, q in zip(shared.parameters(), alone.parameters(), strict=True):
            torch.testing.assert_close(p.grad, q.grad, rtol=1e-3, atol=1e-5)
    state, wanted = shared.module.state_dict(), alone.state_dict()
    for name in wanted:
        torch.testing.assert_close(state[name], wanted[name], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("kind", DIFFERENT)
def test_what_differs_is_told_to_every_process(tmp_path, kind):
    run(2, tmp_path, check_different_tensors, kind)


@pytest.mark.parametrize("processes", [2, 3, 4])
@pytest.mark.parametrize("kind", ["distance_correlation", BLOCKS, "regularizer", "identity"])
def test_equals_one_process_on_the_whole_batch(tmp_path, processes, kind):
    run(processes, tmp_path, check_equals_whole_batch, kind)


@pytest.mark.parametrize("kind", [m for m in list_dependence_measures() if m not in OTHERS])
def test_every_measure_equals_one_process(tmp_path, kind):
    run(2, tmp_path, check_equals_whole_batch, kind)


@pytest.mark.parametrize(
    "check",
    [
        check_double_backward,
        check_another_order,
        check_compiled,
        check_share_of_the_work,
        check_small_local_batches,
        check_distillation,
    ],
)
def test_two_processes(tmp_path, check):
    run(2, tmp_path, check)


def test_without_process_group_is_a_no_op():
    x, v, ys = data(1)
    tensors = {"z": x, "v": v}
    gathered, rows = gather(tensors)
    assert gathered["z"] is x
    assert rows == ALL_ROWS
    torch.testing.assert_close(
        MVMRLoss(gather_distributed=True)(x, v, ys), MVMRLoss()(x, v, ys), rtol=0, atol=0
    )
